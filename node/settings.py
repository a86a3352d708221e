"""What can be set on a node. Read by `protocol.settings.load`: default, TOML, MILPA_NODE_<SECTION>_<KEY>, flag; the later wins.

Everything has a default with which a node starts alone on one machine: no broker, no peers, no coordinator.
"""

import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from protocol.errors import BadInput
from protocol.names import checked_name
from protocol.releases import Role
from protocol.settings import Origin, load
from protocol.tasks import task_named

QUEUE_LIMIT = 32  # waiting requests; each holds one of the 40 threads the HTTP server has


class Node(msgspec.Struct, frozen=True):
    """Who this node is."""

    name: str = "node"
    role: Role = "student"  # which files of a release it takes: "student" at a site, "teacher" at a base station
    site: str = ""  # empty: the node's name
    state_dir: str = "~/.local/share/milpa/node"


class Api(msgspec.Struct, frozen=True):
    """The local HTTP API."""

    host: str = "127.0.0.1"
    port: int = 8642  # 0: any free one; `milpa-node status` finds it
    key_file: str = ""  # a file with the key that requests must carry; needed for any host but this machine
    queue: int = 16  # waiting requests before the node says 429
    deadline_s: float = 30.0  # seconds a request waits for its answer


class Model(msgspec.Struct, frozen=True):
    """How the model runs; and a fixed file, for use without a coordinator."""

    path: str = ""  # a GGUF; empty: the active release's
    adapter: str = ""
    calibration: str = ""
    task: str = "ranch"  # of the fixed file, and of requests that name none
    threads: int = 1
    context: int = 1024  # tokens
    budget: float = 0.25  # share of the answers that may be escalated to a peer, in [0, 1]


class Broker(msgspec.Struct, frozen=True):
    """The MQTT broker. Without a host the node lives alone."""

    host: str = ""
    port: int = 1883
    username: str = ""  # empty: the node's name
    password_file: str = ""
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    heartbeat_s: float = 300.0


class Peers(msgspec.Struct, frozen=True):
    """Whom to ask when unsure, and whether to answer others."""

    ask: tuple[str, ...] = ()  # names of peers with a larger model
    serve: bool = False
    deadline_s: float = 3600.0  # seconds until an unanswered question is given up
    votes: int = 1  # how many peers are asked at once; with more than one they vote
    hops: int = 1  # how often a question may be handed on


class Update(msgspec.Struct, frozen=True):
    """Where releases come from."""

    url: str = ""  # the coordinator's repository; empty: no updates
    root_file: str = ""  # the first trusted root.json, brought by hand
    poll_s: float = 900.0
    max_bytes_a_day: int = 0  # 0: no limit


class Learn(msgspec.Struct, frozen=True):
    """Training on the site's own confirmed examples, and rounds."""

    min_examples: int = 32
    epochs: int = 3
    rate: float = 0.0  # learning rate; 0: the training's own default
    max_seconds: float = 600.0
    threads: int = 1
    superlink: str = ""  # HOST:PORT of the SuperLink; empty: no rounds
    fleet_token_file: str = ""  # what the SuperLink asks of nodes
    window_s: float = 120.0  # how long a sync window stays open


class Limits(msgspec.Struct, frozen=True):
    """What is kept on disk."""

    answers: int = 100_000
    refused: int = 1_000


class NodeSettings(msgspec.Struct, frozen=True):
    """All sections."""

    node: Node = Node()
    api: Api = Api()
    model: Model = Model()
    broker: Broker = Broker()
    peers: Peers = Peers()
    update: Update = Update()
    learn: Learn = Learn()
    limits: Limits = Limits()

    @property
    def state_dir(self) -> Path:
        """The node's folder, with `~` resolved."""
        return Path(self.node.state_dir).expanduser()

    @property
    def site(self) -> str:
        """The site's name."""
        return self.node.site or self.node.name


def read(
    file: Path | None = None, *, flags: Mapping[str, Any] | None = None, environment: Mapping[str, str] = os.environ
) -> tuple[NodeSettings, tuple[Origin, ...]]:
    """The node's settings, checked. Without `file`, MILPA_NODE_CONFIG may name one.

    Raises:
        BadInput: a value out of its range, a file that is not TOML.
        UnknownName: a section, key or task nobody knows.
    """
    if file is None and environment.get("MILPA_NODE_CONFIG"):
        file = Path(environment["MILPA_NODE_CONFIG"])
    settings, origins = load(NodeSettings, side="node", file=file, environment=environment, flags=flags)
    check(settings)
    return settings, origins


def check(settings: NodeSettings) -> None:
    """Refuse what cannot work.

    Raises:
        BadInput, UnknownName: naming the setting.
    """
    checked_name(settings.node.name, what="node.name")
    checked_name(settings.site, what="node.site")
    for peer in settings.peers.ask:
        checked_name(peer, what="peers.ask")
    task_named(settings.model.task)
    ranges = {
        "api.port": (settings.api.port, 0, 65535),
        "api.queue": (settings.api.queue, 1, QUEUE_LIMIT),
        "api.deadline_s": (settings.api.deadline_s, 0.1, 3600),
        "broker.port": (settings.broker.port, 1, 65535),
        "broker.heartbeat_s": (settings.broker.heartbeat_s, 1, 86_400),
        "model.threads": (settings.model.threads, 1, 256),
        "model.context": (settings.model.context, 64, 131_072),
        "model.budget": (settings.model.budget, 0, 1),
        "peers.deadline_s": (settings.peers.deadline_s, 1, 30 * 86_400),
        "peers.votes": (settings.peers.votes, 1, 16),
        "peers.hops": (settings.peers.hops, 0, 8),
        "update.poll_s": (settings.update.poll_s, 1, 30 * 86_400),
        "learn.min_examples": (settings.learn.min_examples, 1, 1_000_000),
        "learn.epochs": (settings.learn.epochs, 1, 1_000),
        "learn.rate": (settings.learn.rate, 0, 1),
        "learn.max_seconds": (settings.learn.max_seconds, 1, 86_400),
        "learn.threads": (settings.learn.threads, 1, 256),
        "learn.window_s": (settings.learn.window_s, 1, 86_400),
        "limits.answers": (settings.limits.answers, 100, 100_000_000),
        "limits.refused": (settings.limits.refused, 1, 1_000_000),
    }
    for name, (value, low, high) in ranges.items():
        if not low <= value <= high:
            raise BadInput(f"{name} is {value}; it must be between {low} and {high}")
    if settings.model.path and settings.update.url:
        raise BadInput("model.path fixes the model and update.url replaces it: set one of them")
    if settings.peers.ask and not settings.broker.host:
        raise BadInput("peers.ask names peers, but broker.host is empty: questions travel through the broker")


def secret(file: str, *, what: str) -> str:
    """The secret in `file`, one line; "" when no file is named.

    Raises:
        BadInput: unreadable or empty.
    """
    if not file:
        return ""
    try:
        value = Path(file).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read {what} {file}: {error}") from error
    if not value:
        raise BadInput(f"{what} {file} is empty")
    return value


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
