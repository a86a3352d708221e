"""The coordinator as a process would run it: the live line, releases from elsewhere, health, the command."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from coordinator import web
from coordinator.app import Watch
from coordinator.fleet.publishing import Publisher, build_release
from coordinator.settings import CoordinatorSettings, LedgerSection, load_settings
from coordinator.web import listen
from protocol.errors import BadInput, PortInUse, Unavailable, UnknownName
from protocol.messages import Status
from protocol.ports import is_loopback
from tests.dashboard.conftest import Serving, form_token
from tests.dashboard.seed import NOW

ROOT = Path(__file__).parents[2]


def publish(store: Path, number: int, *, bundle: dict | None = None) -> Publisher:
    publisher = Publisher(store / "repository")
    if not publisher.exists:
        publisher.init()
    model, proof = store / "student.gguf", store / "evidence.json"
    model.write_bytes(b"GGUF" + bytes([number]))
    files = [("student", "model", model, "")]
    if bundle is not None:
        proof.write_text(json.dumps(bundle))
        files.append(("student", "evidence", proof, ""))
    release, paths = build_release(number, "ranch", files, note=f"number {number}", previous=number - 1)  # type: ignore[arg-type]
    publisher.publish(release, paths)
    return publisher


@contextmanager
def entered(serving: Serving) -> Iterator[httpx.Client]:
    """A browser that has logged in, over a real connection."""
    with httpx.Client(base_url=serving.address, follow_redirects=True, timeout=20) as browser:
        token = serving.coordinator.door.token_file.read_text().strip()
        page = browser.get("/setup")
        browser.post("/setup", data={"csrf": form_token(page.text), "token": token, "name": "ana", "password": "twelve letters"})
        yield browser


def test_an_open_page_hears_of_a_change_and_the_page_then_shows_it(coordinator):
    with Serving(coordinator) as serving, entered(serving) as browser, browser.stream("GET", "/events") as stream:
        lines = stream.iter_lines()
        assert next(line for line in lines if line.startswith("event:")) == "event: tick", "a word at once"

        coordinator.ledger.seen_status(Status(node="jalapa", boot="b", sequence=1, state="answering"), NOW)

        assert next(line for line in lines if line.startswith("event:")) == "event: change"
        assert "jalapa" in browser.get("/nodes").text


def test_the_live_line_ends_with_the_session(coordinator, monkeypatch):
    monkeypatch.setattr("coordinator.dashboard.routes.TICK_S", 0.1)
    with Serving(coordinator) as serving, entered(serving) as browser, browser.stream("GET", "/events") as stream:
        lines = stream.iter_lines()
        assert next(line for line in lines if line.startswith("event:")) == "event: tick"
        browser.post("/logout", data={"csrf": form_token(browser.get("/").text)})

        rest = list(itertools.islice(lines, 300))

        assert len(rest) < 300, "the server ended it"  # what moved before the logout may still be told
        assert browser.get("/events").status_code == 401


def test_a_release_published_by_another_process_reaches_the_ledger_and_the_notice_once(coordinator, tmp_path):
    told: list[int] = []
    publisher = publish(tmp_path / "store", 1, bundle={"student": {"chrf": 41.5}})
    watch = Watch(publisher, coordinator.ledger, announce=lambda release: told.append(release.number), clock=lambda: NOW)

    watch.look()
    watch.look()
    publish(tmp_path / "store", 2)
    watch.look()

    assert told == [1, 2]
    assert [(kept.number, kept.note, kept.evidence) for kept in coordinator.ledger.releases()] == [
        (1, "number 1", {"student": {"chrf": 41.5}}), (2, "number 2", None),
    ]  # fmt: skip


def test_evidence_that_does_not_read_leaves_the_release_without_figures(coordinator, tmp_path, caplog):
    store = tmp_path / "store"
    publisher = Publisher(store / "repository")
    publisher.init()
    (store / "evidence.json").write_bytes(b"{ no json")
    (store / "student.gguf").write_bytes(b"GGUF")
    release, paths = build_release(
        1, "ranch", [("student", "model", store / "student.gguf", ""), ("student", "evidence", store / "evidence.json", "")]
    )
    publisher.publish(release, paths)

    Watch(publisher, coordinator.ledger, announce=lambda _: None, clock=lambda: NOW).look()

    assert coordinator.ledger.latest_release().evidence is None and "evidence of release 1 does not read" in caplog.text


def test_a_running_coordinator_notices_a_release_by_itself(coordinator, tmp_path, monkeypatch):
    monkeypatch.setattr("coordinator.app.WATCH_S", 0.05)
    with Serving(coordinator):
        publish(tmp_path / "store", 1)

        deadline = time.monotonic() + 20
        while coordinator.ledger.latest_release() is None:
            assert time.monotonic() < deadline, "the release was not noticed"
            time.sleep(0.05)
    assert not any(thread.name == "release-watch" for thread in threading.enumerate())


def test_nodes_fetch_releases_without_a_login(stranger, tmp_path):
    publish(tmp_path / "store", 1)

    assert stranger.get("/repository/metadata/timestamp.json").status_code == 200


def test_health_ready_and_metrics_answer_without_a_login(stranger, coordinator):
    coordinator.ledger.seen_status(Status(node="jalapa", boot="b", sequence=1, state="answering"), NOW)

    assert stranger.get("/healthz").text == "ok\n"
    assert stranger.get("/readyz").json() == {"ready": True, "ledger": "ok", "broker": "none", "release": 0}
    assert 'milpa_nodes{state="answering"} 1.0' in stranger.get("/metrics").text


def test_not_ready_while_the_ledger_does_not_answer(stranger, coordinator):
    with coordinator.ledger.write() as connection:
        connection.exec_driver_sql("ALTER TABLE releases RENAME TO gone")

    assert stranger.get("/readyz").status_code == 503 and stranger.get("/healthz").status_code == 200


def test_a_port_in_use_is_told_with_what_to_do():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]

        with pytest.raises(PortInUse, match=f"port {port} .*choose another with --port"):
            listen("127.0.0.1", port)


def test_an_address_of_another_machine_is_told():
    with pytest.raises(BadInput, match=r"web\.host"):
        listen("203.0.113.7", 0)


@pytest.mark.parametrize(
    "host,near", [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("milpa.example", False)]
)
def test_only_loopback_counts_as_near(host, near):
    assert is_loopback(host) is near


def test_settings_come_from_file_environment_and_flags_and_an_unknown_key_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.toml").write_text('[web]\nport = 9000\ntimezone = "America/Managua"\n')
    (tmp_path / "b.toml").write_text("[web]\nprot = 9000\n")
    (tmp_path / "password").write_text("s3cret\n")
    monkeypatch.setenv("MILPA_COORDINATOR_LEDGER_URL", "postgresql://milpa@db/milpa")
    monkeypatch.setenv("MILPA_COORDINATOR_LEDGER_PASSWORD_FILE", str(tmp_path / "password"))

    settings, origins = load_settings(tmp_path / "a.toml", flags={"web.port": 9001})

    assert (settings.web.port, settings.web.timezone) == (9001, "America/Managua")
    assert settings.ledger_url == "postgresql://milpa:s3cret@db/milpa" and "s3cret" not in repr(origins)
    with pytest.raises(UnknownName, match="did you mean 'port'"):
        load_settings(tmp_path / "b.toml")


def test_serve_starts_says_where_it_is_and_stops_in_good_order(tmp_path):
    code = (
        "import typer; from coordinator.commands.serve import serve; from protocol.console import run; "
        "app = typer.Typer(); app.command()(serve); run(app)"
    )
    environment = os.environ | {"MILPA_COORDINATOR_BROKER_HOST": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, "--store", str(tmp_path / "store"), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path) as process:
        assert process.stderr is not None
        try:
            address = next(line for line in process.stderr if line.startswith("dashboard: ")).split()[1]
            deadline = time.monotonic() + 30
            while True:
                try:
                    assert httpx.get(address + "healthz", timeout=5).text == "ok\n"
                    break
                except httpx.TransportError:
                    assert time.monotonic() < deadline and process.poll() is None
                    time.sleep(0.1)
            port = address.rsplit(":", 1)[1].strip("/")
            second = subprocess.run([*command[:-1], port], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=60)
            assert second.returncode == PortInUse.exit_code and second.stderr.strip().startswith(f"error: port {port}")
            assert len(second.stderr.strip().splitlines()) == 1
            assert (tmp_path / "store" / "setup-token").read_text().strip()
        finally:
            process.send_signal(signal.SIGTERM)
            rest = process.stderr.read()
            process.wait(30)
    assert "Traceback" not in rest


def test_a_database_that_comes_up_later_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([Unavailable("the ledger does not answer"), Unavailable("the ledger does not answer"), "built"])

    def coordinator(_: object) -> object:
        answer = next(answers)
        if isinstance(answer, Unavailable):
            raise answer
        return answer

    monkeypatch.setattr(web, "Coordinator", coordinator)
    monkeypatch.setattr(web, "DATABASE_AGAIN_S", 0.0)

    assert web._built(CoordinatorSettings()) == "built"


def test_a_database_that_never_comes_up_is_told_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "DATABASE_DEADLINE_S", 0.0)
    settings = CoordinatorSettings(ledger=LedgerSection(url="postgresql://milpa@127.0.0.1:1/milpa"))

    with pytest.raises(Unavailable, match="does not answer"):
        web._built(settings)
