"""footprint: what a daemon costs that runs, each figure of a process of its own, started as systemd starts it.

    footprint      MiB resident (VmRSS) without a model, some seconds after the start; alone, as installed
    footprint_2    MiB with a student of the `small` preset, after answers at the full length of the context's first prompts
    footprint_3    share of one core over a quiet minute, with that model, nothing asked
    footprint_4    seconds from exec to READY=1 beyond what loading and proving the model takes; as the median of several starts

Against: the same daemon with spool folder, site topic, fleet broker and updates configured and all of them away.
The student is cut and trained on nothing: memory and time depend on its shape, not on what it learned.
"""

import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from bench.settings import Settings
from bench.student import packed
from node.client import read_run_file
from protocol.errors import Unavailable
from protocol.ports import free_port

READY_S = 120.0  # seconds until a node must be up
SETTLE_S = 5.0
QUIET_S = 60.0  # seconds of idleness
STARTS = 5
ANSWERS = 32
TICK = os.sysconf("SC_CLK_TCK")


def measure(settings: Settings) -> dict[str, Any]:
    """All four."""
    work, quick = settings.folder("footprint"), settings.quick
    model = settings.base() if quick else packed(settings)
    bare = settings.kept("footprint", "bare", lambda: _resident(work, {}, quick=quick))
    full = settings.kept("footprint", "full", lambda: _resident(work, _all_parts(work), quick=quick))
    loaded = settings.kept("footprint", "loaded", lambda: _loaded(work, model, quick=quick))
    starts = settings.kept("footprint", "starts", lambda: _starts(work, model, 1 if quick else STARTS))
    beyond = [start["ready_s"] - start["model_s"] for start in starts]
    return {
        "footprint": {"figure": bare, "against": {"with every part, all of them away": full}, "n": 1},
        "footprint_2": {"figure": loaded["resident_mib"], "against": {"size of the model, MiB": model.stat().st_size / 2**20}, "n": 1},
        "footprint_3": {"figure": loaded["idle"], "against": {"seconds watched": loaded["watched_s"]}, "n": 1},
        "footprint_4": {
            "figure": statistics.median(beyond),
            "against": {
                "of all, the model": statistics.median(start["model_s"] for start in starts),
                "of all, processor seconds": statistics.median(start["cpu_s"] for start in starts),  # the same on a busy machine
            },
            "n": len(starts),
        },
    }


def _resident(work: Path, environment: Mapping[str, str], *, quick: bool) -> float:
    with _node(work, environment) as (process, _, _):
        time.sleep(0.2 if quick else SETTLE_S)
        return _rss(process.pid)


def _loaded(work: Path, model: Path, *, quick: bool) -> dict[str, float]:
    with _node(work, {"MILPA_NODE_MODEL_PATH": str(model), "MILPA_NODE_MODEL_TASK": "ranch"}) as (process, url, _):
        for number in range(2 if quick else ANSWERS):
            httpx.post(url + "/v1/completions", json={"prompt": f"soil {number} % " * 20}, timeout=60).raise_for_status()
        time.sleep(0.2 if quick else SETTLE_S)
        before, began = _cpu(process.pid), time.monotonic()
        time.sleep(1.0 if quick else QUIET_S)
        watched = time.monotonic() - began
        return {"resident_mib": _rss(process.pid), "idle": (_cpu(process.pid) - before) / watched, "watched_s": watched}


def _starts(work: Path, model: Path, count: int) -> list[dict[str, float]]:
    found = []
    for _ in range(count):
        with _node(work, {"MILPA_NODE_MODEL_PATH": str(model)}) as (process, _, ready):
            found.append({"ready_s": ready, "cpu_s": _cpu(process.pid), "model_s": _load_s(model)})
    return found


def _load_s(model: Path) -> float:
    """Seconds of loading the model alone, in a process that has imported everything."""
    script = (
        "import sys, time; from node.engine.loading import load_fixed; from node.settings import Model\n"
        "began = time.monotonic(); load_fixed(Model(path=sys.argv[1])); print(time.monotonic() - began)"
    )
    command = [sys.executable, "-c", script, str(model)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True, timeout=READY_S).stdout)


def _all_parts(work: Path) -> dict[str, str]:
    nobody = str(free_port())
    (work / "root.json").write_text("{}")
    return {
        "MILPA_NODE_BROKER_HOST": "127.0.0.1", "MILPA_NODE_BROKER_PORT": nobody, "MILPA_NODE_PEERS_ASK": "base",
        "MILPA_NODE_PEERS_SERVE": "true", "MILPA_NODE_SPOOL_ENABLED": "true", "MILPA_NODE_TOPIC_HOST": "127.0.0.1",
        "MILPA_NODE_TOPIC_PORT": nobody, "MILPA_NODE_UPDATE_URL": f"http://127.0.0.1:{nobody}/repository",
        "MILPA_NODE_UPDATE_ROOT_FILE": str(work / "root.json"),
    }  # fmt: skip


@contextmanager
def _node(work: Path, environment: Mapping[str, str]) -> Iterator[tuple[subprocess.Popen[bytes], str, float]]:
    """A running node, its address, and the seconds it took until READY=1."""
    state, notify = work / f"state-{time.monotonic_ns()}", work / "notify"
    notify.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end, (work / "node.log").open("ab") as log:
        end.bind(str(notify))
        end.settimeout(READY_S)
        ours = {
            "NOTIFY_SOCKET": str(notify),
            "MILPA_NODE_CONFIG": "",
            "MILPA_NODE_API_PORT": "0",
            "OMP_NUM_THREADS": "1",
            "MALLOC_ARENA_MAX": "2",
        }
        began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "node.cli", "run", "--state-dir", str(state)],
            env={**os.environ, **ours, **environment},
            stderr=log,
        )
        try:
            while b"READY=1" not in end.recv(4096):
                if process.poll() is not None:
                    raise Unavailable(f"the node ended at its start; see {work / 'node.log'}")
            ready = time.monotonic() - began
            found = read_run_file(state)
            assert found is not None
            yield process, found.url, ready
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


def _rss(pid: int) -> float:
    """Resident memory, MiB."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def _cpu(pid: int) -> float:
    """Seconds of processor used so far, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK
