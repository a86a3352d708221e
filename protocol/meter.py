"""Counts a link's bytes and says whether there are more to spend. Remembered beside the outbox, in the same database.

Rules:
 * What is spent is written ahead by RESERVE: a kill over-counts by at most that, and never under-counts.
 * Counting happens in whatever thread moves bytes and touches memory only; `keep` writes, from a thread that may wait for the disk.
 * The day is `links.Day`: clocks that jump do not open a new one.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from protocol import links
from protocol.links import HEADER_BYTES, Day, LinkRules, Reading, Traffic, Verdict

RESERVE_SHARE, RESERVE_FLOOR, RESERVE_UNLIMITED = 0.01, 512, 1 << 20  # of the day's bytes; bytes; bytes
KEEP_S = 900.0  # seconds between two writes of how far the day is, when nothing is spent

metadata = sa.MetaData()

traffic = sa.Table(
    "link_traffic", metadata,
    sa.Column("row", sa.Integer, primary_key=True),  # always 1
    sa.Column("up", sa.Integer, nullable=False),
    sa.Column("down", sa.Integer, nullable=False),
    sa.Column("elapsed", sa.Float, nullable=False),
    sa.Column("boot", sa.String(64), nullable=False),
    sa.Column("uptime", sa.Float, nullable=False),
    sa.Column("wall", sa.Float, nullable=False),
)  # fmt: skip


def clocks() -> Reading:
    """The machine's clocks now. Without Linux: this process' own uptime, and every start is a boot."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    if boot.exists() and hasattr(time, "CLOCK_BOOTTIME"):
        return Reading(boot.read_text().strip(), time.clock_gettime(time.CLOCK_BOOTTIME), time.time())
    return Reading("", time.monotonic(), time.time())


class Meter:
    """The account of one link, kept in `engine`'s database. Makes its table.

    Args:
        read: the clocks; an argument so that tests own the time.
    """

    def __init__(self, engine: sa.Engine, rules: LinkRules, *, read: Callable[[], Reading] = clocks) -> None:
        self.engine, self._read = engine, read
        self._lock = threading.Lock()
        self.obey(rules)
        self.total_up = self.total_down = 0  # bytes by this process, whatever the day
        metadata.create_all(engine)
        with engine.begin() as connection:
            row = connection.execute(sa.select(traffic)).one_or_none()
        now = read()
        self._day = Day(0, 0, 0.0, now) if row is None else Day(row.up, row.down, row.elapsed, Reading(row.boot, row.uptime, row.wall))
        self._written = self._day
        self.keep()

    def obey(self, rules: LinkRules) -> None:
        """Go by these rules from now on; what was spent stays spent."""
        with self._lock:
            self.rules = rules
            self.reserve = max(RESERVE_FLOOR, int(RESERVE_SHARE * rules.bytes_a_day)) if rules.bytes_a_day else RESERVE_UNLIMITED

    def spend(self, up: int, down: int, packets: int = 0) -> None:
        """Account for bytes of the TCP stream that went up and came down, in so many packets. Never waits."""
        with self._lock:
            self._advance()
            self.total_up, self.total_down = self.total_up + up, self.total_down + down
            headers = HEADER_BYTES * packets
            day = self._day
            self._day = msgspec.structs.replace(day, up=day.up + up + headers // 2, down=day.down + down + headers - headers // 2)

    def may_spend(self, cost: int, what: Traffic = "event") -> Verdict:
        """Whether `cost` bytes may be spent today on `what`."""
        with self._lock:
            self._advance()
            return links.may_spend(self.rules, self._day.spent, cost, what)

    def left(self, what: Traffic) -> int:
        """Bytes that may still be spent today on that; a very large number without a limit, 0 for what the link does not carry."""
        with self._lock:
            self._advance()
            return links.left(self.rules, self._day.spent, what)

    def may_connect(self) -> Verdict:
        """Whether a connection is worth opening, or keeping."""
        return self.may_spend(links.CONNECT_BYTES if self.rules.bytes_a_day > 10 * links.CONNECT_BYTES else 1, "status")

    def keep(self) -> None:
        """Write what must be remembered, if anything must. Call it every second or so."""
        with self._lock:
            self._advance()
            day, written = self._day, self._written
            new_day = day.spent < written.spent - self.reserve and day.elapsed < written.elapsed
            if not new_day and day.spent <= written.spent and day.elapsed - written.elapsed < KEEP_S and day.at.boot == written.at.boot:
                return
            ahead = msgspec.structs.replace(day, up=day.up + self.reserve)
            self._written = ahead
        self._write(ahead)

    def settle(self) -> None:
        """Write the exact count; call it at a clean end."""
        with self._lock:
            self._advance()
            self._written = day = self._day
        self._write(day)

    @property
    def day(self) -> Day:
        """The running day's account."""
        with self._lock:
            self._advance()
            return self._day

    def status(self) -> dict[str, Any]:
        """For GET /v1/status."""
        day = self.day
        return {
            "class": self.rules.name, "bytes_a_day": self.rules.bytes_a_day, "up_bytes": day.up, "down_bytes": day.down,
            "next_day_s": round(links.DAY_S - day.elapsed), "problem": self.may_spend(1, "event").reason,
        }  # fmt: skip

    def _advance(self) -> None:
        self._day = links.advanced(self._day, self._read())

    def _write(self, day: Day) -> None:
        row = {
            "row": 1, "up": day.up, "down": day.down, "elapsed": day.elapsed,
            "boot": day.at.boot, "uptime": day.at.uptime, "wall": day.at.wall,
        }  # fmt: skip
        with self.engine.begin() as connection:
            connection.execute(insert(traffic).values(**row).on_conflict_do_update(index_elements=["row"], set_=row))
