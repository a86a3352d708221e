"""A node under a supervisor: what it tells systemd, when it gives no sign of life, and what a reload takes."""

import io
import json
import logging
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from node import watchdog
from node.client import read_run_file
from node.engine.worker import Speaker
from node.service import Supervisor
from node.settings import read
from node.watchdog import Watchdog
from protocol import drain, logs
from protocol.errors import BadInput, Unavailable
from protocol.ports import free_port
from protocol.tasks import Form, translation
from tests.node.conftest import DEADLINE_S, ENVIRONMENT, ROOT, ask, eventually, settings
from tests.node.fake_engine import FakeEngine


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[socket.socket]:
    """The other end of NOTIFY_SOCKET."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(str(tmp_path / "notify"))
        end.settimeout(DEADLINE_S)
        yield end


def heard(systemd: socket.socket, until: str) -> list[str]:
    """Lines told, up to and with the first that begins so."""
    lines: list[str] = []
    while not any(line.startswith(until) for line in lines):
        lines += systemd.recv(4096).decode().splitlines()
    return lines


def test_words_go_to_the_socket_as_lines_and_a_reason_stays_one_line(systemd: socket.socket, tmp_path: Path) -> None:
    supervisor = Supervisor({"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "3000000"})

    supervisor.tell(STATUS="no model\nREADY=1", WATCHDOG=1)

    assert systemd.recv(4096) == b"STATUS=no model\nWATCHDOG=1"
    assert supervisor.period_s == 3.0


def test_an_abstract_socket_is_a_socket_too() -> None:
    name = f"milpa-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind("\0" + name)
        end.settimeout(5)

        Supervisor({"NOTIFY_SOCKET": "@" + name}).tell(READY=1)

        assert end.recv(100) == b"READY=1"


@pytest.mark.parametrize(
    "environment", [{}, {"WATCHDOG_USEC": "1000"}, {"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}]
)
def test_nobody_watches_where_nobody_said_so(environment: dict[str, str]) -> None:
    supervisor = Supervisor(environment)

    supervisor.tell(READY=1)  # and a supervisor that has gone is no error

    assert supervisor.period_s == 0.0


@pytest.fixture
def service(tmp_path: Path, systemd: socket.socket) -> Iterator[subprocess.Popen[bytes]]:
    (tmp_path / "node.toml").write_text("[model]\nbudget = 0.25\n")
    command = [sys.executable, "-m", "node.cli", "run", "--config", str(tmp_path / "node.toml"), "--state-dir", str(tmp_path / "state")]
    environment = {**ENVIRONMENT, "NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "600000"}
    with (tmp_path / "log").open("wb") as log:
        child = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=log)
    yield child
    child.kill()
    child.wait(10)


def told(tmp_path: Path) -> dict[str, Any]:
    found = read_run_file(tmp_path / "state")
    return dict(httpx.get(found.url + "/v1/status").json()) if found else {}


def test_a_service_says_ready_gives_signs_of_life_reloads_and_says_goodbye(
    service: subprocess.Popen[bytes], systemd: socket.socket, tmp_path: Path
) -> None:
    ready = heard(systemd, "READY=1")
    alive = heard(systemd, "WATCHDOG=1")
    (tmp_path / "node.toml").write_text("[model]\nbudget = 0.1\n[api]\nqueue = 4\n")
    service.send_signal(signal.SIGHUP)
    reloading = heard(systemd, "RELOADING=1")
    heard(systemd, "READY=1")
    status = told(tmp_path)
    service.send_signal(signal.SIGTERM)
    heard(systemd, "STOPPING=1")

    assert "WATCHDOG=1" not in ready and alive
    assert any(line.startswith("MONOTONIC_USEC=") for line in reloading)
    assert status["settings"] == {"reloads": 1, "problem": "", "restart": ["api.queue"]}
    assert service.wait(30) == 0


def milpa_node(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-m", "node.cli", *arguments, "--config", str(tmp_path / "node.toml"), "--state-dir", str(tmp_path / "state"),
    ]  # fmt: skip
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=DEADLINE_S)


def test_the_reload_command_says_what_was_taken_and_what_waits_and_a_broken_file_changes_nothing(
    service: subprocess.Popen[bytes], systemd: socket.socket, tmp_path: Path
) -> None:
    heard(systemd, "READY=1")
    (tmp_path / "node.toml").write_text("[model]\nbudget = 7\n")
    broken, checked = milpa_node(tmp_path, "reload"), milpa_node(tmp_path, "config", "check")
    service.send_signal(signal.SIGHUP)
    eventually(lambda: told(tmp_path)["settings"]["problem"])
    after = told(tmp_path)["settings"]
    (tmp_path / "node.toml").write_text('[model]\nbudget = 0.5\n[node]\nsite = "elsewhere"\n')
    taken = milpa_node(tmp_path, "reload", "--json")

    assert broken.returncode == checked.returncode == 2 and "model.budget is 7" in broken.stderr
    assert after["restart"] == [] and "model.budget is 7" in after["problem"]
    assert (taken.returncode, msgspec.json.decode(taken.stdout)["restart"]) == (1, ["node.site"])


# ---- the watchdog looks for real


@pytest.fixture
def alive(start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A daemon with a small engine and every thread it can have, and its watchdog."""
    monkeypatch.setattr("node.store.BUSY_TIMEOUT_S", 0.2)
    given = {"peers__serve": True, "memory__use": "near", "api__deadline_s": 3.0}
    daemon = start(settings(tmp_path, broker__host="127.0.0.1", broker__port=free_port(), **given))
    daemon.worker.swap_after_current_record(Speaker(FakeEngine(), "ranch"))
    return daemon


def test_a_healthy_node_is_told_alive_after_a_prompt_of_one_token(alive: Any) -> None:
    assert Watchdog(alive).trouble() == ""
    assert len(alive.worker.speaker.engine.prompts) == 1


def test_the_probe_leaves_the_kept_beginning_of_prompts_where_it_is(alive: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    task = translation("English", "Spanish")
    engine, forms = FakeEngine(), list[Form]()
    monkeypatch.setattr(engine, "generate", lambda *_, form, **__: forms.append(form) or FakeEngine().generate("x", max_new_tokens=1))
    alive.worker.swap_after_current_record(Speaker(engine, task.name))

    assert Watchdog(alive).trouble() == ""
    assert [form.opening for form in forms] == [task.form.opening] != [""]


def test_answers_given_meanwhile_spare_the_probe(alive: Any) -> None:
    looking = Watchdog(alive)
    looking.trouble()
    ask(alive.server.url)

    assert looking.trouble() == ""
    assert len(alive.worker.speaker.engine.prompts) == 2  # the first look's, and the answer's


def test_an_engine_that_hangs_gives_no_sign_of_life_and_one_that_is_busy_does(alive: Any) -> None:
    engine, looking = alive.worker.speaker.engine, Watchdog(alive, probe_s=0.3)
    looking.trouble()
    engine.gate.clear()
    hanging = looking.trouble()
    alive.metrics.answered_count += 1  # an answer came out meanwhile
    busy = looking.trouble()
    engine.gate.set()

    assert hanging.startswith("engine: nothing was answered") and busy == ""


@pytest.mark.parametrize("part", ["engine", "messaging", "api"])
def test_a_part_that_died_gives_no_sign_of_life(alive: Any, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    monkeypatch.setattr("node.app.SWEEP_S", 60.0)
    monkeypatch.setattr(watchdog, "HTTP_S", 0.5)
    {"engine": alive.worker.stop, "messaging": alive.messaging.session.stop, "api": alive.server.stop}[part]()

    assert Watchdog(alive, probe_s=0.5).trouble().startswith(part)


def die(*_: Any, **__: Any) -> None:
    """What ends a thread: the loops catch every Exception."""
    raise SystemExit


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # it is what is meant
@pytest.mark.parametrize(
    ("where", "what", "says"),
    [
        ("messaging._drain", "step", "messaging: a thread is dead or stuck: outbox"),
        ("messaging._voice._soon", "clear", "messaging: a thread is dead or stuck: presence"),
        ("messaging._server", "step", "messaging: a thread is dead or stuck: serving"),
        ("memory.making", "step", "parts: memory: the thread is dead"),
        ("answering", "expire", "sweep: the thread is dead"),
    ],
)
def test_a_thread_that_ended_gives_no_sign_of_life(alive: Any, monkeypatch: pytest.MonkeyPatch, where: str, what: str, says: str) -> None:
    before = Watchdog(alive).trouble()
    monkeypatch.setattr(attrgetter(where)(alive), what, die)
    alive.messaging.announce(), alive.messaging._server._wake.set(), alive.memory.making.look_again()  # each comes round now

    assert before == ""
    assert eventually(Watchdog(alive).trouble) == says


def test_an_outbox_whose_thread_hangs_gives_no_sign_of_life(alive: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    round_, hangs, let_go = drain.Drain.step, threading.Event(), threading.Event()
    monkeypatch.setattr(drain, "STUCK_S", 2.0)
    monkeypatch.setattr(alive.messaging._drain, "step", lambda: (hangs.set(), let_go.wait(DEADLINE_S), round_(alive.messaging._drain)))

    assert hangs.wait(DEADLINE_S)
    hanging = eventually(Watchdog(alive).trouble)
    let_go.set()
    eventually(lambda: not Watchdog(alive).trouble())

    assert hanging == "messaging: a thread is dead or stuck: outbox"


def test_a_node_that_stops_is_not_ill(alive: Any) -> None:
    alive.stop()

    assert alive.messaging.trouble() == alive.memory.trouble() == "" and alive.sweeping


def test_a_database_that_cannot_be_written_gives_no_sign_of_life(alive: Any) -> None:
    other = sqlite3.connect(alive.store.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")  # held for ever, as by a thread that hangs

    trouble = Watchdog(alive).trouble()
    other.execute("ROLLBACK")
    other.close()

    assert trouble.startswith("database: cannot be written")


def test_a_written_probe_is_rare_and_answers_spare_it(alive: Any) -> None:
    now = [0.0]
    looking = Watchdog(alive, clock=lambda: now[0])

    def written() -> str | None:
        with alive.store.engine.begin() as connection:
            row = connection.exec_driver_sql("SELECT value FROM meta WHERE key = 'watchdog'").first()
            return row[0] if row else None

    looking.trouble()
    early = written()
    now[0] = watchdog.WRITE_S + 1
    looking.trouble()

    assert (early, written()) == (None, str(int(watchdog.WRITE_S) + 1))


def test_a_broker_that_is_away_is_not_an_illness(alive: Any) -> None:
    assert not alive.messaging.connected
    assert Watchdog(alive).trouble() == ""


# ---- the log


def line(form: logs.Form, error: Exception | None = None, message: str = "a line") -> str:
    try:
        if error:
            raise error
    except Exception:
        info: Any = sys.exc_info()
    else:
        info = None
    record = logging.LogRecord("milpa.node", logging.ERROR, "f", 1, message, None, info)
    record.created = 1_800_000_000.25
    return logs.Lines(form).format(record)


def test_a_line_for_a_person_has_the_time_and_for_journald_the_priority() -> None:
    assert line("text") == "2027-01-15T08:00:00.250Z ERROR milpa.node: a line"
    assert line("journal") == "<3>milpa.node: a line"


def test_a_line_for_a_program_is_one_object() -> None:
    told = json.loads(line("json", Unavailable("the broker is away")))

    assert (told["level"], told["logger"], told["message"]) == ("error", "milpa.node", "a line")
    assert told["trace"][-1] == "Unavailable: the broker is away"


def test_every_line_of_a_traceback_carries_the_priority() -> None:
    assert all(one.startswith("<3>") for one in line("journal", ValueError("x")).splitlines())


@pytest.mark.parametrize("error", [ValueError("the secret"), BadInput("record 'the secret' is empty"), KeyError("the secret")])
def test_the_text_of_an_error_that_may_quote_a_record_is_not_logged(error: Exception) -> None:
    told = line("text", error)

    assert type(error).__name__ in told and "the secret" not in told


def test_the_text_of_an_error_of_the_machine_is_logged() -> None:
    assert "No space left" in line("text", OSError(28, "No space left on device"))


def test_nobody_can_forge_a_line() -> None:
    assert line("text", message="a\n2027 INFO forged\x1b[2J").count("\n") == 0


def test_stderr_is_the_journals_when_systemd_said_so(tmp_path: Path) -> None:
    with (tmp_path / "stream").open("w") as stream:
        about = os.fstat(stream.fileno())

        assert logs.is_journal(stream, {"JOURNAL_STREAM": f"{about.st_dev}:{about.st_ino}"})
        assert not logs.is_journal(stream, {"JOURNAL_STREAM": "8:1"})
        assert not logs.is_journal(io.StringIO(), {"JOURNAL_STREAM": "8:1"})


def test_a_defect_in_a_thread_is_logged_by_the_same_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    root, out = logging.getLogger(), io.StringIO()
    before = (root.handlers[:], root.level)
    for target in (sys, threading):
        monkeypatch.setattr(target, "excepthook", target.excepthook)

    def breaks() -> None:
        raise ValueError("the secret")

    try:
        logs.set_up("text", stream=out)
        threading.excepthook(threading.ExceptHookArgs((ValueError, ValueError("the secret"), None, None)))
    finally:
        root.handlers[:], root.level = before[0], before[1]

    assert "a defect ended" in out.getvalue() and "the secret" not in out.getvalue()


# ---- what it costs to run


def test_a_daemon_without_a_model_pays_neither_for_llama_cpp_nor_for_the_update_client(tmp_path: Path) -> None:
    script = f"""
import sys, node.cli, node.service
from node.app import Daemon
from node.settings import read
daemon = Daemon(read(flags={{"node.state_dir": {str(tmp_path / "state")!r}, "api.port": 0}}, environment={{}})[0])
daemon.start()
daemon.status(), daemon.metrics.render()
print(*sorted({{"llama_cpp", "numpy", "tuf", "cryptography", "httpx", "apsw", "jinja2"}} & set(sys.modules)))
daemon.stop()
"""

    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=DEADLINE_S)

    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_settings_can_be_checked_without_a_node(tmp_path: Path) -> None:
    (tmp_path / "node.toml").write_text('[broker]\nhost = "b"\nca_file = "/nowhere/ca.pem"\n')
    missing = milpa_node(tmp_path, "config", "check")
    (tmp_path / "node.toml").write_text("[spool]\nenabled = true\n")
    good = milpa_node(tmp_path, "config", "check", "--json")

    assert missing.returncode == 2 and "broker.ca_file names /nowhere/ca.pem" in missing.stderr
    assert good.returncode == 0 and msgspec.json.decode(good.stdout)["set"]["spool.enabled"] is True
    assert read(environment={})[0].logs.form == "auto"
