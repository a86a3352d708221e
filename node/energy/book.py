"""Joules by kind of work and by day, and the modelled charge: one small file, replaced whole. A spoiled one is begun anew.

Limits: DAYS_KEPT days; written every SAVE_S seconds at most, so that a kill forgets minutes and an SD card lives.
"""

import logging
from pathlib import Path

import msgspec

from node.energy.rules import DAY_S, KINDS, Kind
from protocol import codec
from protocol.blobs import write_atomically
from protocol.errors import BadInput

DAYS_KEPT = 62
SAVE_S = 300.0  # seconds
LIMIT = 64 * 1024  # bytes; 62 days are about 8 kB
ANSWERING_DAYS = 7  # of these the one with most answering says what a day takes

log = logging.getLogger("milpa.node")


class Kept(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """energy.json."""

    totals: dict[str, float] = {}  # joules by kind, since the file began
    days: dict[str, dict[str, float]] = {}  # day (since 1970, UTC) -> joules by kind
    charge: float = 0.5
    at: float = 0.0  # when `charge` was so, seconds since 1970


class Book:
    """The counts. One caller at a time: `Power` holds the lock; only `write` may be called without it."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        kept = self._read()
        self.totals: dict[Kind, float] = {kind: kept.totals.get(kind, 0.0) for kind in KINDS}
        self.days = {int(day): dict(joules) for day, joules in kept.days.items() if day.isdigit()}
        self.charge, self.at = kept.charge, kept.at
        self._saved_at = kept.at

    def add(self, kind: Kind, joules: float, now: float) -> None:
        """Count."""
        self.totals[kind] += joules
        day = self.days.setdefault(int(now // DAY_S), {})
        day[kind] = day.get(kind, 0.0) + joules
        while len(self.days) > DAYS_KEPT:
            del self.days[min(self.days)]

    def today(self, now: float) -> dict[str, float]:
        """Joules of the day of `now`, by kind."""
        return dict(self.days.get(int(now // DAY_S), {}))

    def answering_wh(self, now: float) -> float:
        """Watt-hours a day of answers take: the busiest of the last days."""
        today = int(now // DAY_S)
        return max((joules.get("answer", 0.0) for day, joules in self.days.items() if day > today - ANSWERING_DAYS), default=0.0) / 3600.0

    def to_save(self, now: float, *, at_once: bool = False) -> bytes | None:
        """What to `write`, if it is time."""
        if self.path is None or not (at_once or now - self._saved_at >= SAVE_S or now < self._saved_at):
            return None
        self._saved_at = now
        totals: dict[str, float] = {kind: round(joules, 1) for kind, joules in self.totals.items()}
        days = {str(day): {kind: round(joules, 1) for kind, joules in row.items()} for day, row in self.days.items()}
        return codec.encode(Kept(totals, days, self.charge, self.at))

    def write(self, data: bytes) -> None:
        """Replace the file. A disk that refuses is told in the log: counting must not stop a node."""
        assert self.path is not None
        try:
            write_atomically(self.path, data)
        except OSError as error:
            log.error("energy is counted but cannot be written: %s", error)

    def _read(self) -> Kept:
        if self.path is None or not self.path.is_file():
            return Kept()
        try:
            return codec.decode_as(self.path.read_bytes(), Kept, limit=LIMIT, what=str(self.path))
        except (OSError, BadInput) as error:
            log.warning("%s; energy is counted from nothing", error)
            return Kept()
