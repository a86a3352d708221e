"""Distillation: the teacher answers the training sources, its answers and top-k log-probabilities become the student's targets.

Sequence-level targets first (Kim and Rush 2016), sparse logits second (top-k and a tail bucket, captured in the same pass that generates).
A target must pass the task's gate: of the task's form, finished, and not against a known truth. Where the teacher is wrong and the truth is
known, the record's own target is learned, without the teacher's log-probabilities; where nothing is known, the record is left out.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import torch
from transformers import Gemma3ForCausalLM

from coordinator.forge.targets.cache import TargetCache, Targets
from coordinator.forge.training.losses import top_k
from protocol.models.tokenizer import Example, Tokenizer, make_example
from protocol.models.torch_model import generate
from protocol.tasks import Record, Task

TOP_K = 50
BATCH = 64  # prompts generated together
CHUNK = 512  # records sorted by length together
COPIED = 0.9  # a translation longer than 20 characters that shares this much of its words with the source is a copy


class Captured(msgspec.Struct, frozen=True):
    """What the teacher said about one record."""

    id: str
    prompt: list[int]
    target: list[int]  # empty: left out
    kind: str  # "teacher", "own" (the teacher was wrong, the truth is known) or "dropped"


class CaptureResult(msgspec.Struct, frozen=True):
    """How a capture went."""

    records: int
    teacher: float  # share of targets that are the teacher's
    own: float
    dropped: float
    seconds: float
    bytes_a_token: float


def passes(task: Task, record: Record, text: str) -> bool:
    """The gate: of the task's form, and not against a known truth."""
    answer = task.parse(text)
    if task.kind == "verdict":
        return bool(answer.verdict) and bool(answer.sentence) and record.verdict in ("", answer.verdict)
    if not answer.sentence:
        return False
    source, words = set(record.source.lower().split()), answer.sentence.lower().split()
    copied = len(record.source) > 20 and sum(word in source for word in words) >= COPIED * len(words)
    ratio = len(answer.sentence) / max(1, len(record.source))
    return not copied and 0.3 < ratio < 3.0


def capture(
    model: Gemma3ForCausalLM,
    tokenizer: Tokenizer,
    task: Task,
    records: Sequence[Record],
    *,
    cache: TargetCache,
    log: Path,
    seconds: float | None = None,
    progress: Callable[[float, str], None] | None = None,
) -> tuple[list[Captured], CaptureResult]:
    """Ask the teacher about `records` in order, until they or `seconds` end; goes on where `log` stopped.

    `log` holds a JSON line a record; a line cut by a power failure is dropped and its record asked again.
    """
    done = read_log(log)
    known = {one.id for one in done}
    begin = time.monotonic()
    todo = [record for record in records if record.id not in known]
    stopped = False
    for start in range(0, len(todo), CHUNK):
        chunk = sorted(todo[start : start + CHUNK], key=lambda record: len(record.source))
        for first in range(0, len(chunk), BATCH):
            if seconds is not None and time.monotonic() - begin > seconds:
                stopped = True
                break
            found = _ask(model, tokenizer, task, chunk[first : first + BATCH], cache)
            cache.sync()
            with log.open("ab") as file:
                file.write(b"".join(msgspec.json.encode(one) + b"\n" for one in found))
            done += found
            if progress:
                spent = (time.monotonic() - begin) / seconds if seconds else 0.0
                progress(min(1.0, max(spent, len(done) / len(records))), f"{len(done)} records")
        if stopped:
            break
    count = max(1, len(done))
    shares = {kind: sum(one.kind == kind for one in done) / count for kind in ("teacher", "own", "dropped")}
    tokens = sum(len(one.target) for one in done if one.kind == "teacher")
    return done, CaptureResult(
        len(done), shares["teacher"], shares["own"], shares["dropped"], time.monotonic() - begin, cache.size / max(1, tokens)
    )


def examples_of(captured: Sequence[Captured]) -> list[Example]:
    """What the student learns: everything that was not dropped."""
    return [Example(one.prompt, one.target) for one in captured if one.kind != "dropped"]


def _ask(model: Gemma3ForCausalLM, tokenizer: Tokenizer, task: Task, records: Sequence[Record], cache: TargetCache) -> list[Captured]:
    """Answer a batch greedily, keep the top k of every chosen token."""
    prompts = [tokenizer.encode(task.prompt(record), bos=True) for record in records]
    seen: list[list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = [[] for _ in records]

    def watch(rows: list[int], logits: torch.Tensor, _chosen: torch.Tensor) -> None:
        ids, log_probs, tail = top_k(logits, cache.header.k)
        for at, row in enumerate(rows):
            seen[row].append((ids[at], log_probs[at], tail[at]))

    answers = generate(model, prompts, max_new_tokens=task.max_new_tokens + 1, eos=tokenizer.eos, watch=watch)
    found = []
    for record, prompt, answer, view in zip(records, prompts, answers, seen, strict=True):
        finished = answer[-1] == tokenizer.eos
        if finished and len(answer) > 1 and passes(task, record, tokenizer.decode(answer[:-1])):
            ids, log_probs, tail = (torch.stack(part).numpy() for part in zip(*view, strict=True))
            cache.put(Example(prompt, answer), Targets(ids, log_probs, tail))
            found.append(Captured(record.id, prompt, answer, "teacher"))
        elif record.target:
            found.append(Captured(record.id, prompt, make_example(tokenizer, task, record).target, "own"))
        else:
            found.append(Captured(record.id, prompt, [], "dropped"))
    return found


def read_log(log: Path) -> list[Captured]:
    """Whole lines of the log; a torn last line is cut off the file."""
    if not log.is_file():
        return []
    data = log.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with log.open("r+b") as file:
            file.truncate(len(whole))
    return [msgspec.json.decode(line, type=Captured) for line in whole.splitlines()]
