"""A source and all that was said to it, on disk: a JSON line a source, appended and never changed.

Rules:
 * A row is named by its content (task, source, language, known verdict), so a source that stands twice in the input is asked once.
 * Nothing is lost: what was refused is in the row with the gate's reason, and a row stands also where nothing was kept.
 * A batch is one write, forced to the disk. After kill -9 a torn last line is cut off; its source is asked again, and so are those of the
   batch that was not written yet. No row that was written is lost, none is doubled. One process writes at a time, held by a lock on the
   file; any number may read.
 * The first line names the plan (teacher, task, samples, seed, shard); rows of another plan are never appended. Those of the same plan's
   other shards can be joined, so that the workers' files become one.
Limits: the keys of all rows are in memory, 100 bytes each; rows are not.
"""

import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Self

import msgspec

from coordinator.forge.synthesis.scoring import Signals
from protocol.digests import digest_value
from protocol.errors import BadInput, MalformedMessage, Unavailable, WrongDigest
from protocol.tasks import Record

VERSION = 2  # raise it when gates or scores change, so that old rows are not gone on with
JOINED = 1000  # rows in memory while files are joined


class Hypothesis(msgspec.Struct, frozen=True):
    """A text that passed every gate."""

    text: str  # the answer, parsed
    score: float  # consistency, see `scoring`
    signals: Signals
    times: int = 1  # how often it was said


class Refused(msgspec.Struct, frozen=True):
    """A text that did not."""

    text: str
    gate: str
    reason: str
    times: int = 1


class Row(msgspec.Struct, frozen=True):
    """One source."""

    key: str
    record: Record
    hypotheses: tuple[Hypothesis, ...]  # best first; empty: nothing was kept
    refused: tuple[Refused, ...]
    samples: int  # asked for
    why: str  # why it got no more samples, or more


class Header(msgspec.Struct, frozen=True):
    """The first line: what all rows of a file have in common."""

    plan: dict[str, Any]
    digest: str


def key_of(record: Record) -> str:
    """Names the content that teacher and gates see, 32 characters; the id and the reference answer are not part of it."""
    return digest_value([record.task, record.source, record.lang, record.verdict])[:32]


class RowLog:
    """The file of one worker, open for appending."""

    def __init__(self, path: Path, plan: Mapping[str, Any]) -> None:
        """Open or create; a torn last line is cut off.

        Raises:
            WrongDigest: the file holds rows of another plan.
            MalformedMessage: it is no file of rows.
            Unavailable: another process writes to it.
        """
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = path.open("a+b")
        try:
            self._lock()
            self._cut()
            header = Header({"version": VERSION, **plan}, digest_value({"version": VERSION, **plan}))
            if not path.stat().st_size:
                self._write(msgspec.json.encode(header) + b"\n")
            found = read_header(path)
            if found.digest != header.digest:
                raise WrongDigest(
                    f"{path} holds rows of another plan ({_difference(found.plan, header.plan)}); use another file or delete it"
                )
            self._plan = header.plan
            self.keys = {row.key for row in read_rows(path)}
        except BaseException:
            self._file.close()
            raise

    def __contains__(self, key: str) -> bool:
        return key in self.keys

    def append(self, rows: Sequence[Row]) -> None:
        """Add rows and make them durable; one that is there already is left out."""
        new = list({row.key: row for row in rows if row.key not in self.keys}.values())
        self._write(b"".join(msgspec.json.encode(row) + b"\n" for row in new))
        self.keys |= {row.key for row in new}

    def join(self, path: Path) -> None:
        """Add the rows of another worker's file.

        Raises:
            WrongDigest: its plan differs in more than the shard.
            BadInput, MalformedMessage: as `read_rows`.
        """
        theirs = read_header(path).plan | {"shard": self._plan["shard"]}
        if theirs != self._plan:
            raise WrongDigest(f"{path} holds rows of another plan ({_difference(theirs, self._plan)}); join what the same command wrote")
        rows = read_rows(path)
        while part := list(islice(rows, JOINED)):
            self.append(part)

    def close(self) -> None:
        """Let others write."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Unavailable(f"another process writes to {self.path}; give each worker a file of its own") from error

    def _cut(self) -> None:
        """Drop what follows the last line break."""
        self._file.seek(0)
        whole = 0
        for line in self._file:
            whole += len(line) if line.endswith(b"\n") else 0
        self._file.truncate(whole)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._file.flush()
        os.fsync(self._file.fileno())


def read_header(path: Path) -> Header:
    """The plan of a file of rows.

    Raises:
        BadInput: it cannot be read.
        MalformedMessage: it does not begin with a plan.
    """
    try:
        with path.open("rb") as file:
            return msgspec.json.decode(file.readline(), type=Header)
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise MalformedMessage(f"{path} is no file of rows that `synthesise` wrote") from error


def read_rows(path: Path) -> Iterator[Row]:
    """The whole rows of a file, in the order written.

    Raises:
        BadInput, MalformedMessage: as `read_header`, or a line is no row; the message names it.
    """
    read_header(path)
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1 or not line.endswith(b"\n"):
                continue
            try:
                yield msgspec.json.decode(line, type=Row)
            except msgspec.DecodeError as error:
                raise MalformedMessage(f"{path}, line {number}: not a row ({error})") from error


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """ "samples 4, not 6": the first figure that is not the same."""
    name = next((name for name in wanted if found.get(name) != wanted[name]), "fields")
    return f"{name} {found.get(name)!r}, not {wanted.get(name)!r}"
