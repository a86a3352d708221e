"""Capture: the teacher's view of every target token of the training records becomes a target cache.

Two kinds of answers: `teacher`, which the teacher writes itself (greedy; sequence-level distillation, Kim and Rush 2016), and `given`,
the records' own targets, read and not written: one forward pass scores them. What a torch model writes is scored by what it computed while
it wrote; any other open teacher (`coordinator.forge.teachers`) reads its answer a second time, tokenised as the student will be.
An answer of the teacher must pass the task's gate: of the task's form, finished, and not against a known truth. Where the teacher is wrong
and the truth is known, the record's own target is learned, without the teacher's view; where nothing is known, the record is left out.
Several workers may capture into one folder, each its share of the records by hash, with a shard family and a log of its own.
What the log says is done is believed where the record is still the one that was captured, and its view is still in the cache: a record of
another text under the same id is refused or replaced, a view that was lost to damage is captured again.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import torch
from transformers import Gemma3ForCausalLM

from coordinator.forge.sharing import Worker
from coordinator.forge.synthesis.gates import passes
from coordinator.forge.targets.cache import Cached, CacheHeader, TargetCache
from coordinator.forge.targets.score import views, views_of
from coordinator.forge.teachers import Teacher, asked
from protocol.blobs import whole_lines
from protocol.digests import digest_value
from protocol.errors import BadInput
from protocol.models.checkpoint import Checkpoint
from protocol.models.tokenizer import Example, Tokenizer, make_example
from protocol.models.torch_model import generate
from protocol.tasks import Record, Task

TOP_K = 50  # ids a token, or draws
BATCH = 64  # prompts generated together
CHUNK = 512  # records sorted by length together
SEEN = ("teacher", "given")  # kinds whose view the cache has
SCORED_TOGETHER = 16  # answers: at each of their tokens the vocabulary's logits are held

Scored = list[tuple[Example, Cached]]


class Captured(msgspec.Struct, frozen=True):
    """What the teacher said about one record."""

    id: str
    prompt: list[int]
    target: list[int]  # empty: left out
    kind: str  # "teacher", "own" (the teacher was wrong, the truth is known), "given" (read, not asked) or "dropped"
    record: str = ""  # digest of task and record, see `capture`; "": from a version that did not say


class CaptureResult(msgspec.Struct, frozen=True):
    """How a capture went."""

    records: int
    teacher: float  # share of targets that are the teacher's
    own: float
    given: float
    dropped: float
    again: int  # records of this run that were captured before: their view was lost, or they were replaced
    seconds: float  # of this run
    tokens: int  # target tokens that the teacher's view is cached of
    tokens_a_second: float  # of this run
    bytes_a_token: float


def header_of(
    checkpoint: Checkpoint, *, mode: Literal["topk", "sampled", "hidden8"] = "topk", k: int = TOP_K, temperature: float = 1.0
) -> CacheHeader:
    """The header of a cache of what that teacher thinks."""
    tokens = checkpoint.vocabulary.tokens
    return CacheHeader(
        teacher=checkpoint.digest,
        tokenizer=digest_value(tokens),
        k=0 if mode == "hidden8" else min(k, len(tokens)),
        vocabulary=len(tokens),
        temperature=temperature,
        mode=mode,
        width=checkpoint.hidden if mode == "hidden8" else 0,
    )


def header_from(teacher: Teacher, *, k: int = TOP_K) -> CacheHeader:
    """The header of a cache of what any open teacher thinks: mode topk, at temperature 1.

    Raises:
        NoLogits: the teacher only tells text; the message says what goes without.
    """
    teacher.score([], k=k)
    return CacheHeader(teacher=teacher.digest, tokenizer=teacher.tokenizer, k=min(k, teacher.vocabulary), vocabulary=teacher.vocabulary)


def log_of(folder: Path, worker: Worker) -> Path:
    """Where that worker logs what it captured into the cache in `folder`."""
    return folder / f"captured-{worker.number}-of-{worker.of}.jsonl"


def capture(
    teacher: Gemma3ForCausalLM | Teacher,
    tokenizer: Tokenizer,
    task: Task,
    records: Sequence[Record],
    *,
    cache: TargetCache,
    log: Path,
    answers: Literal["teacher", "given"] = "teacher",
    replace: bool = False,
    seconds: float | None = None,
    progress: Callable[[float, str], None] | None = None,
) -> tuple[list[Captured], CaptureResult]:
    """Capture the cache's worker's share of `records` in order, until they or `seconds` end; goes on where `log` stopped.

    `log` holds a JSON line a record; a line cut by a power failure is dropped and its record captured again, which doubles nothing:
    an example that is in the cache stays as it is.

    Args:
        teacher: a torch model for a cache of any mode; any open teacher for one of mode topk (`header_from`).
        tokenizer: the student's: the cache is named by its ids, so `cache.header.tokenizer` is its digest.
        replace: capture records again that changed since, in place of what the log has of them.

    Raises:
        BadInput: the log is of the other kind of answers, it or `records` have another text under a record's id, or another process writes
            this family.
    """
    records = cache.worker.share(records)
    cache.claim()
    known = {one.id: one for one in read_log(log)}
    if any((one.kind == "given") != (answers == "given") for one in known.values() if one.kind != "dropped"):
        raise BadInput(f"{log} holds answers of the other kind, not {answers!r}; capture into another folder")
    digests: dict[str, str] = {}
    for record in records:
        if digests.setdefault(record.id, digest := digest_value([task, record])) != digest:
            raise BadInput(f"two different records are called {record.id!r}; what is done goes by their ids: give each its own")
    changed = {name for name, digest in digests.items() if name in known and known[name].record != digest}
    if changed and not replace:
        raise BadInput(
            f"{len(changed)} records, {min(changed)} for one, are not those that {log} has under their ids. If you edited them, --replace "
            "captures them in place of the old ones; if this is another file of the same name, rename it or capture into another folder"
        )
    lost = {one.id for one in known.values() if one.kind in SEEN and Example(one.prompt, one.target) not in cache}
    done = [one for one in known.values() if one.id not in changed | lost]
    kept = {one.id for one in done}
    begin = time.monotonic()
    todo = [record for record in records if record.id not in kept]
    tokens = again = 0
    for start in range(0, len(todo), CHUNK):
        chunk = sorted(todo[start : start + CHUNK], key=lambda record: len(record.source))
        for first in range(0, len(chunk), BATCH):
            if seconds is not None and time.monotonic() - begin > seconds:
                return done, _result(done, cache, again, tokens, time.monotonic() - begin)
            batch = chunk[first : first + BATCH]
            found, scored = _captured(teacher, tokenizer, task, batch, cache.header, answers=answers)
            found = [msgspec.structs.replace(one, record=digests[one.id]) for one in found]
            for example, view in scored:
                cache.put(example, view)
            cache.sync()
            with log.open("ab") as file:
                file.write(b"".join(msgspec.json.encode(one) + b"\n" for one in found))
            done += found
            again += sum(one.id in known for one in found)
            tokens += sum(len(example.target) for example, _ in scored)
            if progress:
                spent = (time.monotonic() - begin) / seconds if seconds else 0.0
                progress(min(1.0, max(spent, len(done) / len(records))), f"{len(done)} records")
    return done, _result(done, cache, again, tokens, time.monotonic() - begin)


def _result(done: Sequence[Captured], cache: TargetCache, again: int, tokens: int, seconds: float) -> CaptureResult:
    """Figures over all that the log holds; the rate is this run's."""
    count = max(1, len(done))
    shares = {kind: sum(one.kind == kind for one in done) / count for kind in ("teacher", "own", "given", "dropped")}
    cached = sum(len(one.target) for one in done if Example(one.prompt, one.target) in cache)
    return CaptureResult(
        len(done), shares["teacher"], shares["own"], shares["given"], shares["dropped"], again, seconds, cached,
        tokens / max(seconds, 1e-9), cache.family_size / max(1, cached),
    )  # fmt: skip


def examples_of(captured: Sequence[Captured]) -> list[Example]:
    """What the student learns: everything that was not dropped."""
    return [Example(one.prompt, one.target) for one in captured if one.kind != "dropped"]


def _captured(
    teacher: Gemma3ForCausalLM | Teacher, tokenizer: Tokenizer, task: Task, records: Sequence[Record], header: CacheHeader, *, answers: str
) -> tuple[list[Captured], Scored]:
    """A batch, and the views that belong into the cache."""
    if answers == "teacher":
        if isinstance(teacher, Gemma3ForCausalLM):
            return _answered(teacher, tokenizer, task, records, header)
        found = _asked(teacher, tokenizer, task, records)
    else:
        found = [_own(tokenizer, task, record, kind="given") for record in records]
    examples = [Example(one.prompt, one.target) for one in found if one.kind in SEEN]
    seen = views(teacher, examples, header) if isinstance(teacher, Gemma3ForCausalLM) else teacher.score(examples, k=header.k)
    return found, list(zip(examples, seen, strict=True))


def _asked(teacher: Teacher, tokenizer: Tokenizer, task: Task, records: Sequence[Record]) -> list[Captured]:
    """What a teacher that is not in torch answers greedily, as text; what does not pass the gate gives way to the record's own target."""
    told = teacher.generate(asked(teacher, task, records), n=1, temperature=0.0, seed=0, max_new_tokens=task.max_new_tokens + 1)
    return [
        _own(tokenizer, task, msgspec.structs.replace(record, target=said.text.strip()), kind="teacher")
        if passes(task, record, said.text, finished=said.finished)
        else _own(tokenizer, task, record)
        for record, (said,) in zip(records, told, strict=True)
    ]


def _answered(
    model: Gemma3ForCausalLM, tokenizer: Tokenizer, task: Task, records: Sequence[Record], header: CacheHeader
) -> tuple[list[Captured], Scored]:
    """Answer a batch greedily; what does not pass the gate gives way to the record's own target, without a view."""
    prompts = [tokenizer.encode(task.prompt(record), bos=True) for record in records]
    states: list[list[torch.Tensor]] = [[] for _ in records]  # of each answer, (hidden,) a token

    def watch(rows: list[int], x: torch.Tensor, *_: torch.Tensor) -> None:
        for row, state in zip(rows, x, strict=True):
            states[row].append(state)

    answers = generate(model, prompts, max_new_tokens=task.max_new_tokens + 1, eos=tokenizer.eos, watch=watch)
    found = [
        Captured(record.id, prompt, answer, "teacher")
        if answer[-1] == tokenizer.eos and len(answer) > 1 and passes(task, record, tokenizer.decode(answer[:-1]))
        else _own(tokenizer, task, record)
        for record, prompt, answer in zip(records, prompts, answers, strict=True)
    ]
    scored: Scored = []
    stood = [place for place, one in enumerate(found) if one.kind == "teacher"]
    for begin in range(0, len(stood), SCORED_TOGETHER):
        places = stood[begin : begin + SCORED_TOGETHER]
        examples = [Example(found[place].prompt, found[place].target) for place in places]
        x = torch.stack([state for place in places for state in states[place]])
        scored += zip(examples, views_of(model, x, examples, header), strict=True)
    return found, scored


def _own(tokenizer: Tokenizer, task: Task, record: Record, *, kind: str = "own") -> Captured:
    """The record's own target; without one it is left out."""
    if not record.target:
        return Captured(record.id, tokenizer.encode(task.prompt(record), bos=True), [], "dropped")
    example = make_example(tokenizer, task, record)
    return Captured(record.id, example.prompt, example.target, kind)


def captured_in(folder: Path) -> list[Captured]:
    """What all workers captured into the cache in `folder`, each record once however the work was shared out from run to run."""
    return list({one.id: one for log in sorted(folder.glob("captured-*-of-*.jsonl")) for one in read_log(log)}.values())


def read_log(log: Path) -> list[Captured]:
    """What the log says of each record, the last of a record's lines; a torn last line is cut off the file."""
    return list({one.id: one for one in (msgspec.json.decode(line, type=Captured) for line in whole_lines(log))}.values())
