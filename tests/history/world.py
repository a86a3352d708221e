"""A small fleet that is real but for its wires: a site's node and a base station as processes, mosquitto, a coordinator with its ledger and
its release store; between the node and everything else, proxies that can be cut.

The database of the node notes every write to an answer by itself (a trigger, in the same transaction), so that no kill hides one.
"""

import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import sqlalchemy as sa
from fastapi import FastAPI

from coordinator.fleet.ledger import Ledger
from coordinator.fleet.listening import Listener
from coordinator.fleet.publishing import Publisher, build_release
from coordinator.fleet.repository import routes
from coordinator.fleet.tables import events
from deploy.broker import Broker, write_mosquitto
from node.api.server import Server, bind
from node.client import read_run_file
from protocol.digests import digest_file
from protocol.mqtt import Session
from protocol.ports import free_port
from tests.faults import Fault, FaultProxy
from tests.history.rules import Change, Given, History
from tests.tiny import tiny_gguf

ROOT = Path(__file__).parents[2]
USERS = {name: f"{name}-password" for name in ("coordinator", "esteli", "base")}
UP_S = 90.0  # seconds for a process to be ready, on a busy machine
ANSWER_S = 30.0
SETTLE_S = 180.0  # seconds for everything to be delivered once all is whole again
MODELS = 3
TRIGGERS = """
CREATE TABLE IF NOT EXISTS seen_changes (id TEXT, change INTEGER, state TEXT, by TEXT);
CREATE TRIGGER IF NOT EXISTS seen_insert AFTER INSERT ON answers BEGIN
  INSERT INTO seen_changes VALUES (new.id, new.change, new.state, new.by); END;
CREATE TRIGGER IF NOT EXISTS seen_update AFTER UPDATE OF change ON answers BEGIN
  INSERT INTO seen_changes VALUES (new.id, new.change, new.state, new.by); END;
"""


def mild(seed: int, wire: str) -> Callable[[int], Fault]:
    """What a wire is like between its cuts, for `FaultProxy`: the seed's own latency, and slices on half of the connections."""
    rng = random.Random(f"{seed}/{wire}")
    usual = Fault(latency_s=rng.uniform(0.0, 0.03), jitter_s=rng.uniform(0.0, 0.03))
    sliced = replace(usual, slice_bytes=rng.choice((256, 1_024, 4_096)))
    return lambda number: sliced if random.Random(f"{seed}/{wire}/{number}").random() < 0.5 else usual


class World:
    """One fleet in `folder`; rules of `machine` are its methods."""

    def __init__(self, folder: Path, *, seed: int) -> None:
        self.folder = folder
        self.given: list[Given] = []
        self.silent: list[str] = []
        self.corrected: dict[str, str] = {}
        self.signed: set[str] = set()
        self.published: list[int] = []  # number of the model of release 1, 2, ...
        self.log: list[str] = []
        self._offsets: dict[str, float] = {}  # of the nodes' clocks, seconds
        self._spoiled: tuple[Path, bytes] | None = None
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        self.models = [tiny_gguf(folder / f"model-{number}.gguf", layers=1, hidden=32, seed=number) for number in range(MODELS)]
        self.larger = tiny_gguf(folder / "larger.gguf", layers=1, hidden=32, seed=99)  # a peer with the node's own model is not asked
        self.broker = Broker(folder / "broker", port=free_port(), users=USERS, program="mosquitto").start()
        self.publisher = Publisher(folder / "repository")
        self.publisher.init()
        (folder / "root.json").write_bytes(self.publisher.root_bytes())
        app = FastAPI()
        app.include_router(routes(self.publisher))
        self._server = Server(app, bind("127.0.0.1", 0, key=""))
        self._server.start()
        self.wire = FaultProxy(("127.0.0.1", self.broker.port), mild(seed, "broker"), seed=seed)
        self.store_wire = FaultProxy(("127.0.0.1", int(self._server.url.rpartition(":")[2])), mild(seed, "store"), seed=seed)
        self.wire.__enter__()
        self.store_wire.__enter__()
        self.ledger = Ledger(f"sqlite:///{folder / 'ledger.db'}")
        self.ledger.migrate()
        self._coordinator = Session("coordinator", "127.0.0.1", self.broker.port, username="coordinator", password=USERS["coordinator"])
        Listener(self._coordinator, self.ledger)
        self._coordinator.start()
        self.clock("esteli", 0.0)
        self.clock("base", 0.0)
        self._configure()
        self._start("base")
        self.publish(0)
        self._start("esteli")
        with sqlite3.connect(folder / "esteli" / "node.db", timeout=20) as database:
            database.executescript(TRIGGERS)

    def _configure(self) -> None:
        for name, password in USERS.items():
            (self.folder / f"{name}.password").write_text(password)
        folder = self.folder
        common = (
            '[api]\nport = 0\n[broker]\nhost = "127.0.0.1"\nport = {port}\npassword_file = "{folder}/{name}.password"\nheartbeat_s = 5\n'
        )
        base = (
            f'[node]\nname = "base"\nrole = "teacher"\nstate_dir = "{folder}/base"\n[model]\npath = "{self.larger}"\n'
            "[peers]\nserve = true\n"
        )
        site = (
            f'[node]\nname = "esteli"\nstate_dir = "{folder}/esteli"\n[model]\nbudget = 1.0\n'
            '[peers]\nask = ["base"]\ndeadline_s = 3600\n'
            f'[update]\nurl = "http://127.0.0.1:{self.store_wire.port}/repository"\nroot_file = "{folder}/root.json"\npoll_s = 1\n'
        )
        (self.folder / "base.toml").write_text(base + common.format(port=self.broker.port, folder=self.folder, name="base"))
        (self.folder / "esteli.toml").write_text(site + common.format(port=self.wire.port, folder=self.folder, name="esteli"))

    # ---- the node

    def _start(self, name: str) -> None:
        command = [sys.executable, "-m", "tests.history.node", str(self.folder / f"{name}.toml"), str(self.folder / f"{name}.clock")]
        with (self.folder / f"{name}.log").open("ab") as log:
            self._nodes[name] = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=_environment())
        pid = self._nodes[name].pid
        _eventually(lambda: (found := self._run_file(name)) and found.pid == pid and self._ready(found.url), UP_S, f"{name} is not ready")

    def _run_file(self, name: str) -> Any:
        return read_run_file(self.folder / name)

    def _ready(self, url: str) -> bool:
        try:
            return httpx.get(url + "/readyz", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def _url(self, name: str = "esteli") -> str:
        found = self._run_file(name)
        assert found is not None, f"{name} does not run"
        return str(found.url)

    def ask(self, source: str) -> None:
        """One request; its answer is on record, or the silence."""
        self._look_after_the_broker()
        self.log.append(f"ask {source}")
        try:
            answer = httpx.post(self._url() + "/v1/completions", json={"prompt": source, "x_milpa": {"lang": "es"}}, timeout=ANSWER_S)
        except httpx.HTTPError as error:
            self.silent.append(f"{source}: {type(error).__name__}")
            return
        if answer.status_code != 200:
            self.silent.append(f"{source}: {answer.status_code} {answer.text[:200]}")
            return
        ours = answer.json()["x_milpa"]
        remembered = ours["memory"]["answer"] if ours["memory"] else ""
        self.given.append(Given(ours["id"], source, ours["release"], ours["model_digest"], remembered))

    def correct(self, number: int, verdict: str) -> None:
        """The operator's word on one of the answers given; on record once the node took it."""
        if not self.given:
            return
        one = self.given[number % len(self.given)]
        self.log.append(f"correct {one.source} as {verdict}")
        answer = httpx.post(self._url() + "/v1/feedback", json={"id": one.id, "verdict": verdict}, timeout=ANSWER_S)
        if answer.status_code == 200:
            self.corrected[one.id] = verdict

    def kill(self, name: str) -> None:
        """A power cut, and the power is back."""
        self.log.append(f"kill {name}")
        self._nodes[name].kill()
        self._nodes[name].wait(10)
        self._start(name)

    def clock(self, name: str, seconds: float) -> None:
        """Let a node's clock differ from the machine's by so much."""
        if self._offsets.get(name) == seconds:
            return
        self._offsets[name] = seconds
        self.log.append(f"clock of {name} {seconds:+.0f} s")
        part = self.folder / f"{name}.clock.part"
        part.write_text(str(seconds))
        part.replace(self.folder / f"{name}.clock")

    # ---- what is around it

    def partition(self) -> None:
        """No broker for the node."""
        self.log.append("partition")
        self.wire.partition()

    def lose_store(self) -> None:
        """No release store for the node."""
        self.log.append("release store away")
        self.store_wire.partition()

    def heal(self) -> None:
        """All wires whole, everything where it belongs."""
        self.log.append("heal")
        self.wire.heal()
        self.store_wire.heal()
        if self._spoiled:
            self._spoiled[0].write_bytes(self._spoiled[1])
            self._spoiled = None

    def kill_broker(self) -> None:
        """The broker's power cut."""
        self.log.append("kill broker")
        self.broker.kill()
        self.broker.start()

    def _look_after_the_broker(self) -> None:
        """What a service manager does: mosquitto 2.0.11 can end by itself (an assertion in will_delay.c) some time after a reload."""
        assert self.broker.process is not None
        if self.broker.process.poll() is not None:
            self.log.append("the broker ended by itself, and is started again")
            self.broker.start()

    def revoke_access(self, *, back: bool) -> None:
        """The broker does not know the node any more, or knows it again."""
        self.log.append("access back" if back else "access revoked")
        users = USERS if back else {name: password for name, password in USERS.items() if name != "esteli"}
        write_mosquitto(self.broker.folder, port=self.broker.port, users=users)
        self.broker.users = users
        assert self.broker.process is not None
        self.broker.process.send_signal(signal.SIGHUP)
        if not back:
            self.wire.drop()  # mosquitto asks for the password when somebody connects

    def publish(self, model: int) -> None:
        """The next release, with that model."""
        number = len(self.published) + 1
        self.log.append(f"release {number} with model {model}")
        release, files = build_release(number, "ranch", [("student", "model", self.models[model], "")], previous=number - 1)
        self.publisher.publish(release, files)
        self.signed.add(digest_file(self.models[model]))
        self.published.append(model)

    def revoke(self) -> None:
        """Take the newest release back: a higher number that names the files of the one before."""
        if len(self.published) > 1:
            self.log.append("revoke")
            self.publish(self.published[-2])

    def spoil(self) -> None:
        """The store's disk, or somebody on it, changes a file that was signed; `heal` brings it back."""
        path = self.publisher.blobs.path(digest_file(self.models[self.published[-1]]))
        if self._spoiled is None and path.is_file():
            self.log.append(f"spoil the file of release {len(self.published)}")
            good = path.read_bytes()
            self._spoiled = (path, good)
            path.write_bytes(good[:-1000] + bytes(1000))

    # ---- the end

    def settle(self) -> History:
        """Everything whole again and delivered: what there is to see then."""
        self.clock("esteli", 0.0)
        self.clock("base", 0.0)
        self.revoke_access(back=True)
        self.heal()
        _eventually(self._settled, SETTLE_S, "not everything was delivered", tell=self._status)
        with sqlite3.connect(self.folder / "esteli" / "node.db", timeout=20) as database:
            rows = database.execute("SELECT id, source, verdict FROM answers").fetchall()
            changes = [Change(*row) for row in database.execute("SELECT id, change, state, by FROM seen_changes ORDER BY rowid")]
        with self.ledger.read() as connection:
            told = connection.execute(sa.select(events.c.id, events.c.detail).where(events.c.kind == "escalation")).all()
        return History(
            given=self.given, silent=self.silent, corrected=self.corrected, changes=changes, stored={row[0]: row[1] for row in rows},
            verdicts={row[0]: row[2] for row in rows}, events=[(id, detail.get("state", "")) for id, detail in told], signed=self.signed,
        )  # fmt: skip

    def _status(self) -> Any:
        told = httpx.get(self._url() + "/v1/status", timeout=ANSWER_S).json()
        return {key: told.get(key) for key in ("release", "states", "broker", "update")}

    def _settled(self) -> bool:
        self._look_after_the_broker()
        told = self._status()
        return bool(
            told["release"] == len(self.published) and told["broker"]["connected"] and not told["broker"]["outbox"]
            and not told["states"].get("provisional")
        )  # fmt: skip

    def close(self) -> None:
        """End everything."""
        for process in self._nodes.values():
            process.terminate()
        for process in self._nodes.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
        self._coordinator.stop()
        self.wire.stop()
        self.store_wire.stop()
        self._server.stop()
        self.broker.stop()
        self.ledger.close()


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def _eventually(look: Callable[[], Any], deadline_s: float, problem: str, tell: Callable[[], Any] = lambda: "") -> None:
    end = time.monotonic() + deadline_s
    while True:
        try:
            if look():
                return
        except httpx.HTTPError as error:
            problem = f"{problem} ({type(error).__name__})" if "(" not in problem else problem
        assert time.monotonic() < end, f"{problem}: {tell()}"
        time.sleep(0.1)
