import random
import socket
import threading
import time
from pathlib import Path

import pytest
import uvicorn
from fastapi import FastAPI

from coordinator.fleet.publishing import Publisher, build_release
from coordinator.fleet.repository import routes
from node.update.download import Downloader
from node.update.rules import BUILT_AT, Machine
from node.update.updater import Updater
from protocol.digests import digest_file
from protocol.releases import KnownAnswer

NOW = BUILT_AT + 10 * 86_400
KNOWN = (KnownAnswer("moisture 12 %\nes:", " irrigation-due: suelo seco"),)


def make_file(path: Path, size: int, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(random.Random(seed).randbytes(size))
    return path


class Coordinator:
    """A release store whose clock the test sets."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.now = float(NOW)
        self.publisher = Publisher(folder / "store", clock=lambda: self.now)
        self.publisher.init()
        self.app = FastAPI()
        self.app.include_router(routes(self.publisher))
        self.url = ""

    def describe(self, number: int, *, model: int = 1, adapter: int | None = None, size: int = 50_000, **more):
        """A release whose model and adapter are random bytes from those seeds."""
        weights = make_file(self.folder / f"model-{model}-{size}.gguf", size, model)
        files = [("student", "model", weights, "")]
        if adapter is not None:
            base = more.pop("base", digest_file(weights))
            files.append(("student", "adapter", make_file(self.folder / f"adapter-{adapter}.gguf", 3_000, adapter), base))
            files.append(("student", "calibration", make_file(self.folder / f"calibration-{adapter}.json", 300, adapter), ""))
        return build_release(number, "ranch", files, previous=number - 1, created=int(self.now), known_answers=KNOWN, **more)

    def publish(self, number: int, **more):
        release, paths = self.describe(number, **more)
        self.publisher.publish(release, paths)
        return release


class Site:
    """A node's update side with a fake engine; the test reads what it did."""

    def __init__(self, state: Path, coordinator: Coordinator, *, url: str = "", **more) -> None:
        self.tested: list[int] = []
        self.live: list[int] = []
        self.events: list[tuple[str, dict, dict]] = []
        self.waits: list[float] = []
        more.setdefault("self_test", lambda candidate: self.tested.append(candidate.number))
        more.setdefault("activate", lambda release: self.live.append(release.number))
        more.setdefault("machine", Machine(memory_mb=512))
        self.updater = Updater(
            state,
            url=url or coordinator.url,
            root=more.pop("root", None) or coordinator.publisher.root_bytes(),
            emit=lambda *event: self.events.append(event),
            downloader=lambda *given: Downloader(*given, sleep=self.waits.append, jitter=lambda: 0.5),
            **more,
        )
        self.slots = self.updater.slots

    def check(self, now: float = NOW):
        return self.updater.check(now)

    @property
    def number(self) -> int:
        active = self.slots.active()
        return active.number if active else 0

    def kinds(self) -> list[str]:
        return [kind for kind, _, _ in self.events]


class Server:
    """uvicorn on a free port, in a thread."""

    def __init__(self, app: FastAPI) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="critical", ws="none", lifespan="off", timeout_graceful_shutdown=1))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self._thread.start()
        deadline = time.monotonic() + 20
        while not self._server.started:
            assert time.monotonic() < deadline, "uvicorn did not start"
            time.sleep(0.005)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        self.socket.close()


@pytest.fixture
def coordinator(tmp_path):
    made = Coordinator(tmp_path / "coordinator")
    server = Server(made.app)
    made.url = f"http://127.0.0.1:{server.port}/repository"
    made.port = server.port
    yield made
    server.stop()


@pytest.fixture
def site(tmp_path, coordinator):
    made: list[Site] = []

    def make(name: str = "node", **more) -> Site:
        made.append(Site(tmp_path / name, coordinator, **more))
        return made[-1]

    yield make
    for one in made:
        one.updater.close()
