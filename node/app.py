"""Builds a node from its settings and keeps it running: every part, every thread with one owner, one way down.

    main thread      starts everything, waits for SIGTERM or SIGINT, stops everything
    milpa-engine     the model                       milpa-api        HTTP
    milpa-update     releases, on notice and by poll  milpa-sweep     deadlines, pruning, summaries
    mqtt, outbox, presence                           only with a broker

Rules:
 * A model in the active slot answers with no network at all: nothing here waits for anything off the machine, at start least of all.
 * Without a model the node is up, says 503 on /readyz, and waits for its first release.
 * One process a state folder (a lock says so); `run.json` beside it tells the command line where the API is.
"""

import fcntl
import logging
import os
import random
import signal
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError

from node.answering import Answering
from node.api import routes
from node.api.metrics import Metrics
from node.api.server import Server, bind
from node.client import RunFile
from node.engine.loading import describe, load_fixed, load_release, prove
from node.engine.worker import Speaker, Worker
from node.messaging import Messaging
from node.settings import NodeSettings, secret
from node.store import RefusedRow, Store, counts
from node.update.slots import ActiveRelease, Slots
from node.update.updater import Outcome, Updater
from protocol import __version__
from protocol.blobs import write_atomically
from protocol.digests import digest_file
from protocol.errors import BadInput, MilpaError, Unavailable
from protocol.messages import Status

SWEEP_S = 1.0  # seconds between looks at deadlines
PRUNE_S = 3600.0  # seconds between prunings
SUMMARY_S = 300.0  # seconds between summaries of answers to the coordinator, at most
SUMMARY_HEARTBEATS = 4  # a faster heartbeat makes summaries faster too
POLL_JITTER = 0.2  # polls come up to this share early, so that a fleet does not ask at once

log = logging.getLogger("milpa.node")


class Daemon:
    """A whole node. `start`, `stop`; `run` does both around a wait for a signal."""

    def __init__(self, settings: NodeSettings, *, clock: Callable[[], float] = time.time) -> None:
        self.settings = settings
        self.boot = uuid.uuid4().hex[:16]
        self.clock = clock
        self.started = clock()
        self.metrics = Metrics()
        self.updated = Outcome("current")  # how the last look for releases ended
        self.failed = False  # a part died; the process must not pretend to live
        self._why = "starting"  # why there is no model
        self._candidate: Speaker | None = None  # passed its self-test, not yet live
        self._stop = threading.Event()
        self._look = threading.Event()  # a release was announced
        self._threads: list[threading.Thread] = []
        self._lock_file: Any = None
        self.worker = Worker(capacity=settings.api.queue)
        self.updater: Updater | None = None
        self.messaging: Messaging | None = None

    # ---- up

    def start(self) -> None:
        """Build and start everything. Returns when the API answers; the model, if there is one, is loaded.

        Raises:
            PortInUse, BadInput, NotEnough: before anything is written but the state folder.
            Unavailable: another process runs on this state folder.
        """
        settings, state = self.settings, self.settings.state_dir
        key = secret(settings.api.key_file, what="api.key_file")
        root = self._root()
        listener = bind(settings.api.host, settings.api.port, key=key)
        try:
            self._lock(state)
            self.store = Store(state / "node.db")
            self.slots = Slots(state, role=settings.node.role)
            self.messaging = self._messaging()
            self.answering = Answering(
                self.store, self.worker, node=settings.node.name, site=settings.site, budget=settings.model.budget,
                asking=self.messaging.asker if self.messaging else None, clock=self.clock, watch=self.metrics,
                on_asked=self.messaging.wake if self.messaging else lambda: None,
            )  # fmt: skip
            app = routes.build(
                self.answering, self.metrics, default_task=settings.model.task, deadline_s=settings.api.deadline_s, status=self.status,
                why_not_ready=lambda: "" if self.worker.speaker else self._why, key=key,
            )  # fmt: skip
            self.server = Server(app, listener)
        except BaseException:
            listener.close()
            if self._lock_file:
                self._lock_file.close()
            raise
        try:
            self._serve(root)
        except BaseException:
            self.stop()
            raise

    def _serve(self, root: bytes) -> None:
        settings, state = self.settings, self.settings.state_dir
        self._gauges()
        self.worker.start()
        self.server.start()
        write_atomically(state / "run.json", msgspec.json.encode(RunFile(os.getpid(), self.server.url, self.boot, int(self.started))))
        log.info("%s answers on %s", settings.node.name, self.server.url)
        self._load_at_start()
        if self.messaging:
            self.messaging.start(apply=self.answering.apply, unanswered=self.answering.unanswered, on_release=self._look.set)
        if settings.update.url:
            self.updater = self._updater(root)
            self._spawn("milpa-update", self._update)
        self._spawn("milpa-sweep", self._sweep)

    def _lock(self, state: Path) -> None:
        state.mkdir(parents=True, exist_ok=True)
        self._lock_file = (state / "lock").open("w")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock_file.close()
            raise Unavailable(f"another milpa-node runs on {state}; stop it, or give this one its own node.state_dir") from error

    def _root(self) -> bytes:
        update = self.settings.update
        if not update.url:
            return b""
        if not update.root_file:
            raise BadInput("update.url is set but update.root_file is not: bring the coordinator's root.json by hand, once")
        try:
            return Path(update.root_file).expanduser().read_bytes()
        except OSError as error:
            raise BadInput(f"cannot read update.root_file {update.root_file}: {error.strerror}") from error

    def _messaging(self) -> Messaging | None:
        if not self.settings.broker.host:
            return None
        return Messaging(self.settings, self.store, self.worker, boot=self.boot, describe=self._describe, clock=self.clock)

    def _updater(self, root: bytes) -> Updater:
        update = self.settings.update
        return Updater(
            self.settings.state_dir, url=update.url, root=root, self_test=self._self_test, activate=self._activate, emit=self._emit,
            role=self.settings.node.role, daily_bytes=update.max_bytes_a_day, slots=self.slots,
        )  # fmt: skip

    def _spawn(self, name: str, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _gauges(self) -> None:
        self.metrics.watch("ready", "1 when a model is active", lambda: float(self.worker.speaker is not None))
        self.metrics.watch("release", "Number of the active release", lambda: float(self._release()))
        self.metrics.watch("queue_length", "Requests that wait for the model", lambda: float(self.worker.waiting))
        if self.messaging:
            messaging = self.messaging
            self.metrics.watch(
                "outbox_messages", "Messages that wait for the broker or the coordinator", lambda: float(messaging.waiting())
            )
            self.metrics.watch("broker_connected", "1 while the broker has us", lambda: float(messaging.connected))

    # ---- the model

    def _load_at_start(self) -> None:
        """Make the fixed file or the live release speak. A release that does not load goes back by itself."""
        model = self.settings.model
        if model.path:
            self.worker.swap_after_current_record(load_fixed(model))
            return
        active, tried = self.slots.starting(), set[int]()
        while active is not None and active.number not in tried:
            tried.add(active.number)
            try:
                self._self_test(active)
                self._activate(active)
            except MilpaError as error:
                log.error("release %d does not load: %s", active.number, error)
                self._why = f"release {active.number} does not load: {error}"
                active = self._instead_of(active, str(error))
            else:
                live = self.slots.active()
                if live is not None and live.number == active.number:
                    self.slots.confirm()
                return
        if self._why == "starting":
            self._why = "no model yet: waiting for a release" if self.settings.update.url else "no model: set model.path or update.url"
        log.warning("%s", self._why)

    def _instead_of(self, active: ActiveRelease, reason: str) -> ActiveRelease | None:
        """What to try after `active` failed to load: damaged files are thrown away, so that the next look fetches them again."""
        damaged = [path for path in (active.model, active.adapter, active.calibration) if path and digest_file(path) != path.name]
        for path in damaged:
            path.unlink()
        if not damaged and not self.slots.confirmed():
            return self.slots.go_back(reason)
        return self.slots.previous()

    def _self_test(self, active: ActiveRelease) -> None:
        """Load a release beside the live one and make it answer; it stays loaded until it goes live."""
        self._drop_candidate()
        candidate = load_release(active, threads=self.settings.model.threads, context=self.settings.model.context)
        try:
            prove(candidate, active)
        except BaseException:
            candidate.engine.close()
            raise
        self._candidate = candidate

    def _activate(self, active: ActiveRelease) -> None:
        """Answer with this release from the next record on."""
        candidate, self._candidate = self._candidate, None
        if candidate is None or candidate.release != active.number:
            if candidate is not None:
                candidate.engine.close()
            candidate = load_release(active, threads=self.settings.model.threads, context=self.settings.model.context)
        self.worker.swap_after_current_record(candidate)
        log.info("release %d answers", active.number)
        if self.messaging:
            self.messaging.announce()

    def _drop_candidate(self) -> None:
        if self._candidate is not None:
            self._candidate.engine.close()
            self._candidate = None

    # ---- threads

    def _update(self) -> None:
        """Look for releases: at start, on notice, by poll."""
        poll = self.settings.update.poll_s
        while not self._stop.is_set():
            self._look.clear()
            if self.updater is None:
                return
            try:
                outcome = self.updater.check(self.clock())
                self._follow()
            except MilpaError as error:
                log.error("the live release does not load: %s", error)
            except Exception:  # a defect or a failing disk must not end updates for ever; the node answers meanwhile
                log.exception("the look for a release failed")
            else:
                if (outcome.state, outcome.reason) != (self.updated.state, self.updated.reason):
                    log.info("releases: %s %s", outcome.state, outcome.reason)
                self.updated = outcome
            self._look.wait(poll * (1.0 - POLL_JITTER * random.random()))

    def _follow(self) -> None:
        """Answer with the live release, if another one speaks: its files were damaged at start and have been fetched again."""
        live = self.slots.active()
        if live is not None and live.number != self._release():
            self._self_test(live)
            self._activate(live)

    def _sweep(self) -> None:
        """Deadlines of questions, pruning, a summary for the coordinator."""
        limits, next_prune = self.settings.limits, 0.0
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
                if time.monotonic() >= next_prune:
                    next_prune = time.monotonic() + PRUNE_S
                    self.store.prune(answers=limits.answers, refused=limits.refused)
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

    # ---- words

    def _release(self) -> int:
        speaker = self.worker.speaker
        return speaker.release if speaker else 0

    def _describe(self) -> Status:
        """This node's word about itself; node, boot, sequence and time are filled in by whoever sends it."""
        speaker = self.worker.speaker
        return Status(
            node=self.settings.node.name, boot=self.boot, sequence=0, state="answering" if speaker else "no-model",
            role=self.settings.node.role, release=self._release(), model_digest=speaker.engine.model_digest if speaker else "",
            adapter_digest=speaker.engine.adapter_digest if speaker else "", answered=self.metrics.answered_count,
            escalated=self.metrics.escalated_count, waiting=self.messaging.waiting() if self.messaging else 0, version=__version__,
        )  # fmt: skip

    def status(self) -> dict[str, Any]:
        """The node as a whole, for GET /v1/status."""
        settings, speaker = self.settings, self.worker.speaker
        with self.store.transaction() as session:
            states = counts(session)
            refused = session.scalar(select(func.count()).select_from(RefusedRow)) or 0
        task = speaker.task if speaker else settings.model.task
        return {
            "node": settings.node.name, "role": settings.node.role, "site": settings.site, "version": __version__, "boot": self.boot,
            "pid": os.getpid(), "url": self.server.url, "uptime_s": round(max(0.0, self.clock() - self.started), 1),
            "ready": speaker is not None, "why": "" if speaker else self._why, "release": self._release(), "task": task,
            "model": describe(speaker) if speaker else None,
            "queue": {"waiting": self.worker.waiting, "limit": settings.api.queue},
            "answered": self.metrics.answered_count, "escalated": self.metrics.escalated_count, "states": states, "refused": refused,
            "examples": self.store.example_count(task),
            "broker": self.messaging.status() if self.messaging else None,
            "update": {"url": settings.update.url, "state": self.updated.state, "reason": self.updated.reason},
        }  # fmt: skip

    # ---- down

    def stop(self) -> None:
        """Stop everything, each part within its deadline; what was accepted is on disk."""
        self._stop.set()
        self._look.set()
        self.server.stop()
        if self.messaging:
            try:
                self._summarise()  # what was answered since the last summary leaves now, or at the next start
            except SQLAlchemyError as error:
                log.error("the last summary could not be written: %s", error)
            self.messaging.stop()
        for thread in self._threads:
            thread.join(10)
        if self.updater:
            self.updater.close()
        self._drop_candidate()
        self.worker.stop()
        self.store.close()
        (self.settings.state_dir / "run.json").unlink(missing_ok=True)
        self._lock_file.close()
        log.info("stopped")

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until somebody asks the node to stop."""
        return self._stop.wait(timeout_s)

    def end(self) -> None:
        """Ask the node to stop; `run` does it. Safe in a signal handler."""
        self._stop.set()


def run(settings: NodeSettings) -> None:
    """`milpa-node run`: until SIGTERM or SIGINT.

    Raises:
        as `Daemon.start`.
    """
    daemon = Daemon(settings)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: daemon.end())
    daemon.start()
    try:
        daemon.wait()
    finally:
        daemon.stop()
    if daemon.failed:
        raise Unavailable("a part of the node died; see the log above, and start it again")
