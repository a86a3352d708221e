"""Runs the coordinator's web application on one port, and stops it in good order.

Plain HTTP: across machines it belongs inside a VPN or behind a proxy that ends TLS. It says so when it is neither on loopback nor told
(`web.tls_elsewhere`) that TLS ends elsewhere.
"""

import logging
import socket
import time
from collections.abc import Callable

import msgspec
import uvicorn

from coordinator.app import Coordinator
from coordinator.dashboard.routes import Changes
from coordinator.settings import CoordinatorSettings
from protocol.errors import BadInput, PortInUse, Unavailable
from protocol.ports import is_loopback

DATABASE_DEADLINE_S = 60.0  # PostgreSQL's own recovery after a power cut takes seconds
DATABASE_AGAIN_S = 1.0
GRACE_S = 5  # seconds that requests under way get when we are told to stop

log = logging.getLogger(__name__)


class _Server(uvicorn.Server):
    """Ends the event streams first: they would hold the stop until its deadline."""

    changes: Changes

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop in good order."""
        await self.changes.close()
        await super().shutdown(sockets=sockets)


def listen(host: str, port: int) -> socket.socket:
    """A bound socket.

    Raises:
        PortInUse: another program listens there.
        BadInput: not an address of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
        made.listen(128)
    except OSError as error:
        made.close()
        if isinstance(error, socket.gaierror) or error.errno is None or error.strerror is None or "ssign" in error.strerror:
            raise BadInput(f"web.host {host!r} is not an address of this machine") from error
        raise PortInUse(f"port {port} on {host} is taken or not allowed ({error.strerror}); choose another with --port") from error
    return made


def run(settings: CoordinatorSettings, *, ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM. `ready` is told the dashboard's address once the port is ours.

    Raises:
        PortInUse, BadInput, Unavailable: before anything was served.
    """
    made = listen(settings.web.host, settings.web.port)
    try:
        port = made.getsockname()[1]
        settings = msgspec.structs.replace(settings, web=msgspec.structs.replace(settings.web, port=port))
        if not is_loopback(settings.web.host) and not settings.web.tls_elsewhere:
            log.warning(
                "listening on %s without TLS: passwords can be read on the way; put a TLS proxy in front and set web.tls_elsewhere",
                settings.web.host,
            )
        coordinator = _built(settings)
        config = uvicorn.Config(
            coordinator.app, log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=GRACE_S, lifespan="on"
        )
        server = _Server(config)
        server.changes = coordinator.dashboard.changes
        shown = f"[{settings.web.host}]" if ":" in settings.web.host else settings.web.host
        ready(f"http://{shown}:{port}/")
        server.run(sockets=[made])
    finally:
        made.close()


def _built(settings: CoordinatorSettings) -> Coordinator:
    """The coordinator, once its database answers: after a power cut it may start later than we do."""
    end = time.monotonic() + DATABASE_DEADLINE_S
    while True:
        try:
            return Coordinator(settings)
        except Unavailable as error:
            if time.monotonic() > end:
                raise
            log.warning("%s; trying again", error)
            time.sleep(DATABASE_AGAIN_S)
