"""Seconds until the next message leaves after one that no connection survives, or that is too large.

A real mosquitto with the shipped settings, our session and outbox with theirs. In each turn a poison message and, right behind it in the
same class, a healthy one; the clock runs from the commit of both to the healthy one's arrival at a subscriber.

    poison       the broker ends the connection whenever it sees it: a packet over its limit from a session that does not know the limit
    oversized    the session knows the limit: the message waits in the outbox since before a CONNACK told it

The figure is the slowest of all turns; how long a session waits between attempts is drawn from the seed.
"""

import queue
import random
import statistics
import time
from pathlib import Path
from typing import Any

from bench.settings import Settings
from deploy.broker import PACKET_LIMIT, Broker
from node.store import open_database
from protocol import outbox as rules
from protocol import topics
from protocol.drain import Drain
from protocol.mqtt import Incoming, Session
from protocol.outbox import Outbox
from protocol.ports import free_port

TURNS = 20  # of each kind
USERS = {"coordinator": "coordinator-password", "esteli": "esteli-password"}
DEADLINE_S = 60.0


def measure(settings: Settings) -> dict[str, Any]:
    limit, rules.MESSAGE_LIMIT = rules.MESSAGE_LIMIT, 4 * PACKET_LIMIT  # our own limit would refuse it long before the broker's
    try:
        seconds = measured(settings)
    finally:
        rules.MESSAGE_LIMIT = limit
    slowest = max(max(each) for each in seconds.values())
    medians = {f"{kind}, median s": round(statistics.median(each), 3) for kind, each in seconds.items()}
    return {
        "figure": slowest, "against": medians, "n": sum(map(len, seconds.values())),
        "slowest_s": {kind: max(each) for kind, each in seconds.items()},
    }  # fmt: skip


def measured(settings: Settings) -> dict[str, list[float]]:
    """Seconds of every turn, by kind."""
    turns = 1 if settings.quick else TURNS
    folder = settings.folder("poison_s")
    seconds: dict[str, list[float]] = {"poison": [], "oversized": []}
    with Broker(folder / "broker", port=free_port(), users=USERS, program="mosquitto") as broker:
        arrived: queue.Queue[bytes] = queue.Queue()
        coordinator = Session("coordinator", broker.host, broker.port, username="coordinator", password=USERS["coordinator"])
        coordinator.subscribe(topics.ALL_EVENTS, lambda message: _note(arrived, message))
        coordinator.start()
        coordinator.wait_connected(DEADLINE_S)
        for kind in seconds:
            for turn in range(turns):
                seconds[kind].append(_turn(folder / f"{kind}-{turn}.db", broker, kind, arrived, seed=settings.seed * 1_000 + turn))
        coordinator.stop()
    return seconds


class Trusting(Session):
    """A session that does not believe the broker's limit, so that what is too large goes out."""

    maximum_packet = property(lambda self: 10**9, lambda self, told: None)


def _turn(database: Path, broker: Broker, kind: str, arrived: "queue.Queue[bytes]", *, seed: int) -> float:
    for file in database.parent.glob(database.name + "*"):
        file.unlink()
    engine = open_database(database)
    box = Outbox(engine)
    session = (Trusting if kind == "poison" else Session)(
        "esteli", broker.host, broker.port, username="esteli", password=USERS["esteli"], rng=random.Random(seed)
    )  # fmt: skip
    session.on_connected(lambda _: box.connected(session.maximum_packet))
    drain = Drain(box, session)
    healthy = f"healthy-{kind}-{seed}".encode()
    with engine.begin() as connection:
        box.put(connection, topics.event("esteli"), b"x" * (PACKET_LIMIT + 1), id="poison", kind="event")
        box.put(connection, topics.event("esteli"), healthy, id="healthy", kind="event")
    began = time.monotonic()
    session.start()
    drain.start()
    try:
        while arrived.get(timeout=DEADLINE_S) != healthy:
            continue
        return time.monotonic() - began
    finally:
        drain.stop()
        session.stop()
        engine.dispose()


def _note(arrived: "queue.Queue[bytes]", message: Incoming) -> None:
    arrived.put(message.payload)
