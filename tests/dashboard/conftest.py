"""A coordinator without a broker, over a SQLite ledger in a temporary folder, at a fixed time."""

import functools
import re
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
import uvicorn
from argon2 import PasswordHasher
from fastapi.testclient import TestClient

from coordinator.app import Coordinator
from coordinator.fleet.ledger import Ledger
from coordinator.settings import Broker, CoordinatorSettings, Store
from tests.dashboard.seed import NOW, fill

PASSWORD = "el maíz crece despacio"
QUICK = PasswordHasher(time_cost=1, memory_cost=1_024, parallelism=1)


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = float(NOW)

    def __call__(self) -> float:
        return self.now


@functools.cache
def empty_ledger() -> bytes:
    """A ledger that was migrated and never written to: building it once saves most of the time of these tests."""
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(f"sqlite:///{folder}/ledger.db")
        ledger.migrate()
        ledger.close()
        return (Path(folder) / "ledger.db").read_bytes()


@functools.cache
def filled_ledger() -> bytes:
    """The ledger of `seed.fill`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.db"
        path.write_bytes(empty_ledger())
        ledger = Ledger(f"sqlite:///{path}")
        sa.event.listen(ledger.engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous = OFF"))  # a thousand writes
        fill(ledger)
        ledger.close()
        return path.read_bytes()


def build(folder: Path, clock: Callable[[], float], *, filled: bool = False) -> Coordinator:
    folder.mkdir(exist_ok=True)
    (folder / "ledger.db").write_bytes(filled_ledger() if filled else empty_ledger())
    coordinator = Coordinator(CoordinatorSettings(store=Store(dir=str(folder)), broker=Broker(host="")), clock=clock)
    coordinator.door._hasher = QUICK  # the real parameters take 64 MiB and 50 ms a login
    coordinator.door._nobody = QUICK.hash("nobody")
    return coordinator


def form_token(page: str) -> str:
    found = re.search(r'name="csrf" value="([^"]+)"', page)
    assert found, "the page has no form"
    return found[1]


def enter(client: TestClient, coordinator: Coordinator) -> None:
    """Create the first account, as an operator would."""
    token = coordinator.door.token_file.read_text().strip()
    page = client.get("/setup")
    answer = client.post("/setup", data={"csrf": form_token(page.text), "token": token, "name": "ana", "password": PASSWORD})
    assert answer.url.path == "/", answer.text


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def coordinator(tmp_path: Path, clock: Clock) -> Coordinator:
    return build(tmp_path / "store", clock)


@pytest.fixture
def stranger(coordinator: Coordinator) -> Iterator[TestClient]:
    """A browser that has not logged in."""
    with TestClient(coordinator.app) as client:
        yield client


@pytest.fixture
def client(stranger: TestClient, coordinator: Coordinator) -> TestClient:
    """A browser that has logged in; the ledger is otherwise empty."""
    enter(stranger, coordinator)
    return stranger


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A browser that has logged in, over a fleet of twelve nodes. For reading only."""
    coordinator = build(tmp_path_factory.mktemp("filled"), lambda: NOW, filled=True)
    with TestClient(coordinator.app) as client:
        enter(client, coordinator)
        yield client


class Serving:
    """A coordinator on a real port, in a thread."""

    def __init__(self, coordinator: Coordinator) -> None:
        self.coordinator = coordinator
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        config = uvicorn.Config(coordinator.app, log_config=None, access_log=False, timeout_graceful_shutdown=2, lifespan="on")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)

    def __enter__(self) -> "Serving":
        self._thread.start()
        deadline = time.monotonic() + 20
        while not self._server.started:
            assert self._thread.is_alive() and time.monotonic() < deadline, "the server did not start"
            time.sleep(0.02)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(20)
        self._socket.close()
