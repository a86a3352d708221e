"""LoRA on the active release, from the site's own confirmed examples, within a budget of time and memory.

Rules:
 * The base is the release's model file without its adapter, the start is the release's shipped initial adapter: so adapters of all sites,
   and of earlier rounds, are sums over the same base and can be merged. What a site learned before is in its examples, which it keeps.
 * "Did it really train": the weights moved, every number is finite, and the loss on the held-out part went down. An adapter that does not
   pass is not stored, and an earlier one stays. (Opacus with PEFT once trained silently into nothing: opacus issue 820.)
 * Progress is saved; a training that was killed or told to stop goes on where it was, within the budget that is left.
 * Memory is asked for before loading and watched while training: past the limit the training ends, not the node.
 * Runs in a process of its own (`milpa-node learn`): this module loads torch.
"""

import os
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch
import torch.nn.functional as F

from node.learn import stored
from node.learn.examples import RELEASE, Parts
from node.learn.underway import STATE
from node.store import LearningExample
from node.update.slots import ActiveRelease
from protocol.adapters import AdapterHeader, Flat, unpack
from protocol.errors import BadInput, NotEnough
from protocol.models.checkpoint import Checkpoint
from protocol.models.feed import Batch, Epochs
from protocol.models.lora import attach, detach, read_adapter_gguf
from protocol.models.tokenizer import Example, Tokenizer, make_example
from protocol.models.torch_model import best_dtype, to_torch
from protocol.models.training import Loss, Step, View, mean_loss, train
from protocol.tasks import Task

RATE = 1e-3  # of LoRA factors; ten times that of full fine-tuning, as usual
EPOCHS = 3.0
BATCH_TOKENS = 512  # about 5 examples: a site has hundreds, and should take more than a handful of steps an epoch
ROW_LIMIT = 512  # tokens of prompt and answer; the training pass knows no sliding window
LOADING_BYTES = 8  # a parameter, at the peak: in float32 twice, before it becomes bfloat16 (1,370 MiB measured for 113 million)
SPARE_MB = 500  # MiB beside the weights: activations of a batch, Adam's two copies of the factors, torch itself


class LearnResult(msgspec.Struct, frozen=True):
    """What a training did."""

    release: int
    stored: bool
    reason: str  # why not stored, or "" when it is
    examples: int
    held_out: int
    loss_before: float  # nats a token on the held-out part
    loss_after: float
    steps: int
    seconds: float
    peak_rss_mb: float
    digest: str = ""
    left_out: int = 0  # examples longer than ROW_LIMIT tokens
    rehearsed: int = 0  # of the examples, general ones that came with the release


def learn(
    state_dir: Path,
    site: str,
    active: ActiveRelease,
    task: Task,
    parts: Parts,
    *,
    rate: float = RATE,
    epochs: float = EPOCHS,
    max_seconds: float = 600.0,
    max_memory_mb: int = 0,
    threads: int = 1,
    seed: int = 0,
    now: Callable[[], float] = time.time,
    progress: Callable[[Step], None] | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> LearnResult:
    """Train and, if it helped, store the adapter for `active`.

    Args:
        max_seconds: of training; loading and measuring come on top (about a tenth).
        max_memory_mb: MiB this process may need; 0: what the machine has free.

    Raises:
        BadInput: the release ships no initial adapter.
        NotEnough: memory, or examples short enough to train on.
        Diverged: the loss left the numbers; nothing was stored.
        Interrupted: as asked; called again with the same examples it goes on.
    """
    began = time.monotonic()
    if active.initial_adapter is None:
        raise BadInput(f"release {active.number} ships no initial adapter: nothing trained on it could be merged")
    torch.set_num_threads(threads)
    checkpoint = Checkpoint.read(active.model)
    matrices = sum(outputs * inputs for _, (outputs, inputs) in checkpoint.matrices())
    need_memory(matrices + len(checkpoint.vocabulary.tokens) * checkpoint.hidden, max_memory_mb)
    model = to_torch(checkpoint, dtype=best_dtype())  # the factors are float32 in any case
    del checkpoint
    with Tokenizer(active.model) as tokenizer:
        training, weights, left_out = tokenised(tokenizer, task, parts.training)
        held_out, _, _ = tokenised(tokenizer, task, parts.held_out)
    if not training or not held_out:
        raise NotEnough(f"no example fits into {ROW_LIMIT} tokens, with some held out; nothing to train on")
    start, layout = read_adapter_gguf(active.initial_adapter)
    parameters = attach(model, start, layout)
    before = mean_loss(model, held_out, batch_tokens=BATCH_TOKENS)
    folder = stored.folder(state_dir, active.number)
    folder.mkdir(parents=True, exist_ok=True)
    done = train(
        model, Epochs(training, batch_tokens=BATCH_TOKENS, seed=seed), parameters=parameters, learning_rate=rate,
        loss=weighted(weights), epochs=epochs, seconds=max_seconds, state=folder / STATE, interrupted=interrupted,
        progress=watching(max_memory_mb, progress),
    )  # fmt: skip
    after = mean_loss(model, held_out, batch_tokens=BATCH_TOKENS)
    flat = detach(model, layout)
    reason = why_not(start, flat, layout, before, after)
    digest = ""
    if not reason:
        header = msgspec.structs.replace(
            layout, site=site, release=active.number, base_digest=digest_of(active, "model"),
            initial_digest=digest_of(active, "initial-adapter"), examples=len(training), loss_before=before, loss_after=after,
            held_out=len(held_out), trained_at=int(now()),
        )  # fmt: skip
        digest = stored.save(state_dir, flat, header)
    (folder / STATE).unlink(missing_ok=True)  # a finished training is not resumed
    return LearnResult(
        release=active.number, stored=not reason, reason=reason, examples=len(training), held_out=len(held_out), loss_before=before,
        loss_after=after, steps=done.steps, seconds=round(time.monotonic() - began, 3), digest=digest, left_out=left_out,
        rehearsed=sum(one.origin == RELEASE for one in parts.training),
        peak_rss_mb=peak_mb(),
    )  # fmt: skip


def tokenised(tokenizer: Tokenizer, task: Task, examples: Sequence[LearningExample]) -> tuple[list[Example], list[float], int]:
    """Token rows, the weight of each, and how many were too long.

    An example with a verdict and no sentence teaches no end of text: the model should go on to explain.
    """
    rows: list[Example] = []
    weights: list[float] = []
    for one in examples:
        row = make_example(tokenizer, task, one.record)
        if one.partial:
            row = Example(row.prompt, row.target[:-1])
        if len(row.prompt) + len(row.target) <= ROW_LIMIT:
            rows.append(row)
            weights.append(one.weight)
    return rows, weights, len(examples) - len(rows)


def weighted(weights: Sequence[float]) -> Loss:
    """Cross entropy in which each token counts as its example does: an operator's correction 1, a peer's answer its confidence."""
    by_example = torch.tensor(weights, dtype=torch.float32)

    def loss(view: View, batch: Batch) -> torch.Tensor:
        by_token = by_example[torch.tensor(batch.index)][batch.rows]  # (n,)
        each = F.cross_entropy(view.logits, batch.targets, reduction="none")  # (n,)
        return (each * by_token).sum() / by_token.sum().clamp_min(1e-6)

    return loss


def why_not(start: Flat, flat: Flat, layout: AdapterHeader, before: float, after: float) -> str:
    """Why a trained adapter is not worth storing; "" when it is."""
    if not np.isfinite(flat).all():
        return "the trained factors are not finite"
    if not any(np.any(b) for _, b in unpack(flat, layout).values()) or np.array_equal(start, flat):
        return "training did not move the weights"
    if not (np.isfinite(before) and np.isfinite(after)):
        return "the held-out loss is not finite"
    if after >= before:
        return f"the held-out loss did not fall ({before:.4f} to {after:.4f} nats a token)"
    return ""


def need_memory(parameters: int, limit_mb: int) -> None:
    """Check that the model fits while it is loaded and trained.

    Raises:
        NotEnough: it does not; the message names figure and need.
    """
    need = parameters * LOADING_BYTES // (1 << 20) + SPARE_MB
    have = limit_mb or available_mb()
    if need > have:
        raise NotEnough(f"training needs about {need} MiB of memory, {have} MiB may be used; close something, or train elsewhere")


def watching(limit_mb: int, progress: Callable[[Step], None] | None) -> Callable[[Step], None]:
    """`progress`, and a look at this process's memory at every step; 0: no limit.

    Raises (when called):
        NotEnough: more was needed than may be used.
    """

    def look(step: Step) -> None:
        if limit_mb and peak_mb() > limit_mb:
            raise NotEnough(f"training took {peak_mb():.0f} MiB of memory, {limit_mb} MiB may be used; raise learn.max_memory_mb")
        if progress is not None:
            progress(step)

    return look


def peak_mb() -> float:
    """Most memory this process ever had resident, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def available_mb() -> int:
    """Memory that can be had without swapping, MiB (proc(5), MemAvailable)."""
    meminfo = Path("/proc/meminfo")
    for line in meminfo.read_text(encoding="ascii").splitlines() if meminfo.is_file() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) // 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // (1 << 20)


def digest_of(active: ActiveRelease, kind: str) -> str:
    """Digest of a file of the release, as its signed manifest has it."""
    return next(file.digest for file in active.release.files_for(active.role) if file.kind == kind)
