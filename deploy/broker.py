"""The fleet's MQTT broker: mosquitto with settings that lose nothing, or `iotcore` for a simulation without mosquitto.

mosquitto's defaults lose data (queues over 1,000 messages silently, everything on SIGKILL for up to 30 minutes), so every setting below
is written out. Its access list gives each node its own topics and no other's; a node's user name is its node name.
Subscribing to more is granted and then filtered on delivery: that is how mosquitto works, so tests look at what arrives.

Passwords go to the broker as PBKDF2 hashes in the form of mosquitto_passwd; the plain ones are the callers' to keep.
"""

import base64
import hashlib
import importlib.util
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath
from types import TracebackType
from typing import Literal, NamedTuple

from protocol.blobs import write_atomically
from protocol.console import stderr
from protocol.errors import BadInput, NotEnough, PortInUse, Unavailable
from protocol.names import checked_name, known

PACKET_LIMIT = 256 * 1024  # bytes; four times the largest message of ours, told to clients in CONNACK
QUEUED_MESSAGES = 100_000  # for each absent client
QUEUED_BYTES = 200_000_000  # for each absent client
SESSION_EXPIRY = "60d"  # a node away for longer starts afresh; its outbox has what matters
READY_DEADLINE_S = 15.0
STOP_DEADLINE_S = 5.0
HASH_ROUNDS = 101  # mosquitto_passwd's own count; the passwords are 32 random characters, not words
COORDINATOR = "coordinator"

Program = Literal["mosquitto", "iotcore"]
Named = Mapping[str, Sequence[str]]  # names that belong to a name


class Tls(NamedTuple):
    """The broker's side of TLS, all PEM files."""

    ca: PurePath  # who signs the clients' certificates
    cert: PurePath
    key: PurePath


IOTCORE_MAIN = "import sys; from iotcore.iotcore import IotCoreBroker; IotCoreBroker(config_path=sys.argv[1]).run_forever()"
SIMULATION_ONLY = "simulation only: iotcore is the broker, without access lists and persistence. For anything real: apt install mosquitto"


def mosquitto_conf(
    *,
    port: int,
    data: PurePath,
    passwords: PurePath,
    access: PurePath,
    host: str = "127.0.0.1",
    user: str = "",
    tls: Tls | None = None,
) -> str:
    """The text of a mosquitto.conf (2.0; 2.1 takes it with a deprecation notice for the password and access files).

    Args:
        host: address to listen on; "" for all, in a container.
        data: folder of the broker's database; must be writable by `user`.
        user: account to become when started as root; "" leaves mosquitto's own default ("mosquitto").
        tls: the broker's files; then every client needs a certificate, whose common name is its user name, and passwords play no part.
    """
    lines = [
        "# written by deploy/broker.py; the reasons are there",
        f"listener {port} {host}".rstrip(),
        "allow_anonymous false",
        f"password_file {passwords}",
        f"acl_file {access}",
        "persistence true",
        f"persistence_location {data}/",
        "autosave_on_changes true",
        "autosave_interval 1",
        f"max_queued_messages {QUEUED_MESSAGES}",
        f"max_queued_bytes {QUEUED_BYTES}",
        f"max_packet_size {PACKET_LIMIT}",
        f"persistent_client_expiration {SESSION_EXPIRY}",
        "log_dest stderr",
        "log_type error",
        "log_type warning",
        "log_type notice",
    ]
    if tls:
        lines += [f"cafile {tls.ca}", f"certfile {tls.cert}", f"keyfile {tls.key}"]
        lines += ["require_certificate true", "use_identity_as_username true"]
    if user:
        lines.append(f"user {user}")
    return "\n".join(lines) + "\n"


def mosquitto_access(groups: Named | None = None, gateways: Named | None = None) -> str:
    """The access list for the topics of `protocol/topics.py`: `%u` is the user name, which is the node's name.

    Args:
        groups: of base stations, name to members: only those may read the questions to the group. Anybody may ask it.
        gateways: of radios, name to the nodes they speak for: what those may say and hear themselves, the gateway may for them.
    """
    spoken_for = [line for gateway, nodes in sorted((gateways or {}).items()) for line in _gateway_access(gateway, nodes)]
    members = [
        line
        for group, names in sorted((groups or {}).items())
        for name in sorted(names)
        for line in (f"user {checked_name(name)}", f"topic read milpa/v1/group/{checked_name(group, what='group')}/question/+", "")
    ]
    return "\n".join(
        (
            "# written by deploy/broker.py",
            "pattern write milpa/v1/node/%u/status",
            "pattern write milpa/v1/node/%u/alive",
            "pattern write milpa/v1/node/%u/event",
            "pattern write milpa/v1/peer/+/question/%u",
            "pattern write milpa/v1/group/+/question/%u",
            "pattern write milpa/v1/node/+/reply/%u",
            "pattern read milpa/v1/release",
            "pattern read milpa/v1/node/+/status",
            "pattern read milpa/v1/node/+/alive",
            "pattern read milpa/v1/node/%u/ack",
            "pattern read milpa/v1/node/%u/reply/+",
            "pattern read milpa/v1/peer/%u/question/+",
            "pattern write milpa/v1/radio/%u/up",
            "pattern read milpa/v1/radio/%u/down",
            "",
            *members,
            *spoken_for,
            f"user {COORDINATOR}",
            "topic readwrite milpa/#",
            "",
        )
    )


def _gateway_access(gateway: str, nodes: Sequence[str]) -> list[str]:
    lines = [f"user {checked_name(gateway)}"]
    for node in sorted(checked_name(name) for name in nodes):
        lines += [f"topic read milpa/v1/radio/{node}/up", f"topic write milpa/v1/radio/{node}/down"]
        lines += [f"topic write milpa/v1/node/{node}/{what}" for what in ("status", "alive")]
        lines += [f"topic write milpa/v1/peer/+/question/{node}", f"topic read milpa/v1/node/{node}/reply/+"]
    return [*lines, ""]


def password_line(user: str, password: str, *, salt: bytes | None = None) -> str:
    """One line of a mosquitto password file: PBKDF2-HMAC-SHA512, as mosquitto_passwd writes it.

    Raises:
        BadInput: a user name that is not a plain name, or an empty password.
    """
    checked_name(user, what="broker user")
    if not password or "\n" in password:
        raise BadInput(f"the broker password of {user!r} is empty or has a line break; put one line of text into its file")
    salt = salt or secrets.token_bytes(12)
    digest = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, HASH_ROUNDS)
    return f"{user}:$7${HASH_ROUNDS}${base64.b64encode(salt).decode()}${base64.b64encode(digest).decode()}"


def write_mosquitto(
    folder: Path,
    *,
    port: int,
    users: Mapping[str, str],
    host: str = "127.0.0.1",
    tls: Tls | None = None,
    groups: Named | None = None,
    gateways: Named | None = None,
) -> Path:
    """Write configuration, access list and password file into `folder`; returns the configuration's path.

    Args:
        users: name to password: the nodes by their names, and "coordinator".
    """
    folder = folder.resolve()
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    # started as root, mosquitto would become a user who cannot read this folder; in a folder of root's own, root it stays
    conf = mosquitto_conf(
        port=port, host=host, data=data, passwords=folder / "passwords", access=folder / "access", tls=tls,
        user="root" if os.geteuid() == 0 else "",
    )  # fmt: skip
    (folder / "passwords").touch(mode=0o600)
    write_atomically(folder / "access", mosquitto_access(groups, gateways).encode())
    write_atomically(folder / "passwords", "".join(password_line(*pair) + "\n" for pair in sorted(users.items())).encode())
    (folder / "passwords").chmod(0o600)
    write_atomically(folder / "mosquitto.conf", conf.encode())
    return folder / "mosquitto.conf"


def write_iotcore(folder: Path, *, port: int, users: Mapping[str, str], host: str = "127.0.0.1") -> Path:
    """Write a configuration of the rumqttd inside `iotcore`: one MQTT 5 listener with a login."""
    for pair in users.items():
        password_line(*pair)  # the same rules for names and passwords
    login = "".join(f'"{name}" = "{_toml(password)}"\n' for name, password in sorted(users.items()))
    text = f"""id = 0
[router]
id = 0
max_connections = 1000
max_outgoing_packet_count = 200
max_segment_size = 104857600
max_segment_count = 10
[v5.1]
name = "v5-1"
listen = "{host}:{port}"
next_connection_delay_ms = 1
[v5.1.connections]
connection_timeout_ms = 60000
max_payload_size = {PACKET_LIMIT}
max_inflight_count = 100
dynamic_filters = true
[v5.1.connections.auth]
{login}"""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.resolve() / "iotcore.toml"
    path.touch(mode=0o600)
    write_atomically(path, text.encode())
    path.chmod(0o600)
    return path


def find_mosquitto() -> str | None:
    """Path of the mosquitto program; Debian installs it where an ordinary user's PATH does not look."""
    return shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")


def prepare(
    folder: Path,
    *,
    port: int,
    users: Mapping[str, str],
    host: str = "127.0.0.1",
    tls: Tls | None = None,
    program: Program | None = None,
    tell: Callable[[str], None] | None = None,
    groups: Named | None = None,
    gateways: Named | None = None,
) -> tuple[Program, list[str]]:
    """Write what the broker reads; returns which program it is and the command that runs it in the foreground.

    Args:
        groups, gateways: see `mosquitto_access`.
        program: insist on one; None takes mosquitto where it is installed.
        tell: gets the line that says what a fallback cannot do; None prints it to stderr.

    Raises:
        PortInUse: somebody listens on `port`.
        NotEnough: neither broker is installed, or not the one that can do TLS.
    """
    need_free(host, port)
    mosquitto = find_mosquitto()
    if program is None:
        program = "mosquitto" if mosquitto or tls else "iotcore"
    known(program, ("mosquitto", "iotcore"), what="broker")
    if program == "mosquitto":
        if mosquitto is None:
            raise NotEnough("mosquitto is not installed: apt install mosquitto")
        conf = write_mosquitto(folder, port=port, users=users, host=host, tls=tls, groups=groups, gateways=gateways)
        return program, [mosquitto, "-c", str(conf)]
    if importlib.util.find_spec("iotcore") is None:
        raise NotEnough("no MQTT broker on this machine: apt install mosquitto, or for a simulation: pip install iotcore")
    (tell or (lambda line: stderr.print(line, style="bold red")))(SIMULATION_ONLY)
    return program, [sys.executable, "-c", IOTCORE_MAIN, str(write_iotcore(folder, port=port, users=users, host=host))]


def need_free(host: str, port: int) -> None:
    """Make sure that nobody listens on `host:port`.

    Raises:
        PortInUse: somebody does.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise PortInUse(f"port {port} is in use by another program; stop it or choose another port for the broker") from error


def answers(host: str, port: int) -> bool:
    """Whether something accepts connections there."""
    try:
        with socket.create_connection((host, port), timeout=1.0):
            return True
    except OSError:
        return False


class Broker:
    """A broker as a child process. Use as a context manager, or `start` and `stop`."""

    def __init__(
        self,
        folder: Path,
        *,
        port: int,
        users: Mapping[str, str],
        host: str = "127.0.0.1",
        tls: Tls | None = None,
        program: Program | None = None,
        tell: Callable[[str], None] | None = None,
        groups: Named | None = None,
        gateways: Named | None = None,
    ) -> None:
        self.groups, self.gateways = groups, gateways
        self.folder, self.host, self.port, self.users, self.tls = folder, host, port, dict(users), tls
        self._program, self._tell = program, tell
        self.program: Program | None = None
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> "Broker":
        """Start it and wait until it takes connections. Its log is `broker.log` in the folder.

        Raises:
            PortInUse, NotEnough: as `prepare`.
            Unavailable: it did not come up in time; the message has the end of its log.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.program, command = prepare(
            self.folder,
            port=self.port,
            users=self.users,
            host=self.host,
            tls=self.tls,
            program=self._program,
            tell=self._tell,
            groups=self.groups,
            gateways=self.gateways,
        )
        log = self.folder / "broker.log"
        with log.open("ab") as output:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)
        deadline = time.monotonic() + READY_DEADLINE_S
        while self.process.poll() is None and time.monotonic() < deadline:
            if answers(self.host, self.port):
                return self
            time.sleep(0.02)
        self.kill()
        last = log.read_text(errors="replace").splitlines()[-3:]
        raise Unavailable(f"the broker did not come up on port {self.port}: {' / '.join(last) or 'it said nothing'}")

    def stop(self) -> None:
        """Ask it to end, and after a deadline end it. Safe to call twice."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_DEADLINE_S)
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self) -> None:
        """SIGKILL: what a power cut does."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(STOP_DEADLINE_S)

    def __enter__(self) -> "Broker":
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()


def _toml(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
