"""Where a file of targets comes from: who wrote them, by which plan, what that teacher cannot tell, and what an audit suspected.

`synthesise --targets FILE` writes it beside them as FILE.made.json, and `distill --records FILE` copies it into the student's lineage. It
names its file by digest: a file that was changed since, or joined from several, is not described by it, and that is an error, not a guess.
"""

from pathlib import Path
from typing import Any

import msgspec

from coordinator.forge.synthesis.audit import Audit
from coordinator.forge.synthesis.sampling import Summary
from coordinator.forge.teachers.cost import TextOnly
from protocol.blobs import write_atomically
from protocol.digests import digest_file
from protocol.errors import BadInput

ENDING = ".made.json"


class Made(msgspec.Struct, frozen=True):
    """What is known of one file of targets."""

    file_digest: str  # of the targets
    records: int
    generic: float  # share of the records that were mixed in
    generic_digest: str  # of the file that they come from; "" where none were
    teacher: str
    teacher_digest: str
    open: bool  # whether the teacher told log-probabilities
    cost: TextOnly | None  # what a teacher that tells text only cannot do
    plan: dict[str, Any]  # the first line of the file of rows: task, samples, signals, the translator back, seed
    counts: Summary
    audit: Audit | None  # without the texts, which stand in OUT.audit.json

    @property
    def sentence(self) -> str:
        """One line for the lineage."""
        told = "log-probabilities too" if self.open else "text only"
        parts = [f"{self.counts.kept:,} of {self.counts.sources:,} sources have a target of {self.teacher} (tells {told})"]
        parts += [f"{self.counts.left:,} not asked"] if self.counts.left else []
        parts += [f"{self.generic:.0%} generic"] if self.generic else []
        return "; ".join([*parts, self.audit.sentence if self.audit else "not audited"])

    def plain(self) -> dict[str, Any]:
        """As JSON would have it, for the lineage, with its `sentence`."""
        found: dict[str, Any] = msgspec.to_builtins(self)
        return {"sentence": self.sentence} | found


def file_of(targets: Path) -> Path:
    """Where what is known of these targets stands."""
    return targets.with_name(targets.name + ENDING)


def write_made(targets: Path, made: Made) -> None:
    """Write it. Before the targets: a kill between the two leaves a digest that does not fit, which `read_made` tells."""
    write_atomically(file_of(targets), msgspec.json.format(msgspec.json.encode(made)))


def read_made(targets: Path) -> Made | None:
    """What is known of these targets; None where nothing stands beside them, as with records that people wrote.

    Raises:
        BadInput: it is damaged, or describes other bytes than those of `targets`.
    """
    file = file_of(targets)
    if not file.is_file() or not targets.is_file():
        return None
    try:
        made = msgspec.json.decode(file.read_bytes(), type=Made)
    except msgspec.DecodeError as error:
        raise BadInput(f"{file} is not what `synthesise --targets` wrote ({error}); run that again, or delete it") from error
    if made.file_digest != digest_file(targets):
        raise BadInput(
            f"{targets} was changed since `synthesise` wrote it, so {file.name} does not describe it; run that again, or delete {file.name}"
        )
    return made
