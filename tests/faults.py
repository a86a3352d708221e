"""A TCP proxy that misbehaves on purpose, for every test that needs a bad link. Unprivileged; one seed gives one behaviour.

    with FaultProxy(("127.0.0.1", port), lambda n: Fault(cut_after=1000) if n < 3 else Fault()) as proxy:
        client.get(f"http://127.0.0.1:{proxy.port}/...")

The faults are toxiproxy's (limit_data, latency, bandwidth, reset_peer, timeout), one set a connection, in the direction of the answer.
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


@dataclass(frozen=True)
class Fault:
    """What happens to one connection."""

    cut_after: int | None = None  # bytes towards the client, then the connection ends
    reset: bool = False  # end with RST instead of FIN
    latency_s: float = 0.0  # before each block
    jitter_s: float = 0.0  # up to that much more, from the proxy's seed
    bytes_per_s: float = 0.0  # 0: as fast as it goes
    black_hole: bool = False  # accept, read, never answer
    refuse: bool = False  # close at once


class FaultProxy:
    """Listens on a free port of 127.0.0.1 and forwards to `target`. `plan` names the fault of connection 0, 1, 2, ..."""

    def __init__(self, target: tuple[str, int], plan: Callable[[int], Fault] = lambda n: Fault(), *, seed: int = 0) -> None:
        self.target = target
        self.plan = plan
        self.connections = 0
        self.bytes_down = 0  # towards the client, headers and all
        self._random = random.Random(seed)
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()
        self._stopped = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """End every connection and the listener."""
        self._stopped = True
        _close(self._listener)
        self.drop()
        self._thread.join(5)

    def drop(self) -> None:
        """End the connections that are open now: the link flaps."""
        with self._lock:
            open_now, self._open = self._open, []
        for end in open_now:
            _close(end)

    def _accept(self) -> None:
        while not self._stopped:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return  # stopped
            with self._lock:
                fault = self.plan(self.connections)
                self.connections += 1
            threading.Thread(target=self._serve, args=(client, fault), daemon=True).start()

    def _serve(self, client: socket.socket, fault: Fault) -> None:
        if fault.refuse:
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
        threading.Thread(target=_pump_up, args=(client, server), daemon=True).start()
        self._pump_down(server, client, fault)

    def _pump_down(self, server: socket.socket, client: socket.socket, fault: Fault) -> None:
        left = fault.cut_after if fault.cut_after is not None else 1 << 62
        reset = fault.reset
        try:
            while block := server.recv(BLOCK):
                if fault.black_hole:
                    continue
                if fault.latency_s or fault.jitter_s:
                    with self._lock:
                        extra = self._random.random() * fault.jitter_s
                    time.sleep(fault.latency_s + extra)
                if fault.bytes_per_s:
                    time.sleep(len(block) / fault.bytes_per_s)
                block = block[:left]
                client.sendall(block)
                left -= len(block)
                with self._lock:
                    self.bytes_down += len(block)
                if left <= 0:
                    break
            else:
                reset = False
        except OSError:
            reset = False  # one end is gone already
        _close(server)
        _end(client, reset=reset)


def _pump_up(client: socket.socket, server: socket.socket) -> None:
    try:
        while block := client.recv(BLOCK):
            server.sendall(block)
    except OSError:
        return
    finally:
        _close(server)


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
