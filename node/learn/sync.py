"""A sync window: for a while the coordinator may ask this node what it has learned.

A child process runs Flower's SuperNode and our executor (`node.learn.flower`); this side starts it, ends it, and starts it again if it
dies while the window is open. The child sees the folder with the stored adapter, never the node's records.
"""

import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import msgspec

from protocol.lines import read_lines
from protocol.names import checked_name

STOP_S = 5.0  # to sign off at the SuperLink
AGAIN_S = 3.0  # before a child that died is started again
SLICE_S = 0.2


class SyncResult(msgspec.Struct, frozen=True):
    """What happened in a window."""

    node: str
    delivered: bool  # the coordinator has it on its disk: it sent a receipt
    answered: tuple[str, ...]  # the code of every answer
    restarts: int
    seconds: float


def sync(
    state_dir: Path,
    node: str,
    superlink: str,
    *,
    window_s: float,
    fleet_token: str = "",
    stay: bool = False,
    stop: Callable[[], bool] = lambda: False,
    on_progress: Callable[[str], None] = lambda text: None,
) -> SyncResult:
    """Keep a window open for `window_s` seconds at the SuperLink "HOST:PORT".

    Args:
        fleet_token: what the SuperLink asks of nodes.
        stay: keep the window open after the receipt (otherwise there is nothing left to say).
        stop: asked a few times a second; True ends the window.

    No SuperLink at the address is not an error: the window closes with nothing delivered.
    """
    checked_name(node, what="node")
    begun = time.monotonic()
    end = begun + window_s
    codes: list[str] = []
    heard, restarts = False, 0  # heard: the coordinator has our answer

    def over() -> bool:
        return time.monotonic() >= end or stop() or (heard and not stay)

    with tempfile.TemporaryDirectory(prefix="milpa-sync-") as private:
        secret_file = Path(private) / "secret"
        secret_file.touch(mode=0o600)
        secret_file.write_text(secrets.token_urlsafe(32), encoding="ascii")
        while not over():
            job = {
                "node": node, "state_dir": str(state_dir.resolve()), "superlink": superlink, "port": _free_port(),
                "secret_file": str(secret_file), "fleet_token": fleet_token,
            }  # fmt: skip
            for said in _child(job, flower_home=Path(private), over=over):
                if said.get("kind") == "answered":
                    codes.append(str(said.get("code", "")))
                    on_progress(f"answered: {codes[-1]}")
                elif said.get("kind") == "sent" and codes and codes[-1] == "noted":
                    heard = True
            if not over():
                restarts += 1
                _wait(AGAIN_S, over)
    return SyncResult(node, heard and "adapter" in codes, tuple(codes), restarts, round(time.monotonic() - begun, 3))


def _child(job: dict[str, Any], *, flower_home: Path, over: Callable[[], bool]) -> Any:
    """Lines of the child until it dies or the window is over; then it is gone."""
    quiet = {
        "FLWR_HOME": str(flower_home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }
    lines: SimpleQueue[bytes] = SimpleQueue()
    with subprocess.Popen(
        [sys.executable, "-m", "node.learn.flower"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=None if os.environ.get("MILPA_FLOWER_LOG") else subprocess.DEVNULL,
        env={**os.environ, **quiet},
        cwd=Path(__file__).parents[2],  # `-m` finds us there, installed or not
        start_new_session=True,
    ) as child:
        assert child.stdin is not None and child.stdout is not None
        threading.Thread(target=read_lines, args=(child.stdout, lines), daemon=True).start()
        try:
            child.stdin.write(msgspec.json.encode(job) + b"\n")
            child.stdin.flush()  # left open: its end tells the child that we are gone
            while not over():
                try:
                    line = lines.get(timeout=SLICE_S)
                except Empty:
                    continue
                if not line:
                    return
                try:
                    yield msgspec.json.decode(line, type=dict[str, Any])
                except msgspec.DecodeError:
                    continue  # not one of ours
        except BrokenPipeError:
            return
        finally:
            child.terminate()
            try:
                child.wait(STOP_S)
            except subprocess.TimeoutExpired:
                child.kill()


def _wait(seconds: float, over: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not over():
        time.sleep(SLICE_S)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
