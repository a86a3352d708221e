"""Bytes a day that an idle node costs: a real daemon, a real mosquitto with mutual TLS, counted at the TCP stream by a proxy between them.

Scaled: heartbeats every BEAT_S seconds instead of 300. The arithmetic, all from counts of this run:

    beat         (bytes of both directions during BEATS heartbeats that the coordinator heard) / BEATS
    connect      all bytes before them, less the beats among those: TLS, CONNECT, subscriptions, birth
    a day        connect + 86,400 / 300 * beat + pings,    for one connection a day
    pings        a link that keeps alive less often than its heartbeats sends none (cellular: 450 s against 300 s); lan keeps alive every
                 60 s, so between two heartbeats there are four pings of PING_BYTES each way (measured, docs/adr/0024)

The figure is that of a cellular link as a plan bills it, IP and TCP headers (52 bytes a packet) counted; the stream alone stands beside it,
and both of a lan, where nobody bills. (The daemon of this run says "lan", for a cellular one would not send heartbeats every second; what
it says is the same.)
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
from protocol import topics
from protocol.links import HEADER_BYTES, LINKS
from protocol.mqtt import Session
from protocol.ports import free_port
from tests.certificates import Authority
from tests.faults import FaultProxy

BEAT_S, BEATS, QUICK_BEATS = 1.0, 60, 4
HEARTBEAT_S = 300.0  # seconds; what is asked of a day
DAY_S = 86_400
CONNECT_PACKETS = 30  # of both directions, acknowledgements included; at most
PING_BYTES = 24 + 24  # PINGREQ and PINGRESP, 2 bytes each in a TLS record of 22 more
PING_PACKETS = 4  # as a heartbeat
BEAT_PACKETS = 4  # heartbeat, its TCP acknowledgement, PUBACK, its TCP acknowledgement; at most
READY_S = 120.0  # seconds for the daemon to connect; Python starts slowly on a busy machine


def measure(settings: Settings) -> dict[str, Any]:
    folder, beats = settings.folder("idle_bytes_day"), QUICK_BEATS if settings.quick else BEATS
    certificates = Authority(folder / "ca")
    tls = Tls(certificates.ca, *certificates.issue("broker"))
    with (
        Broker(folder / "broker", port=free_port(), users={}, tls=tls, program="mosquitto") as broker,
        FaultProxy((broker.host, broker.port)) as proxy,
    ):
        alive: list[bytes] = []
        cert, key = certificates.issue("coordinator")
        coordinator = Session("coordinator", broker.host, broker.port, ca_file=certificates.ca, cert_file=cert, key_file=key)
        coordinator.subscribe(topics.ALL_ALIVE, lambda message: alive.append(message.payload))
        coordinator.start()
        daemon = _start(folder, proxy.port, certificates)
        try:
            _heard(alive, 1, daemon, folder)
            first, known = sum(_moved(proxy)), len(alive)
            _heard(alive, known + beats, daemon, folder)
            sent = len(alive) - known
            beat = (sum(_moved(proxy)) - first) / sent
            connect = first - known * beat
        finally:
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(30)
            coordinator.stop()
    a_day = DAY_S / HEARTBEAT_S
    pings = DAY_S / LINKS["lan"].keepalive_s - a_day
    stream, packets = connect + a_day * beat, CONNECT_PACKETS + a_day * BEAT_PACKETS
    lan_stream, lan_packets = stream + pings * PING_BYTES, packets + pings * PING_PACKETS
    return {
        "figure": stream + packets * HEADER_BYTES,
        "against": {
            "cellular, the stream alone": stream, "lan, the stream alone": lan_stream,
            "lan, keep-alive of 60 s": lan_stream + lan_packets * HEADER_BYTES,
        },
        "n": sent, "bytes": {"connect": connect, "heartbeat": beat}, "packets": packets, "heartbeats_a_day": a_day,
        "arithmetic": f"{connect:.0f} + {a_day:g} * {beat:.1f} + {packets:g} * {HEADER_BYTES}",
    }  # fmt: skip


def _start(folder: Path, port: int, certificates: Any) -> "subprocess.Popen[bytes]":
    cert, key = certificates.issue("esteli")
    wanted = {
        "NODE_NAME": "esteli", "NODE_STATE_DIR": folder / f"state-{time.time_ns()}", "API_PORT": 0, "BROKER_HOST": "127.0.0.1",
        "BROKER_PORT": port, "BROKER_HEARTBEAT_S": BEAT_S, "BROKER_CA_FILE": certificates.ca, "BROKER_CERT_FILE": cert,
        "BROKER_KEY_FILE": key,
    }  # fmt: skip
    environment = {**os.environ, "MILPA_NODE_CONFIG": "", **{f"MILPA_NODE_{name}": str(value) for name, value in wanted.items()}}
    with (folder / "daemon.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "node.cli", "run"], env=environment, stdout=log, stderr=log, cwd=Path(__file__).parents[1]
        )


def _moved(proxy: FaultProxy) -> tuple[int, int]:
    return proxy.bytes_up, proxy.bytes_down


def _heard(alive: list[bytes], count: int, daemon: "subprocess.Popen[bytes]", folder: Path) -> None:
    """Wait until the coordinator has heard so many heartbeats."""
    end = time.monotonic() + READY_S + 10 * BEAT_S * count
    while len(alive) < count:
        if daemon.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"the daemon is not heard; see {folder / 'daemon.log'}")
        time.sleep(0.01)
