"""Runs the API in a thread of its own: the socket is bound first, so that a port in use is one clear line and not a traceback later."""

import errno
import socket
import threading
import time

import uvicorn
from starlette.types import ASGIApp

from protocol.errors import BadInput, PortInUse, Unavailable
from protocol.ports import is_loopback

BACKLOG = 64  # connections that wait for accept()
GOODBYE_S = 5  # seconds for requests under way when the node stops
START_S = 15.0  # seconds until the server must listen


def bind(host: str, port: int, *, key: str) -> socket.socket:
    """A listening socket; port 0 takes any free one.

    Raises:
        BadInput: an address other than this machine's and no key, or an address this machine does not have.
        PortInUse: another program listens there.
    """
    if not key and not is_loopback(host):
        raise BadInput(f"api.host {host} can be reached from other machines: set api.key_file first, or use 127.0.0.1")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(f"port {port} on {host} is in use by another program; stop it or set api.port") from error
        raise BadInput(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    return listener


class Server:
    """uvicorn on an already bound socket."""

    def __init__(self, app: ASGIApp, listener: socket.socket) -> None:
        config = uvicorn.Config(
            app, log_config=None, access_log=False, lifespan="off", server_header=False, timeout_graceful_shutdown=GOODBYE_S,
            timeout_keep_alive=15, ws="none",
        )  # fmt: skip
        self._listener = listener
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]}, name="milpa-api", daemon=True)
        host, port = listener.getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def start(self) -> None:
        """Serve, in the background.

        Raises:
            Unavailable: it did not come up.
        """
        self._thread.start()
        deadline = time.monotonic() + START_S
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise Unavailable(f"the API did not start on {self.url}")
            time.sleep(0.01)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Finish requests under way, at most GOODBYE_S seconds, and free the port."""
        self._server.should_exit = True
        if self._thread.ident is not None:
            self._thread.join(GOODBYE_S + 2)
        self._listener.close()
