"""A sync window: for a while the coordinator may ask this node what it has learned.

A child process runs Flower's SuperNode and our executor (`node.learn.flower`); this side starts it, ends it, and starts it again if it
dies while the window is open. The child sees the folder with the stored adapter, never the node's records.
"""

import secrets
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from protocol.flower import authorities, offline
from protocol.lines import child_lines
from protocol.names import checked_name
from protocol.ports import free_port

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
    ca: str = "",
    stay: bool = False,
    stop: Callable[[], bool] = lambda: False,
    on_progress: Callable[[str], None] = lambda text: None,
) -> SyncResult:
    """Keep a window open for `window_s` seconds at the SuperLink "HOST:PORT".

    Args:
        fleet_token: what the SuperLink asks of nodes.
        ca: who signed its certificate: a PEM file; "" is plain HTTP.
        stay: keep the window open after the receipt (otherwise there is nothing left to say).
        stop: asked a few times a second; True ends the window.

    No SuperLink at the address is not an error: the window closes with nothing delivered.

    Raises:
        BadInput: `ca` is of no use, or `node` no name.
    """
    checked_name(node, what="node")
    authorities(ca)
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
                "node": node, "state_dir": str(state_dir.resolve()), "superlink": superlink, "port": free_port(),
                "secret_file": str(secret_file), "fleet_token": fleet_token, "ca": ca,
            }  # fmt: skip
            for said in child_lines("node.learn.flower", job, dict[str, Any], environment=offline(Path(private)), over=over):
                if said.get("kind") == "answered":
                    codes.append(str(said.get("code", "")))
                    on_progress(f"answered: {codes[-1]}")
                elif said.get("kind") == "sent" and codes and codes[-1] == "noted":
                    heard = True
            if not over():
                restarts += 1
                _wait(AGAIN_S, over)
    return SyncResult(node, heard and "adapter" in codes, tuple(codes), restarts, round(time.monotonic() - begun, 3))


def _wait(seconds: float, over: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not over():
        time.sleep(SLICE_S)
