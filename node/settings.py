"""What can be set on a node. Read by `protocol.settings.load`: default, TOML, MILPA_NODE_<SECTION>_<KEY>, flag; the later wins.

The TOML file is the one that is named (--config), else MILPA_NODE_CONFIG (empty: none), else the installed one where there is one.
Everything has a default with which a node starts alone on one machine: no broker, no peers, no coordinator.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from node.energy.rules import Plant
from node.memory.rules import Use
from protocol.errors import BadInput
from protocol.links import LinkClass, LinkRules, link
from protocol.logs import Form, Level
from protocol.names import checked_name
from protocol.releases import Role
from protocol.settings import Origin, load
from protocol.tasks import task_named

QUEUE_LIMIT = 32  # waiting requests; each holds one of the 40 threads the HTTP server has
CREDENTIAL = "credential:"  # in front of a secret's name that systemd hands over (LoadCredential)
SECRETS = Path("/etc/milpa/secrets")
INSTALLED = Path("/etc/milpa/node.toml")  # as deploy/install-node.sh lays it


class Node(msgspec.Struct, frozen=True):
    """Who this node is."""

    name: str = "node"  # 1 to 48 of a-z, 0-9 and -; to the broker its user name
    role: Role = "student"  # which files of a release it takes: "student" at a site, "teacher" at a base station
    site: str = ""  # the site's name; empty: the node's
    state_dir: str = "~/.local/share/milpa/node"  # everything the node keeps; the service's is /var/lib/milpa


class Api(msgspec.Struct, frozen=True):
    """The local HTTP API."""

    host: str = "127.0.0.1"  # address to listen on: 0.0.0.0 for the site's network, which key_file must guard
    port: int = 8642  # 0: any free one; `milpa-node status` finds it
    key_file: str = ""  # a file with the key that requests must carry; needed for any host but this machine
    queue: int = 16  # waiting requests before the node says 429
    deadline_s: float = 30.0  # seconds a request waits for its answer


class Model(msgspec.Struct, frozen=True):
    """How the model runs; and a fixed file, for use without a coordinator."""

    path: str = ""  # a GGUF; empty: the active release's
    adapter: str = ""  # a LoRA adapter (GGUF) on top of path
    calibration: str = ""  # of path and adapter, as `milpa-coordinator calibrate` writes it; empty: confidence is not calibrated
    task: str = "ranch"  # of the fixed file, and of requests that name none
    threads: int = 1  # processor threads of the model
    context: int = 1024  # tokens
    budget: float = 0.25  # share of the answers that may be escalated to a peer, in [0, 1]


class Confidence(msgspec.Struct, frozen=True):
    """What asking a peer may cost beside `model.budget`, the share of the answers; the tightest decides (node/confidence)."""

    bytes_a_day: int = 0  # for questions and their replies; 0: no limit but the link's own
    joules_a_day: float = 0.0  # for questions; 0: no limit
    joules_a_question: float = 2.0  # a radio of 1 W for two seconds; measure yours
    audit: float = 0.02  # share of the sure answers that are asked regardless, so that sureness is checked at all; part of the budget
    refit: bool = True  # move the shipped curve by the site's confirmed answers, where that is better; of verdict tasks only
    agree: bool = False  # take samples of close answers when there is energy; they come before the answer is given, and take as long each


class Account(msgspec.Struct, frozen=True):
    """A broker, and who the node is there. Without a host there is none."""

    host: str = ""  # name or address; empty: none
    port: int = 1883
    username: str = ""  # empty: the node's name
    password_file: str = ""  # a file with the password, one line
    ca_file: str = ""  # who signs the broker's certificate (PEM); empty: no TLS
    cert_file: str = ""  # the node's own certificate (PEM), where the broker wants one
    key_file: str = ""  # and its key

    def tls_files(self) -> tuple[Path | None, Path | None, Path | None]:
        """Where the authority, the certificate and its key are."""
        ca, cert, key = (located(file) if file else None for file in (self.ca_file, self.cert_file, self.key_file))
        return ca, cert, key

    def login(self, name: str, *, what: str) -> dict[str, Any]:
        """How a `protocol.mqtt.Session` gets in; `what` is the section's name.

        Raises:
            BadInput: a password file that cannot be read.
        """
        password = secret(self.password_file, what=f"{what}.password_file")
        ca, cert, key = self.tls_files()
        return {
            "host": self.host, "port": self.port, "username": self.username or (name if password else ""), "password": password,
            "ca_file": ca, "cert_file": cert, "key_file": key,
        }  # fmt: skip


class Broker(Account, frozen=True):
    """The MQTT broker. Without a host the node lives alone."""

    heartbeat_s: float = 300.0  # seconds between two words that say nothing new; the class of link may make it longer


class Link(msgspec.Struct, frozen=True):
    """What the node hangs on, and what it may spend there. The class's own rules: `protocol/links.py`."""

    class_: LinkClass = msgspec.field(default="lan", name="class")
    bytes_a_day: int = 0  # both directions, headers included; 0: what the class says (lan: no limit)
    radio: tuple[str, ...] = ()  # nodes on a radio that this node speaks for, as their gateway


class Peers(msgspec.Struct, frozen=True):
    """Whom to ask when unsure, and whether to answer others."""

    ask: tuple[str, ...] = ()  # names of peers with a larger model
    ask_groups: tuple[str, ...] = ()  # groups of base stations, each of which counts as one peer; then every node's status is listened to
    serve: bool = False  # answer the questions of others: a base station, or the teacher beside the coordinator
    serve_groups: tuple[str, ...] = ()  # whose questions this node shares with the other members; the broker's access list must let it
    deadline_s: float = 3600.0  # seconds until an unanswered question is given up
    votes: int = 1  # how many peers are asked at once; with more than one they vote
    quorum: int = 0  # how many answers are enough; 0: as many as were asked for
    patience_s: float = 30.0  # seconds a peer may be silent before the next is asked too; and the others have after the first answer
    queue: int = 256  # questions of others that wait here; one more is declined as busy
    hops: int = 2  # how often a question may be handed on


class Update(msgspec.Struct, frozen=True):
    """Where releases come from."""

    url: str = ""  # the coordinator's repository; empty: no updates
    root_file: str = ""  # the first trusted root.json, brought by hand
    poll_s: float = 900.0  # seconds between two looks for a release; the class of link may make it longer
    max_bytes_a_day: int = 0  # for downloads; 0: no limit


class Spool(msgspec.Struct, frozen=True):
    """A folder that takes records as files and gives answers as files (node/entrances/spool.py)."""

    enabled: bool = False  # take files
    folder: str = ""  # empty: `spool` in the state folder
    quiet_s: float = 1.0  # seconds a file must not change before it is read
    file_limit_bytes: int = 1 << 20  # the largest file that is read
    records: int = 1_000  # most records in one file
    kept: int = 1_000  # files kept in `done` and in `refused`
    waiting: int = 10_000  # answers nobody collected; with more, no file is taken


class Topic(Account, frozen=True):
    """Records and answers on the site's own broker; without a host there is none. It may be the fleet's broker too."""

    records: str = "site/records"  # a filter: wildcards are allowed
    answers: str = "site/answers"  # for requests that name no response topic


class Power(Plant, frozen=True):
    """What the node hangs on and draws, and where its battery tells its charge (docs/power-and-learning.md)."""

    battery: str = ""  # a folder such as /sys/class/power_supply/BAT0, or a file that a charge controller's script writes; empty: a model


class Learn(msgspec.Struct, frozen=True):
    """Training on the site's own confirmed examples, and rounds."""

    auto: bool = True  # the daemon trains and opens sync windows by itself, when power and schedule allow
    min_examples: int = 32  # confirmed examples before the first training
    new_examples: int = 16  # confirmed since the last training that are worth another
    site_adapter: bool = True  # answer with what was learned here, where it is better here
    max_memory_mb: int = 0  # MiB a training may take; 0: what the machine has free
    max_joules_a_day: float = 0.0  # for training, by the stated model; 0: no limit
    sync_every_s: float = 21_600.0  # between sync windows that have something to deliver; 0: none by itself
    sync_hours: tuple[float, ...] = ()  # instead: hours of the day (UTC) at which a window opens, as agreed with the coordinator
    epochs: int = 3  # passes over the examples
    rate: float = 0.0  # learning rate; 0: the training's own default
    max_seconds: float = 600.0  # of one training, however often interrupted
    threads: int = 1  # processor threads of a training
    superlink: str = ""  # HOST:PORT of the SuperLink; empty: no rounds
    superlink_ca_file: str = ""  # who signs its certificate (PEM); /etc/ssl/certs/ca-certificates.crt for a public one; empty: no TLS
    fleet_token_file: str = ""  # what the SuperLink asks of nodes
    window_s: float = 120.0  # how long a sync window stays open


class Limits(msgspec.Struct, frozen=True):
    """What is kept on disk."""

    answers: int = 100_000  # newest; examples that somebody confirmed are kept beside them
    refused: int = 1_000  # newest inputs that could not be used, with the reason


class Memory(msgspec.Struct, frozen=True):
    """What the site remembers, and what that is used for (node/memory)."""

    use: Use = "near"  # near: similar records too, once trusted; examples: shown to the model (bench/results/memory.json)
    rows: int = 10_000  # confirmed answers; about 1 kB each
    max_bytes: int = 64 << 20  # of vectors on disk; only near and examples make any. 10,000 take 26 MiB
    near_right: float = 0.75  # the share of near answers that must surely be right, however seldom the model is, in [0, 1]


class Logs(msgspec.Struct, frozen=True):
    """What the node writes to stderr (protocol/logs.py)."""

    form: Form = "auto"  # auto: journal under systemd, else text
    level: Level = "info"


class NodeSettings(msgspec.Struct, frozen=True):
    """All sections."""

    node: Node = Node()
    api: Api = Api()
    model: Model = Model()
    confidence: Confidence = Confidence()
    broker: Broker = Broker()
    link: Link = Link()
    peers: Peers = Peers()
    update: Update = Update()
    power: Power = Power()
    learn: Learn = Learn()
    limits: Limits = Limits()
    spool: Spool = Spool()
    topic: Topic = Topic()
    logs: Logs = Logs()
    memory: Memory = Memory()

    @property
    def state_dir(self) -> Path:
        """The node's folder, with `~` resolved."""
        return Path(self.node.state_dir).expanduser()

    @property
    def site(self) -> str:
        """The site's name."""
        return self.node.site or self.node.name

    @property
    def link_rules(self) -> LinkRules:
        """What this node's link allows."""
        return link(self.link.class_, bytes_a_day=self.link.bytes_a_day)

    @property
    def heartbeat_s(self) -> float:
        """Seconds between two heartbeats, as rarely as the link wants."""
        return max(self.broker.heartbeat_s, self.link_rules.heartbeat_s)

    @property
    def poll_s(self) -> float:
        """Seconds between two looks for a release, as rarely as the link wants; infinite where none come this way."""
        return max(self.update.poll_s, self.link_rules.poll_s)


def read(
    file: Path | None = None, *, flags: Mapping[str, Any] | None = None, environment: Mapping[str, str] = os.environ
) -> tuple[NodeSettings, tuple[Origin, ...]]:
    """The node's settings, checked. Without `file`: what MILPA_NODE_CONFIG names (empty: none), else the installed file if there is one.

    Raises:
        BadInput: a value out of its range, a file that is not TOML, an installed file that this user may not read.
        UnknownName: a section, key or task nobody knows.
    """
    if file is None:
        named = environment.get("MILPA_NODE_CONFIG")
        file = _installed() if named is None else Path(named) if named else None
    settings, origins = load(NodeSettings, side="node", file=file, environment=environment, flags=flags)
    check(settings)
    return settings, origins


def _installed() -> Path | None:
    try:
        INSTALLED.open("rb").close()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise BadInput(f"cannot read {INSTALLED}: {error.strerror}; run it with sudo, or name another file with --config") from error
    return INSTALLED


def check(settings: NodeSettings) -> None:
    """Refuse what cannot work.

    Raises:
        BadInput, UnknownName: naming the setting.
    """
    checked_name(settings.node.name, what="node.name")
    checked_name(settings.site, what="node.site")
    for key in ("ask", "ask_groups", "serve_groups"):
        for name in getattr(settings.peers, key):
            checked_name(name, what=f"peers.{key}")
    task_named(settings.model.task)
    ranges = {
        "api.port": (settings.api.port, 0, 65535),
        "api.queue": (settings.api.queue, 1, QUEUE_LIMIT),
        "api.deadline_s": (settings.api.deadline_s, 0.1, 3600),
        "broker.port": (settings.broker.port, 1, 65535),
        "broker.heartbeat_s": (settings.broker.heartbeat_s, 1, 86_400),
        "link.bytes_a_day": (settings.link.bytes_a_day, 0, 1 << 40),
        "model.threads": (settings.model.threads, 1, 256),
        "model.context": (settings.model.context, 64, 131_072),
        "model.budget": (settings.model.budget, 0, 1),
        "confidence.bytes_a_day": (settings.confidence.bytes_a_day, 0, 1 << 40),
        "confidence.joules_a_day": (settings.confidence.joules_a_day, 0, 1e9),
        "confidence.joules_a_question": (settings.confidence.joules_a_question, 0, 1e6),
        "confidence.audit": (settings.confidence.audit, 0, 0.5),
        "peers.deadline_s": (settings.peers.deadline_s, 1, 30 * 86_400),
        "peers.votes": (settings.peers.votes, 1, 16),
        "peers.quorum": (settings.peers.quorum, 0, settings.peers.votes),
        "peers.patience_s": (settings.peers.patience_s, 1, 86_400),
        "peers.queue": (settings.peers.queue, 1, 10_000),
        "peers.hops": (settings.peers.hops, 0, 8),
        "update.poll_s": (settings.update.poll_s, 1, 30 * 86_400),
        "power.battery_wh": (settings.power.battery_wh, 1, 1_000_000),
        "power.panel_w": (settings.power.panel_w, 0, 1_000_000),
        "power.latitude": (settings.power.latitude, -90, 90),
        "power.longitude": (settings.power.longitude, -180, 180),
        "power.clearness": (settings.power.clearness, 0, 1),
        "power.idle_w": (settings.power.idle_w, 0.01, 1_000),
        "power.busy_w": (settings.power.busy_w, settings.power.idle_w, 10_000),
        "power.radio_w": (settings.power.radio_w, 0, 1_000),
        "power.dark_days": (settings.power.dark_days, 0, 60),
        "power.curve (length)": (len(settings.power.curve) or 24, 24, 24),
        **{f"power.curve[{hour}]": (share, 0, 1) for hour, share in enumerate(settings.power.curve)},
        **{f"learn.sync_hours[{place}]": (hour, 0, 24) for place, hour in enumerate(settings.learn.sync_hours)},
        "learn.new_examples": (settings.learn.new_examples, 1, 1_000_000),
        "learn.max_memory_mb": (settings.learn.max_memory_mb, 0, 1 << 24),
        "learn.max_joules_a_day": (settings.learn.max_joules_a_day, 0, 1e9),
        "learn.sync_every_s": (settings.learn.sync_every_s, 0, 30 * 86_400),
        "learn.min_examples": (settings.learn.min_examples, 1, 1_000_000),
        "learn.epochs": (settings.learn.epochs, 1, 1_000),
        "learn.rate": (settings.learn.rate, 0, 1),
        "learn.max_seconds": (settings.learn.max_seconds, 1, 86_400),
        "learn.threads": (settings.learn.threads, 1, 256),
        "learn.window_s": (settings.learn.window_s, 1, 86_400),
        "limits.answers": (settings.limits.answers, 100, 100_000_000),
        "limits.refused": (settings.limits.refused, 1, 1_000_000),
        "spool.quiet_s": (settings.spool.quiet_s, 0, 3600),
        "spool.file_limit_bytes": (settings.spool.file_limit_bytes, 1_000, 1 << 26),
        "spool.records": (settings.spool.records, 1, 100_000),
        "spool.kept": (settings.spool.kept, 0, 1_000_000),
        "spool.waiting": (settings.spool.waiting, 1, 1_000_000),
        "topic.port": (settings.topic.port, 1, 65535),
        "memory.rows": (settings.memory.rows, 1, 1_000_000),
        "memory.max_bytes": (settings.memory.max_bytes, 9 << 20, 1 << 40),
        "memory.near_right": (settings.memory.near_right, 0.5, 0.999),
    }
    for name, (value, low, high) in ranges.items():
        if not low <= value <= high:
            raise BadInput(f"{name} is {value}; it must be between {low} and {high}")
    if any(sign in settings.topic.answers for sign in "+#"):
        raise BadInput(f"topic.answers is {settings.topic.answers!r}; answers are published to one topic, without + and #")
    if settings.model.path and settings.update.url:
        raise BadInput("model.path fixes the model and update.url replaces it: set one of them")
    for name in settings.link.radio:
        checked_name(name, what="link.radio")
    if settings.link_rules.frames_only and (settings.peers.serve or settings.link.radio):
        raise BadInput("link.class lora carries verdicts one way only: a node on a radio cannot set peers.serve or link.radio")
    if settings.peers.ask and not settings.broker.host:
        raise BadInput("peers.ask names peers, but broker.host is empty: questions travel through the broker")
    if settings.peers.ask_groups and not settings.broker.host:
        raise BadInput("peers.ask_groups names groups, but broker.host is empty: questions travel through the broker")
    if settings.peers.serve_groups and not settings.peers.serve:
        raise BadInput("peers.serve_groups names groups, but peers.serve is false: a member of a group answers its questions")


def located(file: str, environment: Mapping[str, str] = os.environ) -> Path:
    """The path a setting names. `credential:NAME` is what systemd loaded for this unit, or the same file for commands run by root."""
    name = file.removeprefix(CREDENTIAL)
    if name == file:
        return Path(file).expanduser()
    folder = environment.get("CREDENTIALS_DIRECTORY", "")
    return Path(folder) / f"milpa_{name}" if folder else SECRETS / name


def named_file(file: str) -> str:
    """The path a setting names, as text; "" where it names none."""
    return str(located(file)) if file else ""


def secret(file: str, *, what: str) -> str:
    """The secret in `file`, one line; "" when no file is named.

    Raises:
        BadInput: unreadable or empty.
    """
    if not file:
        return ""
    try:
        value = located(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read {what} {file}: {error}") from error
    if not value:
        raise BadInput(f"{what} {file} is empty")
    return value


def missing_files(settings: NodeSettings) -> dict[str, str]:
    """Settings that name a file which cannot be read here: "broker.ca_file" -> the path."""
    named = {
        f"{section}.{key}": value
        for section in settings.__struct_fields__
        for key, value in msgspec.structs.asdict(getattr(settings, section)).items()
        if value and (key.endswith("_file") or (section == "model" and key in ("path", "adapter", "calibration")))
    }
    return {
        name: str(located(file)) for name, file in named.items() if not os.access(located(file), os.R_OK) or not located(file).is_file()
    }
