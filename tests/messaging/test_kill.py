"""A node killed between any two steps of a question's way: asked, sent, replied, applied, reported, acknowledged."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa

from coordinator.fleet.ledger import Ledger
from coordinator.fleet.listening import Listener
from coordinator.fleet.tables import events
from node.escalation.serving import Server, Spoke
from node.store import open_database
from protocol import topics
from protocol.drain import Drain
from protocol.outbox import Outbox
from tests.messaging.conftest import PASSWORDS

ROOT = Path(__file__).parents[2]
STRIDE = os.environ.get("MILPA_KILL_STRIDE", "3")  # of about 110 steps; 1 kills at every single one, in three times the time


class Sure:
    """A model that always says the same."""

    def answer(self, question, *, deadline_s, may_ask):
        return Spoke("leak: x", 0.9, "m", 0.0)

    def remember(self, connection, reply, spoke):
        pass


@pytest.mark.broker
def test_a_node_killed_anywhere_applies_each_reply_once_and_reports_it_once(broker, join, tmp_path):
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    ledger.migrate()
    coordinator = join("coordinator", start=False)
    Listener(coordinator, ledger)
    coordinator.start()
    peer = open_database(tmp_path / "peer.db")
    outbox = Outbox(peer)
    server = Server("base", outbox, Sure(), engine=peer)
    base = join("base", start=False)
    base.subscribe(topics.questions_to("base"), server.heard)
    base.start()
    drain = Drain(outbox, base, poll=0.05)
    server.start()
    drain.start()

    try:
        done = subprocess.run(
            [sys.executable, "tests/messaging/killed.py", str(tmp_path), str(broker.port), PASSWORDS["esteli"], STRIDE],
            cwd=ROOT, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}, capture_output=True, text=True, timeout=250,
        )  # fmt: skip
    finally:
        drain.stop()
        server.stop()

    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert result["steps"] > 30  # all of the way was cut, not only its beginning
    answers = [answer for (answer,) in result["answers"]]
    assert {state for _, state, _ in answers} == {"upgraded"}
    with ledger.read() as connection:
        kept = [row.id for row in connection.execute(sa.select(events.c.id))]
    assert sorted(kept) == sorted(event for _, _, event in answers)
    ledger.close()
    peer.dispose()
