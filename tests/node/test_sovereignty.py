"""A node is sovereign: with a release on its disk it boots and answers where there is no network but itself."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from node.client import read_run_file
from tests.node.conftest import DEADLINE_S, ENVIRONMENT, ROOT, eventually, publish, settings

pytestmark = [pytest.mark.namespace, pytest.mark.llama]
FAR_AWAY = "10.66.66.66"  # nothing routes there from inside
REQUESTS = 20
CLIENT = """
import sys, httpx, json, socket
url, count = sys.argv[1], int(sys.argv[2])
answers = [httpx.post(url + "/v1/completions", json={"prompt": f"window {n}"}, timeout=60) for n in range(count)]
try:
    socket.create_connection(("10.66.66.66", 80), timeout=2)
    alone = False
except OSError:
    alone = True
print(json.dumps({"codes": [a.status_code for a in answers], "releases": [a.json()["x_milpa"]["release"] for a in answers],
    "provisional": [a.json()["x_milpa"]["provisional"] for a in answers], "alone": alone,
    "broker": httpx.get(url + "/v1/status", timeout=60).json()["broker"]["connected"]}))
"""


def _can_isolate() -> str:
    missing = [tool for tool in ("unshare", "nsenter", "ip") if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not found: apt install util-linux iproute2"
    tried = subprocess.run(["unshare", "-n", "ip", "link", "set", "lo", "up"], capture_output=True, text=True, timeout=20)
    return "" if tried.returncode == 0 else f"network namespaces are not allowed here ({tried.stderr.strip()}); run as root"


@pytest.fixture
def isolated(start: Any, tmp_path: Path, tiny: Path, repository: tuple[Any, str]) -> Iterator[tuple[int, str]]:
    """A daemon that took release 1 while there was a network, booted cold where there is only `lo`: its process and its address."""
    if reason := _can_isolate():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    publisher, url = repository
    online = start(settings(tmp_path, update__url=url, update__root_file=str(tmp_path / "root.json"), update__poll_s=1.0))
    publish(publisher, 1, tiny)
    eventually(lambda: online.status()["release"] == 1)
    online.stop()
    (tmp_path / "node.toml").write_text(
        f'[node]\nname = "esteli"\nstate_dir = "{tmp_path / "state"}"\n[api]\nport = 0\n[broker]\nhost = "{FAR_AWAY}"\n'
        f'[peers]\nask = ["base"]\n[update]\nurl = "http://{FAR_AWAY}/repository"\nroot_file = "{tmp_path / "root.json"}"\npoll_s = 1.0\n'
    )
    command = f"ip link set lo up && exec {sys.executable} -m node.cli run --config {tmp_path / 'node.toml'}"
    with (tmp_path / "log").open("wb") as log:
        child = subprocess.Popen(["unshare", "-n", "sh", "-c", command], cwd=ROOT, env=ENVIRONMENT, stdout=log, stderr=log)
    try:
        found = eventually(lambda: child.poll() is None and read_run_file(tmp_path / "state"))
        yield found.pid, found.url
    finally:
        child.terminate()
        assert child.wait(30) == 0, (tmp_path / "log").read_text()


def inside(pid: int, *command: str) -> str:
    done = subprocess.run(
        ["nsenter", f"--net=/proc/{pid}/ns/net", sys.executable, *command],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=DEADLINE_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_cold_boot_with_only_loopback_answers_every_record(isolated: tuple[int, str]) -> None:
    pid, url = isolated
    waiting = f"import httpx, sys; sys.exit(httpx.get({url!r} + '/readyz').status_code != 200)"
    eventually(lambda: subprocess.run(["nsenter", f"--net=/proc/{pid}/ns/net", sys.executable, "-c", waiting], timeout=30).returncode == 0)

    told = msgspec.json.decode(inside(pid, "-c", CLIENT, url, str(REQUESTS)))

    assert told["alone"] and told["broker"] is False
    assert told["codes"] == [200] * REQUESTS
    assert told["releases"] == [1] * REQUESTS
    assert any(told["provisional"])  # unsure answers were given at once, and their questions wait on disk
