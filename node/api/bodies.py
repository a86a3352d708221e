"""Reading what a client sends and writing what it gets, for every route of the node."""

import re
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from node.api.errors import BadBody
from protocol.errors import BadInput

T = TypeVar("T")


class Json(Response):
    """A body as JSON, by msgspec."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The bytes."""
        return msgspec.json.encode(content)


async def read_bytes(request: Request) -> bytes:
    """The body of a request that says it is JSON: a web page elsewhere cannot send one without asking the browser's leave.

    Raises:
        BadInput: it says something else, or nothing.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise BadInput("send the body as application/json")
    return await request.body()


async def read_as(request: Request, kind: type[T]) -> T:
    """The body as a value of `kind`.

    Raises:
        BadInput: as `read_bytes` and `decode`.
    """
    return decode(await read_bytes(request), kind)


def decode(data: bytes, kind: type[T]) -> T:
    """A body's value.

    Raises:
        BadBody: not JSON, or not of the kind; the message says where.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except UnicodeDecodeError as error:
        raise BadBody("the body is not UTF-8") from error
    except RecursionError as error:
        raise BadBody("the body is nested too deeply") from error
    except msgspec.DecodeError as error:
        message, _, place = str(error).partition(" - at `$")
        missing = re.search(r"field `(\w+)`", message)
        where = ".".join(filter(None, (re.sub(r"\[\.\.\.\]", "", place).strip(".`"), missing[1] if missing else "")))
        raise BadBody(f"{where}: {message}" if where else f"the body does not decode: {message}", where or None) from error


def number(request: Request, name: str, default: int, *, least: int, most: int = 1 << 62) -> int:
    """A number of the query.

    Raises:
        BadBody: it is none, or out of range.
    """
    text = request.query_params.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 20 and least <= int(text) <= most):
        raise BadBody(f"{name}: {text[:20]!r} is not a number from {least} to {most}", name)
    return int(text)
