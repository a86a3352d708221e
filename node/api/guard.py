"""Who may ask, and how much at once: the key, the host name, the size of a body. Plain ASGI, before any parsing.

* A key, where one is set, on everything but /healthz, /readyz and the page for people, which has a door of its own (node/page/door.py).
* Without a key, requests must name this machine as their host: a web page elsewhere could otherwise reach us through a name that its
  owner points at 127.0.0.1.
"""

import hmac
from collections.abc import Callable

import msgspec
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from node.api.errors import error_body
from node.page import door

BODY_LIMIT = 256 * 1024  # bytes; a record is at most 4,000 characters, a chat may carry old messages
OPEN = ("/healthz", "/readyz")
OUR_HOSTS = ("127.0.0.1", "localhost", "[::1]")


class _TooLarge(HTTPException):
    """Raised inside `receive`, wherever the body is read; the application turns it into a response like any other."""


class Guard:
    """ASGI middleware.

    Args:
        key: what `Authorization: Bearer ...` must carry; "" for none, then only OUR_HOSTS are answered.
        count: told the scope and the status of every response.
    """

    def __init__(
        self, app: ASGIApp, *, key: str = "", body_limit: int = BODY_LIMIT, count: Callable[[Scope, int], None] | None = None
    ) -> None:
        self.app, self.key, self.body_limit = app, key, body_limit
        self._count = count or (lambda scope, status: None)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or pass on with the body counted."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._count(scope, message["status"])
            await send(message)

        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if refusal := _garbled(scope) or self._refusal(scope["path"], headers):
            await _answer(counted, *refusal)
            return
        await self.app(scope, self._limited(receive), counted)

    def _refusal(self, path: str, headers: dict[str, str]) -> tuple[int, str, str, str] | None:
        if self.key:
            given = headers.get("authorization", "").removeprefix("Bearer ")
            if path not in OPEN and not door.guards(path) and not hmac.compare_digest(given.encode(), self.key.encode()):
                return 401, "this node wants its key: Authorization: Bearer KEY", "authentication_error", "invalid_api_key"
        elif _host(headers.get("host", "")) not in OUR_HOSTS:
            return 421, "this node answers on 127.0.0.1 and localhost only; set api.key_file to open it", "invalid_request_error", "host"
        length = headers.get("content-length", "")
        if length.isascii() and length.isdigit() and (len(length) > 18 or int(length) > self.body_limit):
            return 413, f"the body is over {self.body_limit} bytes", "invalid_request_error", "too_large"
        return None

    def _limited(self, receive: Receive) -> Receive:
        size = 0

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.body_limit:
                raise _TooLarge(413, f"the body is over {self.body_limit} bytes")
            return message

        return limited


def _garbled(scope: Scope) -> tuple[int, str, str, str] | None:
    """An address is ASCII, whatever it stands for; libraries behind us take that for granted."""
    if scope["query_string"].isascii():
        return None
    return 400, "the query is not ASCII: write other characters as %XX", "invalid_request_error", "bad_input"


def _host(value: str) -> str:
    return value[: value.rindex(":")] if value.rpartition(":")[2].isdigit() else value


async def _answer(send: Send, status: int, message: str, kind: str, code: str) -> None:
    body = msgspec.json.encode(error_body(message, kind, code))
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
