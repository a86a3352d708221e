"""Child processes with a name, a log and an end.

A process is told from another that later got its number by its start time. Children of a supervisor die with it (Linux: PR_SET_PDEATHSIG)
unless they are to outlive it (`milpa-fleet up`). Stopping is SIGTERM, a deadline, then SIGKILL; only processes in the list are signalled.
"""

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import httpx
import msgspec

from protocol.blobs import write_atomically
from protocol.errors import NotEnough, Unavailable

STOP_DEADLINE_S = 10.0  # a SuperNode needs about 3 s to sign off
READY_DEADLINE_S = 60.0  # the slowest, the SuperLink, is ready in 4 s on a quiet machine
POLL_S = 0.1
LOG_TAIL = 12  # lines of a log shown when its process died
PR_SET_PDEATHSIG = 1


class Child(msgspec.Struct, frozen=True):
    """One process of ours, as written to the list on disk."""

    name: str
    pid: int
    started: int  # clock ticks since boot, from /proc: tells this process from a later one of the same number
    log: str
    argv: tuple[str, ...]

    def alive(self) -> bool:
        """Whether this very process still runs (a zombie does not)."""
        return start_time(self.pid) == self.started


def start_time(pid: int) -> int:
    """Start time of a process in clock ticks since boot, 0 when it is gone or a zombie (proc(5), field 22)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])


def _die_with_parent() -> None:
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class Processes:
    """The processes of one fleet, listed in `folder/processes.json` so that another program can find and stop them."""

    def __init__(self, folder: Path, *, outlive: bool = False) -> None:
        self.folder = folder
        self.outlive = outlive
        self.list = folder / "processes.json"
        self.children: dict[str, Child] = {}
        self._handles: dict[str, subprocess.Popen[bytes]] = {}
        if self.list.exists():
            self.children = {child.name: child for child in msgspec.json.decode(self.list.read_bytes(), type=list[Child])}

    def start(self, name: str, argv: Sequence[str], *, environment: Mapping[str, str] | None = None) -> Child:
        """Start a program in a session of its own, its output in `folder/logs/NAME.log`.

        Raises:
            NotEnough: the program is not on this machine.
        """
        log = self.folder / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            try:
                handle = subprocess.Popen(
                    list(argv), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                    env={**os.environ, **(environment or {})}, start_new_session=True,
                    preexec_fn=None if self.outlive else _die_with_parent,
                )  # fmt: skip
            except FileNotFoundError as error:
                raise NotEnough(f"{argv[0]} is not on this machine; run `make setup`") from error
        child = Child(name=name, pid=handle.pid, started=start_time(handle.pid), log=str(log), argv=tuple(argv))
        self.children[name], self._handles[name] = child, handle
        self._save()
        return child

    def wait_until(self, name: str, ready: Callable[[], bool], *, deadline_s: float = READY_DEADLINE_S) -> None:
        """Wait until `ready()`.

        Raises:
            Unavailable: the process died or the deadline passed; the end of its log is in the message.
        """
        end = time.monotonic() + deadline_s
        while not ready():
            if not self.running(name):
                raise Unavailable(f"{name} stopped while starting:\n{self.tail(name)}")
            if time.monotonic() > end:
                raise Unavailable(f"{name} was not ready within {deadline_s:.0f} s:\n{self.tail(name)}")
            time.sleep(POLL_S)

    def running(self, name: str) -> bool:
        """Whether the process of that name runs."""
        if handle := self._handles.get(name):
            return handle.poll() is None
        return name in self.children and self.children[name].alive()

    def wait(self, name: str, *, deadline_s: float) -> int:
        """Wait for a process of this program to end by itself; its exit code.

        Raises:
            Unavailable: it did not within the deadline; it was stopped.
        """
        try:
            return self._handles[name].wait(timeout=deadline_s)
        except subprocess.TimeoutExpired as error:
            self.stop(name)
            raise Unavailable(f"{name} did not end within {deadline_s:.0f} s:\n{self.tail(name)}") from error

    def tail(self, name: str) -> str:
        """The last lines a process wrote."""
        log = Path(self.children[name].log)
        return "\n".join(log.read_text(errors="replace").splitlines()[-LOG_TAIL:]) if log.exists() else "(no log)"

    def stop(self, name: str) -> None:
        """End one process and forget it."""
        child = self.children.pop(name)
        handle = self._handles.pop(name, None)
        for number in (signal.SIGTERM, signal.SIGKILL):
            if not child.alive():
                break
            _signal_group(child.pid, number)
            end = time.monotonic() + STOP_DEADLINE_S
            while child.alive() and time.monotonic() < end:
                if handle:
                    handle.poll()
                time.sleep(POLL_S)
        if handle:
            handle.poll()
        self._save()

    def stop_all(self) -> None:
        """End every process in the list, the last started first."""
        for name in reversed(list(self.children)):
            self.stop(name)
        self.list.unlink(missing_ok=True)

    def _save(self) -> None:
        write_atomically(self.list, msgspec.json.encode(list(self.children.values())))


def _signal_group(pid: int, number: signal.Signals) -> None:
    """Signal the session a child leads: what it started goes with it."""
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return


def http_ok(url: str) -> bool:
    """Whether a GET answers 200 within two seconds."""
    try:
        return httpx.get(url, timeout=2.0).status_code == 200
    except httpx.HTTPError:
        return False
