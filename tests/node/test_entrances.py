"""The spool folder and the site's topic: what comes in is answered once, whatever ends the process in between."""

import io
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from deploy.broker import answers as listens
from deploy.broker import find_mosquitto
from node.engine.worker import Speaker
from node.entrances.spool import SpoolFolder
from node.entrances.topic import SiteTopic
from node.settings import read
from node.store import AnswerRow, open_database
from protocol import logs
from protocol.errors import BadInput
from protocol.mqtt import Incoming, Session
from protocol.ports import free_port
from protocol.topics import covers
from tests.node.conftest import DEADLINE_S, ENVIRONMENT, ROOT, ask, eventually, settings
from tests.node.fake_engine import FakeEngine

LEAK = FakeEngine(default=" leak: a pipe", probability=0.99)


def record(name: str, source: str = "soil 21 C", **fields: Any) -> bytes:
    return msgspec.json.encode({"id": name, "task": "ranch", "source": source, **fields})


class Ticks:
    """A monotonic clock moved by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Folder:
    """A spool on a node in memory, looked at by hand."""

    def __init__(self, node: Any, root: Path, **options: Any) -> None:
        self.node, self.root, self.options, self.clock = node, root, options, Ticks()
        self.again()

    def again(self) -> None:
        flags = {"spool.folder": str(self.root), "spool.enabled": True, **{f"spool.{key}": value for key, value in self.options.items()}}
        self.spool = SpoolFolder(read(flags=flags, environment={})[0], self.node.answering, clock=self.clock)

    def drop(self, name: str, data: bytes) -> Path:
        path = self.root / "in" / name
        path.write_bytes(data)
        return path

    def look(self) -> None:
        """See what is there, wait until it is quiet, look."""
        self.spool.look()
        self.clock.now += 2.0
        self.spool.look()

    def out(self, name: str) -> list[dict[str, Any]]:
        return [msgspec.json.decode(line) for line in (self.root / "out" / name).read_bytes().splitlines()]

    def names(self, folder: str) -> list[str]:
        return sorted(path.name for path in (self.root / folder).iterdir())


@pytest.fixture
def folder(make_node: Callable[..., Any], tmp_path: Path) -> Callable[..., Folder]:
    def make(engine: FakeEngine | None = None, **options: Any) -> Folder:
        return Folder(make_node(engine or FakeEngine(default=" leak: a pipe", probability=0.99)), tmp_path / "spool", **options)

    return make


# ---- the spool folder


def test_a_dropped_file_becomes_a_file_of_the_same_name_with_an_answer_a_record(folder: Callable[..., Folder]) -> None:
    spool = folder()
    spool.drop("morning.jsonl", record("a") + b"\n\n" + record("b", "soil 9 C"))
    spool.drop("one.json", msgspec.json.format(record("c")))

    spool.look()

    assert [(one["record_id"], one["text"]) for one in spool.out("morning.jsonl")] == [("a", "leak: a pipe"), ("b", "leak: a pipe")]
    assert [one["record_id"] for one in spool.out("one.json")] == ["c"]
    assert (spool.names("in"), spool.names("work"), spool.names("done")) == ([], [], ["morning.jsonl", "one.json"])


def test_a_file_that_still_grows_is_not_read(folder: Callable[..., Folder]) -> None:
    spool = folder(quiet_s=1.0)
    path = spool.drop("slow.json", record("a")[:10])
    spool.spool.look()
    spool.clock.now += 0.9
    with path.open("ab") as file:
        file.write(record("a")[10:])
    spool.spool.look()
    spool.clock.now += 0.9

    spool.spool.look()
    early = spool.names("out")
    spool.clock.now += 0.2
    spool.spool.look()

    assert (early, spool.names("out")) == ([], ["slow.json"])


@pytest.mark.parametrize("name", ["a.json.part", ".a.json", "a.tmp"])
def test_names_under_which_files_are_written_are_never_read(folder: Callable[..., Folder], name: str) -> None:
    spool = folder()
    spool.drop(name, record("a"))

    spool.look()

    assert (spool.names("in"), spool.names("out")) == ([name], [])


def test_a_link_out_of_the_folder_is_never_followed(folder: Callable[..., Folder], tmp_path: Path) -> None:
    spool = folder()
    (tmp_path / "secret").write_bytes(record("a"))
    (spool.root / "in" / "a.json").symlink_to(tmp_path / "secret")

    spool.look()

    assert spool.names("out") == []


def test_a_line_that_is_not_usable_gets_an_error_in_its_place_and_the_others_their_answers(folder: Callable[..., Folder]) -> None:
    spool = folder()
    spool.drop("mixed.jsonl", record("a") + b"\nnot json\n" + record("c", lang="xx"))

    spool.look()

    first, second, third = spool.out("mixed.jsonl")
    assert first["text"] == "leak: a pipe"
    assert (second["error"]["code"], third["error"]["code"]) == ("bad_input", "bad_input")
    assert spool.names("done") == ["mixed.jsonl"]
    assert [origin for origin, _ in spool.node.refused()] == ["spool", "spool"]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "is empty"),
        (b"garbage", "does not decode"),
        (record("a") + b"\n" + record("b") + b"\n" + record("c"), "the limit is 2"),
        (record("a", "x" * 2_000), "spool.file_limit_bytes"),
    ],
)
def test_a_file_without_anything_usable_is_refused_with_the_reason(folder: Callable[..., Folder], data: bytes, says: str) -> None:
    spool = folder(records=2, file_limit_bytes=1_000)
    spool.drop("bad.jsonl", data)

    spool.look()

    assert spool.names("refused") == ["bad.jsonl", "bad.jsonl.reason"]
    assert says in (spool.root / "refused" / "bad.jsonl.reason").read_text()
    assert "error" in spool.out("bad.jsonl")[0]


def test_a_file_that_meets_a_defect_or_has_a_strange_name_does_not_keep_the_others_waiting(
    folder: Callable[..., Folder], monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = folder()
    real = spool.node.answering.answer

    def breaks(given: Any, **options: Any) -> Any:
        if given.id == "a":
            raise ValueError("a defect")
        return real(given, **options)

    monkeypatch.setattr(spool.node.answering, "answer", breaks)
    strange = os.fsdecode(b"\xff.json")
    for name, data in (("a.json", record("a")), (strange, b"garbage"), ("b.json", record("b"))):
        spool.drop(name, data)

    spool.look()

    assert spool.out("b.json")[0]["text"] == "leak: a pipe"
    assert {"a.json", strange} <= set(spool.names("refused")) and spool.names("work") == []
    assert "ValueError" in (spool.root / "refused" / "a.json.reason").read_text()


def test_files_wait_while_there_is_no_model(folder: Callable[..., Folder]) -> None:
    spool = folder()
    speaker = spool.node.worker.speaker
    spool.node.worker.swap_after_current_record(None)
    spool.node.engine.closed = False
    spool.drop("early.json", record("a"))
    with pytest.raises(Exception, match="no model"):
        spool.look()

    spool.node.worker.swap_after_current_record(speaker)
    spool.look()

    assert spool.out("early.json")[0]["text"] == "leak: a pipe"


def test_nothing_is_taken_while_nobody_collects(folder: Callable[..., Folder]) -> None:
    spool = folder(waiting=1)
    spool.drop("a.json", record("a"))
    spool.look()
    spool.drop("b.json", record("b"))

    spool.look()

    assert (spool.names("in"), spool.names("out")) == (["b.json"], ["a.json"])


class Killed(BaseException):
    """The process ended here."""


@pytest.mark.parametrize("step", range(6))
def test_ended_at_any_step_every_record_is_answered_once_and_every_file_appears_once(
    folder: Callable[..., Folder], monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    spool = folder()
    spool.drop("a.jsonl", record("a") + b"\n" + record("b"))
    moves, real, seen = 0, Path.replace, []

    def replace(self: Path, target: Any) -> Path:
        nonlocal moves
        moves += 1
        if moves == step + 1:
            raise Killed
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    try:
        spool.look()
    except Killed:
        seen += spool.names("out")  # the consumer takes what has a name by then
        for name in [name for name in seen if not name.startswith(".")]:
            (spool.root / "out" / name).unlink()
    monkeypatch.setattr(Path, "replace", real)

    spool.again()
    spool.spool.recover()
    spool.look()

    appeared = [name for name in (*seen, *spool.names("out")) if not name.startswith(".")]
    assert appeared == ["a.jsonl"]
    assert len(spool.node.engine.prompts) == 2
    assert (spool.names("in"), spool.names("work"), spool.names("done")) == ([], [], ["a.jsonl"])


@pytest.mark.llama
def test_kill_9_in_the_middle_of_a_file_answers_no_record_twice(tiny: Path, tmp_path: Path) -> None:
    state, names = tmp_path / "state", [f"r{number}" for number in range(60)]
    command = [sys.executable, "-m", "node.cli", "run", "--state-dir", str(state), "--model", str(tiny)]
    environment = {**ENVIRONMENT, "MILPA_NODE_SPOOL_ENABLED": "true", "MILPA_NODE_SPOOL_QUIET_S": "0.1"}
    (state / "spool" / "in").mkdir(parents=True)
    (state / "spool" / "in" / "all.jsonl").write_bytes(b"\n".join(record(name, f"soil {name}") for name in names))

    def stored() -> list[str]:
        if not (state / "node.db").is_file():
            return []
        engine = open_database(state / "node.db")
        try:
            with engine.begin() as connection:
                return [str(name) for (name,) in connection.exec_driver_sql("SELECT record FROM answers")]
        except Exception:
            return []  # not made yet
        finally:
            engine.dispose()

    first = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    eventually(lambda: len(stored()) >= 5)
    first.send_signal(signal.SIGKILL)
    first.wait(10)
    half = len(stored())
    second = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    try:
        answered = eventually(lambda: (state / "spool/out/all.jsonl").is_file() and (state / "spool/out/all.jsonl").read_bytes())
    finally:
        second.terminate()
        second.wait(30)

    assert half < len(names)
    assert sorted(stored()) == sorted(names)
    assert [msgspec.json.decode(line)["record_id"] for line in answered.splitlines()] == names


def test_a_node_without_these_entrances_starts_no_thread_for_them(start: Any, tmp_path: Path) -> None:
    daemon = start(settings(tmp_path))

    assert not any("spool" in thread.name or "site" in thread.name for thread in threading.enumerate())
    assert not (daemon.settings.state_dir / "spool").exists()


# ---- the site's topic


@pytest.fixture
def site_broker(tmp_path: Path) -> Iterator[int]:
    """A broker as a site has one: open to everybody on it."""
    program = find_mosquitto()
    if program is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("mosquitto is not installed: apt install mosquitto")
    port, user = free_port(), "user root\n" if os.geteuid() == 0 else ""
    (tmp_path / "site.conf").write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\n{user}")
    running = subprocess.Popen([str(program), "-c", str(tmp_path / "site.conf")], stderr=subprocess.DEVNULL)
    eventually(lambda: listens("127.0.0.1", port))
    yield port
    running.terminate()
    running.wait(10)


class Controller:
    """Whatever at the site sends records."""

    def __init__(self, port: int) -> None:
        self.heard: list[Incoming] = []
        self.session = Session("controller", "127.0.0.1", port, backoff_base=0.05)
        self.session.subscribe("site/answers", self.heard.append)
        self.session.subscribe("controller/replies", self.heard.append)
        self.session.start()
        assert self.session.wait_connected(DEADLINE_S)

    def send(self, data: bytes, **options: Any) -> None:
        self.session.publish("site/records", data, **options)

    def said(self, count: int = 1) -> list[dict[str, Any]]:
        eventually(lambda: len(self.heard) >= count)
        return [msgspec.json.decode(message.payload) for message in self.heard]


@pytest.fixture
def controller(site_broker: int) -> Iterator[Controller]:
    one = Controller(site_broker)
    yield one
    one.session.stop()


@pytest.fixture
def topic(site_broker: int, make_node: Callable[..., Any]) -> Iterator[Callable[..., tuple[SiteTopic, Any]]]:
    made: list[SiteTopic] = []

    def make(engine: FakeEngine | None = None, node: Any = None, **flags: Any) -> tuple[SiteTopic, Any]:
        node = node or make_node(engine or FakeEngine(default=" leak: a pipe", probability=0.99))
        given = {"topic.host": "127.0.0.1", "topic.port": site_broker, "api.deadline_s": 2.0, **flags}
        made.append(SiteTopic(read(flags=given, environment={})[0], node.answering))
        made[-1].start()
        assert made[-1].session.wait_connected(DEADLINE_S)
        return made[-1], node

    yield make
    for one in made:
        one.stop()


@pytest.mark.broker
def test_a_record_is_answered_on_the_topic_of_answers(controller: Controller, topic: Callable[..., Any]) -> None:
    topic()

    controller.send(record("a"))

    (said,) = controller.said()
    assert (controller.heard[0].topic, said["record_id"], said["text"], said["state"]) == ("site/answers", "a", "leak: a pipe", "final")


@pytest.mark.broker
def test_a_response_topic_and_its_correlation_are_honoured(controller: Controller, topic: Callable[..., Any]) -> None:
    topic()

    controller.send(record("a"), response_topic="controller/replies", correlation=b"row 7")

    controller.said()
    assert [(message.topic, message.correlation) for message in controller.heard] == [("controller/replies", b"row 7")]


@pytest.mark.broker
def test_the_same_record_twice_is_answered_once_and_told_twice(controller: Controller, topic: Callable[..., Any]) -> None:
    _, node = topic()

    controller.send(record("a"))
    controller.send(record("a"))
    controller.send(record("a", "another window"))

    first, second, third = controller.said(3)
    assert first["id"] == second["id"] != third["id"]
    assert len(node.engine.prompts) == 2


@pytest.mark.broker
def test_what_is_no_record_is_told_so_and_kept(controller: Controller, topic: Callable[..., Any]) -> None:
    _, node = topic()

    controller.send(b"{")

    assert controller.said()[0]["error"]["code"] == "bad_input"
    assert [origin for origin, _ in node.refused()] == ["topic"]


@pytest.mark.broker
def test_an_answer_is_never_sent_to_where_records_come_from(controller: Controller, topic: Callable[..., Any]) -> None:
    _, node = topic(**{"topic.records": "site/#", "topic.answers": "answers"})

    controller.send(record("a"), response_topic="site/here")

    eventually(lambda: node.refused())
    assert "name another response topic" in node.refused()[0][1]
    assert node.engine.prompts == []


@pytest.mark.broker
def test_a_record_that_waits_for_a_model_when_the_node_stops_is_answered_by_the_next_process(
    controller: Controller, topic: Callable[..., Any], make_node: Callable[..., Any]
) -> None:
    first, waiting = topic(**{"api.deadline_s": 60.0})
    waiting.worker.swap_after_current_record(None)
    controller.send(record("a"))
    time.sleep(0.3)  # it is in the handler now

    first.stop()
    topic()

    assert [said["text"] for said in controller.said()] == ["leak: a pipe"]


@pytest.mark.broker
def test_a_record_without_a_model_gets_an_honest_no(controller: Controller, topic: Callable[..., Any]) -> None:
    _, node = topic(**{"api.deadline_s": 0.2})
    node.worker.swap_after_current_record(None)

    controller.send(record("a"))

    (said,) = controller.said()
    assert (said["record_id"], said["error"]["code"]) == ("a", "unavailable")


@pytest.mark.parametrize(
    ("topic_filter", "name", "covered"),
    [
        ("site/records", "site/records", True), ("site/+", "site/records", True), ("site/#", "site", True), ("#", "a/b", True),
        ("site/records", "site/records/one", False), ("site/+", "site/a/b", False), ("+", "a/b", False), ("a/b/c", "a/b", False),
    ],
)  # fmt: skip
def test_a_filter_covers_what_the_broker_would_deliver(topic_filter: str, name: str, covered: bool) -> None:
    assert covers(topic_filter, name) is covered


def test_answers_cannot_be_set_to_go_to_several_topics() -> None:
    with pytest.raises(BadInput, match=r"topic\.answers"):
        read(flags={"topic.answers": "site/+"}, environment={})


# ---- what is logged


CANARY = "qzx-canary-qzx"


@pytest.mark.broker
def test_nothing_of_what_comes_in_at_any_entrance_is_logged(
    start: Any, tmp_path: Path, site_broker: int, controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, root = io.StringIO(), logging.getLogger()
    for target, name in ((sys, "excepthook"), (threading, "excepthook")):
        monkeypatch.setattr(target, name, getattr(target, name))
    before = (root.handlers[:], root.level)
    daemon = start(settings(tmp_path, spool__enabled=True, spool__quiet_s=0.0, topic__host="127.0.0.1", topic__port=site_broker))
    try:
        logs.set_up("text", "debug", stream=log)
        engine = FakeEngine({"break": ""}, default=f" leak: {CANARY}", probability=0.99)
        daemon.worker.swap_after_current_record(Speaker(engine, "ranch"))
        url, bad = daemon.server.url, [b"{", CANARY.encode(), record("x", CANARY, lang=CANARY), record(CANARY, "", site=CANARY)]
        given = ask(url, CANARY).json()["x_milpa"]
        httpx.post(url + "/v1/chat/completions", json={"messages": [{"role": "user", "content": CANARY}], "x_milpa": {"task": CANARY}})
        httpx.post(url + "/v1/feedback", json={"id": given["id"], "verdict": CANARY, "text": CANARY})
        httpx.post(url + "/v1/feedback", json={"id": given["id"], "verdict": "leak", "text": CANARY})
        httpx.get(url + f"/v1/answers/{CANARY}")
        for number, data in enumerate([*bad, record("fine", CANARY)]):
            httpx.post(url + "/v1/records", content=data, headers={"content-type": "application/json"})
            (tmp_path / "state" / "spool" / "in" / f"{number}.json").write_bytes(data)
            controller.send(data, correlation=CANARY.encode())
        eventually(lambda: len(list((tmp_path / "state/spool/out").glob("*.json"))) == 5)
        controller.said(5)
        monkeypatch.setattr(engine, "generate", lambda *_, **__: (_ for _ in ()).throw(ValueError(CANARY)))  # a defect that quotes
        ask(url, f"another {CANARY}")
        monkeypatch.setattr(daemon.store, "engine", None)  # and a store that fails
        ask(url, f"a third {CANARY}")
    finally:
        root.handlers[:], root.level = before[0], before[1]

    assert "its text is not logged" in log.getvalue()  # the defects are there
    assert CANARY not in log.getvalue()


def test_an_answer_is_found_by_an_index_and_not_by_reading_all(make_node: Callable[..., Any]) -> None:
    node = make_node()
    query = "EXPLAIN QUERY PLAN SELECT * FROM answers WHERE record = 'a' AND source = 'b'"

    with node.store.engine.begin() as connection:
        plan = str(connection.exec_driver_sql(query).all())

    assert "USING INDEX" in plan and AnswerRow.__tablename__ in plan
