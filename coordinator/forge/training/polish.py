"""Polish by reward: after distillation the student draws several answers a prompt, and learns from which of them are better.

Rules:
 * A round: `prompts` records, `samples` answers each. Rewards and error spans make an advantage for every token (`rewards`).
 * The loss is the clipped policy gradient of PPO (Schulman et al. 2017) with group-relative advantages (GRPO, Shao et al. 2024; RLOO,
   Ahmadian et al. 2024), a mean over all tokens of a batch (DAPO, Yu et al. 2025), and KL to the student as it was before (k3 estimate,
   Schulman 2020). Probabilities of the moment of drawing, and of the reference, are computed once and kept in the log.
 * An answer is learned from `passes` times and never again. Groups where no token has an advantage are left out, unless all are.
One training loop, `protocol.models.training.train`; what survives kill -9 is in `rounds`. Why not TRL's GRPOTrainer: docs/adr/0016.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from transformers import Gemma3ForCausalLM

from coordinator.forge.targets.score import log_probs
from coordinator.forge.training.recipe import Recipe, trained_by
from coordinator.forge.training.rewards import Reward, Sample, advantages, blamed, chosen, inside
from coordinator.forge.training.rounds import RoundFeed, RoundLog
from protocol.digests import digest_value
from protocol.errors import BadInput, NotEnough
from protocol.models.checkpoint import Checkpoint
from protocol.models.feed import Batch, plan
from protocol.models.tokenizer import Example, Tokenizer
from protocol.models.torch_model import best_dtype, generate, to_torch
from protocol.models.training import Loss, Step, TrainResult, View
from protocol.tasks import Record, Task

ENSEMBLE = {"task": 1.0, "consistency": 0.25, "language": 0.25, "natural": 0.25, "length": 0.25}
SINGLE = {"task": 1.0}

Natural = Callable[[Sequence[Example]], Sequence[float]]  # mean log-probability a token of written answers, nats


class PolishPlan(msgspec.Struct, frozen=True):
    """What is drawn, and how far it may move the student."""

    weights: dict[str, float] = msgspec.field(default_factory=lambda: dict(ENSEMBLE))  # of the rewards, by name
    prompts: int = 16  # a round
    samples: int = 8  # a prompt
    passes: int = 1  # over a round's answers
    temperature: float = 1.0  # of drawing; the policy that is improved is the one at this temperature
    clip: float = 0.2
    kl: float = 0.02  # weight of the distance from the reference, nats
    penalty: float = 0.5  # of a token inside an error span, in advantages


class Rollout(msgspec.Struct, frozen=True):
    """A round in the log; sample s of prompt p is row p * samples + s."""

    examples: list[Example]
    rewards: dict[str, list[float]]
    advantages: list[list[float]]  # one a target token
    old: list[list[float]]  # log-probabilities when drawn
    reference: list[list[float]]  # under the student as it was
    blamed: int  # tokens inside an error span
    seconds: float


class PolishResult(msgspec.Struct, frozen=True):
    """What a polish did; `first` and `last` are means over the first and the last quarter of the rounds."""

    rounds: int
    samples: int
    seconds: float  # of drawing and judging
    first: dict[str, float]  # reward by name
    last: dict[str, float]
    blamed: float  # share of tokens inside an error span
    drift: float  # mean log p - log p of the reference, last quarter: an estimate of KL(student || reference), nats a token


def clipped_policy_loss(
    log_p: torch.Tensor, old: torch.Tensor, reference: torch.Tensor, advantage: torch.Tensor, *, clip: float, kl: float
) -> torch.Tensor:
    """-min(r A, clip(r, 1 - c, 1 + c) A) + kl * (e^d - d - 1), each (n,); r = p / p_old, d = log p_ref - log p."""
    ratio = (log_p - old).exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(1.0 - clip, 1.0 + clip) * advantage)
    away = reference - log_p
    return -gain + kl * (away.exp() - away - 1.0)


class Polish(RoundFeed[Rollout]):
    """The feed: nothing fixed, only what the student draws."""

    def __init__(
        self, student: Gemma3ForCausalLM, reference: Gemma3ForCausalLM, tokenizer: Tokenizer, task: Task, records: Sequence[Record], *,
        plan: PolishPlan, rewards: Mapping[str, Reward], natural: Natural | None, log: Path, batch_tokens: int, seed: int, origin: str,
    ) -> None:  # fmt: skip
        """`origin` names student and teacher: the log of other ones is refused.

        Raises:
            NotEnough: no records.
            BadInput: a plan that cannot be followed.
            UnknownName: a reward that there is not.
            WrongDigest: the log is of another plan.
        """
        if not records:
            raise NotEnough("there are 0 records to polish on; at least 1 is needed")
        if min(plan.prompts, plan.passes) < 1 or plan.samples < 2 or plan.temperature <= 0:
            raise BadInput(f"{plan} is no polish: prompts and passes are 1 or more, samples 2 or more, temperature above 0")
        self._rewards = chosen(plan.weights, rewards)
        self.key = digest_value([[one.id for one in records], task, plan, batch_tokens, seed, origin, "polish"])
        super().__init__([], RoundLog(log, Rollout, key=self.key))
        self._student, self._reference, self._tokenizer, self._natural = student, reference, tokenizer, natural
        self._task, self._records, self._plan = task, list(records), plan
        self._batch_tokens, self._seed = batch_tokens, seed
        self.advantages: list[torch.Tensor] = []  # beside `examples`
        self.old: list[torch.Tensor] = []
        self.reference: list[torch.Tensor] = []

    @property
    def batches_an_epoch(self) -> int:
        """Until every record was asked once, at most: rounds hold answers of unknown length."""
        rounds = -(-len(self._records) // self._plan.prompts)
        return rounds * self._plan.passes * self._plan.samples * min(self._plan.prompts, len(self._records))

    def write(self, number: int) -> Rollout:
        """Draw, judge, and remember how likely each token was."""
        began = time.monotonic()
        order = torch.randperm(len(self._records), generator=torch.Generator().manual_seed(self._seed)).tolist()
        first, count = number * self._plan.prompts, min(self._plan.prompts, len(order))
        records = [self._records[order[at % len(order)]] for at in range(first, first + count)]
        examples = self._draw(records, self._seed * 1_000_003 + number)
        groups = self._groups(examples)
        scores = {
            name: np.array([reward(self._task, record, group) for record, group in zip(records, groups, strict=True)])
            for name, reward in self._rewards.items()
        }
        worth = advantages(scores, self._plan.weights).ravel().tolist()
        rows = [record for record in records for _ in range(self._plan.samples)]
        wrong = [self._wrong(record, example) for record, example in zip(rows, examples, strict=True)]
        return Rollout(
            examples=examples,
            rewards={name: values.ravel().tolist() for name, values in scores.items()},
            advantages=[[a - self._plan.penalty * bad for bad in flags] for a, flags in zip(worth, wrong, strict=True)],
            old=[one.tolist() for one in log_probs(self._student, examples, temperature=self._plan.temperature)],
            reference=[one.tolist() for one in log_probs(self._reference, examples, temperature=self._plan.temperature)],
            blamed=sum(map(sum, wrong)),
            seconds=time.monotonic() - began,
        )

    def _draw(self, records: Sequence[Record], seed: int) -> list[Example]:
        prompts = [self._tokenizer.encode(self._task.prompt(record), bos=True) for record in records]
        answers = generate(
            self._student, prompts, max_new_tokens=self._task.max_new_tokens + 1, eos=self._tokenizer.eos,
            samples=self._plan.samples, temperature=self._plan.temperature, seed=seed,
        )  # fmt: skip
        return [Example(prompts[row // self._plan.samples], answer) for row, answer in enumerate(answers)]

    def _groups(self, examples: Sequence[Example]) -> list[list[Sample]]:
        thought = self._natural(examples) if self._natural else [None] * len(examples)
        samples = [
            Sample(self._tokenizer.decode(one.target), one.target[-1] == self._tokenizer.eos, log_prob)
            for one, log_prob in zip(examples, thought, strict=True)
        ]
        return [samples[at : at + self._plan.samples] for at in range(0, len(samples), self._plan.samples)]

    def _wrong(self, record: Record, example: Example) -> list[bool]:
        """Which target tokens are inside an error span."""
        pieces = [self._tokenizer.piece(token) for token in example.target]
        return inside(blamed(self._task, record, b"".join(pieces).decode("utf-8", errors="replace")), pieces)

    def rows(self, one: Rollout) -> Sequence[Example]:
        """Its answers; what belongs to them is laid beside."""
        self.advantages += [torch.tensor(values) for values in one.advantages]
        self.old += [torch.tensor(values) for values in one.old]
        self.reference += [torch.tensor(values) for values in one.reference]
        return one.examples

    def plan(self, number: int) -> list[list[int]]:
        """Shuffled batches of the round, `passes` times."""
        group = self._plan.samples
        places = list(self.places(number))
        groups = [places[at : at + group] for at in range(0, len(places), group)]
        told = [place for one in groups if any(bool(self.advantages[place].any()) for place in one) for place in one] or places
        lengths = [len(self.examples[place].prompt) + len(self.examples[place].target) - 1 for place in told]
        found = []
        for turn in range(self._plan.passes):
            generator = torch.Generator().manual_seed((self._seed * 1_000_003 + number) * 31 + turn)
            found += [[told[i] for i in index] for index in plan(lengths, batch_tokens=self._batch_tokens, generator=generator)]
        return found

    def loss(self, view: View, batch: Batch) -> torch.Tensor:
        """Mean over the batch's tokens of the clipped policy loss."""
        log_p = -F.cross_entropy(view.logits / self._plan.temperature, batch.targets, reduction="none")  # (n,)
        old, reference, advantage = (torch.cat([beside[i] for i in batch.index]) for beside in (self.old, self.reference, self.advantages))
        return clipped_policy_loss(log_p, old, reference, advantage, clip=self._plan.clip, kl=self._plan.kl).mean()

    def result(self) -> PolishResult:
        """Figures of the rounds so far."""
        rounds = list(self.log)
        quarter = max(1, len(rounds) // 4)
        away = [
            p - r
            for one in rounds[-quarter:]
            for old, reference in zip(one.old, one.reference, strict=True)
            for p, r in zip(old, reference, strict=True)
        ]
        return PolishResult(
            rounds=len(rounds),
            samples=sum(len(one.examples) for one in rounds),
            seconds=sum(one.seconds for one in rounds),
            first=_means(rounds[:quarter]),
            last=_means(rounds[-quarter:]),
            blamed=sum(one.blamed for one in rounds) / max(1, sum(len(row) for one in rounds for row in one.old)),
            drift=sum(away) / max(1, len(away)),
        )


def naturalness(teacher: Gemma3ForCausalLM) -> Natural:
    """A torch teacher's mean log-probability a token; it shares the student's vocabulary."""
    return lambda examples: [float(one.mean()) for one in log_probs(teacher, examples)]


def polished(
    checkpoint: Checkpoint,
    records: Sequence[Record],
    task: Task,
    recipe: Recipe,
    *,
    rewards: Mapping[str, Reward],
    log: Path,
    seed: int,
    plan: PolishPlan | None = None,
    natural: Natural | None = None,
    origin: str = "",
    progress: Callable[[Step], None] | None = None,
    state: Path | None = None,
) -> tuple[Checkpoint, TrainResult, PolishResult]:
    """Polish a copy of `checkpoint`, which is a file, on `records`: those without a target are welcome where a reward needs none.

    Args:
        rewards: by name, `rewards.ensemble(identify)`; the plan's weights say which.
        natural: of the teacher, for the reward of that name.
        origin: the teacher's digest.

    Raises:
        NotEnough, BadInput, UnknownName, WrongDigest: as `Polish`.
        Diverged: as `protocol.models.training.train`.
    """
    feeds: list[Polish] = []
    if checkpoint.path is None:
        raise BadInput("a student is polished from its file: write the checkpoint first")
    with Tokenizer(checkpoint.path) as tokenizer:

        def course(student: Gemma3ForCausalLM) -> tuple[Polish, Loss]:
            feed = Polish(
                student, to_torch(checkpoint, dtype=best_dtype()), tokenizer, task, records, plan=plan or PolishPlan(), rewards=rewards,
                natural=natural, log=log, batch_tokens=recipe.batch_tokens, seed=seed, origin=f"{checkpoint.digest} {origin}",
            )  # fmt: skip
            feeds.append(feed)
            return feed, feed.loss

        model, result = trained_by(checkpoint, course, recipe, seed=seed, progress=progress, state=state)
    return model, result, feeds[0].result()


def _means(rounds: Sequence[Rollout]) -> dict[str, float]:
    """Mean of each reward over all answers of some rounds."""
    return {
        name: float(np.mean([value for one in rounds for value in one.rewards[name]])) for name in (rounds[0].rewards if rounds else ())
    }
