"""The memory at work: exact answers at once, near ones and examples by likeness, and the thread that makes vectors when there is time.

Rules:
 * An answer never waits for the memory: exact is one indexed look; near costs a vector and a search, and only where a limit was learned.
   Whatever goes wrong with vectors is a line in the status, and the model answers.
 * The truth is the table. A vector only says which entries to look at, so a correction counts from the next record on.
 * Vectors are made in the background, one at a time, only while no record waits, at most SHARE_OF_TIME of the time, and only if `may_work`
   agrees; a batch is kept, then the next: killed at any point it goes on there. Another model begins anew while exact answers go on.
 * The similarity that is trusted is learned again when the memory has grown by a tenth. Nothing is imported or started for `exact`.
Limits: `rows` entries, `max_bytes` of vectors, LEARN_FROM entries held against the others.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from node import settings
from node.engine.worker import Worker
from node.memory import rules, table
from node.memory.rules import Least, Neighbour, Recalled
from node.memory.sharing import MaySpend, Report, Sharing
from node.memory.vectors import NoVectors, Vectors, room_for, size_on_disk
from node.parts import Figure, Part
from node.store import AnswerRow, Store
from protocol.errors import MilpaError, Unavailable
from protocol.tasks import Record, Task

FILE = "memory.db"
BATCH = 16  # vectors kept together
SHARE_OF_TIME = 0.25  # of one core, while there are vectors to make
LOOK_S = 5.0  # seconds between looks for work
SCAN_S = 3_600.0  # seconds between looks at what is there and what should be
PRUNE_S = 3_600.0
STOP_S = 5.0
EMBED_DEADLINE_S = 30.0  # of a vector made in the background
LEARN_FROM = 400  # newest entries of a scope: at 14 ms a search, about six seconds
GROWN = 1.1  # times as many entries as last time, and the limit is learned again

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
        self._worker, self._clock, self._may_work = worker, clock, may_work
        self._vectors = Vectors(folder / FILE)
        self._sharing = Sharing(store, report=report, may_spend=may_spend, clock=clock) if report else None
        self._least: dict[str, Least | None] = {}  # by scope, for the model below
        self._learned_at: dict[str, int] = {}  # entries of the scope when its limit was learned
        self._model = ""  # whose vectors are there
        self._size = 0  # figures of a vector
        self._made = 0  # vectors there
        self._todo: deque[tuple[str, str, str]] = deque(maxlen=max(1, chosen.rows))  # key, scope, source
        self._remade = 0  # how often the file had been begun anew when it was last looked at
        self._grown = False  # since the last thought about limits
        self._problem = ""
        self._scan_at = self._prune_at = 0.0  # monotonic
        self._stop, self._look = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="milpa-memory", daemon=True)
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
        return self._near(record, task, deadline_s=deadline_s) if self.chosen.use == "near" else None

    def examples(self, record: Record, task: Task, *, deadline_s: float) -> tuple[Record, ...]:
        """The most similar remembered records with their answers, the nearest last; none unless the setting says so."""
        if self.chosen.use != "examples" or not self._made:
            return ()
        try:
            found = self._neighbours(record, rules.scope(record.task, record.lang), deadline_s=deadline_s)
        except MilpaError as error:
            self._note(error)
            return ()
        whole = [row for _, row in found if not row.verdict or task.parse(row.text).sentence]  # a verdict alone would teach to end there
        return tuple(
            Record(id=row.key, task=row.task, source=row.source, lang=row.lang, target=row.text, verdict=row.verdict) for row in whole
        )[::-1]

    def remember(self, session: Session, row: AnswerRow, *, origin: str, weight: float, now: float) -> None:
        """Remember the answer as it stands now, inside the caller's transaction."""
        table.remember(session, row, origin=origin, weight=weight, now=now)
        if self._by_likeness:
            self._todo.append((rules.memory_key(row.task, row.lang, row.source), rules.scope(row.task, row.lang), row.source))
            self._look.set()

    def used(self, session: Session, recalled: Recalled, *, now: float) -> None:
        """Note inside the caller's transaction that this entry answered."""
        table.used(session, recalled.key, now=now)

    def _near(self, record: Record, task: Task, *, deadline_s: float) -> Recalled | None:
        scope = rules.scope(record.task, record.lang)
        least = self._least.get(scope)
        if least is None:
            return None
        try:
            found = self._neighbours(record, scope, deadline_s=deadline_s)
        except MilpaError as error:
            self._note(error)
            return None
        nearest = rules.agreed([Neighbour(row.key, close, rules.meaning(row.verdict, row.text)) for close, row in found], least.similarity)
        if nearest is None:
            return None
        row = next(row for _, row in found if row.key == nearest.key)
        reason = (
            f"remembered: {rules.NEIGHBOURS} similar records mean this, the nearest {nearest.similarity:.3f} alike (answer {row.answer}, "
            f"confirmed by {rules.trusted(row.origin)}); such answers are right {least.precision:.0%} of the time here, or more"
        )
        return Recalled("near", row.key, row.text, least.precision, reason, row.answer, nearest.similarity)

    def _neighbours(self, record: Record, scope: str, *, deadline_s: float) -> list[tuple[float, table.MemoryRow]]:
        """The entries most like the record, nearest first, as they stand now."""
        worker = self._need_worker()
        embedded = worker.embed(record.source, deadline_s=deadline_s)
        model = embedded.speaker.model_digest
        if model != self._model:
            raise NoVectors("another model speaks now; vectors are being made for it")
        close = self._vectors.nearest(model, embedded.vector, scope=scope, count=rules.NEIGHBOURS)
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
        self._scan_at = 0.0
        self._look.set()
        return shown(row)

    # ---- the part

    def start(self) -> None:
        """Start making vectors, where the setting wants any."""
        if self._by_likeness and self._worker is not None:
            self._thread.start()

    def stop(self) -> None:
        """End the thread; what is made is kept."""
        self._stop.set()
        self._look.set()
        if self._thread.is_alive():
            self._thread.join(STOP_S)
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
                self._scan_at = 0.0

    def status(self) -> dict[str, Any] | None:
        """For GET /v1/status."""
        with self.store.transaction() as session:
            counted = {f"{kind}s": table.count(session, kind) for kind in table.KINDS}
        least = {scope: {"similarity": round(one.similarity, 4), "right": round(one.precision, 3), "pairs": one.pairs}
                 for scope, one in self._least.items() if one}  # fmt: skip
        return {
            "use": self.chosen.use, **counted, "vectors": self._made, "to_make": len(self._todo), "trusted": least,
            "bytes": size_on_disk(self._vectors.path), "problem": self._problem,
        }  # fmt: skip

    def figures(self) -> tuple[Figure, ...]:
        """Gauges."""
        return (
            ("memory_vectors", "Remembered records that have a vector of the active model", lambda: float(self._made)),
            ("memory_vectors_to_make", "Remembered records that wait for one", lambda: float(len(self._todo))),
            ("memory_bytes", "Disk space of the vectors", lambda: float(size_on_disk(self._vectors.path))),
        )

    @property
    def _by_likeness(self) -> bool:
        return self.chosen.use in ("near", "examples")

    # ---- the thread

    def _run(self) -> None:
        while not self._stop.is_set():
            self._look.clear()
            try:
                busy_s = self.step()
            except MilpaError as error:
                busy_s = 0.0
                self._note(error)
            except Exception:  # a locked or full database: exact answers go on, the next look tries again
                busy_s = 0.0
                log.exception("the memory could not make vectors now")
            if busy_s:
                self._stop.wait(busy_s * (1.0 / SHARE_OF_TIME - 1.0))
            else:
                self._look.wait(LOOK_S)

    def step(self) -> float:
        """Make a batch of vectors, or learn what similarity is worth; seconds it took, 0 for nothing to do. For the thread, and tests.

        Raises:
            MilpaError: no vectors now; the message says why.
        """
        began = time.perf_counter()
        worker = self._need_worker()
        speaker = worker.speaker
        if speaker is None or not self._may_work():
            return 0.0
        if speaker.model_digest != self._model or self._vectors.remade != self._remade or time.monotonic() >= self._scan_at:
            self._scan(speaker.task)
        if not self._make_batch(worker):
            if self._todo or not self._grown:
                return 0.0  # records wait, or nothing to do
            self._learn(speaker.task)
            self._grown = False
        self._problem = ""
        return time.perf_counter() - began

    def _scan(self, task: str) -> None:
        """Find what has no vector yet, and drop vectors of what is forgotten."""
        probe = self._need_worker().embed(task, deadline_s=EMBED_DEADLINE_S)  # tells model and size together
        model, size = probe.speaker.model_digest, int(probe.vector.size)
        there = self._vectors.keys(model, size)
        with self.store.transaction() as session:
            wanted = table.best(session, task, limit=min(self.chosen.rows, room_for(self.chosen.max_bytes, size)))
        keys = {key for key, _, _ in wanted}
        self._vectors.drop(sorted(there - keys))
        if model != self._model:
            self._least, self._learned_at = {}, {}
        self._todo.clear()
        self._todo.extend((key, rules.scope(task, lang), source) for key, lang, source in wanted if key not in there)
        self._model, self._size, self._made = model, size, len(there & keys)
        self._remade = self._vectors.remade
        self._scan_at, self._grown = time.monotonic() + SCAN_S, True

    def _make_batch(self, worker: Worker) -> int:
        """Up to BATCH vectors, as long as no record waits."""
        made: list[tuple[str, str, Any]] = []
        taken: list[tuple[str, str, str]] = []
        while self._todo and len(taken) < BATCH and not worker.waiting and not self._stop.is_set():
            key, scope, source = self._todo.popleft()
            taken.append((key, scope, source))
            if self._made + len(made) >= room_for(self.chosen.max_bytes, self._size):
                continue  # the disk limit; the next scan drops what is least of use
            embedded = worker.embed(source, deadline_s=EMBED_DEADLINE_S)
            if embedded.speaker.model_digest != self._model:
                self._scan_at = 0.0
                return 0
            made.append((key, scope, embedded.vector))
        self._made += self._vectors.put(self._model, made)
        self._grown |= bool(made)
        return len(made)

    def _learn(self, task: str) -> None:
        """Learn what similarity is worth, for each scope that has grown enough."""
        with self.store.transaction() as session:
            entries = table.best(session, task, limit=self.chosen.rows)
        for scope in sorted({rules.scope(task, lang) for _, lang, _ in entries}):
            count = sum(rules.scope(task, lang) == scope for _, lang, _ in entries)
            if count >= GROWN * self._learned_at.get(scope, 0) and count != self._learned_at.get(scope):
                keys = [key for key, lang, _ in entries if rules.scope(task, lang) == scope][:LEARN_FROM]
                self._least[scope], self._learned_at[scope] = self._leave_one_out(scope, keys), count

    def _leave_one_out(self, scope: str, keys: list[str]) -> Least | None:
        pairs, tried = [], 0
        for key in keys:
            if self._stop.is_set():
                return None
            vector = self._vectors.one(self._model, self._size, key)
            if vector is None:
                continue
            close = self._vectors.nearest(self._model, vector, scope=scope, count=rules.NEIGHBOURS + 1)
            others = [(other, similarity) for other, similarity in close if other != key][: rules.NEIGHBOURS]
            with self.store.transaction() as session:
                known = table.rows(session, [key, *(other for other, _ in others)])
            if key not in known:
                continue
            means = {name: rules.meaning(row.verdict, row.text) for name, row in known.items()}
            tried += 1
            neighbours = [Neighbour(other, similarity, means[other]) for other, similarity in others if other in means]
            if (pair := rules.leave_one_out(means[key], neighbours)) is not None:
                pairs.append(pair)
        return rules.learned_least(pairs, of=tried, precision=self.chosen.near_right)

    def _need_worker(self) -> Worker:
        if self._worker is None:
            raise Unavailable("no model runs here")
        return self._worker

    def _note(self, error: MilpaError) -> None:
        """For the status: why there is no likeness now. A model that comes or a queue that empties is no trouble."""
        if isinstance(error, NoVectors) and str(error) != self._problem:
            self._problem = str(error)
            self._scan_at = 0.0  # look again what is there
            log.warning("memory: %s", error)


def shown(row: table.MemoryRow) -> dict[str, Any]:
    """An entry for people and programs."""
    return {
        "key": row.key, "kind": row.kind, "task": row.task, "lang": row.lang, "when": row.source, "text": row.text, "verdict": row.verdict,
        "by": row.origin, "answer": row.answer, "changed": row.created, "uses": row.uses, "used": row.used, "shareable": row.shareable,
        "shared": row.shared,
    }  # fmt: skip


def _exactly(row: table.MemoryRow) -> Recalled:
    reason = f"remembered: the same record, confirmed by {rules.trusted(row.origin)} (answer {row.answer})"
    return Recalled("exact", row.key, row.text, row.weight, reason, row.answer)


def _by_pattern(row: table.MemoryRow) -> Recalled:
    return Recalled("pattern", row.key, row.text, row.weight, f"remembered: the operator's pattern {row.source!r} ({row.key[:12]})", "")
