"""The coordinator on a real broker: what a node says is on the pages, what is published reaches the nodes."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from coordinator.app import Coordinator
from coordinator.settings import Broker as BrokerSection
from coordinator.settings import CoordinatorSettings, Store
from deploy.broker import Broker, find_mosquitto
from protocol import topics
from protocol.codec import encode
from protocol.messages import ReleaseNotice, Status
from protocol.mqtt import Session
from protocol.ports import free_port
from tests.dashboard.conftest import Serving
from tests.dashboard.test_serving import publish

pytestmark = pytest.mark.broker
USERS = {"coordinator": "coordinator-password", "esteli": "esteli-password"}


def eventually(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def test_a_status_reaches_the_ledger_and_a_release_reaches_the_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_mosquitto() is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("mosquitto is not installed: apt install mosquitto")
    monkeypatch.setattr("coordinator.app.WATCH_S", 0.1)
    (tmp_path / "password").write_text(USERS["coordinator"])
    with Broker(tmp_path / "broker", port=free_port(), users=USERS, program="mosquitto") as broker:
        section = BrokerSection(port=broker.port, username="coordinator", password_file=str(tmp_path / "password"))
        settings = CoordinatorSettings(store=Store(dir=str(tmp_path / "store")), broker=section)
        coordinator = Coordinator(settings)
        heard: list[bytes] = []
        node = Session("esteli", broker.host, broker.port, username="esteli", password=USERS["esteli"])
        node.subscribe(topics.RELEASE, lambda message: heard.append(message.payload))
        node.start()
        try:
            with Serving(coordinator):
                eventually(lambda: coordinator.broker == "connected", "the coordinator did not connect")
                eventually(lambda: node.connected, "the node did not connect")
                status = Status(node="esteli", boot="b", sequence=1, state="no-model")
                node.publish(topics.status("esteli"), encode(status), retain=True)
                publish(tmp_path / "store", 1)

                eventually(lambda: coordinator.ledger.mark()[0] == 1, "the status is not in the ledger")
                eventually(lambda: heard, "the notice did not come")
            assert heard == [encode(ReleaseNotice(number=1, url=settings.public_url))]
        finally:
            node.stop()
