"""Where a server of ours listens: a port that is planned now and bound a moment later by another process, and who can reach it."""

import ipaddress
import secrets
import socket

from protocol.errors import Unavailable

PORTS = range(20_000, 32_000)
PORT_DRAWS = 100


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on now and that no outgoing connection will be given before it is used.

    The system hands ports of `ip_local_port_range` (32768 and up by default) to outgoing connections; one of those, chosen now and bound
    a moment later, may be taken by then. So it is drawn from below that range.

    Raises:
        Unavailable: a hundred draws found none.
    """
    for _ in range(PORT_DRAWS):
        port = PORTS.start + secrets.randbelow(len(PORTS))
        with socket.socket() as found:
            try:
                found.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise Unavailable(f"no free port between {PORTS.start} and {PORTS.stop - 1} in {PORT_DRAWS} draws; stop what listens there")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
