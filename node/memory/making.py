"""Makes the vectors of what is remembered, when there is time, and learns what likeness is worth here.

Rules:
 * One vector at a time, only while no record waits, at most SHARE_OF_TIME of the time, and only if `may_work` agrees. A batch is kept,
   then the next is made: killed at any point it goes on there.
 * Another model's vectors mean nothing beside these: it begins anew, and near answers rest until it is done.
 * From which similarity on near answers are trusted is learned from the entries themselves, each held against the others and against what
   the model had said, and again when there are a tenth more of them.
 * What goes wrong rests for REST_S and is a line in the status.
Limits: `rows` entries, `max_bytes` of vectors, LEARN_FROM entries held against the others.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from node import settings
from node.engine.worker import Worker
from node.memory import rules, table
from node.memory.rules import Least, Neighbour, Remembered
from node.memory.vectors import NoVectors, Vectors, room_for
from node.parts import dead
from node.store import Store
from protocol.errors import BadInput, MilpaError
from protocol.tasks import task_named

if TYPE_CHECKING:
    from node.memory.vectors import Vector

BATCH = 16  # vectors kept together
SHARE_OF_TIME = 0.25  # of one core, while there are vectors to make
LOOK_S = 5.0  # seconds between looks for work
SCAN_S = 3_600.0  # seconds between looks at what is there and what should be
REST_S = 300.0  # seconds after something went wrong with the file
STOP_S = 5.0
EMBED_DEADLINE_S = 30.0  # seconds for one vector
LEARN_FROM = 400  # entries of a scope: at 14 ms a search, about six seconds
GROWN = 1.1  # times as many entries as last time, and the limit is learned again

log = logging.getLogger("milpa.node")


class Making:
    """The thread, and what it knows. Other threads read `model`, `made`, `least` and `problem`."""

    def __init__(self, store: Store, worker: Worker, vectors: Vectors, chosen: settings.Memory, *, may_work: Callable[[], bool]) -> None:
        self.store, self.worker, self.vectors, self.chosen = store, worker, vectors, chosen
        self.may_work = may_work
        self.model = ""  # whose vectors are there
        self.made = 0
        self.least: dict[str, Least | None] = {}  # by scope, for this model
        self.problem = ""
        self._size = 0  # figures of a vector
        self._todo: deque[tuple[str, str, str]] = deque(maxlen=chosen.rows)  # key, scope, source
        self._learned_at: dict[str, int] = {}  # entries of the scope when its limit was learned
        self._grown = False  # since the last thought about limits
        self._remade = 0  # how often the file had been begun anew when it was last looked at
        self._scan_at = 0.0  # monotonic
        self._stop, self._look = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="milpa-memory", daemon=True)

    @property
    def waiting(self) -> int:
        """Entries that wait for a vector."""
        return len(self._todo)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End it; what is made is kept."""
        self._stop.set()
        self._look.set()
        if self._thread.is_alive():
            self._thread.join(STOP_S)

    def trouble(self) -> str:
        """A dead thread."""
        return dead(self._thread, self._stop)

    def add(self, key: str, scope: str, source: str) -> None:
        """An entry is new, or has changed; one that is past the limit comes with a later scan."""
        self._todo.append((key, scope, source))
        self._look.set()

    def look_again(self) -> None:
        """Entries were forgotten: their vectors go with the next scan."""
        self._scan_at = 0.0
        self._look.set()

    def note(self, error: MilpaError) -> None:
        """For the status: why there is no likeness now. A model that comes or a queue that empties is no trouble."""
        if isinstance(error, NoVectors):
            if str(error) != self.problem:
                log.warning("memory: %s", error)
            self.problem = str(error)

    def step(self) -> float:
        """Make a batch, or learn what likeness is worth; seconds it took, 0 for nothing to do. For the thread, and tests.

        Raises:
            MilpaError: no vectors now; the message says why.
        """
        began = time.perf_counter()
        speaker = self.worker.speaker
        if speaker is None or not self.may_work():
            return 0.0
        if speaker.model_digest != self.model or self.vectors.remade != self._remade or time.monotonic() >= self._scan_at:
            if not self._anything():
                return 0.0
            self._scan(speaker.task)
        if not self._make_batch():
            if self._todo or not self._grown:
                return 0.0  # records wait, or nothing to do
            self._learn(speaker.task)
            self._grown = False
        self.problem = ""
        return time.perf_counter() - began

    def _run(self) -> None:
        while not self._stop.is_set():
            self._look.clear()
            busy_s = 0.0
            try:
                busy_s = self.step()
            except NoVectors as error:
                self.note(error)
                self._todo.clear()
                self._scan_at = time.monotonic() + REST_S
            except MilpaError as error:  # the model is away or busy
                log.debug("memory: %s", error)
            except Exception:  # a locked or full database: exact answers go on, the next look tries again
                log.exception("the memory could not make vectors now")
            if busy_s:
                self._stop.wait(busy_s * (1.0 / SHARE_OF_TIME - 1.0))
            else:
                self._look.wait(LOOK_S)

    def _anything(self) -> bool:
        """Whether there is an entry at all; until then neither library is loaded and no file made."""
        with self.store.transaction() as session:
            return bool(self.model) or table.count(session, "answer") > 0

    def _scan(self, task: str) -> None:
        """Find what has no vector yet, and drop vectors of what is forgotten."""
        probe = self.worker.embed(task, deadline_s=EMBED_DEADLINE_S)  # tells model and size together
        model, size = probe.speaker.model_digest, int(probe.vector.size)
        there = self.vectors.keys(model, size)
        with self.store.transaction() as session:
            wanted = table.best(session, task, limit=min(self.chosen.rows, room_for(self.chosen.max_bytes, size)))
        keys = {key for key, _, _ in wanted}
        self.vectors.drop(sorted(there - keys))
        if model != self.model:
            self.least, self._learned_at = {}, {}
        self._todo.clear()
        self._todo.extend((key, rules.scope(task, lang), source) for key, lang, source in wanted if key not in there)
        self.model, self._size, self.made = model, size, len(there & keys)
        self._remade = self.vectors.remade
        self._scan_at, self._grown = time.monotonic() + SCAN_S, True

    def _make_batch(self) -> int:
        """Up to BATCH vectors, as long as no record waits; how many. What is made is kept, whatever happens to the next."""
        batch: list[tuple[str, str, Vector]] = []
        try:
            while self._todo and len(batch) < BATCH and not self.worker.waiting and not self._stop.is_set():
                key, scope, source = self._todo[0]
                if self.made + len(batch) < room_for(self.chosen.max_bytes, self._size):  # else the next scan makes room
                    try:
                        embedded = self.worker.embed(source, deadline_s=EMBED_DEADLINE_S)
                    except BadInput:  # its text is not said: key and reason could tell the record
                        log.debug("memory: an entry does not fit the model, and gets no vector")
                    else:
                        if embedded.speaker.model_digest != self.model:
                            break  # the next step begins anew
                        batch.append((key, scope, embedded.vector))
                self._todo.popleft()
        finally:
            self.made += self.vectors.put(self.model, batch)
            self._grown |= bool(batch)
        return len(batch)

    def _learn(self, task: str) -> None:
        """Learn what likeness is worth, for each scope that has grown enough."""
        with self.store.transaction() as session:
            meanings = table.meanings(session, task_named(task))
        for lang, means in meanings.items():
            scope, count = rules.scope(task, lang), len(means)
            if count != self._learned_at.get(scope) and count >= GROWN * self._learned_at.get(scope, 0):
                self.least[scope], self._learned_at[scope] = self._leave_one_out(scope, means), count

    def _leave_one_out(self, scope: str, means: dict[str, Remembered]) -> Least | None:
        """Hold the newest entries against all others of the scope; `means` is what each key means, newest first."""
        pairs, tried = [], 0
        for key in list(means)[:LEARN_FROM]:
            vector = None if self._stop.is_set() else self.vectors.one(self.model, self._size, key)
            if vector is None:
                continue
            close = self.vectors.nearest(self.model, vector, scope=scope, count=rules.NEIGHBOURS + 1)
            others = [Neighbour(other, likeness, means[other].meaning) for other, likeness in close if other != key and other in means]
            tried += 1
            if (pair := rules.leave_one_out(means[key], others)) is not None:
                pairs.append(pair)
        return rules.learned_least(pairs, of=tried, floor=self.chosen.near_right)
