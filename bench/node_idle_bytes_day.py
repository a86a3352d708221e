"""Bytes a day that an idle node costs: a real daemon, a real mosquitto with mutual TLS, counted at the TCP stream by a proxy between them.

Scaled: heartbeats every BEAT_S seconds instead of 300. The arithmetic, all from counts of this run:

    connect      bytes of both directions until the node is born and subscribed and nothing more comes
    beat         (bytes of the BEATS heartbeats after that) / BEATS
    a day        connect + 86,400 / 300 * beat + pings,    for one connection a day
    pings        a link that keeps alive less often than its heartbeats sends none (cellular: 450 s against 300 s); lan keeps alive every
                 60 s, so between two heartbeats there are four pings of PING_BYTES each way (measured, docs/adr/0024)

The figure is that of a cellular link; a lan's stands beside it, and what a plan bills when IP and TCP headers (52 bytes a packet) count.
(The daemon of this run says "lan", for a cellular one would not send heartbeats every second; what it says is the same.)
The node has no model: with one, an idle heartbeat is the same frame. `--quick` takes fewer heartbeats.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.settings import Settings
from deploy.broker import Broker, Tls
from protocol.links import HEADER_BYTES, LINKS
from protocol.ports import free_port
from tests.certificates import authority
from tests.faults import FaultProxy

BEAT_S, BEATS, QUICK_BEATS = 1.0, 60, 4
HEARTBEAT_S = 300.0  # seconds; what is asked of a day
DAY_S = 86_400
PING_BYTES = 24 + 24  # PINGREQ and PINGRESP, 2 bytes each in a TLS record of 22 more
QUIET_S = 2.0  # without a byte: it has said all it had to
BEAT_PACKETS = 4  # heartbeat, its TCP acknowledgement, PUBACK, its TCP acknowledgement; at most
READY_S = 120.0  # seconds for the daemon to connect; Python starts slowly on a busy machine


def measure(settings: Settings) -> dict[str, Any]:
    folder, beats = settings.folder("idle_bytes_day"), QUICK_BEATS if settings.quick else BEATS
    certificates = authority(folder / "ca")
    tls = Tls(certificates.ca, *certificates.issue("broker"))
    with (
        Broker(folder / "broker", port=free_port(), users={}, tls=tls, program="mosquitto") as broker,
        FaultProxy((broker.host, broker.port)) as proxy,
    ):
        daemon = _start(folder, proxy.port, certificates)
        try:
            connect = _connected(proxy)
            before = _moved(proxy)
            while (sent := _beats(proxy, before)) < beats:
                if daemon.poll() is not None:
                    raise RuntimeError(f"the daemon ended; see {folder / 'daemon.log'}")
                time.sleep(0.05)
            beat = sum(_moved(proxy)[i] - before[i] for i in (0, 1)) / sent
        finally:
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(30)
    a_day = DAY_S / HEARTBEAT_S
    pings = (DAY_S / LINKS["lan"].keepalive_s - a_day) * PING_BYTES
    stream = connect + a_day * beat
    return {
        "figure": stream,
        "against": {"lan, keep-alive of 60 s": stream + pings, "as billed, headers included": stream + a_day * BEAT_PACKETS * HEADER_BYTES},
        "n": sent, "bytes": {"connect": connect, "heartbeat": beat}, "heartbeats_a_day": a_day,
        "arithmetic": f"{connect} + {a_day:g} * {beat:.1f}",
    }  # fmt: skip


def _start(folder: Path, port: int, certificates: Any) -> "subprocess.Popen[bytes]":
    cert, key = certificates.issue("esteli")
    wanted = {
        "NODE_NAME": "esteli", "NODE_STATE_DIR": folder / f"state-{time.time_ns()}", "API_PORT": 0, "BROKER_HOST": "127.0.0.1",
        "BROKER_PORT": port, "BROKER_HEARTBEAT_S": BEAT_S, "BROKER_CA_FILE": certificates.ca, "BROKER_CERT_FILE": cert,
        "BROKER_KEY_FILE": key,
    }  # fmt: skip
    environment = {**os.environ, **{f"MILPA_NODE_{name}": str(value) for name, value in wanted.items()}}
    with (folder / "daemon.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "node.cli", "run"], env=environment, stdout=log, stderr=log, cwd=Path(__file__).parents[1]
        )


def _moved(proxy: FaultProxy) -> tuple[int, int]:
    return proxy.bytes_up, proxy.bytes_down


def _connected(proxy: FaultProxy) -> int:
    """Bytes of both directions from the first SYN to the birth's PUBACK: what comes before the first pause as long as a heartbeat's."""
    end = time.monotonic() + READY_S
    while not proxy.connections:
        if time.monotonic() > end:
            raise RuntimeError(f"the daemon did not connect within {READY_S:g} s")
        time.sleep(0.02)
    last, since = _moved(proxy), time.monotonic()
    while time.monotonic() - since < 0.6 * BEAT_S:
        time.sleep(0.01)
        if _moved(proxy) != last:
            last, since = _moved(proxy), time.monotonic()
    return sum(last)


def _beats(proxy: FaultProxy, before: tuple[int, int]) -> int:
    """How many heartbeats were acknowledged: a PUBACK is 4 bytes and its TLS record 22."""
    return (proxy.bytes_down - before[1]) // 26
