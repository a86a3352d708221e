"""Fetches files by digest over bad links: resumed, bounded, counted, verified.

Rules:
 * A file grows in `.part` and resumes from its last byte, after a cut, a restart or a kill.
 * Every received byte counts against the day's budget, which survives restarts. A range is asked for no further than the budget reaches.
 * A server that ignores Range sends from the start again: what is already here is skipped and counted, and is only accepted when the whole
   file fits the budget. It is logged, never silent.
 * 404, 410 and other refusals are final at once. Cuts, time-outs and 5xx are tried again, with jitter; ATTEMPTS without one new byte, or
   ATTEMPTS_IN_ALL, end it until the next check.
 * The name is given only to verified bytes.

What was written shortly before a power cut may be lost or damaged; then the digest is wrong, the part is thrown away, and the next check
starts clean, within the budget.
"""

import logging
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import httpx
import msgspec

from protocol import codec
from protocol.blobs import BlobFolder, write_atomically
from protocol.errors import MalformedMessage, NotEnough, Unavailable, WrongDigest
from protocol.links import Traffic

CONNECT_S = 10.0  # seconds
READ_S = 20.0  # seconds without one byte
ATTEMPTS = 6  # in a row without a new byte: 1 + 2 + 4 + 8 + 16 s of waiting, about half a minute
ATTEMPTS_IN_ALL = 400  # a 400 MB file on a link that drops every megabyte
BACKOFF_S = (1.0, 60.0)  # first and longest wait, seconds
DAILY_BYTES = 1 << 30  # default budget: a first teacher and a student, or a year of adapters
SEGMENT_BYTES = 1_400  # of a file in one packet, about
RESERVE_BYTES = 1 << 20  # the budget's file is written once a mebibyte, ahead: a kill over-counts by that much at most
AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})  # statuses worth another try

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_log = logging.getLogger("milpa.update")


def http_client(*, ca_file: Path | None = None) -> httpx.Client:
    """The node's HTTP client for updates: no redirects, no compression, no proxy from the environment."""
    import ssl

    return httpx.Client(
        timeout=httpx.Timeout(READ_S, connect=CONNECT_S),
        follow_redirects=False,
        trust_env=False,
        verify=ssl.create_default_context(cafile=str(ca_file)) if ca_file else True,
        headers={"accept-encoding": "identity", "user-agent": "milpa-node"},
        limits=httpx.Limits(max_connections=1),
    )


class _Spent(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    day: int
    bytes: int


class Account(Protocol):
    """What a budget needs of `protocol.meter.Meter`."""

    def left(self, what: Traffic) -> int:
        """Bytes that may still be spent today on that."""

    def spend(self, up: int, down: int, packets: int = 0) -> None:
        """Account for bytes."""


class Budget:
    """Bytes a day, enforced and remembered.

    Args:
        path: where it is remembered.
        daily_bytes: 0 is no limit; bytes are counted all the same.
        link: the account that everything on this node's link shares; None: there is none.
    """

    def __init__(self, path: Path, daily_bytes: int = DAILY_BYTES, *, link: Account | None = None) -> None:
        self.path, self.link = path, link
        self.daily_bytes = daily_bytes
        self._spent = self._read()
        self._written = self._spent.bytes
        self.received = 0  # bytes by this process, whatever the day

    @property
    def limit(self) -> str:
        """What the day allows, for people."""
        return str(self.daily_bytes) if self.daily_bytes else "the link's"

    def open_day(self, now: float) -> None:
        """Begin a new account if `now` (seconds since 1970) is on a later day; a clock that went back changes nothing."""
        day = int(now // 86_400)
        if day > self._spent.day:
            self._spent = _Spent(day, 0)
            self._write(0)

    @property
    def spent(self) -> int:
        """Bytes received today."""
        return self._spent.bytes

    @property
    def left(self) -> int:
        """Bytes that may still be received today."""
        own = max(0, self.daily_bytes - self._spent.bytes) if self.daily_bytes else 1 << 62
        return own if self.link is None else min(own, self.link.left("download"))

    def spend(self, count: int) -> None:
        """Account for `count` received bytes."""
        self.received += count
        if self.link is not None:
            self.link.spend(0, count, packets=2 * (1 + count // SEGMENT_BYTES))
        self._spent = _Spent(self._spent.day, self._spent.bytes + count)
        if self._spent.bytes > self._written:
            self._write(self._spent.bytes + RESERVE_BYTES)

    def settle(self) -> None:
        """Give back what was reserved and not used; call it when a check ends."""
        if self._written != self._spent.bytes:
            self._write(self._spent.bytes)

    def _write(self, count: int) -> None:
        write_atomically(self.path, codec.encode(_Spent(self._spent.day, count)))
        self._written = count

    def _read(self) -> _Spent:
        try:
            return codec.decode_as(self.path.read_bytes(), _Spent, what=str(self.path))
        except FileNotFoundError:
            return _Spent(0, 0)
        except MalformedMessage as error:
            _log.warning("%s; counting from nothing", error)
            return _Spent(0, 0)


class Downloader:
    """Brings files into a blob folder.

    Args:
        sleep, jitter: seconds to wait, and a number in [0, 1); replaced in tests.
    """

    def __init__(
        self,
        client: httpx.Client,
        blobs: BlobFolder,
        budget: Budget,
        *,
        attempts: int = ATTEMPTS,
        attempts_in_all: int = ATTEMPTS_IN_ALL,
        backoff_s: tuple[float, float] = BACKOFF_S,
        sleep: Callable[[float], None] = time.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.client = client
        self.blobs = blobs
        self.budget = budget
        self.attempts = attempts
        self.attempts_in_all = attempts_in_all
        self.backoff_s = backoff_s
        self._sleep = sleep
        self._jitter = jitter

    def fetch(self, url: str, digest: str, size: int, *, deadline: float | None = None, wait_for: Callable[[], str] = lambda: "") -> Path:
        """The file with that digest, fetched if it is not here.

        Args:
            size: bytes, from verified metadata.
            deadline: on `time.monotonic`; what has come by then is kept.
            wait_for: why nothing may be fetched just now, or ""; asked again with every piece that comes.

        Raises:
            NotEnough: disk, or the day's budget; what has come is kept.
            Unavailable: it has to wait; what has come is kept.
            Unavailable: final refusal, too many attempts, or past the deadline.
            WrongDigest: complete, and not what was signed; it was thrown away.
        """
        if self.blobs.has(digest):
            return self.blobs.path(digest)
        part = self.blobs.part(digest)
        if part.is_file() and part.stat().st_size > size:
            part.unlink()  # grown under another promise
        self.blobs.need_space(size - _size(part))
        idle = 0

        def enough() -> bool:
            return bool(wait_for()) or (deadline is not None and time.monotonic() > deadline)

        for _ in range(self.attempts_in_all):
            have = _size(part)
            if have == size:
                return self.blobs.adopt(part, digest)
            if self.budget.left == 0:
                raise NotEnough(f"today's budget of {self.budget.limit} bytes is spent; {have} of {size} are here, the rest follows")
            if why := wait_for():
                raise Unavailable(f"{have} of {size} bytes are here, the rest waits: {why}")
            problem = self._attempt(
                url, part, have, size, lambda: bool(wait_for()) or (deadline is not None and time.monotonic() > deadline)
            )
            if deadline is not None and time.monotonic() > deadline:
                raise Unavailable(f"not complete by its deadline: {_size(part)} of {size} bytes are here; the next check goes on")
            if problem:
                idle = idle + 1 if _size(part) == have else 0
                if idle >= self.attempts:
                    raise Unavailable(f"{idle} attempts brought nothing ({problem}); the next check goes on from byte {have}")
                first, longest = self.backoff_s
                self._sleep(min(longest, first * 2**idle) * (0.5 + self._jitter() / 2))
        raise Unavailable(f"{self.attempts_in_all} attempts were not enough; the next check goes on from byte {_size(part)} of {size}")

    def _attempt(self, url: str, part: Path, have: int, size: int, enough: Callable[[], bool]) -> str:
        """One request; append what comes. Returns why it ended early, or ""."""
        end = min(size, have + self.budget.left)
        try:
            with self.client.stream("GET", url, headers={"range": f"bytes={have}-{end - 1}"}) as response:
                if response.status_code in AGAIN:
                    return f"status {response.status_code}"
                skip = self._bytes_to_skip(response, url, part, have, size)
                with part.open("ab") as file:
                    for chunk in response.iter_raw():
                        self.budget.spend(len(chunk))
                        fresh, skip = chunk[skip:][: end - have], max(0, skip - len(chunk))
                        file.write(fresh)
                        file.flush()  # a killed process loses nothing it paid for
                        have += len(fresh)
                        if have == end or enough():
                            return ""
        except httpx.TransportError as error:
            return f"{type(error).__name__}: {error}"
        return "the answer was cut short"

    def _bytes_to_skip(self, response: httpx.Response, url: str, part: Path, have: int, size: int) -> int:
        """How many bytes at the head of this answer are here already.

        Raises:
            Unavailable: the server will not give the file; asking again is no use.
            WrongDigest: the server has a shorter or a longer file under this name.
            NotEnough: it sends from the start, and that does not fit the budget.
        """
        status = response.status_code
        if response.headers.get("content-encoding", "identity") != "identity":
            raise Unavailable(f"something between us and {url} compresses; files can only be resumed plain")
        if status == 206:
            found = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
            if not found or int(found[1]) != have:
                raise Unavailable(f"{url} answered another range than asked: {response.headers.get('content-range')!r}")
            if found[3] not in ("*", str(size)):
                part.unlink(missing_ok=True)
                raise WrongDigest(f"{url} has {found[3]} bytes, {size} were signed; the part was thrown away")
            return 0
        if status == 416:
            part.unlink(missing_ok=True)
            raise WrongDigest(f"{url} is shorter than the {size} bytes that were signed; the part was thrown away")
        if status != 200:
            raise Unavailable(f"{url} answered {status}: not asking again before the next check")
        length = response.headers.get("content-length", str(size))
        if length != str(size):
            part.unlink(missing_ok=True)
            raise WrongDigest(f"{url} has {length} bytes, {size} were signed; the part was thrown away")
        if have:
            _log.warning("%s ignores Range: %d bytes come a second time", url, have)
        if size > self.budget.left:
            raise NotEnough(f"{url} ignores Range, and {size >> 20} MiB in one go do not fit today's budget")
        return have


def _size(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0
