"""How many samples a source gets, and what is kept of them.

* Every source gets FIRST samples. More are asked where they pay: where the first disagree, a gate refused one, or the better one's score
  is low. Where two samples agree, a third says the same. (The 2-sample pre-filter of TranslateGemma, by agreement instead of MetricX.)
* Gates first, then the consistency score; the `keep` best texts stay, not only the best one (MBR-n, Wang et al. 2024, arXiv 2407.10456).
* What a source gets depends on the plan and on itself alone: not on the batch, the shard, or where a run was killed.
* Work is shared by hash (`forge.sharing`): each worker has a file of its own, and the files together are the whole (`RowLog.join`).
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from coordinator.forge.sharing import Worker
from coordinator.forge.synthesis.gates import Identify, refusal
from coordinator.forge.synthesis.rows import Hypothesis, Refused, Row, RowLog, key_of, read_rows
from coordinator.forge.synthesis.scoring import Candidate, Judge, Signals, consistency
from coordinator.forge.teachers import SAMPLES_LIMIT, Said, Teacher, asked
from protocol.errors import BadInput, TooLarge
from protocol.tasks import Record, Task

FIRST = 2  # samples that every source gets
BATCH = 32  # sources asked together and written together: those that a kill asks again at most, with all their samples


class Plan(msgspec.Struct, frozen=True):
    """What decides the rows, beside teacher and records."""

    samples: int = 6  # a source, at most; 1: the greedy answer
    temperature: float = 0.7
    keep: int = 3  # texts of a source
    agree: float = 70.0  # chrF of the first samples with each other from which no more are asked
    low: float = -4.0  # score of the best below which more are asked although they agree
    seed: int = 0

    def checked(self) -> "Plan":
        """Itself.

        Raises:
            BadInput: a figure out of range.
        """
        if not 1 <= self.samples <= SAMPLES_LIMIT:
            raise BadInput(f"{self.samples} samples a source are not possible; ask for 1 to {SAMPLES_LIMIT}")
        if not 1 <= self.keep <= self.samples:
            raise BadInput(f"{self.keep} texts of {self.samples} samples cannot be kept; keep 1 to {self.samples}")
        if not 0.0 < self.temperature <= 2.0:
            raise BadInput(
                f"temperature {self.temperature} is not usable for samples; 0.7 is usual, for the greedy answer ask for 1 sample"
            )
        return self


class Summary(msgspec.Struct, frozen=True):
    """How a synthesis went: over all rows of the file, but for `seconds`."""

    sources: int
    kept: int  # of them with at least one text
    texts: int
    samples: int  # asked for
    saved: float  # share of the samples that the pre-filter did not ask for
    refused: dict[str, int]  # samples by gate
    duplicates: int  # records of the input whose source another one has
    left: int  # sources still to ask: the time ran out
    seconds: float  # of this run


def synthesise(
    teacher: Teacher,
    task: Task,
    records: Sequence[Record],
    log: RowLog,
    *,
    plan: Plan,
    judge: Judge,
    identify: Identify | None = None,
    worker: Worker | None = None,
    seconds: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Ask `teacher` about the worker's share of `records` that `log` does not hold yet, until they or `seconds` end.

    Raises:
        BadInput: a plan that cannot be used.
        Unavailable: the teacher did not answer; what was written stays, the same call goes on.
    """
    plan.checked()
    began = time.monotonic()
    worker = worker or Worker()
    mine = [(key, record) for record in records if worker.does(key := key_of(record))]
    once = dict(reversed(mine))  # the first record of a source stands for all
    todo = [(key, once[key]) for key in dict.fromkeys(key for key, _ in mine) if key not in log]
    done = len(once) - len(todo)
    for first in range(0, len(todo), BATCH):
        if seconds is not None and time.monotonic() - began > seconds:
            break
        part = todo[first : first + BATCH]
        log.append(_readable(teacher, task, part, plan, judge, identify))
        done += len(part)
        if progress:
            progress(done, len(once))
    return msgspec.structs.replace(
        summary(read_rows(log.path), plan),
        duplicates=len(mine) - len(once),
        left=len(once) - done,
        seconds=round(time.monotonic() - began, 1),
    )


def summary(rows: Iterable[Row], plan: Plan) -> Summary:
    """Figures over rows."""
    sources = kept = texts = samples = 0
    refused: Counter[str] = Counter()
    for row in rows:
        sources += 1
        kept += bool(row.hypotheses)
        texts += len(row.hypotheses)
        samples += row.samples
        for one in row.refused:
            refused[one.gate] += one.times
    saved = 1.0 - samples / (sources * plan.samples) if sources else 0.0
    return Summary(sources, kept, texts, samples, saved, dict(refused.most_common()), 0, 0, 0.0)


def plan_of(teacher: Teacher, task: Task, plan: Plan, *, worker: Worker, signals: Sequence[str], back: str = "") -> dict[str, Any]:
    """What the first line of a file of rows says; another plan, another file. `back`: digest of the translator back, if any."""
    return {"teacher": teacher.digest, "name": teacher.name, "task": task.name, "template": task.template, "signals": sorted(signals),
            "back": back, "shard": f"{worker.number}/{worker.of}", **msgspec.to_builtins(plan)}  # fmt: skip


def more_pays(hypotheses: Sequence[Hypothesis], refused: Sequence[Refused], plan: Plan) -> str:
    """Why more samples of a source are worth asking for; "" where they are not."""
    if refused:
        return f"a sample was refused: {refused[0].gate}"
    if not hypotheses:
        return "nothing was said"
    shared = min((one.signals.agreement for one in hypotheses if one.signals.agreement is not None), default=100.0)
    if shared < plan.agree:
        return f"the first samples agree by {shared:.0f} chrF, below {plan.agree:.0f}"
    return f"the best score is {hypotheses[0].score:.1f}, below {plan.low:.1f}" if hypotheses[0].score < plan.low else ""


def _readable(
    teacher: Teacher, task: Task, part: Sequence[tuple[str, Record]], plan: Plan, judge: Judge, identify: Identify | None
) -> list[Row]:
    """The rows of one batch; a source that is too long for the teacher is refused alone and does not stop the others."""
    try:
        return _rows(teacher, task, part, plan, judge, identify)
    except TooLarge as error:
        if len(part) > 1:
            return [row for one in part for row in _readable(teacher, task, [one], plan, judge, identify)]
        return [Row(*part[0], (), (Refused("", "too long", str(error)),), 0, "the teacher cannot read it")]


def _rows(
    teacher: Teacher, task: Task, part: Sequence[tuple[str, Record]], plan: Plan, judge: Judge, identify: Identify | None
) -> list[Row]:
    """The rows of one batch: the first samples of all, and more of those that more pays for."""
    records = [record for _, record in part]
    said = _ask(teacher, task, records, min(FIRST, plan.samples), plan, seed=plan.seed)
    found = _weighed(task, records, said, judge, identify)
    reasons = [more_pays(*one, plan) if plan.samples > FIRST else "" for one in found]
    again = [at for at, reason in enumerate(reasons) if reason]
    if again:
        added = _ask(teacher, task, [records[at] for at in again], plan.samples - FIRST, plan, seed=plan.seed + 1)
        for at, more in zip(again, added, strict=True):
            said[at] = [*said[at], *more]
        for at, one in zip(again, _weighed(task, [records[at] for at in again], [said[at] for at in again], judge, identify), strict=True):
            found[at] = one
    return [
        Row(key, record, tuple(kept[: plan.keep]), tuple(refused), plan.samples if reason else min(FIRST, plan.samples), reason or "agreed")
        for (key, record), (kept, refused), reason in zip(part, found, reasons, strict=True)
    ]


def _ask(teacher: Teacher, task: Task, records: Sequence[Record], n: int, plan: Plan, *, seed: int) -> list[list[Said]]:
    temperature = plan.temperature if plan.samples > 1 else 0.0
    prompts = asked(teacher, task, records)
    return teacher.generate(prompts, n=n, temperature=temperature, seed=seed, max_new_tokens=task.max_new_tokens + 1)


def _weighed(
    task: Task, records: Sequence[Record], said: Sequence[Sequence[Said]], judge: Judge, identify: Identify | None
) -> list[tuple[list[Hypothesis], list[Refused]]]:
    """For each record the texts that passed, best first, and those that were refused; equal texts are one."""
    candidates: list[list[Candidate]] = []
    refused: list[list[Refused]] = []
    for record, answers in zip(records, said, strict=True):
        passed, out = _gated(task, record, answers, identify)
        candidates.append(passed)
        refused.append(out)
    signals = judge.signals(task, records, candidates)
    return [
        (sorted(map(_hypothesis, mine, known), key=lambda one: -one.score), out)
        for mine, known, out in zip(candidates, signals, refused, strict=True)
    ]


def _gated(task: Task, record: Record, answers: Sequence[Said], identify: Identify | None) -> tuple[list[Candidate], list[Refused]]:
    passed: dict[str, Candidate] = {}
    out: dict[tuple[str, str], Refused] = {}
    for said in answers:
        text = task.parse(said.text).text
        found = refusal(task, record, said.text, finished=said.finished, identify=identify)
        if found is None:
            seen = passed.get(text)
            passed[text] = msgspec.structs.replace(seen, times=seen.times + 1) if seen else Candidate(text, said.tokens, said.log_prob)
        else:
            before = out.get((text, found.gate))
            out[text, found.gate] = Refused(text, found.gate, found.reason, before.times + 1 if before else 1)
    return list(passed.values()), list(out.values())


def _hypothesis(candidate: Candidate, signals: Signals) -> Hypothesis:
    return Hypothesis(candidate.text, consistency(signals), signals, candidate.times)
