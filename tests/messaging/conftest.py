"""A real mosquitto with our own configuration, sessions on it, and a node's database."""

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from deploy.broker import Broker, find_mosquitto
from node.store import open_database
from protocol.mqtt import Session
from protocol.ports import free_port

PASSWORDS = {name: f"{name}-password" for name in ("coordinator", "esteli", "malacatoya", "base", "ridge")}
DEADLINE_S = 20.0


@pytest.fixture
def eventually() -> Callable[..., None]:
    """Wait until a condition holds; fail with what was seen when it does not within the deadline."""

    def wait(condition: Callable[[], Any], seen: Callable[[], Any] = lambda: "", deadline: float = DEADLINE_S) -> None:
        end = time.monotonic() + deadline
        while not condition():
            assert time.monotonic() < end, f"did not happen within {deadline} s: {seen()}"
            time.sleep(0.01)

    return wait


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Engine]:
    engine = open_database(tmp_path / "node.db")
    yield engine
    engine.dispose()


@pytest.fixture
def mosquitto() -> None:
    """Skip where it is not installed; in CI, fail."""
    if find_mosquitto() is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("mosquitto is not installed: apt install mosquitto")


@pytest.fixture
def broker(tmp_path: Path, mosquitto: None) -> Iterator[Broker]:
    with Broker(tmp_path / "broker", port=free_port(), users=PASSWORDS, program="mosquitto") as running:
        yield running


@pytest.fixture
def join(broker: Broker) -> Iterator[Callable[..., Session]]:
    """Make a session under a user name; `start=False` leaves starting to the test. All are stopped at the end."""
    with ExitStack() as stack:

        def make(user: str, *, start: bool = True, password: str | None = None, **options: Any) -> Session:
            options = {"backoff_base": 0.05, "backoff_cap": 0.2, "rng": random.Random(1), **options}
            session = Session(
                options.pop("client_id", user),
                broker.host,
                options.pop("port", broker.port),
                username=user,
                password=password or PASSWORDS[user],
                **options,
            )
            stack.callback(session.stop)
            if start:
                session.start()
                assert session.wait_connected(DEADLINE_S), session.problem
            return session

        yield make
