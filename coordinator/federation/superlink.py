"""Flower's SuperLink behind a guard: one port, and nobody but us and our nodes past it.

Rules:
 * /health is open. /v1/fleet/* (all a node uses) needs the fleet token in the header x-milpa-fleet, unless the operator opened it.
 * Everything else (Control and Runtime APIs, /docs, /openapi.json) needs the control token as a bearer: open-source Flower has no login
   there, and whoever may start a run may run code on every stock SuperNode.
 * Tokens are files of mode 0600 in the state folder, made at the first start, compared in constant time.
 * State is an SQLite file: a SuperLink that was killed goes on where it was, and with it a round under way.
 * No telemetry, no update check, no installation of packages from the network.

Limits: the fleet token is one for the whole fleet, so it keeps strangers out but does not tell one node from another; a node is believed
when it says its site's name. Without a certificate traffic is plain HTTP: for one machine, or inside a VPN.
superlink.db keeps the size of its largest day; with no round open it may be deleted while the SuperLink is stopped.
"""

import hmac
import os
import secrets
import socket
import ssl
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

import msgspec

from protocol.blobs import write_atomically
from protocol.errors import BadInput, PortInUse
from protocol.flower import FLEET_HEADER, authorities, offline

TOKEN_BYTES = 32
STOP_DEADLINE_S = 5  # for requests under way when the SuperLink is told to stop

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]


def environment(state: Path) -> dict[str, str]:
    """The variables for flwr's processes of a coordinator with that folder."""
    return offline(state / "flwr")


class Place(msgspec.Struct, frozen=True):
    """Where a SuperLink listens: `superlink.json` in its state folder."""

    address: str  # HOST:PORT
    ca: str = ""  # who signed its certificate, a PEM file; empty: plain HTTP
    pid: int = 0


class Keys(msgspec.Struct, frozen=True):
    """What opens the SuperLink."""

    control: str  # our own token, for Control and Runtime
    fleet: str  # every node's token; empty: nodes need none
    secret: str  # signs the request for a run's task (Flower's SuperExec secret)


def keys(state: Path, *, open_fleet: bool = False) -> Keys:
    """The keys in `state`, made at the first call: control.token, fleet.token, superexec.secret, each mode 0600."""
    state.mkdir(parents=True, exist_ok=True)
    fleet = "" if open_fleet else _key(state / "fleet.token")
    return Keys(control=_key(state / "control.token"), fleet=fleet, secret=_key(state / "superexec.secret"))


def _key(path: Path) -> str:
    if not path.exists():
        part = path.with_name(path.name + ".new")
        part.unlink(missing_ok=True)
        part.touch(mode=0o600)
        part.write_text(secrets.token_urlsafe(TOKEN_BYTES) + "\n", encoding="ascii")
        part.replace(path)
    return read_key(path)


def read_key(path: Path) -> str:
    """The key in a file.

    Raises:
        BadInput: no such file, or it is empty, or others may read it.
    """
    try:
        if path.stat().st_mode & 0o077:
            raise BadInput(f"{path} may be read by others; run `chmod 600 {path}`")
        value = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read the key {path}; `milpa-coordinator superlink` makes it at its first start") from error
    if len(value) < 16:
        raise BadInput(f"{path} holds no usable key; delete it and start the SuperLink again")
    return value


class Certificate(msgspec.Struct, frozen=True):
    """What the SuperLink shows who connects, as PEM files."""

    cert: Path  # with the address or name that nodes are told among its subject alternative names
    key: Path
    ca: Path  # who signed it; `cert` itself where it signed itself

    def check(self) -> None:
        """Look at all three before anything listens.

        Raises:
            BadInput: a file cannot be read, or the key is not the certificate's.
        """
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.cert, self.key, password="")
        except OSError as error:  # an SSLError is one, too
            raise BadInput(
                f"{self.cert} and {self.key} are no certificate with its key ({error}); give both as PEM, the key in clear"
            ) from error
        authorities(str(self.ca))


class Guard:
    """Lets a request through only with the right token. Plain ASGI, so streaming answers pass untouched."""

    def __init__(self, app: Application, keys: Keys) -> None:
        self.app = app
        self._control = f"Bearer {keys.control}".encode()
        self._fleet = keys.fleet.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope) if scope["type"] == "http" else 403
        if not refusal:
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await _refuse(send, refusal)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _refusal(self, scope: Scope) -> int:
        """0, or the status to refuse with. A node gets 403, because on a 401 flwr kills its own process."""
        path, headers = scope["path"], dict(scope["headers"])
        if path == "/health":
            return 0
        if path.startswith("/v1/fleet/"):
            return 0 if not self._fleet or hmac.compare_digest(headers.get(FLEET_HEADER.encode(), b""), self._fleet) else 403
        return 0 if hmac.compare_digest(headers.get(b"authorization", b""), self._control) else 401


async def _refuse(send: Send, status: int) -> None:
    headers = [(b"content-type", b"text/plain")] + ([(b"www-authenticate", b"Bearer")] if status == 401 else [])
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b"a token is needed here\n"})


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 lets the kernel choose.

    Raises:
        PortInUse: another program listens there, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise PortInUse(f"cannot listen on {host}:{port} ({error.strerror}); stop the other program or choose another --port") from error
    return found


def serve(
    state: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    open_fleet: bool = False,
    certificate: Certificate | None = None,
    ready: Callable[[str], None] | None = None,
    outer_environment: MutableMapping[str, str] = os.environ,
) -> None:
    """Run the guarded SuperLink until SIGTERM or SIGINT. `state/superlink.json` tells other programs where it listens.

    Args:
        certificate: speaks TLS with it, and tells rounds on this machine whom to trust; none: plain HTTP.
        ready: called once with "HOST:PORT" when the address is known.

    Raises:
        PortInUse: as `listen`.
        BadInput: as `Certificate.check`.
    """
    if certificate is not None:
        certificate.check()
    os.umask(0o077)  # adapters on their way lie in the database
    ours = keys(state, open_fleet=open_fleet)
    bound = listen(host, port)
    port = bound.getsockname()[1]
    outer_environment.update(environment(state))
    import uvicorn

    from coordinator.federation import flower

    app = flower.superlink_app(database=str(state / "superlink.db"), host=host, port=port, secret=ours.secret.encode())
    config = uvicorn.Config(
        Guard(app, ours), log_level="warning", access_log=False, lifespan="on", timeout_graceful_shutdown=STOP_DEADLINE_S,
        ssl_certfile=certificate.cert if certificate else None, ssl_keyfile=certificate.key if certificate else None,
    )  # fmt: skip
    place = Place(f"{host}:{port}", str(certificate.ca.resolve()) if certificate else "", os.getpid())
    write_atomically(state / "superlink.json", msgspec.json.encode(place))
    if ready is not None:
        ready(f"{host}:{port}")
    uvicorn.Server(config).run(sockets=[bound])


def place_in(state: Path) -> Place | None:
    """Where the SuperLink of that state folder listens, as it said at its last start."""
    try:
        return msgspec.json.decode((state / "superlink.json").read_bytes(), type=Place)
    except (OSError, msgspec.DecodeError):
        return None
