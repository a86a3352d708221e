"""A TCP proxy that misbehaves on purpose, for every test that needs a bad link. Unprivileged; one seed gives one behaviour.

    with FaultProxy(("127.0.0.1", port), lambda n: Fault(cut_after=1000) if n < 3 else Fault()) as proxy:
        client.get(f"http://127.0.0.1:{proxy.port}/...")

    proxy.partition(); proxy.heal(); proxy.drop()          by hand
    FaultProxy(target, flap=Flap(up_s=3, down_s=1))        by itself

The faults are toxiproxy's (latency, jitter, bandwidth, slicer, limit_data, reset_peer, timeout), one set a connection, in both directions
where that makes sense. Replay: what happens to connection n depends on `seed` and n alone (and on what is sent through it), never on which
thread came first; a flap's times depend on `seed` alone. Which bytes a moment's flap catches is the machine's business.
"""

import contextlib
import random
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

BLOCK = 16 * 1024
RESET_BELOW_S = 0.02  # seconds: shorter waits are not worth the scheduler's error


@dataclass(frozen=True)
class Fault:
    """What happens to one connection. Directions: down is towards the client, up is towards the target."""

    cut_after: int | None = None  # bytes down, then the connection ends
    cut_after_up: int | None = None  # bytes up, then the connection ends
    reset: bool = False  # end with RST instead of FIN
    latency_s: float = 0.0  # of each block, both ways
    jitter_s: float = 0.0  # up to that much more
    bytes_per_s: float = 0.0  # down; 0: as fast as it goes
    bytes_per_s_up: float | None = None  # None: as down
    slice_bytes: int = 0  # at most so many bytes at a time, from 1 to that, both ways; 0: as they come
    black_hole: bool = False  # accept, read, never answer; nothing reaches the target either
    half_open_after: int | None = None  # bytes in both directions, then silence: open for TCP, dead for everybody
    refuse: bool = False  # close at once


LORA_DR5 = Fault(latency_s=0.1, jitter_s=0.1, bytes_per_s=5_470 / 8, slice_bytes=222)  # EU868, 5,470 bit/s
CELLULAR = Fault(latency_s=0.08, jitter_s=0.12, bytes_per_s=40_000, bytes_per_s_up=15_000)  # a 2G/3G fringe


@dataclass(frozen=True)
class Flap:
    """The link goes away and comes back by itself: each time up to a half more or less than said, from the seed."""

    up_s: float
    down_s: float


class FaultProxy:
    """Listens on a free port of 127.0.0.1 and forwards to `target`. `plan` names the fault of connection 0, 1, 2, ..."""

    def __init__(
        self, target: tuple[str, int], plan: Callable[[int], Fault] = lambda n: Fault(), *, seed: int = 0, flap: Flap | None = None
    ) -> None:
        self.target, self.plan, self.seed = target, plan, seed
        self.host = "127.0.0.1"
        self.connections = 0
        self.bytes_down = 0  # towards the client, headers and all
        self.bytes_up = 0  # towards the target
        self.flaps: list[float] = []  # seconds after the start at which the link went, came, went, ...
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._partitioned = False
        self._listener = socket.create_server((self.host, 0))
        self.port: int = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        if flap is not None:
            self._threads.append(threading.Thread(target=self._flap, args=(flap,), daemon=True))

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """End every connection and the listener."""
        self._stopped.set()
        _close(self._listener)
        self.drop()
        for thread in self._threads:
            thread.join(5)

    def drop(self) -> None:
        """End the connections that are open now: the link flaps."""
        with self._lock:
            open_now, self._open = self._open, []
        for end in open_now:
            _close(end)

    def partition(self) -> None:
        """End what is open, and every new connection at once, until `heal`."""
        self._partitioned = True
        self.drop()

    def heal(self) -> None:
        """Let connections through again."""
        self._partitioned = False

    def _flap(self, flap: Flap) -> None:
        began = time.monotonic()
        for at, up in flap_times(flap, self.seed):
            if self._stopped.wait(max(0.0, began + at - time.monotonic())):
                return
            self.flaps.append(at)
            (self.heal if up else self.partition)()

    def _accept(self) -> None:
        while not self._stopped.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return  # stopped
            with self._lock:
                number = self.connections
                self.connections += 1
            threading.Thread(target=self._serve, args=(client, number, self.plan(number)), daemon=True).start()

    def _serve(self, client: socket.socket, number: int, fault: Fault) -> None:
        if fault.refuse or self._partitioned:
            _end(client, reset=True)
            return
        try:
            server = socket.create_connection(self.target, timeout=5)
            server.settimeout(None)
        except OSError:
            _end(client, reset=True)
            return
        with self._lock:
            self._open += [client, server]
        shared = Shared(fault.half_open_after)
        up = Pump(self, client, server, fault, shared, rng=random.Random(f"{self.seed}/{number}/up"), up=True)
        down = Pump(self, server, client, fault, shared, rng=random.Random(f"{self.seed}/{number}/down"), up=False)
        threading.Thread(target=up.run, daemon=True).start()
        down.run()


class Shared:
    """What both directions of a connection share: the bytes before it falls silent, and whether it ends with RST."""

    def __init__(self, count: int | None) -> None:
        self.left, self.reset, self._lock = count, False, threading.Lock()

    def take(self, count: int) -> int:
        """How many of `count` may still pass."""
        with self._lock:
            if self.left is None:
                return count
            passed = min(count, self.left)
            self.left -= passed
            return passed


class Pump:
    """Moves one connection's bytes in one direction, as its fault says."""

    def __init__(
        self, proxy: FaultProxy, source: socket.socket, sink: socket.socket, fault: Fault, shared: Shared, *, rng: random.Random, up: bool
    ) -> None:
        self.proxy, self.source, self.sink, self.fault, self.shared, self.rng, self.up = proxy, source, sink, fault, shared, rng, up
        cut = fault.cut_after_up if up else fault.cut_after
        self.left = 1 << 62 if cut is None else cut
        self.rate = fault.bytes_per_s if fault.bytes_per_s_up is None or not up else fault.bytes_per_s_up
        self.owed = 0.0  # seconds not slept yet

    def run(self) -> None:
        """Until one end goes, or the cut."""
        try:
            with contextlib.suppress(OSError):  # one end is gone already
                while block := self.source.recv(BLOCK):
                    if self.fault.black_hole:
                        continue
                    for part in self._sliced(block):
                        self._pass(part)
                    if self.left <= 0:
                        self.shared.reset = self.fault.reset  # before either end goes: the other direction must not say goodbye then
                        break
        finally:
            down, up = (self.source, self.sink) if not self.up else (self.sink, self.source)
            _close(down)  # the target's end
            _end(up, reset=self.shared.reset)

    def _sliced(self, block: bytes) -> list[bytes]:
        if not self.fault.slice_bytes:
            return [block]
        parts = []
        while block:
            size = self.rng.randint(1, self.fault.slice_bytes)
            parts.append(block[:size])
            block = block[size:]
        return parts

    def _pass(self, part: bytes) -> None:
        self._wait(part)
        part = part[: self.left]
        part = part[: self.shared.take(len(part))]
        if not part:
            return
        self.left -= len(part)
        with self.proxy._lock:  # before they leave: who has heard them finds them counted
            if self.up:
                self.proxy.bytes_up += len(part)
            else:
                self.proxy.bytes_down += len(part)
        self.sink.sendall(part)

    def _wait(self, part: bytes) -> None:
        fault = self.fault
        if fault.latency_s or fault.jitter_s:
            self.owed += fault.latency_s + self.rng.random() * fault.jitter_s
        if self.rate:
            self.owed += len(part) / self.rate
        if self.owed >= RESET_BELOW_S:
            wait, self.owed = self.owed, 0.0
            self.proxy._stopped.wait(wait)


def flap_times(flap: Flap, seed: int, limit: int = 100_000) -> list[tuple[float, bool]]:
    """When the link changes, in seconds from the start, and whether it is up then: down, up, down, ..."""
    rng, at, times = random.Random(f"{seed}/flap"), 0.0, []
    for number in range(limit):
        at += (flap.down_s if number % 2 else flap.up_s) * rng.uniform(0.5, 1.5)
        times.append((at, bool(number % 2)))
    return times


def _end(end: socket.socket, *, reset: bool) -> None:
    if not reset:
        _close(end)
        return
    with contextlib.suppress(OSError):  # closed by the other thread
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        end.shutdown(socket.SHUT_RD)  # wakes the other thread's recv, which would keep the socket open; SHUT_WR would send FIN
    end.close()  # with linger 0 this sends RST


def _close(end: socket.socket) -> None:
    with contextlib.suppress(OSError):  # never connected, or closed already
        end.shutdown(socket.SHUT_RDWR)
    end.close()
