"""The memory at work: exact answers at once, near ones and examples by likeness, and what its operator may do with it.

Rules:
 * An answer never waits for the memory: exact is one indexed look; near costs a vector and a search, and only where a limit was learned.
   Whatever goes wrong with vectors is a line in the status, and the model answers.
 * The truth is the table. A vector only says which entries to look at, so a correction counts from the next record on.
 * For `exact` no thread is started and no library loaded. What vectors need is `making.py`.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from node import settings
from node.engine.worker import Worker
from node.memory import rules, table
from node.memory.making import Making
from node.memory.rules import Neighbour, Recalled
from node.memory.sharing import MaySpend, Report, Sharing
from node.memory.vectors import NoVectors, Vectors, size_on_disk
from node.parts import Figure, Part
from node.store import AnswerRow, Store
from protocol.errors import MilpaError
from protocol.reasons import Why
from protocol.tasks import Record, Task

FILE = "memory.db"
PRUNE_S = 3_600.0  # seconds between prunings

log = logging.getLogger("milpa.node")


class Memory(Part):
    """What the node remembers.

    Args:
        folder: of the node's state; the vectors live there.
        may_work: whether vectors may be made now (a battery may say no).
        report: puts an event into the outbox inside the caller's transaction; None: nobody to share with.
        may_spend: whether the link is rich enough for so many bytes of a pattern today.
    """

    name = "memory"

    def __init__(
        self,
        store: Store,
        worker: Worker | None,
        folder: Path,
        chosen: settings.Memory,
        *,
        clock: Callable[[], float] = time.time,
        may_work: Callable[[], bool] = lambda: True,
        report: Report | None = None,
        may_spend: MaySpend | None = None,
    ) -> None:
        self.store, self.chosen = store, chosen
        self._clock = clock
        self._vectors = Vectors(folder / FILE)
        self._sharing = Sharing(store, report=report, may_spend=may_spend, clock=clock) if report else None
        self.making: Making | None = None  # None: no likeness is wanted, or no model runs here
        if worker is not None and chosen.use in ("near", "examples"):
            self.making = Making(store, worker, self._vectors, chosen, may_work=may_work)
        self._prune_at = 0.0  # monotonic
        table.prepare(store, keep=chosen.rows)

    # ---- asked while a record waits

    def recall(self, record: Record, task: Task, *, deadline_s: float) -> Recalled | None:
        """What is remembered for the record; None: ask the model."""
        if self.chosen.use == "off":
            return None
        with self.store.transaction() as session:
            row = table.exact(session, record)
            if row is not None:
                return _exactly(row)
            row = table.pattern(session, record)
        if row is not None:
            return _by_pattern(row)
        return self._near(record, self.making, deadline_s=deadline_s) if self.making and self.chosen.use == "near" else None

    def examples(self, record: Record, task: Task, *, deadline_s: float) -> tuple[Record, ...]:
        """The most similar remembered records with their answers, the nearest last; none unless the setting says so."""
        if self.making is None or self.chosen.use != "examples" or not self.making.made:
            return ()
        try:
            found = self.neighbours(record, self.making, deadline_s=deadline_s)
        except MilpaError as error:
            self.making.note(error)
            return ()
        whole = [row for _, row in found if not row.verdict or task.parse(row.text).sentence]  # a verdict alone would teach to end there
        return tuple(
            Record(id=row.key, task=row.task, source=row.source, lang=row.lang, target=row.text, verdict=row.verdict) for row in whole
        )[::-1]

    def remember(self, session: Session, row: AnswerRow, *, origin: str, weight: float, now: float) -> None:
        """Remember the answer as it stands now, inside the caller's transaction."""
        table.remember(session, row, origin=origin, weight=weight, now=now)
        if self.making is not None:
            self.making.add(rules.memory_key(row.task, row.lang, row.source), rules.scope(row.task, row.lang), row.source)

    def used(self, session: Session, recalled: Recalled, *, now: float) -> None:
        """Note inside the caller's transaction that this entry answered."""
        table.used(session, recalled.key, now=now)

    def _near(self, record: Record, making: Making, *, deadline_s: float) -> Recalled | None:
        least = making.least.get(rules.scope(record.task, record.lang))
        if least is None:
            return None
        try:
            found = self.neighbours(record, making, deadline_s=deadline_s)
        except MilpaError as error:
            making.note(error)
            return None
        nearest = rules.agreed([Neighbour(row.key, close, rules.meaning(row.verdict, row.text)) for close, row in found], least.similarity)
        if nearest is None:
            return None
        row = next(row for _, row in found if row.key == nearest.key)
        figures = {"count": rules.NEIGHBOURS, "similarity": nearest.similarity, "right": least.precision}
        why = Why("alike", {**figures, "answer": row.answer, "whom": rules.trusted(row.origin)})
        return Recalled("near", row.key, row.text, least.precision, why, row.answer, nearest.similarity)

    def neighbours(self, record: Record, making: Making, *, deadline_s: float) -> list[tuple[float, table.MemoryRow]]:
        """The entries most like the record with their likeness, nearest first, as they stand now.

        Raises:
            MilpaError: no likeness now: another model, a missing library, a damaged file, a full queue.
        """
        embedded = making.worker.embed(record.source, deadline_s=deadline_s)
        model = embedded.speaker.model_digest
        if model != making.model:
            raise NoVectors("another model speaks now; vectors are being made for it")
        close = self._vectors.nearest(model, embedded.vector, scope=rules.scope(record.task, record.lang), count=rules.NEIGHBOURS)
        with self.store.transaction() as session:
            known = table.rows(session, [key for key, _ in close])
        return [(similarity, known[key]) for key, similarity in close if key in known]

    # ---- what the operator asks for; each is one transaction

    def listed(self, *, kind: str = "", shareable: bool = False, limit: int = 100) -> list[dict[str, Any]]:
        """Entries, for people and programs.

        Raises:
            UnknownName: no such kind.
        """
        with self.store.transaction() as session:
            return [shown(row) for row in table.listed(session, kind=kind, shareable=shareable, limit=limit)]

    def add(self, task: Task, *, lang: str, when: str, verdict: str, text: str, shareable: bool) -> dict[str, Any]:
        """Remember a pattern; says how many remembered answers it fits and how many of those say otherwise.

        Raises:
            BadInput, UnknownName, NotEnough: see `node.answering.read_correction` and `table.add_pattern`.
        """
        from node.answering import read_correction
        from protocol.codec import checked_record
        from protocol.tasks import Answer

        means, _ = read_correction(task, Answer(text=""), verdict=verdict, text=text)
        checked_record(Record(id="pattern", task=task.name, source=when, lang=lang))
        with self.store.transaction() as session:
            row = table.add_pattern(session, task, lang=lang, when=when, means=means, shareable=shareable, now=self._clock())
            fits, against = table.seen_before(session, row)
            return shown(row) | {"fits": fits, "against": against}

    def share(self, key: str, *, shareable: bool) -> dict[str, Any]:
        """Let a pattern leave the site, or not any more.

        Raises:
            BadInput: see `table.share`.
        """
        with self.store.transaction() as session:
            return shown(table.share(session, key, shareable=shareable))

    def forget(self, key: str) -> dict[str, Any]:
        """Remove an entry at once; its vector follows.

        Raises:
            BadInput: see `table.forget`.
        """
        with self.store.transaction() as session:
            row = table.forget(session, key)
        if self.making is not None:
            self.making.look_again()
        return shown(row)

    # ---- the part

    def start(self) -> None:
        """Start making vectors, where the setting wants any."""
        if self.making is not None:
            self.making.start()

    def stop(self) -> None:
        """End the thread; what is made is kept."""
        if self.making is not None:
            self.making.stop()
        self._vectors.close()

    def sweep(self) -> None:
        """Share what may leave, forget what is past the cap."""
        if self._sharing is not None:
            self._sharing.sweep()
        if time.monotonic() >= self._prune_at:
            self._prune_at = time.monotonic() + PRUNE_S
            with self.store.transaction() as session:
                gone = table.prune(session, keep=self.chosen.rows)
            if gone:
                log.info("%d remembered answers that were least of use are forgotten", gone)
                if self.making is not None:
                    self.making.look_again()

    def trouble(self) -> str:
        """A dead thread."""
        return self.making.trouble() if self.making is not None else ""

    def status(self) -> dict[str, Any] | None:
        """For GET /v1/status."""
        with self.store.transaction() as session:
            counted = {f"{kind}s": table.count(session, kind) for kind in table.KINDS}
        told = {"use": self.chosen.use, **counted, "bytes": size_on_disk(self._vectors.path)}
        if self.making is None:
            return told
        trusted = {
            scope: {"similarity": round(one.similarity, 4), "right": round(one.precision, 3), "model": one.model, "pairs": one.pairs}
            for scope, one in self.making.least.items()
            if one
        }
        making = {"vectors": self.making.made, "to_make": self.making.waiting, "trusted": trusted, "problem": self.making.problem}
        return told | making

    def figures(self) -> tuple[Figure, ...]:
        """Gauges."""
        making = self.making
        if making is None:
            return ()
        return (
            ("memory_vectors", "Remembered records that have a vector of the active model", lambda: float(making.made)),
            ("memory_vectors_to_make", "Remembered records that wait for one", lambda: float(making.waiting)),
            ("memory_bytes", "Disk space of the vectors", lambda: float(size_on_disk(self._vectors.path))),
        )


def shown(row: table.MemoryRow) -> dict[str, Any]:
    """An entry for people and programs."""
    return {
        "key": row.key, "kind": row.kind, "task": row.task, "lang": row.lang, "when": row.source, "text": row.text, "verdict": row.verdict,
        "by": row.origin, "answer": row.answer, "changed": row.created, "uses": row.uses, "used": row.used, "shareable": row.shareable,
        "shared": row.shared,
    }  # fmt: skip


def _exactly(row: table.MemoryRow) -> Recalled:
    why = Why("same-record", {"whom": rules.trusted(row.origin), "answer": row.answer})
    return Recalled("exact", row.key, row.text, row.weight, why, row.answer)


def _by_pattern(row: table.MemoryRow) -> Recalled:
    why = Why("pattern", {"pattern": row.source, "key": row.key[:12]})
    return Recalled("pattern", row.key, row.text, row.weight, why, "")
