"""A second teacher looks for hallucinations in a sample of the kept targets. Its verdicts are plain data, part of the evidence.

One question, whatever the second teacher can do: does a target's own source explain it better than any of OTHERS other sources do?
 * An open teacher: the mean log-probability a token of the target, given its source and given the others.
 * One that tells text only: chrF of the target against its answer to the source, and against its answers to the others.
A target that another source explains as well is suspect: it says something that its source does not. Others are sources of the same
sample whose length is nearest, so that length alone decides nothing. With k others a target that has nothing to do with its source is
found with a chance of k / (k + 1).
A verdict is not a proof: a second teacher that does not know a word suspects a good target.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from coordinator.forge.judging.metrics import sentence_chrf, wilson
from coordinator.forge.synthesis.rows import Row
from coordinator.forge.teachers import Teacher, asked
from protocol.errors import NotEnough
from protocol.models.tokenizer import Example, Tokenizer
from protocol.tasks import Record, Task

OTHERS = 4  # sources that a target is held against
SAMPLE = 200  # targets; a share of suspects of 5% is then known to 3 points
BATCH = 64  # targets judged together


class Verdict(msgspec.Struct, frozen=True):
    """What the second teacher made of one target."""

    id: str
    source: str
    target: str
    suspect: bool
    own: float  # how well its own source explains it: nats a token, or chrF
    others: float  # the best of the others
    reason: str  # for people


class Audit(msgspec.Struct, frozen=True):
    """A sample of the kept targets, audited."""

    teacher: str  # the second one
    digest: str
    method: str  # "log-probability, nats a token" or "agreement, chrF"
    audited: int
    of: int  # kept targets in all
    suspect: float  # share of the audited
    suspect_ci: tuple[float, float]  # 95%, Wilson
    verdicts: tuple[Verdict, ...]  # suspects first

    @property
    def sentence(self) -> str:
        """One line for people."""
        low, high = self.suspect_ci
        return f"{self.teacher} suspects {self.suspect:.1%} of {self.audited} targets ({low:.1%} to {high:.1%})"

    def plain(self) -> dict[str, Any]:
        """As JSON would have it."""
        found: dict[str, Any] = msgspec.to_builtins(self)
        return found

    def without_texts(self) -> "Audit":
        """The same with the verdicts' figures only, for a lineage that others read: their ids lead back to the texts."""
        bare = (msgspec.structs.replace(verdict, source="", target="") for verdict in self.verdicts)
        return msgspec.structs.replace(self, verdicts=tuple(bare))


def audit(
    teacher: Teacher, task: Task, rows: Iterable[Row], *, text: Tokenizer | None = None, sample: int = SAMPLE, seed: int = 0
) -> Audit:
    """Let `teacher` judge the best texts of `sample` rows, chosen by hash.

    Args:
        text: the tokeniser of an open teacher; without it the teacher is asked for texts.

    Raises:
        NotEnough: fewer than two targets were kept: there is no other source to hold one against.
        Unavailable: the teacher did not answer.
    """
    kept = [(row.record, row.hypotheses[0].text) for row in rows if row.hypotheses]
    if len(kept) < 2:
        raise NotEnough(f"{len(kept)} targets were kept; an audit needs at least 2")
    chosen = sorted(kept, key=lambda pair: hashlib.sha256(f"{seed} {pair[0].source}".encode()).digest())[: max(2, sample)]
    likely = teacher.open and text is not None
    verdicts: list[Verdict] = []
    for first in range(0, len(chosen), BATCH):
        places = range(first, min(first + BATCH, len(chosen)))
        held = [[place, *others_of(chosen, place)] for place in places]
        explained = (
            _by_log_prob(teacher, task, chosen, held, text) if likely and text is not None else _by_agreement(teacher, task, chosen, held)
        )
        verdicts += [_verdict(*chosen[place], scores, likely) for place, scores in zip(places, explained, strict=True)]
    suspects = sum(verdict.suspect for verdict in verdicts)
    return Audit(
        teacher=teacher.name, digest=teacher.digest, method="log-probability, nats a token" if likely else "agreement, chrF",
        audited=len(verdicts), of=len(kept), suspect=suspects / len(verdicts), suspect_ci=wilson(suspects, len(verdicts)),
        verdicts=tuple(sorted(verdicts, key=lambda verdict: (not verdict.suspect, verdict.own - verdict.others))),
    )  # fmt: skip


def others_of(chosen: Sequence[tuple[Record, str]], place: int) -> list[int]:
    """Places of the OTHERS sources nearest in length, equal ones left out."""
    mine = chosen[place][0].source
    different = [at for at in range(len(chosen)) if chosen[at][0].source != mine]
    return sorted(different, key=lambda at: (abs(len(chosen[at][0].source) - len(mine)), at))[:OTHERS]


def _by_log_prob(
    teacher: Teacher, task: Task, chosen: Sequence[tuple[Record, str]], held: Sequence[Sequence[int]], text: Tokenizer
) -> list[list[float]]:
    """log p of each target a token, given its own source first and then the others."""
    examples = [
        Example(text.encode(task.prompt(chosen[at][0]), bos=True), text.encode(" " + chosen[places[0]][1], bos=False))
        for places in held for at in places
    ]  # fmt: skip
    means = iter([float(row.mean()) for row in teacher.log_probs(examples)])
    return [[next(means) for _ in places] for places in held]


def _by_agreement(teacher: Teacher, task: Task, chosen: Sequence[tuple[Record, str]], held: Sequence[Sequence[int]]) -> list[list[float]]:
    """chrF of each target against the teacher's answer to its own source first and then to the others."""
    needed = sorted({at for places in held for at in places})
    prompts = asked(teacher, task, [chosen[at][0] for at in needed])
    said = teacher.generate(prompts, n=1, temperature=0.0, seed=0, max_new_tokens=task.max_new_tokens + 1)
    answers = {at: task.parse(texts[0].text).text if texts else "" for at, texts in zip(needed, said, strict=True)}
    scores = iter(
        sentence_chrf([chosen[places[0]][1] for places in held for _ in places], [answers[at] for places in held for at in places])
    )
    return [[next(scores) for _ in places] for places in held]


def _verdict(record: Record, target: str, scores: Sequence[float], likely: bool) -> Verdict:
    own, best = scores[0], max(scores[1:])
    unit = "nats a token" if likely else "chrF"
    suspect = own <= best
    reason = f"its source explains it by {own:.2f} {unit}, the best of {len(scores) - 1} others by {best:.2f}"
    return Verdict(record.id, record.source, target, suspect, own, best, reason)
