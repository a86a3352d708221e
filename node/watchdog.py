"""Whether this process still does its work: a real look at each thing that must not hang. Used before every kick of systemd's watchdog.

    engine     the thread lives, and something was answered since the last look, or a prompt of one token is
    database   a write transaction begins; now and then (WRITE_S) one is written and synced, if no answer was stored meanwhile
    messaging  the threads of the session, the outbox, presence and serving live, and the outbox's comes round; being offline is not ill
    sweep      the daemon's own thread lives: deadlines, pruning, the parts' sweeps
    api        GET /healthz over the real socket
    parts      none of them asks for a restart

Every look has a deadline. A queue full of slow requests is not ill as long as answers come out of it.
"""

import http.client
import time
import urllib.parse
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import msgspec
from sqlalchemy.exc import DBAPIError

from node.engine.worker import Busy, Late, NoModel, probe
from node.store import MetaRow
from protocol.errors import MilpaError
from protocol.tasks import task_named

if TYPE_CHECKING:
    from node.app import Daemon

PROBE_S = 20.0  # seconds for one token behind whatever waits
HTTP_S = 5.0
WRITE_S = 600.0  # seconds between written probes: 144 a day, about 1 MB on the card

Clock = Callable[[], float]


class Watchdog:
    """Looks at a daemon. One thread calls `trouble`."""

    def __init__(self, daemon: "Daemon", *, clock: Clock = time.monotonic, probe_s: float = PROBE_S) -> None:
        self._daemon, self._clock, self._probe_s = daemon, clock, probe_s
        self._answered = -1
        self._written = clock()

    def trouble(self) -> str:
        """The first thing that is wrong, or ""."""
        moved = self._moved()
        looks: tuple[tuple[str, Callable[[], str]], ...] = (
            ("engine", partial(self._engine, moved)), ("database", partial(self._database, moved)), ("messaging", self._messaging),
            ("sweep", self._sweep), ("api", self._api), ("parts", self._parts),
        )  # fmt: skip
        return next((f"{what}: {found}" for what, look in looks if (found := look())), "")

    def _moved(self) -> bool:
        before, self._answered = self._answered, self._daemon.metrics.answered_count
        return 0 <= before < self._answered

    def _engine(self, moved: bool) -> str:
        worker = self._daemon.worker
        if not worker.alive:
            return "the thread is dead"
        speaker = worker.speaker
        if moved or speaker is None:
            return ""
        task = task_named(speaker.task)
        opening = msgspec.structs.replace(task.form, codes=())  # what is kept of the prompts' beginning stays so; one token is enough
        try:
            worker.ask(task.name, probe(task), max_new_tokens=1, deadline_s=self._probe_s, form=opening)
        except NoModel:
            return ""
        except (Busy, Late) as error:
            return "" if self._moved() else f"nothing was answered since the last look ({error})"
        except MilpaError as error:
            return f"the model does not speak: {error}"
        return ""

    def _database(self, moved: bool) -> str:
        write = not moved and self._clock() - self._written >= WRITE_S
        try:
            with self._daemon.store.transaction() as session:  # IMMEDIATE: takes the write lock
                session.connection()
                if write:
                    session.merge(MetaRow(key="watchdog", value=str(int(self._clock()))))
        except DBAPIError as error:
            return f"cannot be written: {error.orig}"
        if moved or write:
            self._written = self._clock()
        return ""

    def _messaging(self) -> str:
        return self._daemon.messaging.trouble() if self._daemon.messaging else ""

    def _sweep(self) -> str:
        return "" if self._daemon.sweeping else "the thread is dead"

    def _api(self) -> str:
        address = urllib.parse.urlsplit(self._daemon.server.url)
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.hostname or "", address.hostname or "")
        connection = http.client.HTTPConnection(host, address.port, timeout=HTTP_S)
        try:
            connection.request("GET", "/healthz")
            status = connection.getresponse().status
        except (OSError, http.client.HTTPException) as error:
            return f"does not answer: {type(error).__name__}"
        finally:
            connection.close()
        return "" if status == 200 else f"/healthz says {status}"

    def _parts(self) -> str:
        return next((f"{part.name}: {found}" for part in self._daemon.parts if (found := part.trouble())), "")
