"""Builds the coordinator: settings in, one web application out. The only place where its parts meet.

    ledger <- listener <- MQTT          what nodes say
    repository -> HTTP                  what nodes fetch; signed, so without a login
    watch                               a release published by another process reaches the ledger and the notice
    dashboard -> HTTP                   for people, behind the login
    /healthz, /readyz, /metrics         for programs; counts only

The broker may be away at any time: the pages show what the ledger has, and the session connects again by itself.
"""

import asyncio
import contextlib
import logging
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from starlette.responses import Response

from coordinator.dashboard.auth import Door
from coordinator.dashboard.routes import Dashboard
from coordinator.dashboard.views.nodes import SHOWN, all_nodes
from coordinator.fleet.ledger import Ledger
from coordinator.fleet.listening import Listener
from coordinator.fleet.publishing import Publisher
from coordinator.fleet.repository import routes
from coordinator.settings import CoordinatorSettings, read_secret
from protocol.errors import MilpaError
from protocol.messages import ReleaseNotice
from protocol.mqtt import Session
from protocol.releases import Release

WATCH_S = 2.0  # how soon a release published by another process is noticed
EVIDENCE_LIMIT = 8 << 20  # bytes; a real bundle is about 100 kB
STOP_S = 10.0  # for the watching thread to end

log = logging.getLogger(__name__)


class Watch:
    """Notices releases that another process published: into the ledger, then the notice. One thread."""

    def __init__(self, publisher: Publisher, ledger: Ledger, *, announce: Callable[[Release], None], clock: Callable[[], float]) -> None:
        self.publisher, self.ledger, self.announce, self.clock = publisher, ledger, announce, clock
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="release-watch", daemon=True)
        self._seen: tuple[int, int] | None = None
        self._told = ""

    def start(self) -> None:
        """Begin watching."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(STOP_S)

    def look(self) -> None:
        """Look once: does nothing while the store's timestamp is the one of last time.

        Raises:
            MilpaError: the store or the ledger does not read; the next look tries again.
        """
        now = self._stamp()
        if now is None or now == self._seen:
            return
        kept = {release.number for release in self.ledger.releases() if release.evidence is not None}
        latest: Release | None = None
        for number in self.publisher.numbers():
            latest = self.publisher.release(number)
            if number not in kept:
                self.ledger.add_release(latest, evidence_of(self.publisher, latest), latest.created or int(self.clock()))
        if latest is not None:
            self.announce(latest)
        self._seen = now

    def _run(self) -> None:
        while True:
            try:
                self.look()
                self._told = ""
            except (MilpaError, OSError) as error:
                if str(error) != self._told:
                    log.warning("the release store does not read, trying again every %g s: %s", WATCH_S, error)
                self._told = str(error)
            if self._stopping.wait(WATCH_S):
                return

    def _stamp(self) -> tuple[int, int] | None:
        try:
            found = (self.publisher.root / "metadata" / "timestamp.json").stat()
        except FileNotFoundError:
            return None
        return found.st_mtime_ns, found.st_ino


def evidence_of(publisher: Publisher, release: Release) -> dict[str, Any] | None:
    """The release's evidence bundle from the store, or None when it has none that reads."""
    file = next((file for file in release.files if file.kind == "evidence" and file.name.endswith(".json")), None)
    if file is None or file.size > EVIDENCE_LIMIT:
        return None
    try:
        found = msgspec.json.decode(publisher.blobs.path(file.digest).read_bytes())
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        log.warning("evidence of release %d does not read: %s", release.number, error)
        return None
    return found if isinstance(found, dict) else None


class Coordinator:
    """The parts of one coordinator, built and not yet running. `app` runs them in its lifespan."""

    def __init__(self, settings: CoordinatorSettings, *, clock: Callable[[], float] = time.time) -> None:
        """Open the ledger, prepare the rest.

        Raises:
            BadInput: settings that cannot be used.
            Unavailable: the ledger does not open.
        """
        self.settings, self.clock = settings, clock
        store = settings.store_dir
        store.mkdir(parents=True, exist_ok=True)
        self.ledger = Ledger(settings.ledger_url, clock=clock)
        self.ledger.migrate()
        self.publisher = Publisher(store / "repository")
        self.session = _session(settings, store, self.ledger, clock)
        self.listener = Listener(self.session, self.ledger, clock=clock) if self.session else None
        self.watch = Watch(self.publisher, self.ledger, announce=self._announce, clock=clock)
        self.door = Door(self.ledger, store / "setup-token", clock=clock)
        self.dashboard = Dashboard(
            self.ledger, self.door, timezone=settings.web.timezone, silent_after_s=settings.web.silent_after_s,
            secure=settings.web.tls_elsewhere, clock=clock,
        )  # fmt: skip
        self.app = self._web()

    def _announce(self, release: Release) -> None:
        if self.listener is not None:
            self.listener.publish_notice(ReleaseNotice(number=release.number, url=self.settings.public_url))

    def _web(self) -> FastAPI:
        app = FastAPI(title="Milpa coordinator", docs_url=None, redoc_url=None, openapi_url=None, lifespan=self._lifespan)
        app.include_router(routes(self.publisher))
        registry = CollectorRegistry()
        registry.register(_Fleet(self))

        @app.get("/healthz", include_in_schema=False)
        def healthz() -> Response:
            return PlainTextResponse("ok\n")

        @app.get("/readyz", include_in_schema=False)
        def readyz() -> Response:
            try:
                latest = self.ledger.latest_release()
            except MilpaError as error:
                log.warning("not ready: %s", error)
                return JSONResponse({"ready": False, "ledger": "does not answer"}, status_code=503)
            return JSONResponse({"ready": True, "ledger": "ok", "broker": self.broker, "release": latest.number if latest else 0})

        @app.get("/metrics", include_in_schema=False)
        def metrics() -> Response:
            return PlainTextResponse(generate_latest(registry), media_type="text/plain; version=0.0.4; charset=utf-8")

        self.dashboard.install(app)
        return app

    @property
    def broker(self) -> str:
        """The broker in a word."""
        if self.session is None:
            return "none"
        return "connected" if self.session.connected else "away"

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        token = await asyncio.to_thread(self.door.prepare)
        if token:
            log.warning("first start: open the dashboard and create the first account with the set-up token %s", token)
            log.warning("the token is also in %s", self.door.token_file)
        if self.session is not None:
            await asyncio.to_thread(self.session.start)
        self.watch.start()
        poller = asyncio.create_task(self.dashboard.changes.run())
        try:
            yield
        finally:
            poller.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await poller
            await asyncio.to_thread(self.watch.stop)
            if self.session is not None:
                await asyncio.to_thread(self.session.stop)
            self.ledger.close()


def _session(settings: CoordinatorSettings, store: Path, ledger: Ledger, clock: Callable[[], float]) -> Session | None:
    broker = settings.broker
    if not broker.host:
        return None

    def path(name: str) -> Path | None:
        return Path(name).expanduser() if name else None

    return Session(
        _client_id(store), broker.host, broker.port, username=broker.username,
        password=read_secret(broker.password_file, setting="broker.password_file"),
        ca_file=path(broker.ca_file), cert_file=path(broker.cert_file), key_file=path(broker.key_file),
        on_parked=lambda message, reason: ledger.add_refused(message.topic, message.payload, reason, int(clock())),
    )  # fmt: skip


def _client_id(store: Path) -> str:
    """One id for the life of the store, so that the broker keeps what came while we were away."""
    file = store / "client-id"
    if not file.exists():
        file.write_text(f"coordinator-{uuid.uuid4().hex[:12]}\n", encoding="ascii")
    return file.read_text(encoding="ascii").strip()


class _Fleet(Collector):
    """The fleet in counts, read when somebody asks."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the gauges."""
        one = self._coordinator
        found = all_nodes(one.ledger, now=int(one.clock()), silent_after_s=one.settings.web.silent_after_s)
        states = GaugeMetricFamily("milpa_nodes", "Nodes by the state that the dashboard shows", labels=["state"])
        for state in SHOWN:
            states.add_metric([state], sum(node.shown == state for node in found))
        yield states
        latest = one.ledger.latest_release()
        yield GaugeMetricFamily("milpa_release", "Number of the latest release", value=latest.number if latest else 0)
        yield GaugeMetricFamily("milpa_broker_connected", "1 while the MQTT broker is connected", value=float(one.broker == "connected"))
