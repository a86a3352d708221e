"""protocol/meter.py: counted, enforced, remembered over kills and clean ends; and a session that obeys."""

import socket

import pytest

from protocol import links, topics
from protocol.links import BELIEVED_FROM, DAY_S, HEADER_BYTES, Reading
from protocol.meter import KEEP_S, Meter
from protocol.mqtt import Session
from tests.faults import FaultProxy
from tests.messaging.conftest import PASSWORDS

EVENT = topics.event("esteli")
A_GOODBYE = 100  # bytes that may still cross while the socket closes; and the kernel counts a FIN as one


class Clocks:
    """All clocks of a machine, moved by hand."""

    def __init__(self) -> None:
        self.boot, self.uptime, self.wall = 1, 1_000.0, BELIEVED_FROM + DAY_S

    def __call__(self) -> Reading:
        return Reading(f"boot-{self.boot}", self.uptime, self.wall)

    def pass_by(self, seconds: float) -> None:
        self.uptime, self.wall = self.uptime + seconds, self.wall + seconds

    def reboot(self, off_s: float) -> None:
        self.boot, self.uptime, self.wall = self.boot + 1, 20.0, self.wall + off_s


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


@pytest.fixture
def metered(database, clocks):
    def make(name="cellular", **options):
        return Meter(database, links.link(name, **options), read=clocks)

    return make


def test_both_directions_and_the_headers_of_each_packet_count(metered):
    meter = metered()

    meter.spend(100, 50, packets=4)

    assert (meter.day.up, meter.day.down, meter.day.spent) == (100 + 2 * HEADER_BYTES, 50 + 2 * HEADER_BYTES, 150 + 4 * HEADER_BYTES)
    assert (meter.total_up, meter.total_down) == (100, 50)


def test_when_the_days_bytes_are_spent_nothing_more_may_be_and_tomorrow_it_may(metered, clocks):
    meter = metered(bytes_a_day=100_000)
    meter.spend(99_000, 1_000)
    assert not meter.may_spend(1, "status").ok
    assert not meter.may_connect().ok

    clocks.pass_by(DAY_S)

    assert meter.may_spend(1, "event").ok
    assert meter.may_connect().ok


def test_what_was_spent_survives_a_kill_and_is_never_counted_for_less(metered):
    meter = metered(bytes_a_day=100_000)
    meter.spend(40_000, 2_000)
    meter.keep()
    meter.spend(300, 100)  # never written: within the reserve

    after = metered(bytes_a_day=100_000)

    assert 42_400 <= after.day.spent <= 42_400 + 2 * meter.reserve


def test_a_clean_end_remembers_the_exact_count(metered):
    meter = metered()
    meter.spend(10_000, 0)
    meter.settle()

    assert metered().day.spent == 10_000


def test_a_reboot_with_the_clock_in_1970_opens_no_new_day(metered, clocks):
    meter = metered(bytes_a_day=50_000)
    meter.spend(50_000, 0)
    meter.settle()

    clocks.reboot(off_s=0)
    clocks.wall = 12.0
    early = metered(bytes_a_day=50_000)
    clocks.wall = BELIEVED_FROM + 400 * DAY_S  # the time server answers: within the boot a jump means nothing
    late = early.may_spend(1, "reply")

    assert not late.ok


def test_a_reboot_after_a_night_off_counts_the_night(metered, clocks):
    meter = metered(bytes_a_day=50_000)
    clocks.pass_by(DAY_S - 4 * 3_600)
    meter.spend(50_000, 0)
    meter.settle()

    clocks.reboot(off_s=5 * 3_600)

    assert metered(bytes_a_day=50_000).day.spent <= meter.reserve


def test_how_far_the_day_is_is_written_now_and_then_though_nothing_is_spent(metered, clocks):
    meter = metered()
    clocks.pass_by(KEEP_S + 1)
    meter.keep()

    assert metered().day.elapsed == pytest.approx(KEEP_S + 1)


def test_writing_is_rare(metered, database):
    meter, writes = metered(bytes_a_day=1_000_000), []
    write, meter._write = meter._write, lambda day: (writes.append(day), write(day))
    for _ in range(1_000):
        meter.spend(50, 50)
        meter.keep()

    assert len(writes) <= 100_000 / meter.reserve + 1


@pytest.mark.broker
def test_a_sessions_bytes_are_those_that_a_proxy_sees(broker, metered, eventually):
    meter = metered("lan")
    with FaultProxy((broker.host, broker.port)) as proxy:
        session = Session("esteli", "127.0.0.1", proxy.port, username="esteli", password=PASSWORDS["esteli"], meter=meter)
        session.start()
        assert session.wait_connected(10)
        for number in range(20):
            session.publish(EVENT, b"x" * 100 * number)
        session.stop()
        eventually(lambda: proxy.bytes_up >= 19_000)  # the last ones are still under way

    assert abs(proxy.bytes_up - meter.total_up) <= A_GOODBYE
    assert abs(proxy.bytes_down - meter.total_down) <= A_GOODBYE

    assert meter.day.spent > proxy.bytes_up + proxy.bytes_down


@pytest.mark.broker
def test_a_session_whose_bytes_are_spent_says_goodbye_and_comes_back_the_next_day(broker, metered, clocks, join, eventually, monkeypatch):
    monkeypatch.setattr("protocol.mqtt.SPENT_LOOK_S", 0.05)
    deaths = []
    watcher = join("base", start=False)
    watcher.subscribe(topics.ALL_STATUS, lambda message: deaths.append(message.payload))
    watcher.start()
    meter = metered(bytes_a_day=100_000)
    session = join("esteli", meter=meter, will=lambda connection: (topics.status("esteli"), b"lost"))

    meter.spend(100_000, 0)
    eventually(lambda: not session.connected)
    assert "away until there are bytes again" in session.problem
    clocks.pass_by(DAY_S)
    eventually(lambda: session.connected, lambda: session.problem)

    assert deaths == []
    assert session.connects == 2


@pytest.mark.broker
def test_on_a_connection_that_is_dead_for_everybody_but_tcp_nothing_waits_for_ever(broker, eventually, monkeypatch):
    from protocol.errors import ConnectionLost, Unavailable
    from tests.faults import Fault

    monkeypatch.setattr("protocol.mqtt.SILENCE_LIMIT_S", 0.5)
    with FaultProxy((broker.host, broker.port), lambda n: Fault(half_open_after=1_000) if n == 0 else Fault()) as proxy:
        session = Session("esteli", "127.0.0.1", proxy.port, username="esteli", password=PASSWORDS["esteli"], backoff_base=0.02)
        session.start()
        assert session.wait_connected(10)
        try:
            with pytest.raises(Unavailable, match="said nothing") as refused:
                session.publish(EVENT, b"x" * 2_000, timeout=10)
            assert not isinstance(refused.value, ConnectionLost)  # it was not the message's fault
            eventually(lambda: session.connected and session.connects == 2)
            session.publish(EVENT, b"x" * 2_000)
        finally:
            session.stop()


def test_a_handshake_that_fails_is_paid_for(metered, clocks, tmp_path, eventually):
    """Its socket is gone before anybody can ask the kernel."""
    import threading

    meter = metered()
    with socket.create_server(("127.0.0.1", 0)) as plain:

        def greet_wrongly():
            end, _ = plain.accept()
            with end:
                end.recv(4_096)
                end.sendall(b"no TLS here\r\n")

        threading.Thread(target=greet_wrongly, daemon=True).start()
        from tests.certificates import Authority

        session = Session("esteli", "127.0.0.1", plain.getsockname()[1], ca_file=Authority(tmp_path / "ca").ca, meter=meter, backoff_base=5)
        session.start()
        try:
            eventually(lambda: meter.day.spent >= links.CONNECT_BYTES, lambda: session.problem)
        finally:
            session.stop()
