"""What a student minimises: a weighted sum of named losses, some of them on what the teacher's cache holds of its targets.

name                                  what it compares                                  the cache's mode
cross_entropy                         the student with the target token                 any, or no cache
kl                                    whole distributions, or top k and tail            any; sampled: an unbiased estimate
reverse_kl skew_kl jsd                the same                                          topk, hidden8
total_variation                       the same                                          topk, hidden8
hidden_cosine hidden_mse              final normed hidden states                        hidden8
relations                             Q-Q, K-K, V-V of one block                        none: a live teacher

Rules:
 * At positions the teacher did not speak for, the loss is cross-entropy alone, with weight 1.
 * At temperature T of the cache both sides are softened and the term counts T^2 (Hinton et al. 2015), so that gradients keep their size.
 * One log-softmax over the vocabulary serves all terms (at T = 1).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import Gemma3ForCausalLM

from coordinator.forge.targets.cache import Cached, CacheHeader, Samples, States, TargetCache, Targets
from coordinator.forge.training import losses
from coordinator.forge.training.losses import Divergence
from protocol.errors import BadInput, WrongDigest
from protocol.models.checkpoint import Checkpoint
from protocol.models.feed import Batch
from protocol.models.tokenizer import Example, Tokenizer
from protocol.models.torch_model import embed, hidden_states
from protocol.models.training import View
from protocol.names import known
from protocol.tasks import Task

DIVERGENCES: dict[str, Divergence] = {
    "kl": losses.kl,
    "reverse_kl": losses.reverse_kl,
    "skew_kl": losses.skew_kl,
    "jsd": losses.jsd,
    "total_variation": losses.total_variation,
}
HIDDEN = {"hidden_cosine": "cosine", "hidden_mse": "mse"}
NAMES = ("cross_entropy", *DIVERGENCES, *HIDDEN, "relations")
IGNORED = -100  # a label that is not learned, as transformers and TRL mark it


@dataclass
class Relations:
    """Whose attention relations are copied, and where: a live teacher, since a cache of T x T numbers would be huge."""

    teacher: Gemma3ForCausalLM
    teacher_block: int  # whose queries, keys and values; at least 1
    student_block: int  # `train(taps=...)` must name the block before it; at least 1
    heads: int = 8  # relation heads; divides the widths of both models' queries and keys


@dataclass
class Objective:
    """A loss for `protocol.models.training.train`, and, by `on_labels`, for any loop that has logits and labels."""

    weights: Mapping[str, float]  # name -> weight, of NAMES
    examples: Sequence[Example]  # what a batch's places name; may grow while training runs
    cache: TargetCache | None = None
    token_weights: Sequence[torch.Tensor] | None = None  # a number a target token of each example
    head: torch.Tensor | None = None  # (V, width), the teacher's output matrix, for the divergences of mode hidden8: `read_head`
    skew: float = 0.1  # of skew_kl
    beta: float = 0.5  # of jsd
    projection: torch.nn.Module | None = None  # (student's width -> teacher's), for hidden_*; train its parameters as well
    relations: Relations | None = None
    _divergences: dict[str, Divergence] = field(init=False, repr=False)
    _positions: int = field(init=False, default=0, repr=False)
    _spoken_for: int = field(init=False, default=0, repr=False)

    def __post_init__(self) -> None:
        """Refuse what cannot be computed before a long training begins.

        Raises:
            UnknownName: a loss of another name.
            BadInput: a loss that this cache cannot serve; the message says what can.
        """
        mode = self.cache.header.mode if self.cache is not None else ""
        for name in self.weights:
            check_loss(name, mode, live=self.relations is not None)
        if mode == "hidden8" and self.head is None and any(name in DIVERGENCES for name in self.weights):
            raise BadInput("a cache of mode hidden8 is read through the teacher's output matrix: pass head=read_head(TEACHER.gguf, header)")
        bound = {"skew_kl": partial(losses.skew_kl, skew=self.skew), "jsd": partial(losses.jsd, beta=self.beta)}
        self._divergences = {**DIVERGENCES, **bound}

    @property
    def coverage(self) -> float:
        """Share of the positions so far that the cache spoke for; less than 1 where examples were cut or tokenised otherwise."""
        return self._spoken_for / max(1, self._positions)

    def __call__(self, view: View, batch: Batch) -> torch.Tensor:
        """The loss of one step: a scalar, a weighted mean over positions."""
        examples = [self.examples[i] for i in batch.index]
        states = partial(_normed, view)
        each = self._each(view.logits, batch.targets, examples, states)
        mean = _mean(each, None if self.token_weights is None else torch.cat([self.token_weights[i] for i in batch.index]))
        if weight := self.weights.get("relations", 0.0):
            mean = mean + weight * self._relations(view, batch)
        return mean

    def on_labels(
        self, logits: torch.Tensor, input_ids: torch.Tensor, labels: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The same for a loop of transformers or TRL: logits (B, T, V), input_ids and labels (B, T), labels -100 where nothing is learned.

        A row is prompt, then target, then padding; the row's ids name the example in the cache. Returns a scalar.
        """
        learned = labels[:, 1:] != IGNORED  # (B, T - 1): position t predicts token t + 1
        examples = examples_in(input_ids, labels, attention_mask)
        return self._each(logits[:, :-1][learned], labels[:, 1:][learned], examples, None).mean()

    def _each(self, logits: torch.Tensor, targets: torch.Tensor, examples: Sequence[Example], states: Any) -> torch.Tensor:
        """The loss at each position: logits (n, V), targets (n,), examples in the positions' order. Returns (n,)."""
        q = F.log_softmax(logits.float(), dim=-1)
        each = losses.cross_entropy(q, targets)
        rows, found = self._spoken(examples)
        rows = rows.to(q.device)
        self._positions, self._spoken_for = self._positions + len(each), self._spoken_for + len(rows)
        if not found:
            return each
        spoken = self._divergence(logits, q, rows, found)
        if share := self.weights.get("cross_entropy", 0.0):
            spoken = spoken + share * each[rows]
        for name, by in HIDDEN.items():
            if weight := self.weights.get(name, 0.0):
                if states is None:
                    raise BadInput(f"loss {name!r} needs hidden states, which a loop that has logits only cannot give")
                own = states(self.projection)[rows]
                spoken = spoken + weight * losses.hidden_transfer(own, _states(found).to(own.device), by=by)
        return spoken if len(rows) == len(each) else each.index_copy(0, rows, spoken)

    def _spoken(self, examples: Sequence[Example]) -> tuple[torch.Tensor, list[Cached]]:
        """Positions that the teacher spoke for, and what it said, in the same order."""
        rows: list[int] = []
        found: list[Cached] = []
        at = 0
        for example in examples:
            view = self.cache.get(example) if self.cache is not None else None
            if view is not None:
                found.append(view)
                rows += range(at, at + len(example.target))
            at += len(example.target)
        return torch.tensor(rows, dtype=torch.long), found

    def _divergence(self, logits: torch.Tensor, q: torch.Tensor, rows: torch.Tensor, found: Sequence[Cached]) -> torch.Tensor:
        """The weighted sum of the divergences at `rows`: (len(rows),)."""
        assert self.cache is not None
        temperature = self.cache.header.temperature
        total = q.new_zeros(len(rows))
        wanted = {name: weight * temperature**2 for name, weight in self.weights.items() if name in DIVERGENCES and weight}
        if not wanted:
            return total
        if temperature != 1.0:
            q = F.log_softmax(logits.float() / temperature, dim=-1)
        some = rows if len(rows) < len(q) else None
        if isinstance(found[0], Samples):
            return wanted["kl"] * losses.sampled_kl(q, *_samples(found, q.device), rows=some)
        if isinstance(found[0], Targets):
            ids, log_probs, tail = (torch.from_numpy(np.concatenate(part)).to(q.device) for part in zip(*found, strict=True))
            p, q = losses.buckets(q, ids, log_probs, tail, some)
        else:
            assert self.head is not None
            p = F.log_softmax(_states(found).to(q.device) @ self.head.to(q.device).T / temperature, dim=-1)
            q = q if some is None else q[some]
        for name, weight in wanted.items():
            total = total + weight * self._divergences[name](p, q)
        return total

    def _relations(self, view: View, batch: Batch) -> torch.Tensor:
        """MiniLMv2's three relation losses, added up: a scalar."""
        assert self.relations is not None
        among = self.relations
        if among.student_block - 1 not in view.states:
            raise BadInput(f"relations of block {among.student_block} need the output of block {among.student_block - 1}: train(taps=...)")
        with torch.no_grad():
            x = hidden_states(among.teacher, embed(among.teacher, batch.ids), last=among.teacher_block)
            theirs = block_vectors(among.teacher, among.teacher_block, x)
        ours = block_vectors(view.model, among.student_block, view.states[among.student_block - 1])
        ends = torch.zeros(len(batch.index), dtype=torch.long).scatter_reduce(0, batch.rows, batch.columns, "amax")
        there = torch.arange(batch.ids.shape[1]) <= ends[:, None]  # (B, T)
        parts = [losses.relation_transfer(mine, other, there, heads=among.heads) for mine, other in zip(ours, theirs, strict=True)]
        return torch.stack(parts).sum()


def check_loss(name: str, mode: str, *, live: bool = False) -> None:
    """Check that a loss can be computed from a cache of `mode` ("": no cache), or of a live teacher.

    Raises:
        UnknownName: a loss of another name.
        BadInput: it cannot; the message says from what it can.
    """
    known(name, NAMES, what="loss")
    served = {"cross_entropy": True, "kl": bool(mode), "relations": live}.get(
        name, mode == "hidden8" or (mode == "topk" and name in DIVERGENCES)
    )
    if not served:
        raise BadInput(f"loss {name!r} cannot be computed from {f'a cache of mode {mode}' if mode else 'no cache'}: {_wants(name)}")


def distillation_loss(
    examples: Sequence[Example],
    *,
    weights: Sequence[torch.Tensor] | None = None,
    cache: TargetCache | None = None,
    alpha: float = 0.0,
    name: str = "kl",
    head: torch.Tensor | None = None,
) -> Objective:
    """(1 - alpha) * cross-entropy + alpha * the loss called `name` on positions the teacher spoke for; cross-entropy alone on the others.

    A weighted mean over positions when `weights` has one number a target token of each example. Without a cache it is cross-entropy.
    """
    mix = {"cross_entropy": 1.0 - alpha, name: alpha} if cache is not None else {"cross_entropy": 1.0}
    return Objective(mix, examples, cache=cache, token_weights=weights, head=head)


def read_head(teacher: Path, header: CacheHeader) -> torch.Tensor:
    """The output matrix (V, width) that a cache of mode hidden8 is read through.

    Raises:
        WrongDigest: the file is not the teacher that the header names.
    """
    checkpoint = Checkpoint.read(teacher)
    if checkpoint.digest != header.teacher:
        raise WrongDigest(f"{teacher} is not the teacher whose hidden states the cache holds ({header.teacher[:12]}); name that file")
    return torch.tensor(checkpoint.array("token_embd.weight"))  # a copy: a float32 one is a view of the file


def examples_in(input_ids: torch.Tensor, labels: torch.Tensor, attention_mask: torch.Tensor | None = None) -> list[Example]:
    """The examples of a padded batch (B, T): a row's learned tokens are its target, what stands before them its prompt."""
    found = []
    for row, ids in enumerate(input_ids):
        learned = (labels[row, 1:] != IGNORED).nonzero().squeeze(1) + 1  # nothing predicts the first token
        there = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask[row].bool()
        if len(learned):
            first = int(learned[0])
            found.append(Example(ids[:first][there[:first]].tolist(), ids[learned].tolist()))
    return found


def block_vectors(model: Gemma3ForCausalLM, block: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of a block from its input x (B, T, hidden), before norms and rotation, each (B, T, heads * head)."""
    layer: Any = model.model.layers[block]
    h = layer.input_layernorm(x)
    return layer.self_attn.q_proj(h), layer.self_attn.k_proj(h), layer.self_attn.v_proj(h)


def token_weights(tokenizer: Tokenizer, task: Task, examples: Sequence[Example], *, verdict: float) -> list[torch.Tensor]:
    """How much each target token counts: `verdict` up to the code's colon, 1 after it; 1 everywhere for free text.

    The code is one or two tokens of seventeen, and what is hard about them all.
    """
    (colon,) = tokenizer.encode(":", bos=False)
    found = []
    for example in examples:
        weights = torch.ones(len(example.target))
        if task.codes and colon in example.target:
            weights[: example.target.index(colon) + 1] = verdict
        found.append(weights)
    return found


def _mean(each: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    if weight is None:
        return each.mean()
    weight = weight.to(each.device)
    return (each * weight).sum() / weight.sum()


def _normed(view: View, projection: torch.nn.Module | None) -> torch.Tensor:
    """The student's final normed hidden states (n, hidden), projected to the teacher's width where a projection is given."""
    states = view.model.model.norm(view.hidden).float()
    return states if projection is None else projection(states)


def _states(found: Sequence[Cached]) -> torch.Tensor:
    """(n, width)."""
    return torch.from_numpy(np.concatenate([one.states for one in found if isinstance(one, States)]))


def _samples(found: Sequence[Cached], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, weights, log-probabilities, padded to one width: (n, m) each."""
    widest = max(part.ids.shape[1] for part in found if isinstance(part, Samples))
    padded = [[np.pad(array, ((0, 0), (0, widest - array.shape[1]))) for array in one] for one in found]
    ids, weights, log_probs = (torch.from_numpy(np.concatenate(part)).to(device) for part in zip(*padded, strict=True))
    return ids, weights, log_probs


def _wants(name: str) -> str:
    """What a loss is computed from, for a message."""
    if name == "relations":
        return "it needs relations=Relations(...) with a live teacher"
    if name in HIDDEN:
        return "it needs a cache of mode hidden8"
    return "it needs a cache of mode topk or hidden8" + (", or sampled" if name == "kl" else "")
