"""The one training loop: teacher correction, distillation, rewards and a node's LoRA all run through `train`.

Rules:
 * Loss on target tokens only; the output matrix is multiplied at target positions only.
 * A feed says what a step learns from (`protocol.models.feed`), a loss says what it minimises; steps and epochs repeat exactly.
 * Work stops by steps, epochs or seconds, whichever comes first, and the learning rate follows the share of the budget used:
   linear warm-up, then cosine. (A budget of seconds is the one thing that does not repeat exactly.)
 * Blocks below the lowest trained one run once an example; their output is kept and read again in later epochs.
 * A step is `accumulate` batches, shared out over the processes of a `World`: one process or several, the same gradients.
 * bfloat16 weights are trained through float32 masters; LoRA factors are float32 anyway.
 * With `state`, kill -9 at any moment costs at most `save_every_s` seconds of work.

Knows nothing of tasks, teachers or Flower.
"""

import io
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import msgspec
import torch
import torch.nn.functional as F
from transformers import Gemma3ForCausalLM

from protocol.blobs import write_atomically
from protocol.digests import digest_bytes, digest_value
from protocol.errors import BadInput, MilpaError, NotEnough
from protocol.models.feed import Batch, Feed, collate, plan
from protocol.models.tokenizer import Example
from protocol.models.torch_model import embed, hidden_states, logits_of

KEPT_BYTES = 1 << 30  # at most this much of frozen blocks' output is kept between epochs
STOPPED = -1.0  # in place of the share of the budget, so that several processes agree on both at once


class Diverged(MilpaError):
    """The loss is not a number any more; use a lower learning rate."""


class Interrupted(MilpaError):
    """Told to stop; what was done is saved and goes on from there."""


@dataclass
class View:
    """What a loss may look at of one batch's forward pass."""

    model: Gemma3ForCausalLM
    hidden: torch.Tensor  # (n, hidden) at the predicting positions, before the final norm
    states: Mapping[int, torch.Tensor]  # tapped block -> its output (B, T, hidden)

    @cached_property
    def logits(self) -> torch.Tensor:
        """(n, V), float32; computed when first asked for."""
        return logits_of(self.model, self.hidden).float()


Loss = Callable[[View, Batch], torch.Tensor]  # a scalar, mean over positions


class World(Protocol):
    """The processes that share a training; every one of them makes the same steps."""

    rank: int
    size: int

    def add(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each, in place, by its sum over all processes."""
        ...

    def agree(self, number: float) -> float:
        """The first process's number."""
        ...


class Alone:
    """One process."""

    rank, size = 0, 1

    def add(self, tensors: Sequence[torch.Tensor]) -> None:
        """Nothing to add."""

    def agree(self, number: float) -> float:
        """Its own."""
        return number


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


def cross_entropy(view: View, batch: Batch) -> torch.Tensor:
    """Mean -log p(target) over the n positions, nats."""
    return F.cross_entropy(view.logits, batch.targets)


def train(
    model: Gemma3ForCausalLM,
    feed: Feed,
    *,
    parameters: Sequence[torch.nn.Parameter],
    learning_rate: float,
    loss: Loss = cross_entropy,
    taps: Collection[int] = (),
    steps: int | None = None,
    epochs: float | None = None,
    seconds: float | None = None,
    deadline: float | None = None,
    accumulate: int = 1,
    world: World | None = None,
    warm_up: float = 0.06,
    final: float = 0.05,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    progress: Callable[[Step], None] | None = None,
    state: Path | None = None,
    save_every_s: float = 30.0,
    interrupted: Callable[[], bool] = lambda: False,
) -> TrainResult:
    """Train `parameters` of `model` in place.

    Args:
        learning_rate: at the end of the warm-up; falls to `final` times that.
        taps: blocks whose output the loss reads (`View.states`), below the last one.
        seconds: of this training, earlier ones of the same `state` counted.
        deadline: `time.monotonic()` past which no step starts, whatever the schedule says.
        accumulate: batches a step, over all processes; a step's loss is their mean.
        world: the processes that share the work; alone by default. Only the first one saves.
        warm_up: share of the budget.
        state: file to resume from and to save to. It is ignored when it belongs to another plan; the caller removes it.
        interrupted: asked before each step; True saves and ends it.

    Raises:
        BadInput: no limit, nothing to train, or a step that cannot be shared out evenly.
        Diverged: the loss is not finite; the weights are spoiled.
        Interrupted: as asked.
    """
    if steps is None and epochs is None and seconds is None:
        raise BadInput("training needs a limit: steps, epochs or seconds")
    if not parameters:
        raise BadInput("training needs parameters: none is free")
    world = world or Alone()
    if accumulate < 1 or accumulate % world.size:
        raise BadInput(f"{accumulate} batches a step cannot be shared out over {world.size} processes; use a multiple of {world.size}")
    work = _Work(model, feed, parameters, loss, taps, learning_rate, weight_decay, clip, accumulate, world)
    steps_an_epoch = -(-feed.batches_an_epoch // accumulate)
    limit = min((n for n in (steps, math.ceil(epochs * steps_an_epoch) if epochs is not None else None) if n is not None), default=None)
    key = digest_value([feed.key, [p.numel() for p in parameters], learning_rate, steps, epochs, accumulate, warm_up])
    done = _load(state, key, work) if state else _Done()
    began = saved = time.monotonic() - done.seconds
    schedule = feed.batches(done.steps * accumulate)
    model.train()
    try:
        while True:
            done.seconds = time.monotonic() - began
            share = max(done.steps / limit if limit else 0.0, done.seconds / seconds if seconds else 0.0)
            if share < 1.0 and interrupted():
                share = STOPPED
            share = world.agree(1.0 if deadline is not None and time.monotonic() > deadline else share)
            if share >= 1.0:
                break
            if share == STOPPED:
                if state and world.rank == 0:
                    _save(state, key, work, done)
                raise Interrupted(f"stopped after {done.steps} steps; it goes on from there")
            batches = [collate(feed.examples, index) for index in islice(schedule, accumulate)][world.rank :: world.size]
            value = work.step(batches, rate=_rate(share, warm_up, final))
            done.steps += 1
            done.losses.append(value)
            done.examples += sum(len(batch.index) for batch in batches) * world.size
            done.tokens += sum(batch.tokens for batch in batches) * world.size
            done.target_tokens += sum(len(batch.targets) for batch in batches) * world.size
            if not math.isfinite(value):
                raise Diverged(f"the loss is {value} after {done.steps} steps; use a learning rate below {learning_rate:g}")
            if progress:
                recent = done.losses[-20:]
                progress(Step(done.steps, min(1.0, share), sum(recent) / len(recent), done.tokens, time.monotonic() - began))
            if state and world.rank == 0 and time.monotonic() - saved > save_every_s:
                done.seconds = time.monotonic() - began
                _save(state, key, work, done)
                saved = time.monotonic()
    finally:
        work.close()
        model.eval()
    tenth = max(1, len(done.losses) // 10)
    return TrainResult(
        steps=done.steps,
        epochs=done.examples / len(feed.examples),
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
        batch = collate(examples, index).to(model.model.embed_tokens.weight.device)
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
        self, model: Gemma3ForCausalLM, feed: Feed, parameters: Sequence[torch.nn.Parameter], loss: Loss, taps: Collection[int],
        learning_rate: float, weight_decay: float, clip: float, accumulate: int, world: World,
    ) -> None:  # fmt: skip
        self.model, self.loss, self.taps, self.clip, self.learning_rate = model, loss, taps, clip, learning_rate
        self.accumulate, self.world = accumulate, world
        self.parameters = list(parameters)
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.masters = [p if p.dtype == torch.float32 else p.detach().float().requires_grad_(True) for p in self.parameters]
        self.hooks = [self._stream(p, m) for p, m in zip(self.parameters, self.masters, strict=True) if m is not p]
        self.device = model.model.embed_tokens.weight.device
        self.optimizer = torch.optim.AdamW(self.masters, lr=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.98), fused=True)
        self.embedding_trained = any(parameter.requires_grad for parameter in model.model.embed_tokens.parameters())
        self.first = min([self._lowest_trained_block(), *taps])
        tokens = sum(len(one.prompt) + len(one.target) for one in feed.examples)
        self.keeps = self.first > 0 and tokens * model.config.hidden_size * model.dtype.itemsize <= KEPT_BYTES
        self.kept: dict[int, torch.Tensor] = {}  # example -> (T, hidden) below the lowest trained block
        self.room = KEPT_BYTES  # left; a feed that grows may fill it

    def _stream(self, parameter: torch.nn.Parameter, master: torch.Tensor) -> torch.utils.hooks.RemovableHandle:
        """Add each gradient to its master's the moment it is there, while it is in the processor's cache, into memory that is kept.

        Fetching fresh memory for every gradient, twice, was a fifth of a step (docs/log.md).
        """
        room = torch.zeros_like(master, requires_grad=False)

        def add(trained: torch.Tensor) -> None:
            assert trained.grad is not None
            if master.grad is None:
                master.grad = room.copy_(trained.grad)
            else:
                master.grad.add_(trained.grad)
            trained.grad = None

        return parameter.register_post_accumulate_grad_hook(add)

    def close(self) -> None:
        """Leave the model's parameters as they were found, but for their values."""
        for hook in self.hooks:
            hook.remove()

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
        with torch.set_grad_enabled(self.embedding_trained):
            x = hidden_states(self.model, embed(self.model, batch.ids), last=self.first)
        if self.keeps and self.room > 0:
            ends = (
                torch.zeros(len(batch.index), dtype=torch.long, device=self.device).scatter_reduce(0, batch.rows, batch.columns, "amax") + 1
            )
            for row, i in enumerate(batch.index):
                if i not in self.kept:
                    self.kept[i] = x[row, : ends[row]].clone()
                    self.room -= self.kept[i].nbytes
        return x

    def step(self, batches: Sequence[Batch], *, rate: float) -> float:
        """Forward, backward, update; returns the loss before the update, over all processes."""
        total = torch.zeros((), device=self.device)
        for batch in (batch.to(self.device) for batch in batches):
            states: dict[int, torch.Tensor] = dict.fromkeys(self.taps, total)
            x = hidden_states(self.model, self._inputs(batch), first=self.first, at=(batch.rows, batch.columns), taps=states)
            value = self.loss(View(self.model, x, states), batch) / self.accumulate
            value.backward()
            total += value.detach().float()
        grads = [master.grad for master in self.masters if master.grad is not None]
        self.world.add([total, *grads])
        self._clip(grads)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                if master is not parameter:
                    parameter.copy_(master)
        return float(total)

    def _clip(self, grads: Sequence[torch.Tensor]) -> None:
        """Gradients of a norm above `clip` are divided down to it: by the optimiser as it reads them, not in a pass of their own."""
        if not grads:
            return
        norm = torch.nn.utils.get_total_norm(grads)
        self.optimizer.grad_scale = ((norm + 1e-6) / self.clip).clamp(min=1.0).float()


def _rate(share: float, warm_up: float, final: float) -> float:
    """Linear warm-up, then cosine from 1 down to `final`; `share` of the budget used."""
    if share < warm_up:
        return max(0.02, share / warm_up)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, (share - warm_up) / (1 - warm_up))))


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
