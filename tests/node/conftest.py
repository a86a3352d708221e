"""A node in memory: a real store and a real engine thread, a small engine, and somebody to ask who only takes notes; and whole daemons."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from node.answering import Answering
from node.api import routes
from node.api.metrics import Metrics
from node.api.server import Server, bind
from node.app import Daemon
from node.engine.worker import Speaker, Worker
from node.settings import NodeSettings, read
from node.store import Store
from protocol.digests import digest_bytes, digest_file
from protocol.messages import Question, Reply
from protocol.releases import KnownAnswer
from protocol.tasks import Record
from tests.node.fake_engine import FakeEngine

NOW = 1_800_000_000.0


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


class Notes:
    """Takes questions and events down; `fails` makes the next question fail."""

    def __init__(self, deadline_s: float = 600.0) -> None:
        self.deadline_s = deadline_s
        self.questions: list[Question] = []
        self.events: list[tuple[str, dict[str, float], dict[str, str]]] = []
        self.fails = False

    def ask(self, session: Any, question: Question) -> None:
        if self.fails:
            raise OSError("no space left")
        self.questions.append(question)

    def report(self, session: Any, kind: str, figures: dict[str, float], detail: dict[str, str]) -> None:
        self.events.append((kind, figures, detail))


class NodeInMemory:
    """What the tests hold in their hands."""

    def __init__(self, folder: Path, engine: FakeEngine, *, asking: Notes | None, budget: float, capacity: int, deadline_s: float) -> None:
        self.server: Server | None = None
        self.engine, self.asking, self.clock, self.metrics = engine, asking, Clock(), Metrics()
        self.store = Store(folder / "node.db")
        self.worker = Worker(capacity=capacity)
        self.worker.swap_after_current_record(Speaker(engine, "ranch", release=1))
        self.worker.start()
        self.answering = Answering(
            self.store, self.worker, node="esteli", site="esteli", budget=budget, asking=asking, clock=self.clock, watch=self.metrics
        )
        self.app = routes.build(
            self.answering, self.metrics, default_task="ranch", deadline_s=deadline_s, status=dict,
            why_not_ready=lambda: "" if self.worker.speaker else "no model yet", clock=self.clock,
        )  # fmt: skip

    def answer(self, source: str = "soil 21 C", **fields: Any) -> Any:
        record = Record(id="r1", task="ranch", source=source, **fields)
        return self.answering.answer(record, deadline_s=10)

    def row(self, answer_id: str) -> Any:
        from sqlalchemy import select

        from node.store import AnswerRow

        with self.store.transaction() as session:
            return session.scalar(select(AnswerRow).where(AnswerRow.id == answer_id))

    def refused(self) -> list[tuple[str, str]]:
        from sqlalchemy import select

        from node.store import RefusedRow

        with self.store.transaction() as session:
            return [(row.origin, row.reason) for row in session.scalars(select(RefusedRow))]

    def client(self) -> TestClient:
        return TestClient(self.app, base_url="http://127.0.0.1", raise_server_exceptions=False)

    def serve(self) -> str:
        """The API on a real socket; its address."""
        if self.server is None:
            self.server = Server(self.app, bind("127.0.0.1", 0, key=""))
            self.server.start()
        return self.server.url

    def close(self) -> None:
        self.engine.gate.set()
        if self.server is not None:
            self.server.stop()
        self.worker.stop()
        self.store.close()


def reply_to(question: Question, text: str, **fields: Any) -> Reply:
    values: dict[str, Any] = {
        "id": f"reply-{text}", "question": question.id, "question_digest": digest_bytes(question.prompt.encode()), "peer": "base-station",
        "model_digest": "f" * 64, "text": text, "confidence": 0.9,
    }  # fmt: skip
    return Reply(**(values | fields))


@pytest.fixture
def make_node(tmp_path: Path) -> Iterator[Callable[..., NodeInMemory]]:
    made: list[NodeInMemory] = []

    def make(
        engine: FakeEngine | None = None, *, asking: Notes | None = None, budget: float = 0.25, capacity: int = 4, deadline_s: float = 10.0
    ) -> NodeInMemory:
        folder = tmp_path / f"node{len(made)}"
        made.append(NodeInMemory(folder, engine or FakeEngine(), asking=asking, budget=budget, capacity=capacity, deadline_s=deadline_s))
        return made[-1]

    yield make
    for node in made:
        node.close()


@pytest.fixture
def unsure(make_node: Callable[..., NodeInMemory]) -> NodeInMemory:
    """A node whose model is never sure, with somebody to ask."""
    return make_node(FakeEngine(default=" leak: the pipe lost pressure", probability=0.3), asking=Notes())


@pytest.fixture
def sure(make_node: Callable[..., NodeInMemory]) -> NodeInMemory:
    """A node whose model is always sure, with somebody to ask."""
    return make_node(FakeEngine(default=" normal: all is well", probability=0.99), asking=Notes())


# ---- whole daemons

ROOT = Path(__file__).parents[2]
DEADLINE_S = 60.0
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MILPA_NODE_API_PORT": "0"}


def eventually(look: Callable[[], Any]) -> Any:
    end = time.monotonic() + DEADLINE_S
    while not (found := look()):
        assert time.monotonic() < end, "it did not happen within the deadline"
        time.sleep(0.05)
    return found


def settings(folder: Path, **flags: Any) -> NodeSettings:
    given = {"node.state_dir": str(folder / "state"), "api.port": 0, **{key.replace("__", "."): value for key, value in flags.items()}}
    return read(flags=given, environment={})[0]


@pytest.fixture
def start() -> Iterator[Callable[[NodeSettings], Daemon]]:
    running: list[Daemon] = []

    def begin(given: NodeSettings) -> Daemon:
        daemon = Daemon(given)
        daemon.start()
        running.append(daemon)
        return daemon

    yield begin
    for daemon in running:
        if daemon.failed or not daemon.wait(0):
            daemon.stop()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny import tiny_gguf

    return tiny_gguf(tmp_path_factory.mktemp("daemon") / "tiny.gguf")


def ask(url: str, prompt: str = "soil 12 %") -> httpx.Response:
    return httpx.post(url + "/v1/completions", json={"prompt": prompt}, timeout=30)


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[tuple[Any, str]]:
    """A publisher and the address its store is served on."""
    from fastapi import FastAPI

    from node.api.server import Server, bind

    publishing, serving = pytest.importorskip("coordinator.fleet.publishing"), pytest.importorskip("coordinator.fleet.repository")
    publisher = publishing.Publisher(tmp_path / "repository")
    publisher.init()
    (tmp_path / "root.json").write_bytes(publisher.root_bytes())
    app = FastAPI()
    app.include_router(serving.routes(publisher))
    server = Server(app, bind("127.0.0.1", 0, key=""))
    server.start()
    yield publisher, server.url + "/repository"
    server.stop()


def publish(publisher: Any, number: int, model: Path, *, knows: str | None = None, adapter: Path | None = None) -> None:
    from coordinator.fleet.publishing import build_release

    known = [KnownAnswer("soil\nen:", knows)] if knows is not None else []
    files: list[Any] = [("student", "model", model, "")]
    if adapter is not None:
        files.append(("student", "adapter", adapter, digest_file(model)))
    release, paths = build_release(number, "ranch", files, known_answers=known, previous=number - 1)
    publisher.publish(release, paths)


def write_adapter(path: Path, *, hidden: int = 64, scale: float = 1.0, tensor: str = "blk.0.ffn_down.weight", inputs: int = 128) -> Path:
    """A LoRA adapter for the tiny model, with other arguments for a model it is not."""
    import gguf
    import numpy as np

    random = np.random.default_rng(7)
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    writer.add_tensor(f"{tensor}.lora_a", (scale * random.standard_normal((4, inputs))).astype(np.float32))
    writer.add_tensor(f"{tensor}.lora_b", random.standard_normal((hidden, 4)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
