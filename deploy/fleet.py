"""A whole fleet on this machine: real processes, each with its own folder, secrets and log.

broker, SuperLink, coordinator with its dashboard, a base station that runs the teacher, the site nodes; all on the loopback interface.
Secrets are made at the first start and stay in the folder (mode 0600). Nothing here is a simulation but the distance between the machines.

folder/
  fleet.json      ports and names            processes.json   what runs
  broker/         mosquitto's files          superlink/       keys, SQLite
  store/          ledger, signed repository  trust/root.json  what nodes are enrolled with
  nodes/NAME/     node.toml, state           logs/NAME.log
"""

import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import msgspec

from coordinator.fleet.publishing import Publisher, build_release
from deploy.broker import COORDINATOR, answers, prepare
from deploy.processes import Processes, http_ok
from protocol.blobs import write_atomically
from protocol.errors import BadInput, Unavailable
from protocol.names import checked_name
from protocol.ports import free_port

SITES = ("esteli", "malacatoya")
PEER = "base-station"
HEARTBEAT_S = 5.0  # seconds; a local fleet pays nothing for words
POLL_S = 2.0  # seconds between a node's looks for a release, besides the notice on MQTT
QUESTION_DEADLINE_S = 600.0


class Plan(msgspec.Struct, frozen=True):
    """What is where. Written once, so that a restart finds the same addresses."""

    sites: tuple[str, ...]
    peer: str
    task: str
    budget: float  # share of a node's answers it may hand on
    broker_port: int
    superlink_port: int
    web_port: int
    node_ports: dict[str, int]

    @property
    def names(self) -> tuple[str, ...]:
        """All nodes, the base station first."""
        return (self.peer, *self.sites)


class LocalFleet:
    """The fleet in `folder`. `prepare` once, then `start`, `stop`."""

    def __init__(self, folder: Path, processes: Processes) -> None:
        self.folder = folder.resolve()
        self.processes = processes
        self._plan_file = self.folder / "fleet.json"

    @property
    def plan(self) -> Plan:
        """The written plan.

        Raises:
            BadInput: there is no fleet in this folder.
        """
        try:
            return msgspec.json.decode(self._plan_file.read_bytes(), type=Plan)
        except (FileNotFoundError, msgspec.DecodeError) as error:
            raise BadInput(f"there is no fleet in {self.folder}; start one with `milpa-fleet up --folder {self.folder}`") from error

    @property
    def dashboard(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.plan.web_port}/"

    @property
    def store(self) -> Path:
        """The coordinator's store: ledger and signed repository."""
        return self.folder / "store"

    def node_url(self, name: str) -> str:
        """A node's API."""
        return f"http://127.0.0.1:{self.plan.node_ports[name]}"

    def node_config(self, name: str) -> Path:
        """A node's TOML file."""
        return self.folder / "nodes" / name / "node.toml"

    def prepare(
        self, *, sites: Sequence[str] = SITES, peer: str = PEER, task: str = "ranch", budget: float = 0.25, web_port: int = 0
    ) -> Plan:
        """Make folders, secrets, keys and configurations, or take up those that are there."""
        if not self._plan_file.exists():
            for name in (peer, *sites):
                checked_name(name, what="node")
            plan = Plan(
                sites=tuple(sites), peer=peer, task=task, budget=budget, broker_port=free_port(), superlink_port=free_port(),
                web_port=web_port or free_port(), node_ports={name: free_port() for name in (peer, *sites)},
            )  # fmt: skip
            write_atomically(self._plan_file, msgspec.json.format(msgspec.json.encode(plan)))
        plan = self.plan
        for user in (COORDINATOR, *plan.names):
            self._password(user)
        publisher = self.publisher()
        if not publisher.exists:
            publisher.init()
        write_atomically(self.folder / "trust" / "root.json", publisher.root_bytes())
        self._write_toml(
            self.folder / "coordinator.toml",
            {
                "store": {"dir": str(self.store)},
                "web": {"host": "127.0.0.1", "port": plan.web_port, "silent_after_s": 60},
                "broker": {"host": "127.0.0.1", "port": plan.broker_port, "username": COORDINATOR,
                           "password_file": str(self._password_file(COORDINATOR))},
            },
        )  # fmt: skip
        for name in plan.names:
            self._write_toml(self.node_config(name), self._node_settings(plan, name))
        return plan

    def publisher(self) -> Publisher:
        """The signed repository."""
        return Publisher(self.store / "repository")

    def start(self) -> None:
        """Start every part and wait until each is ready. A part that runs already is left alone.

        Raises:
            Unavailable: a part did not come up; its log's end is in the message.
            PortInUse: another program took a port since the plan was made.
        """
        plan = self.plan
        if not self.processes.running("broker"):
            passwords = {user: self._password(user) for user in (COORDINATOR, *plan.names)}
            _, command = prepare(self.folder / "broker", port=plan.broker_port, users=passwords)
            self.processes.start("broker", command)
            self.processes.wait_until("broker", lambda: answers("127.0.0.1", plan.broker_port))
        self._start("superlink", ["-m", "coordinator.cli", "superlink", "--state", str(self.folder / "superlink"),
                                  "--port", str(plan.superlink_port)])  # fmt: skip
        self._start("coordinator", ["-m", "coordinator.cli", "serve", "--config", str(self.folder / "coordinator.toml")])
        for name in plan.names:
            self._start(name, ["-m", "node.cli", "run", "--config", str(self.node_config(name))])
        self.processes.wait_until("superlink", lambda: http_ok(f"http://127.0.0.1:{plan.superlink_port}/health"))
        self.processes.wait_until("coordinator", lambda: http_ok(self.dashboard + "healthz"))
        for name in plan.names:
            self.processes.wait_until(name, lambda url=self.node_url(name): http_ok(url + "/healthz"))  # type: ignore[misc]

    def wait_for_release(self, number: int, *, deadline_s: float) -> dict[str, float]:
        """Wait until every node answers with release `number`; seconds each took.

        Raises:
            Unavailable: a node did not get there in time.
        """
        begun, waiting, took = time.monotonic(), list(self.plan.names), {}
        while waiting:
            for name in list(waiting):
                if self.node_status(name).get("release") == number and http_ok(self.node_url(name) + "/readyz"):
                    took[name] = time.monotonic() - begun
                    waiting.remove(name)
            if waiting and time.monotonic() - begun > deadline_s:
                raise Unavailable(
                    f"{', '.join(waiting)} did not activate release {number} within {deadline_s:.0f} s:\n{self.processes.tail(waiting[0])}"
                )
            time.sleep(0.2)
        return took

    def node_status(self, name: str) -> dict[str, Any]:
        """GET /v1/status of a node; {} when it does not answer."""
        try:
            answer = httpx.get(self.node_url(name) + "/v1/status", timeout=5.0)
            return dict(answer.json()) if answer.status_code == 200 else {}
        except httpx.HTTPError:
            return {}

    def publish_first(self, task: str, *, student: Path, teacher: Path) -> None:
        """Publish these models as release 1, if there is no release yet.

        Raises:
            BadInput: a file is missing.
        """
        publisher = self.publisher()
        if publisher.latest() is None:
            release, paths = build_release(
                1, task, [("student", "model", student, ""), ("teacher", "model", teacher, "")], note="first release"
            )
            publisher.publish(release, paths)

    def setup_token_file(self) -> Path:
        """Where the coordinator leaves the one-time token with which the first operator signs up."""
        return self.store / "setup-token"

    def describe(self) -> dict[str, Any]:
        """Parts, addresses and what each node says, as plain JSON values."""
        plan = self.plan
        urls = {"broker": f"mqtt://127.0.0.1:{plan.broker_port}", "superlink": f"http://127.0.0.1:{plan.superlink_port}",
                "coordinator": self.dashboard}  # fmt: skip
        parts: dict[str, Any] = {name: {"running": self.processes.running(name), "url": url} for name, url in urls.items()}
        for name in plan.names:
            parts[name] = {"running": self.processes.running(name), "url": self.node_url(name), "node": self.node_status(name)}
        return {"folder": str(self.folder), "dashboard": self.dashboard, "setup_token_file": str(self.setup_token_file()), "parts": parts}

    def stop(self) -> None:
        """End every process of this fleet."""
        self.processes.stop_all()

    def _start(self, name: str, arguments: Sequence[str]) -> None:
        if not self.processes.running(name):
            self.processes.start(name, [sys.executable, *arguments], environment={"OMP_NUM_THREADS": "1"})

    def _node_settings(self, plan: Plan, name: str) -> dict[str, dict[str, Any]]:
        is_peer = name == plan.peer
        return {
            "node": {"name": name, "role": "teacher" if is_peer else "student", "state_dir": str(self.node_config(name).parent / "state")},
            "api": {"port": plan.node_ports[name], "queue": 32, "deadline_s": 120.0},
            "model": {"task": plan.task, "budget": 0.0 if is_peer else plan.budget, "threads": 1},
            "broker": {
                "host": "127.0.0.1",
                "port": plan.broker_port,
                "password_file": str(self._password_file(name)),
                "heartbeat_s": HEARTBEAT_S,
            },
            "memory": {"use": "off"},  # what a season counts is the model's own; the same records are asked before and after
            "peers": {"serve": True} if is_peer else {"ask": [plan.peer], "deadline_s": QUESTION_DEADLINE_S},
            "update": {
                "url": f"http://127.0.0.1:{plan.web_port}/repository",
                "root_file": str(self.folder / "trust" / "root.json"),
                "poll_s": POLL_S,
            },
            "learn": {
                "auto": False,  # whoever runs the fleet says when its sites learn and sync
                "superlink": f"127.0.0.1:{plan.superlink_port}",
                "fleet_token_file": str(self.folder / "superlink" / "fleet.token"),
            },
        }

    def _password_file(self, user: str) -> Path:
        return self.folder / "secrets" / f"{user}.password"

    def _password(self, user: str) -> str:
        file = self._password_file(user)
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            file.touch(mode=0o600)
            file.write_text(secrets.token_urlsafe(24))
        return file.read_text().strip()

    def _write_toml(self, file: Path, sections: dict[str, dict[str, Any]]) -> None:
        lines = ["# written by milpa-fleet"]
        for section, values in sections.items():
            lines += ["", f"[{section}]", *(f"{key} = {_toml(value)}" for key, value in values.items())]
        write_atomically(file, ("\n".join(lines) + "\n").encode())


def _toml(value: Any) -> str:
    """A TOML value: JSON's strings, numbers, booleans and lists of them are TOML's as well."""
    return msgspec.json.encode(value).decode()
