"""What became of a request that was not answered: status, kind and code, in OpenAI's words and in Ollama's."""

from typing import Any

import msgspec

from node.answering import NoSuchAnswer
from node.engine.worker import Busy, Gone, Late
from protocol.errors import BadInput, MilpaError, NotEnough, TooLarge

CLIENT_CLOSED = 499  # nginx's number for a client that hung up; only the metrics see it


class BadBody(BadInput):
    """The body does not decode; `param` names the place in it."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


STATUSES: tuple[tuple[type[MilpaError], int, str, str], ...] = (  # the first that fits
    (NoSuchAnswer, 404, "invalid_request_error", "not_found"),
    (TooLarge, 413, "invalid_request_error", "too_large"),
    (BadInput, 400, "invalid_request_error", "bad_input"),
    (Busy, 429, "rate_limit_error", "queue_full"),
    (Late, 504, "server_error", "deadline"),
    (Gone, CLIENT_CLOSED, "invalid_request_error", "hung_up"),
    (NotEnough, 503, "server_error", "not_enough"),
    (MilpaError, 503, "server_error", "unavailable"),
)


class Told(msgspec.Struct, frozen=True):
    """An error as it goes over the wire."""

    status: int
    message: str
    kind: str
    code: str
    param: str | None = None
    retry_after_s: int = 0  # 0: nothing to suggest

    @property
    def headers(self) -> dict[str, str]:
        """Response headers."""
        return {"Retry-After": str(self.retry_after_s)} if self.retry_after_s else {}

    def openai(self) -> dict[str, Any]:
        """As OpenAI clients read it."""
        return error_body(self.message, self.kind, self.code, self.param)

    def ollama(self) -> dict[str, Any]:
        """As Ollama clients read it."""
        return {"error": self.message}


def told(error: Exception) -> Told:
    """How an error is told. What is not ours is the disk's or a fault: neither shows its inside."""
    if not isinstance(error, MilpaError):
        return Told(503, "the node cannot use its database; is the disk full? run: milpa-node doctor", "server_error", "storage")
    status, kind, code = next((status, kind, code) for cls, status, kind, code in STATUSES if isinstance(error, cls))
    param = error.param if isinstance(error, BadBody) else None
    return Told(status, str(error), kind, code, param, error.retry_after_s if isinstance(error, Busy) else 0)


def error_body(message: str, kind: str, code: str, param: str | None = None) -> dict[str, Any]:
    """An error as OpenAI clients read it."""
    return {"error": {"message": message, "type": kind, "code": code, "param": param}}
