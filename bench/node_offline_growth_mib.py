"""Growth of a daemon's resident memory over seven days offline at one record a minute, every answer unsure and put to a peer.

A real daemon process with a tiny model, its own clock set forward a minute a record (bench/virtual_daemon.py), the broker away, every
question worth asking for a week: so the outbox, the questions and the answers grow as they would. The figure is resident memory (VmRSS)
at the end minus that after WARM records; what the first ones load once (SQLite's pages, the model's buffers) is told beside it.
"""

import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import msgspec

from bench.settings import Settings
from protocol.ports import free_port
from tests.tiny import tiny_gguf

RECORDS, QUICK_RECORDS = 7 * 24 * 60, 40
WARM, QUICK_WARM = 240, 20  # records; the first four hours
MINUTE_S = 60.0
BEGAN = 1_800_000_000.0  # virtual seconds since 1970
READY_S = 120.0
SAMPLE_EVERY = 60  # records between two looks at the memory


def measure(settings: Settings) -> dict[str, Any]:
    records, warm = (QUICK_RECORDS, QUICK_WARM) if settings.quick else (RECORDS, WARM)
    folder = settings.folder("offline_growth_mib") / str(time.time_ns())
    folder.mkdir()
    clock = folder / "clock"
    _set(clock, BEGAN)
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.virtual_daemon", str(clock), str(_config(folder))], cwd=Path(__file__).parents[1],
        stdout=(folder / "daemon.log").open("wb"), stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        url = _url(process, folder)
        memory: list[float] = []
        with httpx.Client(base_url=url, timeout=60) as client:
            for number in range(records):
                _set(clock, BEGAN + MINUTE_S * (number + 1))
                given = client.post("/v1/completions", json={"prompt": f"pump {number} at {number % 24}:00, flow {number % 7} l/min"})
                given.raise_for_status()
                if number + 1 in (warm, records) or (number + 1) % SAMPLE_EVERY == 0:
                    memory.append(resident_mib(process.pid))
                if number + 1 == warm:
                    first = memory[-1]
            status = client.get("/v1/status").json()
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    return {
        "figure": memory[-1] - first, "against": {}, "n": records, "warm_records": warm, "mib": {"after warming": first, "end": memory[-1],
        "most": max(memory)}, "outbox_messages": status["broker"]["outbox"], "answers": sum(status["states"].values()),
    }  # fmt: skip


def resident_mib(pid: int) -> float:
    """Resident memory of a process, MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS:")).split()[1]) / 1024


def _config(folder: Path) -> Path:
    model = tiny_gguf(folder / "tiny.gguf")
    config = folder / "node.toml"
    config.write_text(
        f"""
        [node]
        name = "esteli"
        state_dir = "{folder / "state"}"
        [api]
        port = 0
        [model]
        path = "{model}"
        budget = 1.0
        [broker]
        host = "127.0.0.1"
        port = {free_port()}
        [peers]
        ask = ["base"]
        deadline_s = {8 * 86_400}
        """
    )
    return config


def _url(process: "subprocess.Popen[bytes]", folder: Path) -> str:
    """Where it answers, once it is ready."""
    end, run = time.monotonic() + READY_S, folder / "state" / "run.json"
    while time.monotonic() < end and process.poll() is None:
        if run.is_file():
            url = str(msgspec.json.decode(run.read_bytes())["url"])
            try:
                if httpx.get(f"{url}/readyz").status_code == 200:
                    return url
            except httpx.TransportError:
                time.sleep(0.1)
        time.sleep(0.1)
    raise RuntimeError(f"the daemon is not ready; see {folder / 'daemon.log'}")


def _set(clock: Path, now: float) -> None:
    with clock.open("r+b" if clock.exists() else "wb") as file:
        file.write(struct.pack("<d", now))
