"""A cold boot where there is no network but `lo` and the clock says 1970: how many of 1,000 requests are answered; who reaches out.

The node has a release on its disk; its broker and its release store are configured and unreachable. The socket guard is strace, which sees
every connect() and sendto() of every thread, C code's too; `bench.guarded` tells the names of the threads. A connection off loopback by any
thread but those whose work is the link (LINKS) counts as one on the request path, and the figure is 0.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.settings import Settings
from node.client import read_run_file
from protocol.errors import NotEnough, Unavailable

REQUESTS, QUICK = 1_000, 20
FAR_AWAY = "10.66.66.66"  # no route leads there
LINKS = ("mqtt-", "milpa-update", "paho")  # threads whose work is to reach out
BOOT_S = 180.0
TOOLS = {"unshare": "util-linux", "nsenter": "util-linux", "ip": "iproute2", "strace": "strace", "cc": "build-essential"}
CALL = re.compile(
    r"^(\d+) +(?:connect|sendto|sendmsg)\(.*?sa_family=AF_INET6?,.*?"
    r"(?:inet_addr\(\"([^\"]+)\"\)|inet_pton\(AF_INET6, \"([^\"]+)\")"
)
WOKE_AT = 86_400  # seconds since 1970
CLIENT = """
import httpx, json, sys
url, count = sys.argv[1], int(sys.argv[2])
with httpx.Client(base_url=url, timeout=60) as client:
    bodies = ({"prompt": f"window {n}: soil {n % 40} C", "x_milpa": {"lang": "es"}} for n in range(count))
    answers = [client.post("/v1/completions", json=body) for body in bodies]
    ids = [answer.json()["x_milpa"]["id"] for answer in answers if answer.status_code == 200]
    rows = [client.get(f"/v1/answers/{one}") for one in ids]
print(json.dumps({"codes": [a.status_code for a in answers], "kept": sum(r.status_code == 200 for r in rows),
    "created": [row.json()["created"] for row in rows[:1]], "seconds": sum(a.elapsed.total_seconds() for a in answers)}))
"""


def measure(settings: Settings) -> dict[str, Any]:
    folder = settings.folder("offline_answered")
    for tool, package in TOOLS.items():
        if shutil.which(tool) is None:
            raise NotEnough(f"{tool} is not installed: apt install {package}")
    state = folder / "state"
    if not (state / "slots" / "pointer.json").is_file():
        _take_a_release(folder, settings)
    count = QUICK if settings.quick else REQUESTS
    told, ready_s, trace, notes = _cold_boot(folder, count)
    outside = connections(trace, notes)
    on_path = [line for line in outside if not line[1].startswith(LINKS)]
    answered = sum(code == 200 for code in told["codes"])
    return {
        "figure": 0.0 if on_path else answered / count, "n": count, "against": {},
        "kept_on_disk": told["kept"], "clock_of_the_answers": time.strftime("%Y-%m-%d", time.gmtime(told["created"][0])),
        "seconds_to_ready": round(ready_s, 1), "seconds_a_request": round(told["seconds"] / count, 4),
        "connections_off_loopback": {"on the request path": len(on_path), "by threads of the link": len(outside) - len(on_path)},
        "threads_that_reached_out": sorted({name for _, name, _ in outside}),
    }  # fmt: skip


def connections(trace: Iterable[str], notes: Iterable[str]) -> list[tuple[int, str, str]]:
    """Every attempt off loopback that the kernel saw: number and name of the thread, and where to. A thread without a name is "?"."""
    names = {int(number): name for number, name, _ in (line.rstrip("\n").split("\t", 2) for line in notes)}
    found = []
    for line in trace:
        if match := CALL.match(line):
            where = match[2] or match[3]
            if not (where.startswith("127.") or where == "::1"):
                found.append((int(match[1]), names.get(int(match[1]), "?"), where))
    return found


def _take_a_release(folder: Path, settings: Settings) -> None:
    """The node's disk as it is after a season: one release, taken while there was a network."""
    from fastapi import FastAPI

    from bench.student import packed
    from coordinator.fleet.publishing import Publisher, build_release
    from coordinator.fleet.repository import routes
    from node.api.server import Server, bind
    from node.app import Daemon
    from node.settings import read

    publisher = Publisher(folder / "repository")
    publisher.init()
    (folder / "root.json").write_bytes(publisher.root_bytes())
    release, files = build_release(1, "ranch", [("student", "model", packed(settings), "")])
    publisher.publish(release, files)
    app = FastAPI()
    app.include_router(routes(publisher))
    server = Server(app, bind("127.0.0.1", 0, key=""))
    server.start()
    flags = {"node.state_dir": str(folder / "state"), "api.port": 0, "update.url": server.url + "/repository", "update.poll_s": 1.0}
    daemon = Daemon(read(flags=flags | {"update.root_file": str(folder / "root.json")}, environment={})[0])
    daemon.start()
    try:
        end = time.monotonic() + BOOT_S
        while daemon.status()["release"] != 1:
            if time.monotonic() > end:
                raise Unavailable(f"the node did not take its release: {daemon.status()}")
            time.sleep(0.1)
    finally:
        daemon.stop()
        server.stop()


def _cold_boot(folder: Path, count: int) -> tuple[dict[str, Any], float, list[str], list[str]]:
    (folder / "node.toml").write_text(
        f'[node]\nname = "esteli"\nstate_dir = "{folder / "state"}"\n[api]\nport = 0\n[model]\nbudget = 0.5\n'
        f'[broker]\nhost = "{FAR_AWAY}"\n[peers]\nask = ["base"]\n'
        f'[update]\nurl = "http://{FAR_AWAY}/repository"\nroot_file = "{folder / "root.json"}"\npoll_s = 5\n'
    )
    trace, notes = folder / "trace", folder / "notes"
    for file in (trace, notes, folder / "state" / "run.json"):
        file.unlink(missing_ok=True)
    notes.touch()
    node = f"{sys.executable} -m bench.guarded {notes} run --config {folder / 'node.toml'}"
    guard = f"strace -f --seccomp-bpf -qq -e trace=connect,sendto,sendmsg -e signal=none -o {trace}"
    shim = folder / "clock.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", str(shim), str(Path(__file__).with_name("clock.c"))], check=True)
    guard += f" -E LD_PRELOAD={shim} -E CLOCK_SHIFT={WOKE_AT - int(time.time())}"
    command = f"ip link set lo up && exec {guard} {node}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    with (folder / "log").open("wb") as log:
        child = subprocess.Popen(["unshare", "-n", "sh", "-c", command], env=environment, stdout=log, stderr=log)
    try:
        pid, url = _ready(folder, child, environment)
        ready_s = time.monotonic() - began
        done = _inside(pid, environment, CLIENT, url, str(count))
    finally:
        found = read_run_file(folder / "state")
        if found is not None:
            os.kill(found.pid, signal.SIGTERM)  # strace keeps what is sent to itself
        else:
            child.kill()
        child.wait(60)
    return json.loads(done), ready_s, trace.read_text(errors="replace").splitlines(), notes.read_text().splitlines()


def _ready(folder: Path, child: "subprocess.Popen[bytes]", environment: dict[str, str]) -> tuple[int, str]:
    look = "import httpx, sys; sys.exit(httpx.get(sys.argv[1] + '/readyz').status_code != 200)"
    end = time.monotonic() + BOOT_S
    while time.monotonic() < end and child.poll() is None:
        found = read_run_file(folder / "state")
        if found is not None:
            try:
                _inside(found.pid, environment, look, found.url)
            except subprocess.CalledProcessError:
                continue
            return found.pid, found.url
        time.sleep(0.05)
    raise Unavailable(f"the node did not come up; the end of its log: {(folder / 'log').read_text(errors='replace')[-500:]}")


def _inside(pid: int, environment: dict[str, str], *command: str) -> str:
    """Run Python in the node's network namespace, at the right time."""
    done = subprocess.run(
        ["nsenter", f"--net=/proc/{pid}/ns/net", sys.executable, "-c", *command], env=environment, capture_output=True, text=True,
        timeout=3_600, check=True,
    )  # fmt: skip
    return done.stdout
