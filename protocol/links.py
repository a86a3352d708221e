"""What a link allows: how often a node speaks, how much it may spend a day, and what may travel at all.

Rules:
 * A class of link sets floors and limits; a setting may be stricter, never looser (a cellular node never looks for releases by the minute).
 * The day's bytes are both directions, as billed: the TCP stream with TLS, and HEADER_BYTES for each packet of it.
 * Each kind of traffic leaves a share of the day's bytes for what matters more, so events never eat the bytes of tonight's replies.
   What finds no bytes waits for the next day, the most important first. Nothing is thrown away for want of bytes.
 * A day is 24 hours of time that passed, not a date: a wall clock that jumps neither opens a new day nor holds one back.
   Within one boot the kernel's uptime counts. Across a boot the wall clock counts if it can be believed at both ends; else only the
   time since that boot, so that a board that wakes in 1970 gets its day late rather than twice.

No I/O: clock readings and counts come in. Counting and remembering is `meter.py`; what a `lora` link says instead is `frames.py`.
"""

from typing import Literal

import msgspec

from protocol.names import known

DAY_S = 86_400.0  # seconds
NO_LIMIT = 1 << 62  # bytes
BELIEVED_FROM = 1_767_225_600.0  # 2026-01-01: this program did not exist before, so an earlier wall clock is wrong
HEADER_BYTES = 52  # bytes a packet: IPv4 20, TCP 20, TCP time stamps 12
CONNECT_BYTES = 4_900  # bytes of one TLS connection, headers in: 1.5 kB up, 2.4 kB down in about 18 packets (measured, P-256)

LinkClass = Literal["lan", "cellular", "lora"]
Traffic = Literal["status", "reply", "question", "event", "round", "download", "bulk"]

# Share of the day's bytes that must remain for what matters more, once this is sent. In the order of what matters: a node that is heard of,
# somebody who waits, the site's own question, the ledger, training, a release, everything else.
LEAVES: dict[Traffic, float] = {
    "status": 0.0, "reply": 0.02, "question": 0.05, "event": 0.15, "round": 0.25, "download": 0.25, "bulk": 0.5,
}  # fmt: skip


class LinkRules(msgspec.Struct, frozen=True):
    """What one class of link allows."""

    name: LinkClass
    bytes_a_day: int  # 0: no limit; they are counted all the same
    heartbeat_s: float  # least seconds between two words that say nothing new
    poll_s: float  # least seconds between two looks for a release
    window_s: float  # least seconds between two sync windows (rounds)
    keepalive_s: float  # without a packet until a ping; heartbeats come first where bytes are dear
    backoff_cap_s: float  # longest wait before the next attempt to connect
    travels: frozenset[Traffic]
    frames_only: bool = False  # nothing but the compact frames of `frames.py`, through a gateway


class Verdict(msgspec.Struct, frozen=True):
    """Whether something may travel now, and why not."""

    ok: bool
    reason: str = ""


LINKS: dict[LinkClass, LinkRules] = {
    "lan": LinkRules(
        name="lan", bytes_a_day=0, heartbeat_s=0.0, poll_s=0.0, window_s=0.0, keepalive_s=60.0, backoff_cap_s=60.0,
        travels=frozenset(LEAVES),
    ),
    "cellular": LinkRules(  # a plan of 300 MB a month; a look for releases is two requests, six hours apart; one round a day
        name="cellular", bytes_a_day=10_000_000, heartbeat_s=300.0, poll_s=21_600.0, window_s=DAY_S, keepalive_s=450.0, backoff_cap_s=300.0,
        travels=frozenset(LEAVES) - {"bulk"},
    ),
    "lora": LinkRules(  # 1.1 kB an hour: 1% of the air time at EU868's slowest rate (250 bit/s); releases and adapters come by another way
        name="lora", bytes_a_day=26_400, heartbeat_s=3_600.0, poll_s=float("inf"), window_s=float("inf"), keepalive_s=5_400.0,
        backoff_cap_s=3_600.0, travels=frozenset({"status", "reply", "question"}), frames_only=True,
    ),
}  # fmt: skip


def link(name: str, *, bytes_a_day: int = 0) -> LinkRules:
    """The rules of a class, with the operator's own limit where one is set (0: the class's).

    Raises:
        UnknownName: no such class.
    """
    known(name, LINKS, what="class of link")
    rules = LINKS[name]  # type: ignore[index]  # just checked
    return msgspec.structs.replace(rules, bytes_a_day=bytes_a_day) if bytes_a_day else rules


def may_travel(rules: LinkRules, what: Traffic) -> Verdict:
    """Whether this class of link carries that at all."""
    if what in rules.travels:
        return Verdict(True)
    return Verdict(False, f"a {rules.name} link carries no {what}; it waits for a richer one")


def left(rules: LinkRules, spent: int, what: Traffic) -> int:
    """Bytes that may still be spent today on `what`, when `spent` are gone already; NO_LIMIT where there is none."""
    if not may_travel(rules, what).ok:
        return 0
    if rules.bytes_a_day == 0:
        return NO_LIMIT
    return max(0, rules.bytes_a_day - _kept(rules, what) - spent)


def may_spend(rules: LinkRules, spent: int, cost: int, what: Traffic) -> Verdict:
    """Whether `cost` more bytes may be spent today on `what`, when `spent` are gone already."""
    allowed = may_travel(rules, what)
    if not allowed.ok or cost <= left(rules, spent, what):
        return allowed
    keep = _kept(rules, what)
    for_others = f", {keep} are kept for what matters more" if keep else ""
    return Verdict(
        False, f"{spent} of today's {rules.bytes_a_day} bytes are spent{for_others}; {cost} more for {what} wait for tomorrow"
    )  # fmt: skip


def _kept(rules: LinkRules, what: Traffic) -> int:
    return int(LEAVES[what] * rules.bytes_a_day)


class Reading(msgspec.Struct, frozen=True):
    """All clocks at one moment."""

    boot: str  # one id a start of the machine; "" where the system names none
    uptime: float  # seconds since then, sleep included
    wall: float  # seconds since 1970, whatever it is worth


class Day(msgspec.Struct, frozen=True):
    """The account of the running day."""

    up: int  # bytes we sent, headers included
    down: int  # bytes we got
    elapsed: float  # seconds of this day that have passed, by `passed`
    at: Reading  # when that was so

    @property
    def spent(self) -> int:
        """Bytes of both directions."""
        return self.up + self.down


def passed(before: Reading, now: Reading) -> float:
    """Seconds between two readings that certainly passed; never negative, and never more than did pass while the clocks can be believed."""
    if before.boot and before.boot == now.boot:
        return max(0.0, now.uptime - before.uptime)
    since_boot = max(0.0, now.uptime)
    if before.wall >= BELIEVED_FROM and now.wall >= BELIEVED_FROM:
        return max(since_boot if before.boot else 0.0, now.wall - before.wall)
    return since_boot if before.boot and now.boot else 0.0


def advanced(day: Day, now: Reading) -> Day:
    """The account at `now`: the same day, or a new empty one."""
    elapsed = day.elapsed + passed(day.at, now)
    if elapsed < DAY_S:
        return Day(day.up, day.down, elapsed, now)
    return Day(0, 0, elapsed % DAY_S, now)
