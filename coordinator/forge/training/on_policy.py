"""On-policy distillation with a replay buffer: the student writes, the teacher scores once, and the answer is learned from for a while.

Learning on the student's own answers mends what it says when it has begun badly, which no teacher's answer shows (Agarwal et al., ICLR
2024, GKD). Asking student and teacher afresh at every step is what makes it dear. Rules here:
 * Every `every` batches the student writes answers to the next `prompts` prompts; the teacher's view of them joins the target cache.
 * An answer is learned from during `staleness` rounds, the one that made it included, and never after.
 * A `share` of the batches is of such answers, the others are of the fixed examples, by their own loss. A batch is of one kind.
 * Two ways to write: `alone` (the student writes, the teacher scores the whole batch in one pass) and `together` (block-wise
   speculative sampling, `speculative`): the first needs any teacher that scores, the second a torch model.
One training loop, `protocol.models.training.train`; what survives kill -9 is in `rounds`.
"""

import math
import time
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch
from transformers import Gemma3ForCausalLM

from coordinator.forge.targets.cache import TargetCache, Targets
from coordinator.forge.training.objective import distillation_loss
from coordinator.forge.training.recipe import Recipe, trained_by
from coordinator.forge.training.rounds import RoundFeed, RoundLog
from coordinator.forge.training.speculative import Block, speculate
from protocol.digests import digest_value
from protocol.errors import BadInput, WrongDigest
from protocol.models.checkpoint import Checkpoint
from protocol.models.feed import Batch, Epochs, plan
from protocol.models.tokenizer import Example
from protocol.models.torch_model import generate
from protocol.models.training import Loss, Step, TrainResult, View

Score = Callable[[Sequence[Example]], Sequence[Targets]]  # a teacher's view of written answers, `Teacher.score` or `targets.score`


class OnPolicyPlan(msgspec.Struct, frozen=True):
    """When the student writes, and how long that is learned from."""

    share: float = 0.5  # of the batches, in (0, 1]
    every: int = 16  # batches between two rounds
    prompts: int = 64  # answered a round
    staleness: int = 4  # rounds


class Written(NamedTuple):
    """What a writer made of a round's prompts."""

    examples: Sequence[Example]
    targets: Sequence[Targets]
    judged: int  # proposals the teacher decided on; 0 when it decides on none
    accepted: int
    teacher_tokens: int
    student_tokens: int


Writer = Callable[[Sequence[list[int]], int], Written]  # prompts, seed


class Round(msgspec.Struct, frozen=True):
    """A round in the log; the teacher's view is in the cache."""

    examples: list[Example]
    judged: int
    accepted: int
    teacher_tokens: int
    student_tokens: int
    seconds: float  # of writing and scoring


class OnPolicyResult(msgspec.Struct, frozen=True):
    """What a training asked of the teacher, against asking afresh at every step."""

    rounds: int
    examples: int  # new ones, scored once each
    rows: int  # of them that were learned from, repeats counted
    seconds: float  # of writing and scoring
    acceptance: float | None  # share of the student's proposals that the teacher let stand; None: it only scored
    teacher_tokens: int
    teacher_tokens_an_example: float
    fresh_teacher_tokens: int  # had every learned row been written and scored for itself
    student_tokens: int


def alone(student: Gemma3ForCausalLM, *, score: Score, max_new_tokens: int, eos: int, temperature: float = 1.0) -> Writer:
    """The student writes by itself; the teacher scores the batch once."""

    def write(prompts: Sequence[list[int]], seed: int) -> Written:
        answers = generate(student, list(prompts), max_new_tokens=max_new_tokens, eos=eos, temperature=temperature, seed=seed)
        examples = [Example(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        tokens = sum(len(one.prompt) + len(one.target) - 1 for one in examples)
        return Written(examples, score(examples), 0, 0, tokens, tokens)

    return write


def together(
    student: Gemma3ForCausalLM, *, teacher: Gemma3ForCausalLM, block: Block, k: int, max_new_tokens: int, eos: int
) -> Writer:  # fmt: skip
    """The student proposes blocks, the teacher keeps what it might have said itself."""

    def write(prompts: Sequence[list[int]], seed: int) -> Written:
        found = speculate(student, teacher, prompts, block=block, k=k, max_new_tokens=max_new_tokens, eos=eos, seed=seed)
        return Written(found.examples, found.targets, found.judged, found.accepted, found.teacher_tokens, found.student_tokens)

    return write


class OnPolicy(RoundFeed[Round]):
    """The feed: fixed examples first, then what the student wrote."""

    def __init__(
        self, fixed: Sequence[Example], prompts: Sequence[list[int]], *, writer: Writer, plan: OnPolicyPlan, cache: TargetCache, log: Path,
        batch_tokens: int, seed: int, origin: str,
    ) -> None:  # fmt: skip
        """`origin` names student, teacher and writer: the log of other ones is refused.

        Raises:
            BadInput: a plan that cannot be followed.
            WrongDigest: the log is of another plan.
        """
        if not prompts or not 0.0 < plan.share <= 1.0 or min(plan.every, plan.prompts, plan.staleness) < 1:
            raise BadInput(f"{len(prompts)} prompts and {plan} make no on-policy training: share is in (0, 1], the others are 1 or more")
        if plan.share < 1.0 and not fixed:
            raise BadInput(f"share {plan.share:g} leaves batches to fixed examples, and there are none; use share 1")
        self.key = digest_value([list(fixed), list(prompts), plan, batch_tokens, seed, origin, "on-policy"])
        super().__init__(fixed, RoundLog(log, Round, key=self.key))
        self.fixed = len(fixed)
        self._epochs = Epochs(list(fixed), batch_tokens=batch_tokens, seed=seed) if fixed else None
        self._prompts, self._writer, self._plan, self._cache = list(prompts), writer, plan, cache
        self._batch_tokens, self._seed = batch_tokens, seed

    @property
    def batches_an_epoch(self) -> int:
        """Until every fixed example was seen once; without any, until every prompt was answered once."""
        if self._epochs is None or self._plan.share == 1.0:
            return -(-len(self._prompts) // self._plan.prompts) * self._plan.every
        return math.ceil(self._epochs.batches_an_epoch / (1.0 - self._plan.share))

    def write(self, number: int) -> Round:
        """Answer the next prompts; their targets are on disk before the round is."""
        began = time.monotonic()
        order = torch.randperm(len(self._prompts), generator=torch.Generator().manual_seed(self._seed)).tolist()
        first = number * self._plan.prompts
        prompts = [self._prompts[order[at % len(order)]] for at in range(first, first + min(self._plan.prompts, len(order)))]
        found = self._writer(prompts, self._seed * 1_000_003 + number)
        for example, targets in zip(found.examples, found.targets, strict=True):
            self._cache.put(example, targets)
        self._cache.sync()
        return Round(list(found.examples), *found[2:], seconds=time.monotonic() - began)

    def rows(self, one: Round) -> Sequence[Example]:
        """Its answers.

        Raises:
            WrongDigest: the cache has lost the teacher's view of one.
        """
        if not all(example in self._cache for example in one.examples):
            raise WrongDigest(f"{self._cache.folder} lacks targets that {self.log.path} speaks of; delete both and the training's state")
        return one.examples

    def plan(self, number: int) -> list[list[int]]:
        """The next `every` batches: own ones spread evenly among fixed ones."""
        batches = range(number * self._plan.every, (number + 1) * self._plan.every)
        own = [self._own_before(batch + 1) > self._own_before(batch) for batch in batches]
        fresh = cycle(self._replay(number))
        fixed = self._epochs.batches(batches[0] - self._own_before(batches[0])) if self._epochs else fresh
        return [next(fresh if is_own else fixed) for is_own in own]

    def _own_before(self, batch: int) -> int:
        return math.floor(batch * self._plan.share + 1e-9)

    def _replay(self, number: int) -> list[list[int]]:
        """Batches of what is not stale in round `number`, shuffled."""
        places = [place for one in range(max(0, number - self._plan.staleness + 1), number + 1) for place in self.places(one)]
        lengths = [len(self.examples[place].prompt) + len(self.examples[place].target) - 1 for place in places]
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + number)
        return [[places[i] for i in index] for index in plan(lengths, batch_tokens=self._batch_tokens, generator=generator)]

    def result(self, batches: int) -> OnPolicyResult:
        """Figures of a training that took `batches` batches."""
        rounds = list(self.log)
        learned = [self.examples[i] for index in islice(self.batches(0), batches) for i in index if i >= self.fixed]
        new, judged = sum(len(one.examples) for one in rounds), sum(one.judged for one in rounds)
        tokens = sum(one.teacher_tokens for one in rounds)
        return OnPolicyResult(
            rounds=len(rounds),
            examples=new,
            rows=len(learned),
            seconds=sum(one.seconds for one in rounds),
            acceptance=sum(one.accepted for one in rounds) / judged if judged else None,
            teacher_tokens=tokens,
            teacher_tokens_an_example=tokens / max(1, new),
            fresh_teacher_tokens=sum(len(one.prompt) + len(one.target) - 1 for one in learned),
            student_tokens=sum(one.student_tokens for one in rounds),
        )


def by_kind(feed: OnPolicy, *, fixed: Loss, own: Loss) -> Loss:
    """`own` on a batch of the student's answers, `fixed` on one of the fixed examples."""

    def loss(view: View, batch: Batch) -> torch.Tensor:
        return own(view, batch) if batch.index[0] >= feed.fixed else fixed(view, batch)

    return loss


def taught_on_policy(
    checkpoint: Checkpoint,
    fixed: Sequence[Example],
    prompts: Sequence[list[int]],
    recipe: Recipe,
    *,
    writer: Callable[[Gemma3ForCausalLM], Writer],
    origin: str,
    cache: TargetCache,
    log: Path,
    seed: int,
    plan: OnPolicyPlan | None = None,
    loss: Loss | None = None,
    progress: Callable[[Step], None] | None = None,
    state: Path | None = None,
) -> tuple[Checkpoint, TrainResult, OnPolicyResult]:
    """Train a copy of `checkpoint` on fixed examples and on what it writes itself.

    Args:
        writer: `alone` or `together`, given the student that is being trained.
        origin: digest of teacher and writer.
        cache: gets the teacher's view of every answer.
        loss: on the fixed examples (places as in `fixed`); by default their cached targets, cross-entropy where there are none.

    Raises:
        BadInput, WrongDigest: as `OnPolicy`.
        Diverged: as `protocol.models.training.train`.
    """
    feeds: list[OnPolicy] = []

    def course(student: Gemma3ForCausalLM) -> tuple[OnPolicy, Loss]:
        feed = OnPolicy(
            fixed, prompts, writer=writer(student), plan=plan or OnPolicyPlan(), cache=cache, log=log,
            batch_tokens=recipe.batch_tokens, seed=seed, origin=f"{checkpoint.digest} {origin}",
        )  # fmt: skip
        feeds.append(feed)
        own = distillation_loss(feed.examples, cache=cache, alpha=1.0)
        return feed, by_kind(feed, fixed=loss or own, own=own)

    model, result = trained_by(checkpoint, course, recipe, seed=seed, progress=progress, state=state)
    return model, result, feeds[0].result(result.steps)
