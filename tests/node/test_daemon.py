"""The whole daemon: with a tiny model, with releases from a real repository, with a real broker, as a real process."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from node.app import Daemon
from node.client import read_run_file
from node.engine.worker import Speaker
from node.store import open_database
from protocol.codec import decode_message
from protocol.digests import digest_file
from protocol.errors import BadInput, PortInUse, Unavailable
from protocol.outbox import Outbox
from protocol.ports import free_port
from protocol.tasks import RANCH
from tests.node.conftest import DEADLINE_S, ENVIRONMENT, ROOT, ask, eventually, publish, settings, write_adapter
from tests.node.fake_engine import FakeEngine


@pytest.mark.llama
def test_a_node_boots_and_answers_while_broker_and_coordinator_are_away(start: Any, tiny: Path, tmp_path: Path) -> None:
    nobody = free_port()

    daemon = start(settings(tmp_path, model__path=str(tiny), broker__host="127.0.0.1", broker__port=nobody, peers__ask=("base",)))

    answer = ask(daemon.server.url).json()["x_milpa"]
    status = httpx.get(daemon.server.url + "/v1/status").json()
    assert answer["provisional"] and answer["escalation"]
    assert httpx.get(daemon.server.url + "/readyz").status_code == 200
    assert (status["broker"]["connected"], status["broker"]["outbox"], status["answered"], status["escalated"]) == (False, 1, 1, 1)


@pytest.mark.llama
def test_a_stopping_node_leaves_a_summary_of_figures_for_the_coordinator(start: Any, tiny: Path, tmp_path: Path) -> None:
    alone = settings(tmp_path, model__path=str(tiny), broker__host="127.0.0.1", broker__port=free_port())
    daemon = start(alone)
    ask(daemon.server.url, "a secret window")
    daemon.stop()

    left = [message.payload for message in Outbox(open_database(tmp_path / "state" / "node.db")).waiting() if message.kind == "event"]

    assert [decode_message(payload).kind for payload in left] == ["answers"]
    assert decode_message(left[0]).figures["count"] == 1.0
    assert b"secret" not in left[0]


def test_a_clock_in_1970_does_not_keep_a_node_from_answering_and_asking(tmp_path: Path) -> None:
    daemon = Daemon(settings(tmp_path, broker__host="127.0.0.1", broker__port=free_port(), peers__ask=("base",)), clock=lambda: 5.0)
    daemon.start()
    try:
        daemon.worker.swap_after_current_record(Speaker(FakeEngine(default=" leak: a pipe", probability=0.3), "ranch"))

        given = ask(daemon.server.url).json()["x_milpa"]

        assert given["provisional"] and daemon.status()["broker"]["open_questions"] == 1
    finally:
        daemon.stop()


def test_a_node_without_a_model_waits_and_says_what_for(start: Any, tmp_path: Path) -> None:
    daemon = start(settings(tmp_path))

    ready = httpx.get(daemon.server.url + "/readyz")

    assert ready.status_code == 503
    assert "set model.path or update.url" in ready.json()["reason"]
    assert httpx.get(daemon.server.url + "/healthz").status_code == 200


def test_a_second_process_on_the_same_folder_is_refused(start: Any, tmp_path: Path) -> None:
    start(settings(tmp_path))

    with pytest.raises(Unavailable, match="another milpa-node runs"):
        Daemon(settings(tmp_path)).start()


def test_a_port_in_use_stops_the_start_before_anything_is_written(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(PortInUse):
        Daemon(settings(tmp_path, api__port=taken.getsockname()[1])).start()

    assert not (tmp_path / "state").exists()


@pytest.mark.llama
def test_releases_arrive_go_live_and_are_there_at_the_next_boot_without_a_network(
    start: Any, tmp_path: Path, tiny: Path, repository: tuple[Any, str]
) -> None:
    from protocol.models.engine import Engine
    from tests.tiny import tiny_gguf

    publisher, url = repository
    with Engine(tiny, context=256) as engine:
        knows = engine.generate("soil\nen:", max_new_tokens=48, form=RANCH.form).text
    online = settings(tmp_path, update__url=url, update__root_file=str(tmp_path / "root.json"), update__poll_s=1.0)
    daemon = start(online)
    assert httpx.get(daemon.server.url + "/readyz").status_code == 503

    publish(publisher, 1, tiny, knows=knows)
    eventually(lambda: httpx.get(daemon.server.url + "/readyz").status_code == 200)
    assert ask(daemon.server.url).json()["x_milpa"]["release"] == 1

    publish(publisher, 2, tiny_gguf(tmp_path / "second.gguf", seed=2), knows="something it never says")
    eventually(lambda: daemon.updated.state == "refused")
    assert "did not come out again" in daemon.updated.reason
    assert ask(daemon.server.url).json()["x_milpa"]["release"] == 1

    adapter = write_adapter(tmp_path / "adapter.gguf")
    publish(publisher, 3, tiny, adapter=adapter)
    eventually(lambda: ask(daemon.server.url).json()["x_milpa"]["release"] == 3)
    assert ask(daemon.server.url).json()["x_milpa"]["adapter_digest"] == digest_file(adapter)
    daemon.stop()

    alone = start(settings(tmp_path))
    assert httpx.get(alone.server.url + "/readyz").status_code == 200
    assert ask(alone.server.url).json()["x_milpa"]["release"] == 3


@pytest.mark.llama
def test_a_file_damaged_on_disk_is_noticed_and_the_previous_release_answers(
    start: Any, tmp_path: Path, tiny: Path, repository: tuple[Any, str]
) -> None:
    from tests.tiny import tiny_gguf

    publisher, url = repository
    online = settings(tmp_path, update__url=url, update__root_file=str(tmp_path / "root.json"), update__poll_s=1.0)
    daemon = start(online)
    publish(publisher, 1, tiny)
    eventually(lambda: daemon.status()["release"] == 1)
    publish(publisher, 2, tiny_gguf(tmp_path / "second.gguf", seed=2))
    eventually(lambda: daemon.status()["release"] == 2)
    damaged = daemon.slots.active().model
    daemon.stop()
    data = bytearray(damaged.read_bytes())
    data[-100] ^= 0xFF
    damaged.write_bytes(data)

    alone = start(settings(tmp_path))
    assert ask(alone.server.url).json()["x_milpa"]["release"] == 1
    alone.stop()

    again = start(online)
    eventually(lambda: again.status()["release"] == 2)


@pytest.mark.broker
def test_a_peer_upgrades_an_unsure_answer_over_a_real_broker(start: Any, tmp_path: Path) -> None:
    from deploy.broker import Broker, find_mosquitto

    if find_mosquitto() is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("mosquitto is not installed: apt install mosquitto")
    users = {"coordinator": "c-password", "esteli": "e-password", "base": "b-password"}
    for name, password in users.items():
        (tmp_path / name).write_text(password)
    with Broker(tmp_path / "broker", port=free_port(), users=users, program="mosquitto") as broker:
        common = {"broker__host": broker.host, "broker__port": broker.port, "broker__heartbeat_s": 1.0}
        base = start(
            settings(tmp_path / "b", node__name="base", peers__serve=True, broker__password_file=str(tmp_path / "base"), **common)
        )  # fmt: skip
        base.worker.swap_after_current_record(Speaker(FakeEngine(default=" dry-run: the pump sucks air", name="teacher"), "ranch"))
        site = start(
            settings(
                tmp_path / "s", node__name="esteli", peers__ask=("base",), broker__password_file=str(tmp_path / "esteli"), **common
            )
        )  # fmt: skip
        site.worker.swap_after_current_record(Speaker(FakeEngine(default=" leak: a pipe", probability=0.3), "ranch"))

        given = ask(site.server.url, "pump 2 A, no flow").json()["x_milpa"]
        stored = eventually(lambda: _upgraded(site.server.url, given["id"]))

    assert (given["text"], given["provisional"]) == ("leak: a pipe", True)
    assert (stored["state"], stored["by"], stored["text"]) == ("upgraded", "peer:base", "dry-run: the pump sucks air")
    assert [example.record.verdict for example in site.store.examples("ranch")] == ["dry-run"]


def _upgraded(url: str, answer: str) -> dict[str, Any] | None:
    stored: dict[str, Any] = httpx.get(f"{url}/v1/answers/{answer}").json()
    return None if stored["provisional"] else stored


@pytest.mark.parametrize("given", ["missing.gguf", "a-list.txt"])
def test_a_fixed_model_that_does_not_load_stops_the_start_and_leaves_nothing_running(start: Any, tmp_path: Path, given: str) -> None:
    (tmp_path / "a-list.txt").write_text("milk, nails, seed")
    broken = settings(tmp_path, model__path=str(tmp_path / given))

    with pytest.raises(BadInput, match=given):
        Daemon(broken).start()

    assert not (tmp_path / "state" / "run.json").exists()
    start(settings(tmp_path))  # the lock is free again


def test_a_node_whose_engine_thread_died_does_not_pretend_to_live(start: Any, tmp_path: Path) -> None:
    daemon = start(settings(tmp_path))
    daemon.worker.stop()  # as a defect in the thread would

    assert daemon.wait(DEADLINE_S) and daemon.failed


# ---- as a process


@pytest.fixture
def process(tmp_path: Path, tiny: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    command = [sys.executable, "-m", "node.cli", "run", "--state-dir", str(tmp_path / "state"), "--model", str(tiny)]
    with (tmp_path / "log").open("wb") as log:
        child = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=log, stderr=log)
    try:
        found = eventually(lambda: child.poll() is None and read_run_file(tmp_path / "state"))
        eventually(lambda: httpx.get(found.url + "/readyz").status_code == 200)
        yield child, found.url
    finally:
        child.kill()
        child.wait(10)


def milpa_node(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "node.cli", *arguments, "--state-dir", str(tmp_path / "state")]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=DEADLINE_S)


@pytest.mark.llama
def test_the_command_line_asks_corrects_and_looks_at_a_running_node(process: tuple[subprocess.Popen[bytes], str], tmp_path: Path) -> None:
    asked = msgspec.json.decode(milpa_node(tmp_path, "ask", "soil 12 %", "--json").stdout)
    corrected = msgspec.json.decode(
        milpa_node(tmp_path, "feedback", asked["id"], "--verdict", "leak", "--text", "a pipe", "--json").stdout
    )  # fmt: skip
    status = msgspec.json.decode(milpa_node(tmp_path, "status", "--json").stdout)
    wrong = milpa_node(tmp_path, "feedback", asked["id"], "--verdict", "leek")
    second = milpa_node(tmp_path, "run")

    assert corrected["text"] == "leak: a pipe"
    assert (status["ready"], status["answered"], status["examples"]) == (True, 1, 1)
    assert (wrong.returncode, wrong.stdout) == (2, "") and "did you mean 'leak'" in wrong.stderr
    assert second.returncode == 4 and second.stderr.startswith("error: another milpa-node runs")


@pytest.mark.llama
def test_sigterm_ends_a_node_cleanly_and_kill_9_leaves_a_state_that_starts(
    process: tuple[subprocess.Popen[bytes], str], tmp_path: Path, start: Any
) -> None:
    child, url = process
    given = ask(url).json()["x_milpa"]
    child.send_signal(signal.SIGKILL)
    child.wait(10)

    daemon = start(settings(tmp_path))

    assert httpx.get(f"{daemon.server.url}/v1/answers/{given['id']}").json()["text"] == given["text"]
    daemon.stop()
    assert not (tmp_path / "state" / "run.json").exists()


@pytest.mark.llama
def test_sigterm_exits_with_0(process: tuple[subprocess.Popen[bytes], str], tmp_path: Path) -> None:
    child, _ = process

    child.send_signal(signal.SIGTERM)

    assert child.wait(30) == 0
    assert not (tmp_path / "state" / "run.json").exists()
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.llama
def test_a_running_daemon_that_answers_has_loaded_no_training_library(tiny: Path, tmp_path: Path) -> None:
    script = f"""
import sys, httpx, node.cli
from node.app import Daemon
from node.settings import read
daemon = Daemon(read(flags={{"node.state_dir": {str(tmp_path / "state")!r}, "model.path": {str(tiny)!r}, "api.port": 0,
    "broker.host": "127.0.0.1", "broker.port": 1, "peers.ask": ["base"], "peers.serve": True}}, environment={{}})[0])
daemon.start()
httpx.post(daemon.server.url + "/v1/completions", json={{"prompt": "soil"}}).raise_for_status()
daemon.stop()
print(*sorted({{"torch", "transformers", "flwr", "peft", "sklearn", "gguf"}} & set(sys.modules)))
"""

    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=DEADLINE_S)

    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


@pytest.mark.llama
def test_without_a_daemon_ask_loads_the_model_itself_and_says_so(tiny: Path, tmp_path: Path) -> None:
    nothing = milpa_node(tmp_path, "ask", "soil 12 %")
    fixed = subprocess.run(
        [sys.executable, "-m", "node.cli", "ask", "soil 12 %", "--json", "--state-dir", str(tmp_path / "state")],
        cwd=ROOT, env={**ENVIRONMENT, "MILPA_NODE_MODEL_PATH": str(tiny)}, capture_output=True, text=True, timeout=DEADLINE_S,
    )  # fmt: skip

    assert nothing.returncode == 4 and "has no release yet" in nothing.stderr
    assert msgspec.json.decode(fixed.stdout)["stored"] is False
    assert "no node runs here" in fixed.stderr
