"""A feed that grows while training runs: every so often the model writes a round of examples, and the next batches are of them.

Rules:
 * A round is written once, by the model as it is when the first batch of the round is asked for, and logged before it is learned from.
 * Which batches follow from a round is decided by the log and the seed alone. So a training that is killed and gone on with sees the
   batches it would have seen: rounds that are logged are replayed, the others are written by the same weights.
 * The log is a JSON line a round, forced to the disk; a line cut by a power failure is dropped and its round written again.
   Its first line names the plan; a log of another plan is refused.
Limits: one process writes the rounds; examples stay in memory (ids only).
"""

import itertools
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from protocol.blobs import whole_lines
from protocol.errors import BadInput, WrongDigest
from protocol.models.tokenizer import Example

R = TypeVar("R")


class RoundLog(Generic[R]):
    """Rounds on disk, in order."""

    def __init__(self, path: Path, kind: type[R], *, key: str) -> None:
        """Open or create; a torn last line is cut off.

        Raises:
            WrongDigest: the log is of another plan.
            BadInput: a whole line is not a round.
        """
        self.path = path
        self._rounds: list[R] = []
        lines = whole_lines(path)
        if not lines:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write(msgspec.json.encode({"key": key}))
            return
        try:
            found = msgspec.json.decode(lines[0], type=dict[str, str])
            self._rounds = [msgspec.json.decode(line, type=kind) for line in lines[1:]]
        except msgspec.DecodeError as error:
            raise BadInput(f"{path} is not a log of rounds ({error}); delete it and the training state beside it") from error
        if found.get("key") != key:
            raise WrongDigest(f"{path} is the log of another plan; use another folder or delete it")

    def __len__(self) -> int:
        return len(self._rounds)

    def __getitem__(self, number: int) -> R:
        return self._rounds[number]

    def __iter__(self) -> Iterator[R]:
        return iter(self._rounds)

    def append(self, one: R) -> None:
        """Add a round and make it durable."""
        self._write(msgspec.json.encode(one))
        self._rounds.append(one)

    def _write(self, line: bytes) -> None:
        with self.path.open("ab") as file:
            file.write(line + b"\n")
            file.flush()
            os.fsync(file.fileno())


class RoundFeed(ABC, Generic[R]):
    """A `protocol.models.feed.Feed` of rounds; a kind of training says what a round is, and which batches follow from it."""

    examples: list[Example]  # the fixed ones first

    def __init__(self, fixed: Sequence[Example], log: RoundLog[R]) -> None:
        self.examples, self.log = list(fixed), log
        self._firsts: list[int] = []  # place of each round's first example

    @abstractmethod
    def write(self, number: int) -> R:
        """Make round `number` with the model as it is now; what it needs beside the log is durable when this returns."""

    @abstractmethod
    def rows(self, one: R) -> Sequence[Example]:
        """The examples of a round."""

    @abstractmethod
    def plan(self, number: int) -> list[list[int]]:
        """Places of the batches that follow round `number`; decided by the rounds so far and the seed."""

    def batches(self, skip: int) -> Iterator[list[int]]:
        """Round after round, without end.

        Raises:
            BadInput: the log is shorter than the training that is gone on with.
        """
        for number in itertools.count():
            if number == len(self.log):
                if skip:
                    raise BadInput(f"{self.log.path} has {number} rounds, the training has seen more; delete its state to begin again")
                self.log.append(self.write(number))
            if number == len(self._firsts):
                self._firsts.append(len(self.examples))
                self.examples += self.rows(self.log[number])
            found = self.plan(number)
            yield from found[skip:]
            skip = max(0, skip - len(found))

    def places(self, number: int) -> range:
        """Where the examples of a round are."""
        end = self._firsts[number + 1] if number + 1 < len(self._firsts) else len(self.examples)
        return range(self._firsts[number], end)
