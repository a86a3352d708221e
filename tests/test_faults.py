"""tests/faults.py: the proxy does what its faults say, both ways, and again for the same seed."""

import random
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.faults import LORA_DR5, Fault, FaultProxy, Flap, Pump, Shared, flap_times


@pytest.fixture
def echo() -> Iterator[tuple[str, int]]:
    """A server that says everything back."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve(end: socket.socket) -> None:
            with end:
                try:
                    while block := end.recv(4096):
                        end.sendall(block)
                except OSError:
                    return

        def accept() -> None:
            while True:
                try:
                    end, _ = server.accept()
                except OSError:
                    return
                threading.Thread(target=serve, args=(end,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()
        server.shutdown(socket.SHUT_RDWR)


def call(port: int, said: bytes, *, wait_s: float = 2.0) -> bytes:
    """What comes back until as much came as was said, the end, or silence."""
    with socket.create_connection(("127.0.0.1", port), timeout=wait_s) as end:
        end.sendall(said)
        heard = b""
        try:
            while len(heard) < len(said) and (block := end.recv(4096)):
                heard += block
        except TimeoutError:
            pass
    return heard


def test_without_a_fault_everything_passes_and_is_counted_both_ways(echo):
    with FaultProxy(echo) as proxy:
        assert call(proxy.port, b"x" * 5_000) == b"x" * 5_000
        assert (proxy.bytes_up, proxy.bytes_down, proxy.connections) == (5_000, 5_000, 1)


@pytest.mark.parametrize(("fault", "comes"), [(Fault(cut_after=700), 700), (Fault(cut_after_up=300), 300)], ids=["down", "up"])
def test_a_cut_lets_exactly_so_many_bytes_through(echo, fault, comes):
    with FaultProxy(echo, lambda n: fault) as proxy:
        heard = call(proxy.port, b"x" * 1_000)

    assert len(heard) <= comes
    assert (proxy.bytes_down if fault.cut_after else proxy.bytes_up) == comes


def test_a_reset_is_a_reset_and_no_goodbye(echo):
    with FaultProxy(echo, lambda n: Fault(cut_after=10, reset=True)) as proxy, pytest.raises(ConnectionResetError):
        call(proxy.port, b"x" * 1_000)


@pytest.mark.parametrize("fault", [Fault(black_hole=True), Fault(half_open_after=0)], ids=["black hole", "half open"])
def test_silence_stays_open_for_tcp(echo, fault):
    with FaultProxy(echo, lambda n: fault) as proxy:
        assert call(proxy.port, b"hello", wait_s=0.3) == b""


def test_a_connection_falls_silent_after_so_many_bytes_of_both_directions(echo):
    with FaultProxy(echo, lambda n: Fault(half_open_after=1_500)) as proxy:
        assert len(call(proxy.port, b"x" * 1_000, wait_s=0.3)) == 500


def test_latency_and_bandwidth_cost_time_in_both_directions(echo):
    with FaultProxy(echo, lambda n: Fault(latency_s=0.1, bytes_per_s=10_000)) as proxy:
        began = time.monotonic()
        call(proxy.port, b"x" * 1_000)

    assert time.monotonic() - began >= 2 * (0.1 + 0.1)


def test_a_lora_preset_takes_as_long_as_the_air_would(echo):
    with FaultProxy(echo, lambda n: LORA_DR5) as proxy:
        began = time.monotonic()
        call(proxy.port, b"x" * 51, wait_s=5.0)

    assert time.monotonic() - began >= 2 * 51 / (5_470 / 8)


def test_a_slicer_keeps_the_bytes_and_their_order(echo):
    said = bytes(random.Random(1).randbytes(3_000))
    with FaultProxy(echo, lambda n: Fault(slice_bytes=7)) as proxy:
        assert call(proxy.port, said) == said


def test_the_same_seed_slices_and_delays_the_same_connection_alike(echo):
    def behaviour(seed: int, number: int) -> list[int]:
        rng = random.Random(f"{seed}/{number}/up")
        with socket.socket() as nobody, FaultProxy(echo, seed=seed) as proxy:
            pump = Pump(proxy, nobody, nobody, Fault(slice_bytes=9), Shared(None), rng=rng, up=True)
            return [len(part) for part in pump._sliced(b"x" * 500)]

    assert behaviour(3, 0) == behaviour(3, 0)
    assert behaviour(3, 0) != behaviour(3, 1) != behaviour(4, 1)


def test_a_flap_comes_again_at_the_same_times_for_the_same_seed(echo):
    flap = Flap(up_s=0.1, down_s=0.1)
    with FaultProxy(echo, seed=5, flap=flap) as proxy:
        end = time.monotonic() + 30.0
        while len(proxy.flaps) < 4 and time.monotonic() < end:
            time.sleep(0.01)

    assert len(proxy.flaps) >= 4
    assert proxy.flaps == [at for at, _ in flap_times(flap, 5, limit=len(proxy.flaps))]
    assert flap_times(flap, 5, limit=4) != flap_times(flap, 6, limit=4)


def test_a_partition_ends_what_is_open_and_refuses_until_it_heals(echo):
    with FaultProxy(echo) as proxy, socket.create_connection(("127.0.0.1", proxy.port), timeout=2) as end:
        end.sendall(b"x")
        assert end.recv(1) == b"x"

        proxy.partition()

        assert end.recv(1) == b""
        with pytest.raises(OSError):
            assert call(proxy.port, b"x") == b"x"
            raise OSError("closed without a word")
        proxy.heal()
        assert call(proxy.port, b"again") == b"again"


def test_a_refused_connection_brings_nothing(echo):
    with FaultProxy(echo, lambda n: Fault(refuse=n == 0)) as proxy:
        with pytest.raises(OSError):
            call(proxy.port, b"x")
            raise OSError("closed without a word")

        assert call(proxy.port, b"x") == b"x"
