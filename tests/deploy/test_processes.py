"""Child processes end when they should, and only ours are ever signalled."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from deploy.processes import Child, Processes, start_time
from protocol.errors import NotEnough, Unavailable
from protocol.ports import free_port

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
STUBBORN = [
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)",
]


def wait_for(condition: object, *, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "not within the deadline"
        time.sleep(0.02)


def test_a_started_process_runs_until_it_is_stopped(tmp_path: Path) -> None:
    processes = Processes(tmp_path)
    child = processes.start("one", SLEEP)
    assert processes.running("one")

    processes.stop_all()

    assert not child.alive()
    assert not processes.list.exists()


def test_a_process_that_ignores_the_request_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.processes.STOP_DEADLINE_S", 0.3)
    processes = Processes(tmp_path)
    child = processes.start("stubborn", STUBBORN)
    wait_for(lambda: "up" in processes.tail("stubborn"))

    processes.stop("stubborn")

    wait_for(lambda: not child.alive())


def test_another_program_finds_and_stops_what_was_left_running(tmp_path: Path) -> None:
    child = Processes(tmp_path, outlive=True).start("left", SLEEP)

    later = Processes(tmp_path)
    assert later.running("left")
    later.stop_all()

    wait_for(lambda: start_time(child.pid) != child.started)


def test_a_number_that_now_belongs_to_another_process_is_not_signalled(tmp_path: Path) -> None:
    stranger = subprocess.Popen(SLEEP, start_new_session=True)
    try:
        stale = Child(name="old", pid=stranger.pid, started=start_time(stranger.pid) - 1, log=str(tmp_path / "log"), argv=())
        (tmp_path / "processes.json").write_bytes(msgspec.json.encode([stale]))

        Processes(tmp_path).stop_all()

        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait(10)


def test_a_process_that_dies_while_starting_is_told_with_its_last_words(tmp_path: Path) -> None:
    processes = Processes(tmp_path)
    processes.start("bad", [sys.executable, "-c", "raise SystemExit('no soil')"])

    with pytest.raises(Unavailable, match="no soil"):
        processes.wait_until("bad", lambda: False)


def test_a_process_that_is_never_ready_meets_the_deadline(tmp_path: Path) -> None:
    processes = Processes(tmp_path)
    processes.start("slow", SLEEP)

    with pytest.raises(Unavailable, match="not ready within"):
        processes.wait_until("slow", lambda: False, deadline_s=0.2)

    processes.stop_all()


def test_a_program_that_is_not_here_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(NotEnough, match="not on this machine"):
        Processes(tmp_path).start("none", ["/no/such/program"])


def test_children_die_with_a_supervisor_that_was_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from deploy.processes import Processes;"
        f"child = Processes(Path({str(tmp_path)!r})).start('kid', {SLEEP!r}); print(child.pid, child.started, flush=True); time.sleep(60)"
    )
    supervisor = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    assert supervisor.stdout is not None
    pid, started = map(int, supervisor.stdout.readline().split())

    os.kill(supervisor.pid, signal.SIGKILL)
    supervisor.wait(10)
    supervisor.stdout.close()

    wait_for(lambda: start_time(pid) != started)


def test_a_free_port_is_free_and_no_outgoing_connection_is_ever_given_it() -> None:
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = [free_port() for _ in range(20)]

    assert all(1024 <= port < lowest for port in ports)
    with socket.create_server(("127.0.0.1", ports[0])):
        assert free_port() != ports[0]
