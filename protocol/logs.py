"""What a service of ours writes to stderr: one line an event, for a person, for journald or for a program; never what a site sent.

Forms: "text" with the time in front; "journal" with a priority `<N>` in front (sd-daemon(3)) and no time, which journald adds; "json", one
object a line. "auto" is "journal" where stderr is journald's socket, else "text".
Rules:
 * No site data. What is logged names things and counts; an exception is logged as its types and places in the code, with its message only
   where that cannot repeat what came in: the operating system's, the database's (SQL without parameters) and ours but for BadInput.
   The full reason of a refusal is kept beside the refused input, on the node.
 * A message is one line: line breaks and other control characters are written out, so that nobody can forge a line.
"""

import logging
import os
import sqlite3
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Literal, TextIO

import msgspec

from protocol.errors import BadInput, MilpaError

Form = Literal["auto", "text", "journal", "json"]
Level = Literal["debug", "info", "warning", "error"]
PRIORITIES = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7}
CHATTY = ("httpx", "httpcore", "uvicorn.error", "tuf")  # libraries: their warnings only
FRAMES = 30  # of a traceback, the innermost
LINE_LIMIT = 4_000  # characters of a message

log = logging.getLogger("milpa")


def set_up(
    form: Form = "auto", level: Level = "info", *, stream: TextIO | None = None, environment: Mapping[str, str] = os.environ
) -> None:
    """Log to `stream` (stderr), this process from now on; uncaught exceptions too."""
    stream = stream or sys.stderr
    if form == "auto":
        form = "journal" if is_journal(stream, environment) else "text"
    handler = logging.StreamHandler(stream)
    handler.setFormatter(Lines(form))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for chatty in CHATTY:
        logging.getLogger(chatty).setLevel(logging.WARNING)
    sys.excepthook = _uncaught
    threading.excepthook = lambda told: _uncaught(told.exc_type, told.exc_value, told.exc_traceback)


def is_journal(stream: TextIO, environment: Mapping[str, str]) -> bool:
    """Whether `stream` is the socket that systemd connected to journald: JOURNAL_STREAM names its device and inode."""
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return environment.get("JOURNAL_STREAM", "") == f"{found.st_dev}:{found.st_ino}"


class Lines(logging.Formatter):
    """One event in one of the forms."""

    def __init__(self, form: Form = "text") -> None:
        super().__init__()
        self._form = form

    def format(self, record: logging.LogRecord) -> str:
        """The line, or lines where there is a traceback."""
        message = plain(record.getMessage())
        trace = list(places(record.exc_info[1])) if record.exc_info and record.exc_info[1] else []
        if self._form == "json":
            told = {"at": stamp(record.created), "level": record.levelname.lower(), "logger": record.name, "message": message}
            return msgspec.json.encode(told | ({"trace": trace} if trace else {})).decode()
        if self._form == "journal":
            front = f"<{PRIORITIES.get(record.levelno, 5)}>"
            return "\n".join(front + line for line in (f"{record.name}: {message}", *trace))
        return "\n".join((f"{stamp(record.created)} {record.levelname} {record.name}: {message}", *(f"    {line}" for line in trace)))


def places(error: BaseException | None) -> Iterator[str]:
    """An exception and what caused it: types, places in the code, and those messages that repeat nothing of a site."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        for frame in traceback.extract_tb(error.__traceback__)[-FRAMES:]:
            yield f"{frame.filename}:{frame.lineno} in {frame.name}"
        yield f"{type(error).__name__}{': ' + plain(str(error)) if is_safe(error) else ' (its text is not logged)'}"
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def is_safe(error: BaseException) -> bool:
    """Whether the exception's text cannot repeat what a site sent."""
    if isinstance(error, MilpaError):
        return not isinstance(error, BadInput)
    # sqlalchemy is not imported here: its errors have `orig`, and engines of ours hide parameters
    return isinstance(error, (OSError, sqlite3.Error)) or isinstance(getattr(error, "orig", None), sqlite3.Error)


def plain(text: str) -> str:
    """One printable line."""
    short = text if len(text) <= LINE_LIMIT else text[:LINE_LIMIT] + "..."
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in short)


def stamp(seconds: float) -> str:
    """Seconds since 1970 as UTC: 2026-11-22T08:00:00.123Z."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds % 1 * 1000):03d}Z"


def _uncaught(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    if error is None or isinstance(error, (KeyboardInterrupt, SystemExit)):
        return
    log.critical("a defect ended this thread or process", exc_info=(kind, error, trace))
