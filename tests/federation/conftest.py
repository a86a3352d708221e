"""A real SuperLink in a process of its own, real sync windows, and adapters to send through them."""

import os
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from coordinator.federation.superlink import Keys, keys, place_in
from node.learn.sync import SyncResult, sync

ROOT = Path(__file__).parents[2]
READY_S = 60.0


def wait_until(ready: Callable[[], bool], *, seconds: float = READY_S, what: str = "it") -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, f"{what} did not happen within {seconds:g} s"
        time.sleep(0.1)


class SuperLink:
    """`milpa-coordinator superlink` with a state folder that outlives its process."""

    def __init__(self, state: Path, certificate: tuple[Path, Path, Path] | None = None) -> None:
        """`certificate`: it, its key, who signed it; then all of it is over TLS."""
        self.state, self.certificate = state, certificate
        self.process: subprocess.Popen[bytes] | None = None
        self.address = ""

    def start(self, port: int = 0) -> None:
        command = [sys.executable, "-m", "coordinator.cli", "superlink", "--state", str(self.state), "--port", str(port)]
        for option, file in zip(("--cert-file", "--key-file", "--ca-file"), self.certificate or (), strict=False):
            command += [option, str(file)]
        log = (self.state.parent / "superlink.log").open("ab")
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        log.close()
        wait_until(self.healthy, what="a healthy SuperLink")

    def healthy(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, "the SuperLink died; see superlink.log"
        self.address = place.address if (place := place_in(self.state)) else ""
        try:
            return bool(self.address) and httpx.get(f"{self.url}/health", timeout=2.0, verify=self.trust).status_code == 200
        except httpx.HTTPError:
            return False

    @property
    def ca(self) -> str:
        return str(self.certificate[2]) if self.certificate else ""

    @property
    def url(self) -> str:
        return f"{'https' if self.ca else 'http'}://{self.address}"

    @property
    def trust(self) -> ssl.SSLContext | bool:
        return ssl.create_default_context(cafile=self.ca) if self.ca else True

    def stop(self) -> None:
        assert self.process is not None
        self.process.terminate()
        self.process.wait(20)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    @property
    def keys(self) -> Keys:
        return keys(self.state)

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])


@pytest.fixture(scope="session")
def superlink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SuperLink]:
    pytest.importorskip("flwr", reason="pip install -e '.[sync]'")
    found = SuperLink(tmp_path_factory.mktemp("superlink") / "state")
    found.start()
    yield found
    found.stop()


class Window:
    """A node's sync window in a thread, its Flower process a real child."""

    def __init__(
        self, state_dir: Path, node: str, link: SuperLink, *, seconds: float = 60.0, fleet_token: str | None = None, ca: str | None = None
    ) -> None:
        self.result: SyncResult | None = None
        self.over = threading.Event()
        token = link.keys.fleet if fleet_token is None else fleet_token

        def run() -> None:
            trusted = link.ca if ca is None else ca
            self.result = sync(state_dir, node, link.address, window_s=seconds, fleet_token=token, ca=trusted, stop=self.over.is_set)

        self.thread = threading.Thread(target=run)
        self.thread.start()

    def close(self) -> SyncResult:
        self.over.set()
        return self.wait()

    def wait(self) -> SyncResult:
        self.thread.join(90)
        assert self.result is not None, "the window did not close"
        return self.result


@pytest.fixture
def windows(superlink: SuperLink) -> Iterator[Callable[..., Window]]:
    opened: list[Window] = []

    def open_window(state_dir: Path, node: str, **more: object) -> Window:
        opened.append(Window(state_dir, node, more.pop("link", superlink), **more))  # type: ignore[arg-type]
        return opened[-1]

    yield open_window
    for window in opened:
        window.close()


def children_of(pid: int) -> list[int]:
    """Processes whose parent is `pid`, from /proc."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def flower_children() -> list[int]:
    """The SuperNode processes of this test's windows."""
    return [pid for pid in children_of(os.getpid()) if "node.learn.flower" in command_of(pid)]
