"""The one training loop: teacher correction, distillation and a node's LoRA all run through `train`.

Rules:
 * Loss on target tokens only; the output matrix is multiplied at target positions only.
 * Batches hold a budget of tokens, rows of like length together; everything random comes from `seed`, so steps and epochs repeat exactly.
 * Work stops by steps, epochs or seconds, whichever comes first, and the learning rate follows the share of the budget used:
   linear warm-up, then cosine. (A budget of seconds is the one thing that does not repeat exactly.)
 * Blocks below the lowest trained one run once an example; their output is kept and read again in later epochs.
 * bfloat16 weights are trained through float32 masters; LoRA factors are float32 anyway.
 * With `state`, kill -9 at any moment costs at most `save_every_s` seconds of work.

Knows nothing of tasks, teachers or Flower.
"""

import io
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.nn.functional as F
from transformers import Gemma3ForCausalLM

from protocol.blobs import write_atomically
from protocol.digests import digest_bytes, digest_value
from protocol.errors import BadInput, MilpaError, NotEnough
from protocol.models.tokenizer import Example
from protocol.models.torch_model import embed, hidden_states, logits_of

CHUNK_BATCHES = 32  # rows are sorted by length inside chunks of this many batches: little padding, still shuffled
KEPT_BYTES = 1 << 30  # at most this much of frozen blocks' output is kept between epochs


class Diverged(MilpaError):
    """The loss is not a number any more; use a lower learning rate."""


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right. Positions are those that predict a target token."""

    index: list[int]  # which examples, in row order
    ids: torch.Tensor  # (B, T)
    rows: torch.Tensor  # (n,) row of each predicting position
    columns: torch.Tensor  # (n,)
    targets: torch.Tensor  # (n,) the token to predict there

    @property
    def tokens(self) -> int:
        """Tokens in the batch, with padding: what it costs."""
        return self.ids.numel()


Loss = Callable[[torch.Tensor, Batch], torch.Tensor]  # logits (n, V) float32, batch -> scalar, mean over positions


class Step(msgspec.Struct, frozen=True):
    """What the progress callback is told."""

    step: int
    share: float  # of the budget, in [0, 1]
    loss: float  # nats a target token, mean of the last steps
    tokens: int
    seconds: float


class TrainResult(msgspec.Struct, frozen=True):
    """What a training did."""

    steps: int
    epochs: float
    examples: int  # rows seen, repeats counted
    tokens: int  # processed, padding included
    target_tokens: int
    seconds: float
    first_loss: float  # mean of the first tenth of the steps, nats a target token
    last_loss: float  # mean of the last tenth


def cross_entropy(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Mean -log p(target): logits (n, V), targets (n,)."""
    return F.cross_entropy(logits, batch.targets)


def collate(examples: Sequence[Example], index: Sequence[int]) -> Batch:
    """Rows of prompt + target without the last token (nothing follows it)."""
    chosen = [examples[i] for i in index]
    longest = max(len(one.prompt) + len(one.target) - 1 for one in chosen)
    ids = torch.zeros(len(chosen), longest, dtype=torch.long)
    rows: list[int] = []
    columns: list[int] = []
    targets: list[int] = []
    for row, one in enumerate(chosen):
        text = [*one.prompt, *one.target[:-1]]
        ids[row, : len(text)] = torch.tensor(text)
        rows += [row] * len(one.target)
        columns += range(len(one.prompt) - 1, len(text))
        targets += one.target
    return Batch(list(index), ids, torch.tensor(rows), torch.tensor(columns), torch.tensor(targets))


def plan(lengths: Sequence[int], *, batch_tokens: int, generator: torch.Generator | None) -> list[list[int]]:
    """Which examples share a batch: shuffled (with a generator), sorted by length inside chunks, at most `batch_tokens` with padding."""
    order = torch.randperm(len(lengths), generator=generator).tolist() if generator else list(range(len(lengths)))
    mean = max(1, sum(lengths) // max(1, len(lengths)))
    chunk = max(1, CHUNK_BATCHES * batch_tokens // mean)
    batches: list[list[int]] = []
    for begin in range(0, len(order), chunk):
        current: list[int] = []
        for i in sorted(order[begin : begin + chunk], key=lambda i: lengths[i]):
            if current and (len(current) + 1) * lengths[i] > batch_tokens:
                batches.append(current)
                current = []
            current.append(i)
        batches.append(current)
    if generator:
        batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
    return batches


def train(
    model: Gemma3ForCausalLM,
    examples: Sequence[Example],
    *,
    parameters: Sequence[torch.nn.Parameter],
    learning_rate: float,
    loss: Loss = cross_entropy,
    steps: int | None = None,
    epochs: float | None = None,
    seconds: float | None = None,
    deadline: float | None = None,
    batch_tokens: int = 2048,
    warm_up: float = 0.06,
    final: float = 0.05,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    seed: int = 0,
    progress: Callable[[Step], None] | None = None,
    state: Path | None = None,
    save_every_s: float = 30.0,
) -> TrainResult:
    """Train `parameters` of `model` in place.

    Args:
        learning_rate: at the end of the warm-up; falls to `final` times that.
        seconds: of this training, earlier ones of the same `state` counted.
        deadline: `time.monotonic()` past which no step starts, whatever the schedule says.
        batch_tokens: tokens in a batch, padding included.
        warm_up: share of the budget.
        state: file to resume from and to save to. It is ignored when it belongs to another plan; the caller removes it.

    Raises:
        NotEnough: no examples.
        BadInput: no limit, or nothing to train.
        Diverged: the loss is not finite; the weights are spoiled.
    """
    if not examples:
        raise NotEnough("there are 0 examples to train on; at least 1 is needed")
    if steps is None and epochs is None and seconds is None:
        raise BadInput("training needs a limit: steps, epochs or seconds")
    if not parameters:
        raise BadInput("training needs parameters: none is free")
    work = _Work(model, examples, parameters, loss, learning_rate, weight_decay, clip)
    lengths = [len(one.prompt) + len(one.target) - 1 for one in examples]
    batches_an_epoch = len(plan(lengths, batch_tokens=batch_tokens, generator=torch.Generator().manual_seed(seed)))
    limit = min((n for n in (steps, math.ceil(epochs * batches_an_epoch) if epochs is not None else None) if n is not None), default=None)
    key = digest_value([list(examples), [p.numel() for p in parameters], learning_rate, steps, epochs, batch_tokens, warm_up, seed])
    done = _load(state, key, work) if state else _Done()
    began = saved = time.monotonic() - done.seconds
    schedule = _batches(lengths, batch_tokens=batch_tokens, seed=seed, skip=done.steps)
    model.train()
    try:
        while True:
            done.seconds = time.monotonic() - began
            share = max(done.steps / limit if limit else 0.0, done.seconds / seconds if seconds else 0.0)
            if share >= 1.0 or (deadline is not None and time.monotonic() > deadline):
                break
            batch = collate(examples, next(schedule))
            value = work.step(batch, rate=_rate(share, warm_up, final))
            done.steps += 1
            done.losses.append(value)
            done.examples += len(batch.index)
            done.tokens += batch.tokens
            done.target_tokens += len(batch.targets)
            if not math.isfinite(value):
                raise Diverged(f"the loss is {value} after {done.steps} steps; use a learning rate below {learning_rate:g}")
            if progress:
                recent = done.losses[-20:]
                progress(Step(done.steps, min(1.0, share), sum(recent) / len(recent), done.tokens, time.monotonic() - began))
            if state and time.monotonic() - saved > save_every_s:
                done.seconds = time.monotonic() - began
                _save(state, key, work, done)
                saved = time.monotonic()
    finally:
        model.eval()
    tenth = max(1, len(done.losses) // 10)
    return TrainResult(
        steps=done.steps,
        epochs=done.examples / len(examples),
        examples=done.examples,
        tokens=done.tokens,
        target_tokens=done.target_tokens,
        seconds=done.seconds,
        first_loss=sum(done.losses[:tenth]) / tenth if done.losses else math.nan,
        last_loss=sum(done.losses[-tenth:]) / tenth if done.losses else math.nan,
    )


@torch.no_grad()
def mean_loss(model: Gemma3ForCausalLM, examples: Sequence[Example], *, batch_tokens: int = 4096) -> float:
    """Mean -log p a target token over `examples`, nats.

    Raises:
        NotEnough: no examples.
    """
    if not examples:
        raise NotEnough("there are 0 examples to measure; at least 1 is needed")
    total, count = 0.0, 0
    lengths = [len(one.prompt) + len(one.target) - 1 for one in examples]
    for index in plan(lengths, batch_tokens=batch_tokens, generator=None):
        batch = collate(examples, index)
        logits = logits_of(model, hidden_states(model, embed(model, batch.ids), at=(batch.rows, batch.columns))).float()
        total += float(F.cross_entropy(logits, batch.targets, reduction="sum"))
        count += len(batch.targets)
    return total / count


@dataclass
class _Done:
    """How far a training is."""

    steps: int = 0
    examples: int = 0
    tokens: int = 0
    target_tokens: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)


class _Work:
    """Model, masters and optimiser: one step at a time."""

    def __init__(
        self, model: Gemma3ForCausalLM, examples: Sequence[Example], parameters: Sequence[torch.nn.Parameter], loss: Loss,
        learning_rate: float, weight_decay: float, clip: float,
    ) -> None:  # fmt: skip
        self.model, self.loss, self.clip, self.learning_rate = model, loss, clip, learning_rate
        self.parameters = list(parameters)
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.masters = [p if p.dtype == torch.float32 else p.detach().float().requires_grad_(True) for p in self.parameters]
        self.optimizer = torch.optim.AdamW(self.masters, lr=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.98), fused=True)
        self.first = self._lowest_trained_block()
        tokens = sum(len(one.prompt) + len(one.target) for one in examples)
        self.keeps = self.first > 0 and tokens * model.config.hidden_size * model.dtype.itemsize <= KEPT_BYTES
        self.kept: dict[int, torch.Tensor] = {}  # example -> (T, hidden) below the lowest trained block

    def _lowest_trained_block(self) -> int:
        """Blocks below it need no gradients. 0 when the embedding itself is trained."""
        trained = {id(parameter) for parameter in self.parameters}
        if any(id(parameter) in trained for parameter in self.model.model.embed_tokens.parameters()):
            return 0
        for number, layer in enumerate(self.model.model.layers):
            if any(id(parameter) in trained for parameter in layer.parameters()):
                return number
        return len(self.model.model.layers)

    def _inputs(self, batch: Batch) -> torch.Tensor:
        """What the lowest trained block reads: (B, T, hidden), from memory where it was computed before."""
        if self.keeps and all(i in self.kept for i in batch.index):
            rows = [self.kept[i] for i in batch.index]
            return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        with torch.no_grad():
            x = hidden_states(self.model, embed(self.model, batch.ids), last=self.first)
        if self.keeps:
            ends = torch.zeros(len(batch.index), dtype=torch.long).scatter_reduce(0, batch.rows, batch.columns, "amax") + 1
            for row, i in enumerate(batch.index):
                self.kept[i] = x[row, : ends[row]].clone()
        return x

    def step(self, batch: Batch, *, rate: float) -> float:
        """Forward, backward, update; returns the loss before the update."""
        x = hidden_states(self.model, self._inputs(batch), first=self.first, at=(batch.rows, batch.columns))  # (n, hidden)
        value = self.loss(logits_of(self.model, x).float(), batch)
        value.backward()
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter and parameter.grad is not None:
                master.grad, parameter.grad = parameter.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.masters, self.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                if master is not parameter:
                    parameter.copy_(master)
        return float(value.detach())


def _rate(share: float, warm_up: float, final: float) -> float:
    """Linear warm-up, then cosine from 1 down to `final`; `share` of the budget used."""
    if share < warm_up:
        return max(0.02, share / warm_up)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, (share - warm_up) / (1 - warm_up))))


def _batches(lengths: Sequence[int], *, batch_tokens: int, seed: int, skip: int) -> Iterator[list[int]]:
    """Endless batches, epoch after epoch, the first `skip` left out."""
    epoch = 0
    while True:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        batches = plan(lengths, batch_tokens=batch_tokens, generator=generator)
        yield from batches[skip:]
        skip = max(0, skip - len(batches))
        epoch += 1


def _save(path: Path, key: str, work: _Work, done: _Done) -> None:
    buffer = io.BytesIO()
    torch.save(
        {"key": key, "masters": [m.detach() for m in work.masters], "optimizer": work.optimizer.state_dict(), "done": vars(done)}, buffer
    )
    data = buffer.getvalue()
    write_atomically(path, digest_bytes(data).encode() + data)


def _load(path: Path, key: str, work: _Work) -> _Done:
    """The saved progress; a fresh start when there is none, or it is another plan's, or its bytes are spoiled."""
    if not path.is_file():
        return _Done()
    data = path.read_bytes()
    if digest_bytes(data[64:]).encode() != data[:64]:
        return _Done()
    saved: dict[str, Any] = torch.load(io.BytesIO(data[64:]), weights_only=True)
    if saved.get("key") != key:
        return _Done()
    with torch.no_grad():
        for parameter, master, value in zip(work.parameters, work.masters, saved["masters"], strict=True):
            master.copy_(value)
            parameter.copy_(value)
    work.optimizer.load_state_dict(saved["optimizer"])
    return _Done(**saved["done"])
