"""Builds a node from its settings and keeps it running: every part, every thread with one owner, one way down.

    caller's thread  starts everything, waits, stops everything (node/service.py: signals, systemd, the watchdog)
    milpa-engine     the model                       milpa-api        HTTP
    milpa-update     releases, on notice and by poll  milpa-sweep     deadlines, pruning, summaries
    milpa-learn      training when the sun allows, sync windows
    mqtt, outbox, presence                           only with a broker
    milpa-spool, mqtt of the site                    only where the settings open those entrances

Rules:
 * A model in the active slot answers with no network at all: nothing here waits for anything off the machine, at start least of all.
 * Without a model the node is up, says 503 on /readyz, and waits for its first release.
 * One process a state folder (a lock says so); `run.json` beside it tells the command line where the API is.
 * What is neither model, store, API nor messaging is a `Part` (node/parts.py), and is built in `_parts`.
"""

import fcntl
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError

from node import reload
from node.answering import Answering
from node.api import routes
from node.api.metrics import Metrics
from node.api.server import Server, bind
from node.client import RunFile
from node.confidence.judging import Judge, budget_of, samples_of
from node.energy.power import power_of
from node.engine.live import LiveModel
from node.engine.worker import Worker
from node.entrances.spool import SpoolFolder
from node.entrances.topic import SiteTopic
from node.learn.learner import Learner
from node.link import Link
from node.memory.recall import Memory
from node.messaging import Messaging
from node.parts import Part, dead
from node.settings import NodeSettings, secret
from node.store import RefusedRow, Store, counts
from node.update.looking import Releases
from node.update.slots import Slots
from protocol import __version__
from protocol.blobs import write_atomically
from protocol.errors import Unavailable
from protocol.messages import State, Status

SWEEP_S = 1.0  # seconds between looks at deadlines
PRUNE_S = 3600.0  # seconds between prunings
SUMMARY_S = 300.0  # seconds between summaries of answers to the coordinator, at most
SUMMARY_HEARTBEATS = 4  # a faster heartbeat makes summaries faster too

log = logging.getLogger("milpa.node")


class Daemon:
    """A whole node. `start`, `wait`, `stop`."""

    def __init__(self, settings: NodeSettings, *, clock: Callable[[], float] = time.time) -> None:
        self.settings = settings
        self.boot = uuid.uuid4().hex[:16]
        self.clock = clock
        self.started = clock()
        self.metrics = Metrics()
        self.failed = False  # a part died; the process must not pretend to live
        self.parts: tuple[Part, ...] = ()
        self.power = power_of(settings, clock)
        self.worker = Worker(capacity=settings.api.queue, on_worked=self.power.worked)
        self.messaging: Messaging | None = None
        self._reloads = 0
        self._restart: tuple[str, ...] = ()  # settings that differ in the file and wait for a restart
        self._reload_problem = ""
        self._stop = threading.Event()
        self._sweeper = threading.Thread(target=self._sweep, name="milpa-sweep", daemon=True)
        self._lock_file: Any = None

    # ---- up

    def start(self) -> None:
        """Build and start everything. Returns when the API answers; the model, if there is one, is loaded.

        Raises:
            PortInUse, BadInput, NotEnough: before anything is written but the state folder.
            Unavailable: another process runs on this state folder.
        """
        settings, state = self.settings, self.settings.state_dir
        key = secret(settings.api.key_file, what="api.key_file")
        listener = bind(settings.api.host, settings.api.port, key=key)
        try:
            self._lock(state)
            self.store = Store(state / "node.db")
            self.slots = Slots(state, role=settings.node.role)
            self.link = Link(settings, self.store.engine)
            self.judge = self._judge()
            self.messaging = self._messaging()
            self.model = LiveModel(
                self.worker, self.slots, settings.model, updates=bool(settings.update.url),
                on_change=self._model_changed,
            )  # fmt: skip
            self.memory = self._memory()
            self.answering = Answering(
                self.store, self.worker, node=settings.node.name, site=settings.site, judge=self.judge,
                asking=self.messaging.asker if self.messaging else None, clock=self.clock, watch=self.metrics,
                on_asked=self.messaging.wake if self.messaging else lambda: None, memory=self.memory,
            )  # fmt: skip
            self.updated = Releases(
                settings, self.slots, self.model, emit=self._emit, clock=self.clock, power=self.power, link=self.link.meter
            )
            self.learner = Learner(
                settings, self.slots, self.store, self.model, self.power, clock=self.clock,
                may_sync=lambda cost: self.link.may_spend(cost, "round"), synced=lambda cost: self.link.meter.spend(cost, 0),
            )  # fmt: skip
            self.parts = (self.link, self.power, self.updated, self.learner, *self._parts())
            app = routes.build(
                self.answering, self.metrics, default_task=settings.model.task, deadline_s=settings.api.deadline_s, status=self.status,
                why_not_ready=lambda: self.model.why, examine=self._examine, key=key, clock=self.clock, memory=self.memory,
            )  # fmt: skip
            self.server = Server(app, listener)
        except BaseException:
            listener.close()
            if self._lock_file:
                self._lock_file.close()
            raise
        try:
            self._serve()
        except BaseException:
            self.stop()
            raise

    def _parts(self) -> tuple[Part, ...]:
        """Everything optional, in the order in which it starts; what the settings do not ask for is not built."""
        settings, parts = self.settings, list[Part]([self.memory, self.judge])
        if settings.spool.enabled:
            parts.append(SpoolFolder(settings, self.answering))
        if settings.topic.host:
            parts.append(SiteTopic(settings, self.answering))
        return tuple(parts)

    def _judge(self) -> Judge:
        limits = self.settings.confidence
        return Judge(
            self.store, budget_of(self.settings), joules_a_question=limits.joules_a_question, refits=limits.refit,
            samples=samples_of(self.worker) if limits.agree else None,
            may_agree=lambda: self.power.may("agree").ok, clock=self.clock,
        )  # fmt: skip

    def _memory(self) -> Memory:
        return Memory(
            self.store, self.worker, self.settings.state_dir, self.settings.memory, clock=self.clock,
            may_work=lambda: self.power.may("agree").ok, report=self.messaging.report if self.messaging else None,
            may_spend=lambda cost: self.link.may_spend(cost, "event").ok,
        )  # fmt: skip

    def _serve(self) -> None:
        settings, state = self.settings, self.settings.state_dir
        self._gauges()
        self.worker.start()
        self.server.start()
        write_atomically(state / "run.json", msgspec.json.encode(RunFile(os.getpid(), self.server.url, self.boot, int(self.started))))
        log.info("%s answers on %s", settings.node.name, self.server.url)
        self.model.at_start()
        if self.messaging:
            self.messaging.start(apply=self.answering.apply, unanswered=self.answering.unanswered, on_release=self.updated.announce)
        for part in self.parts:
            part.start()
        self._sweeper.start()

    def _lock(self, state: Path) -> None:
        state.mkdir(parents=True, exist_ok=True)
        self._lock_file = (state / "lock").open("w")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock_file.close()
            raise Unavailable(f"another milpa-node runs on {state}; stop it, or give this one its own node.state_dir") from error

    def _messaging(self) -> Messaging | None:
        if not self.settings.broker.host:
            return None
        return Messaging(
            self.settings, self.store, self.worker, self.judge, boot=self.boot, describe=self._describe, link=self.link, clock=self.clock
        )  # fmt: skip

    def _model_changed(self) -> None:
        """Another release or adapter answers."""
        self.learner.look_soon()
        if self.messaging:
            self.messaging.announce()

    def _gauges(self) -> None:
        self.metrics.count_by("energy_joules", "Energy by the stated model, by kind of work", "work", self.power.joules)
        self.metrics.watch("ready", "1 when a model is active", lambda: float(self.worker.speaker is not None))
        self.metrics.watch("release", "Number of the active release", lambda: float(self.model.release))
        self.metrics.watch("queue_length", "Requests that wait for the model", lambda: float(self.worker.waiting))
        if self.messaging:
            messaging = self.messaging
            self.metrics.watch(
                "outbox_messages", "Messages that wait for the broker or the coordinator", lambda: float(messaging.waiting())
            )
            self.metrics.watch("broker_connected", "1 while the broker has us", lambda: float(messaging.connected))
            self.metrics.watch("open_questions", "Questions to peers without an outcome", lambda: float(messaging.open_questions))
            self.metrics.watch("questions_to_answer", "Questions of others that wait here", lambda: float(messaging.to_answer))
        for part in self.parts:
            for figure in part.figures():
                self.metrics.watch(*figure)

    # ---- while it runs

    def _sweep(self) -> None:
        """Deadlines of questions, pruning, a summary for the coordinator."""
        next_prune = 0.0
        every = min(SUMMARY_S, SUMMARY_HEARTBEATS * self.settings.broker.heartbeat_s)
        next_summary = time.monotonic() + every
        while not self._stop.wait(SWEEP_S):
            if not (self.worker.alive and self.server.alive):
                log.critical("a thread died that must not; the process ends so that its supervisor starts it again")
                self.failed = True
                self._stop.set()
                return
            try:
                if self.messaging:
                    self.messaging.sweep()
                self.answering.expire()
                for part in self.parts:
                    part.sweep()
                if time.monotonic() >= next_prune:
                    next_prune = time.monotonic() + PRUNE_S
                    self.store.prune(answers=self.settings.limits.answers, refused=self.settings.limits.refused)
                if self.messaging and time.monotonic() >= next_summary:
                    next_summary = time.monotonic() + every
                    self._summarise()
            except Exception:  # a full disk: the next round tries again, and answers go on being given
                log.exception("a sweep failed")

    def _summarise(self) -> None:
        figures = self.metrics.summary()
        if figures["count"]:
            self._emit("answers", figures, {})

    def _emit(self, kind: str, figures: dict[str, float], detail: dict[str, str]) -> None:
        if self.messaging:
            with self.store.transaction() as session:
                self.messaging.report(session, kind, figures, detail)
            self.messaging.wake()

    def reload(self, new: NodeSettings) -> tuple[reload.Change, ...]:
        """Take what may change from `new` (already checked); what may not is named in the status and waits for a restart."""
        found = reload.changes(self.settings, new)
        self.settings = reload.merged(self.settings, found)
        if self.messaging and self.messaging.asker:
            self.messaging.asker.deadline_s = self.settings.peers.deadline_s
        for part in self.parts:
            part.reload(self.settings)
        self._restart = tuple(change.name for change in found if not change.live)
        self._reload_problem, self._reloads = "", self._reloads + 1
        taken = ", ".join(change.name for change in found if change.live) or "nothing"
        log.info("settings read again: %s changed; a restart is needed for: %s", taken, ", ".join(self._restart) or "nothing")
        return found

    def reload_failed(self, reason: str) -> None:
        """The settings could not be read again; everything is as it was."""
        self._reload_problem, self._reloads = reason, self._reloads + 1
        log.error("settings not taken: %s", reason)

    # ---- words

    def _describe(self) -> Status:
        """This node's word about itself; node, boot, sequence and time are filled in by whoever sends it."""
        speaker, asleep = self.worker.speaker, self.power.sleeping_until()
        state: State = "no-model" if speaker is None else "sleeping" if asleep else "answering"
        return Status(
            node=self.settings.node.name, boot=self.boot, sequence=0, state=state, sleeping_until=asleep,
            role=self.settings.node.role, release=self.model.release, model_digest=speaker.model_digest if speaker else "",
            adapter_digest=speaker.adapter_digest if speaker else "", answered=self.metrics.answered_count,
            escalated=self.metrics.escalated_count, waiting=self.messaging.waiting() if self.messaging else 0, version=__version__,
        )  # fmt: skip

    def status(self) -> dict[str, Any]:
        """The node as a whole, for GET /v1/status."""
        settings, speaker = self.settings, self.worker.speaker
        with self.store.transaction() as session:
            states = counts(session)
            refused = session.scalar(select(func.count()).select_from(RefusedRow)) or 0
        task = speaker.task if speaker else settings.model.task
        core = {
            "node": settings.node.name, "role": settings.node.role, "site": settings.site, "version": __version__, "boot": self.boot,
            "pid": os.getpid(), "url": self.server.url, "uptime_s": round(max(0.0, self.clock() - self.started), 1),
            "ready": speaker is not None, "why": self.model.why, "release": self.model.release, "task": task,
            "model": self.model.describe(),
            "queue": {"waiting": self.worker.waiting, "limit": settings.api.queue},
            "answered": self.metrics.answered_count, "escalated": self.metrics.escalated_count, "states": states, "refused": refused,
            "examples": self.store.example_count(task),
            "broker": self.messaging.status() if self.messaging else None,
            "settings": {"reloads": self._reloads, "problem": self._reload_problem, "restart": self._restart},
        }  # fmt: skip
        return core | {part.name: told for part in self.parts if (told := part.status()) is not None}

    def _examine(self) -> Sequence[Any]:
        """What the doctor says of this running node, for its page."""
        from node import doctor  # when somebody looks

        return doctor.examine(self.settings, now=self.clock, running=self.status())

    # ---- down

    def stop(self) -> None:
        """Stop everything, each part within its deadline; what was accepted is on disk."""
        self._stop.set()
        self.server.stop()
        for part in reversed(self.parts):
            part.stop()
        if self.messaging:
            try:
                self._summarise()  # what was answered since the last summary leaves now, or at the next start
            except SQLAlchemyError as error:
                log.error("the last summary could not be written: %s", error)
            self.messaging.stop(sleeping_until=self.power.sleeping_until())
        if self._sweeper.ident is not None:
            self._sweeper.join(10)
        self.model.drop_candidate()
        self.worker.stop()
        self.store.close()
        (self.settings.state_dir / "run.json").unlink(missing_ok=True)
        self._lock_file.close()
        log.info("stopped")

    @property
    def sweeping(self) -> bool:
        """Whether the thread of deadlines, pruning and the parts' sweeps lives, or need not."""
        return not dead(self._sweeper, self._stop)

    @property
    def ended(self) -> bool:
        """Whether somebody asked the node to stop."""
        return self._stop.is_set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until somebody asks the node to stop."""
        return self._stop.wait(timeout_s)

    def end(self) -> None:
        """Ask the node to stop; whoever started it does it. Safe in a signal handler."""
        self._stop.set()
