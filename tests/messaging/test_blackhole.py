"""The local answer waits for nothing, a broker that takes connections and never says a word included (bench/node_blackhole_p95.py)."""

import signal
import statistics
import time

import pytest

from protocol.mqtt import CONNACK_DEADLINE_S, PUBACK_DEADLINE_S
from tests.messaging.test_escalation import fleet, sure, unsure

__all__ = ["fleet"]
pytestmark = pytest.mark.broker
ANSWERS, TURNS = 8, 2


def seconds(site, names):
    """How long each local answer took; every one of them asks the peer."""
    took = []
    for name in names:
        began = time.perf_counter()
        assert site.asks(name).provisional
        took.append(time.perf_counter() - began)
    return took


@pytest.mark.rule("ask-11", "ask-10")
def test_the_local_answer_comes_as_soon_when_the_broker_is_a_black_hole(broker, fleet, eventually):
    fleet("base", engine=sure(), serve=True).start()
    esteli = fleet("esteli", engine=unsure(), budget=1.0, ask=("base",)).start()
    eventually(lambda: esteli.messaging._presence.likely("base"))
    up, hole = [], []

    for turn in range(TURNS):
        up += seconds(esteli, [f"tank up {turn} {number}" for number in range(ANSWERS)])
        eventually(lambda: not esteli.messaging.open_questions)
        broker.process.send_signal(signal.SIGSTOP)
        try:
            hole += seconds(esteli, [f"tank hole {turn} {number}" for number in range(ANSWERS)])
        finally:
            broker.process.send_signal(signal.SIGCONT)
        eventually(lambda: not esteli.messaging.open_questions)

    assert max(hole) < min(CONNACK_DEADLINE_S, PUBACK_DEADLINE_S) / 2  # seconds: it waited for none of the link's own deadlines
    assert statistics.median(hole) < 2 * statistics.median(up) + 0.02
    assert {state for state, _, _ in esteli.answers().values()} == {"upgraded"}  # and what was asked into the hole arrived when it closed


def test_answers_are_given_when_the_broker_never_was(fleet):
    """No broker at all: the session's threads are not even started, as before the daemon's messaging is."""
    esteli = fleet("esteli", engine=unsure(), budget=1.0, ask=("base",))
    esteli.worker.start()

    assert max(seconds(esteli, [f"tank {number}" for number in range(ANSWERS)])) < CONNACK_DEADLINE_S / 2
