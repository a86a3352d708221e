"""From rows to what a student learns from: the kept texts as records, and generic records among them against forgetting. No I/O.

A student that sees one domain only forgets the rest (docs/log.md, Tatoeba by topic); TranslateGemma mixes in 30% of generic data.
"""

import hashlib
from collections.abc import Iterable, Sequence

import msgspec

from coordinator.forge.synthesis.rows import Row
from protocol.errors import BadInput
from protocol.tasks import Record, Task

GENERIC_SHARE = 0.3


def training_records(task: Task, rows: Iterable[Row], *, keep: int | None = None) -> list[Record]:
    """One record a kept text, the best `keep` of each source, with ids "ID#1", "ID#2"; the known truth where nothing was kept."""
    found: list[Record] = []
    for row in rows:
        for number, one in enumerate(row.hypotheses[:keep], start=1):
            answer = task.parse(one.text)
            verdict = answer.verdict or row.record.verdict
            found.append(msgspec.structs.replace(row.record, id=f"{row.record.id}#{number}", target=answer.text, verdict=verdict))
        if not row.hypotheses and row.record.target:
            found.append(row.record)
    return found


def mixed(records: Sequence[Record], generic: Sequence[Record], *, share: float = GENERIC_SHARE, seed: int = 0) -> list[Record]:
    """`records` and so many of `generic` that they are `share` of all, or all of them where they are too few; in an order by hash.

    Raises:
        BadInput: a share outside [0, 1), or a generic record without a target.
    """
    if not 0.0 <= share < 1.0:
        raise BadInput(f"a generic share of {share} is not usable; 0 is none, 0.3 the default")
    if without := next((record for record in generic if not record.target), None):
        raise BadInput(f"generic record {without.id!r} has no target: there is nothing to learn from it")
    count = round(len(records) * share / (1.0 - share))
    chosen = sorted(generic, key=lambda record: _place(record, seed))[:count]
    named = [msgspec.structs.replace(record, id=f"{record.id}@generic") for record in chosen]
    return sorted([*records, *named], key=lambda record: _place(record, seed))


def _place(record: Record, seed: int) -> bytes:
    return hashlib.sha256(f"{seed} {record.id} {record.source}".encode()).digest()
