"""What the pages show, read from the ledger: questions in, frozen values out. Nothing here writes, and nothing here knows HTML.

Rules:
 * A number comes with what it was counted from; where nothing was counted there is None, and the page shows no number.
 * `now` is an argument. Times are seconds since 1970, UTC.
 * Counters in statuses start again at every boot; increments are taken within a boot.
Limits: LIST_LIMIT rows a list; series are counted by the database, in at most SERIES_POINTS steps.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
import sqlalchemy as sa
from sqlalchemy import RowMapping

from coordinator.fleet.ledger import Ledger, PublishedRelease
from coordinator.fleet.tables import adapters, audit, boots, events, nodes, refused, rounds, statuses

LIST_LIMIT = 200
NODE_LIMIT = 2_000
SLEEP_GRACE_S = 600  # a board without a clock wakes late
EXPIRED_SHARE = 0.2  # of a day's questions; above it a person should look at the peers
BEHIND_S = 3_600  # a node that answers but has not taken a release for so long is told

Shown = Literal["answering", "asleep", "updating", "silent", "refused", "no-model", "stopped"]
SHOWN: tuple[Shown, ...] = ("refused", "no-model", "silent", "stopped", "updating", "asleep", "answering")  # what needs eyes comes first
SPANS = (
    (3_600, 120),
    (6 * 3_600, 600),
    (86_400, 1_800),
    (7 * 86_400, 6 * 3_600),
    (14 * 86_400, 43_200),
    (30 * 86_400, 86_400),
)  # seconds shown, seconds a step


class Node(msgspec.Struct, frozen=True):
    """A node and how it is, for a person."""

    name: str
    role: str
    shown: Shown
    release: int
    model_digest: str
    adapter_digest: str
    boot: str
    version: str
    answered: int  # since its last start
    escalated: int
    waiting: int
    first_seen: int
    last_seen: int
    sleeping_until: int
    refusal: str = ""  # why it refused the latest release

    @property
    def share(self) -> float | None:
        """Escalated among answered since its last start."""
        return self.escalated / self.answered if self.answered else None


class Need(msgspec.Struct, frozen=True):
    """Something that needs a person, with the one thing to do. `kind` and `action` are keys of the catalogue."""

    kind: str
    level: Literal["red", "amber"]
    href: str
    action: str
    values: dict[str, Any]


class Point(msgspec.Struct, frozen=True):
    """One step of a series; low and high are the 95% interval where there is one."""

    at: int
    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0


class Series(msgspec.Struct, frozen=True):
    """A quantity over the shown span. `kind` is a key of the catalogue."""

    kind: str
    unit: Literal["share", "count", "ms", "bytes", "wh"]
    points: tuple[Point, ...]
    start: int
    end: int
    releases: tuple[tuple[int, int], ...]  # (time, number) of releases within the span
    latest: Point | None  # the last step with a value
    whole: Point | None = None  # over the whole span
    age_s: int = 0  # since the newest thing counted


class Overview(msgspec.Struct, frozen=True):
    """The first page."""

    nodes: tuple[Node, ...]
    counts: Mapping[Shown, int]
    asleep_until: int  # when the first sleeper wakes; 0: nobody sleeps
    release: int  # the latest; 0: none
    on_release: int  # student and teacher nodes that run it
    asked: float | None  # share of the span's answers that asked a peer
    needs: tuple[Need, ...]
    series: tuple[Series, ...]
    span_s: int


class Happened(msgspec.Struct, frozen=True):
    """One line of a node's timeline. `kind` is a key of the catalogue."""

    at: int
    kind: str
    values: dict[str, Any]
    level: Literal["", "amber", "red"] = ""


class ReplyRow(msgspec.Struct, frozen=True):
    """What one site sent to a round. Without a digest it sent no adapter, and `reason` says why."""

    node: str
    accepted: bool
    reason: str
    received: int
    late_s: int  # seconds after the round opened
    examples: int | None
    rank: int | None
    loss_before: float | None
    loss_after: float | None
    digest: str


class SiteChange(msgspec.Struct, frozen=True):
    """A site before and after a merge, on its own held-out records."""

    name: str
    before: float
    after: float
    low: float | None  # 95% interval of after - before
    high: float | None
    n: int | None


class Round(msgspec.Struct, frozen=True):
    """A round: who was asked, who answered, what came of it."""

    id: int
    release: int
    asked: tuple[str, ...]
    opened: int
    deadline: int
    closed: int | None
    replies: tuple[ReplyRow, ...]
    decision: str  # "", or what the round's result says
    published: int  # the release it became; 0: none
    reasons: tuple[str, ...]
    changes: tuple[SiteChange, ...]
    relative_error: float | None

    @property
    def accepted(self) -> tuple[ReplyRow, ...]:
        """Replies in the merge."""
        return tuple(reply for reply in self.replies if reply.accepted)

    @property
    def refused(self) -> tuple[ReplyRow, ...]:
        """Adapters that were turned away."""
        return tuple(reply for reply in self.replies if not reply.accepted and reply.digest)

    @property
    def without(self) -> tuple[ReplyRow, ...]:
        """Answered, but had no adapter, or did not answer in time."""
        return tuple(reply for reply in self.replies if not reply.accepted and not reply.digest)

    @property
    def missing(self) -> tuple[str, ...]:
        """Asked, and nothing came."""
        came = {reply.node for reply in self.replies}
        return tuple(name for name in self.asked if name not in came)


class Peer(msgspec.Struct, frozen=True):
    """A peer as the nodes that asked it saw it."""

    name: str
    asked: int
    answered: int
    expired: int
    refused: int
    p50_s: float | None  # from question to reply
    p95_s: float | None
    last: int
    node: Node | None


class Escalation(msgspec.Struct, frozen=True):
    """One question that stayed without an answer. Never its text."""

    node: str
    peer: str
    state: str
    confidence: float | None
    received: int
    reason: str


class Escalations(msgspec.Struct, frozen=True):
    """All about asking."""

    total: int
    counts: dict[str, int]
    confirmed: Point | None  # share of peer-checked answers the peer agreed with
    peers: tuple[Peer, ...]
    unanswered: tuple[Escalation, ...]
    asked: float | None
    newest: int


class AuditRow(msgspec.Struct, frozen=True):
    """One line of the audit."""

    id: int
    at: int
    actor: str
    action: str
    subject: str
    detail: dict[str, Any]
    hash: str


class RefusedMessage(msgspec.Struct, frozen=True):
    """A message that could not be used; its payload stays in the ledger."""

    topic: str
    size: int
    reason: str
    received: int


def wilson(right: int, n: int) -> tuple[float, float]:
    """95% interval of a share (Wilson 1927); good at 0 and 1 and for small n, where the normal one is not."""
    z, share = 1.96, right / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def shown_state(row: RowMapping | Mapping[str, Any], *, now: int, silent_after_s: int, refusal: str) -> Shown:
    """What a node is, from what it said last and how long ago: silence outweighs the last word, but for announced sleep."""
    quiet_s = now - row["last_seen"]
    if row["state"] == "sleeping" and now < row["sleeping_until"] + SLEEP_GRACE_S:
        return "asleep"
    if row["state"] == "stopped":
        return "stopped"
    if row["state"] in ("lost", "sleeping") or quiet_s > silent_after_s:
        return "silent"
    if refusal:
        return "refused"
    states: dict[str, Shown] = {"answering": "answering", "updating": "updating", "no-model": "no-model"}
    return states.get(row["state"], "silent")


def all_nodes(ledger: Ledger, *, now: int, silent_after_s: int) -> tuple[Node, ...]:
    """Every node, those that need eyes first."""
    latest = ledger.latest_release()
    with ledger.read() as connection:
        refusals = _refusals(connection, latest.number) if latest else {}
        rows = connection.execute(sa.select(nodes).order_by(nodes.c.name).limit(NODE_LIMIT)).mappings().all()
    found = [_node(row, now, silent_after_s, refusals.get(row["name"], "")) for row in rows]
    return tuple(sorted(found, key=lambda node: (SHOWN.index(node.shown), node.name)))


def node_named(ledger: Ledger, name: str, *, now: int, silent_after_s: int) -> Node | None:
    """One node, or None."""
    return next((node for node in all_nodes(ledger, now=now, silent_after_s=silent_after_s) if node.name == name), None)


def overview(ledger: Ledger, *, now: int, silent_after_s: int) -> Overview:
    """The first page's values."""
    found = all_nodes(ledger, now=now, silent_after_s=silent_after_s)
    latest = ledger.latest_release()
    start, step = span(ledger, now)
    series = _series(ledger, start=start, end=now, step=step)
    asked = next((one.whole for one in series if one.kind == "escalation"), None)
    counts = {state: sum(node.shown == state for node in found) for state in SHOWN}
    sleepers = [node.sleeping_until for node in found if node.shown == "asleep"]
    return Overview(
        nodes=found, counts=counts, asleep_until=min(sleepers, default=0), release=latest.number if latest else 0,
        on_release=sum(node.release == latest.number for node in found) if latest else 0,
        asked=asked.value if asked else None, needs=_needs(ledger, found, latest, now), series=series, span_s=now - start,
    )  # fmt: skip


def timeline(ledger: Ledger, name: str) -> tuple[Happened, ...]:
    """What happened on a node, newest first: starts, changes of state and release, refusals, rounds, questions, corrections."""
    lines: list[Happened] = []
    with ledger.read() as connection:
        starts = sa.select(boots).where(boots.c.node == name).order_by(boots.c.id.desc()).limit(LIST_LIMIT)
        lines += [Happened(row.first_seen, "started", {"boot": row.boot}) for row in connection.execute(starts)]
        before = sa.func.lag(statuses.c.state).over(order_by=statuses.c.id)
        release_before = sa.func.lag(statuses.c.release).over(order_by=statuses.c.id)
        steps = sa.select(statuses, before.label("was"), release_before.label("release_was")).where(statuses.c.node == name).subquery()
        changed = (steps.c.was != steps.c.state) | (steps.c.release_was != steps.c.release)
        for row in connection.execute(sa.select(steps).where(changed).order_by(steps.c.id.desc()).limit(LIST_LIMIT)):
            if row.release != row.release_was:
                lines.append(Happened(row.received, "runs", {"release": row.release, "was": row.release_was}))
            if row.state != row.was:
                level: Literal["", "amber"] = "amber" if row.state in ("lost", "no-model") else ""
                lines.append(Happened(row.received, f"became-{row.state}", {}, level))
        for row in connection.execute(sa.select(events).where(events.c.node == name).order_by(events.c.number.desc()).limit(LIST_LIMIT)):
            level = "amber" if "refused" in row.kind or row.detail.get("state") in ("expired", "refused") else ""
            lines.append(Happened(row.received, row.kind, {**row.figures, **row.detail}, level))
        sent = sa.select(adapters).where(adapters.c.node == name).order_by(adapters.c.id.desc()).limit(LIST_LIMIT)
        for row in connection.execute(sent):
            kind = "round-accepted" if row.accepted else "round-refused"
            lines.append(Happened(row.received, kind, {"round": row.round, "reason": row.reason}, "" if row.accepted else "amber"))
    return _folded(sorted(lines, key=lambda line: line.at, reverse=True)[:LIST_LIMIT])


def _folded(lines: Sequence[Happened]) -> tuple[Happened, ...]:
    """Newest first, with each stretch of everyday work (answers, questions that were answered) as one line."""
    found: list[Happened] = []
    work: list[Happened] = []

    def fold() -> None:
        if len(work) > 2:
            told = {"answered": 0.0, "upgraded": 0.0, "confirmed": 0.0, "since": work[-1].at}
            for line in work:
                told["answered"] += line.values.get("count", 0.0) if line.kind == "answers" else 0.0
                if line.kind == "escalation" and line.values.get("state") in ("upgraded", "confirmed"):
                    told[line.values["state"]] += 1
            found.append(Happened(work[0].at, "worked", told))
        else:
            found.extend(work)
        work.clear()

    for line in lines:
        if line.kind in ("answers", "escalation") and not line.level:
            work.append(line)
        else:
            fold()
            found.append(line)
    fold()
    return tuple(found)


def all_rounds(ledger: Ledger) -> tuple[Round, ...]:
    """The newest rounds first."""
    with ledger.read() as connection:
        found = connection.execute(sa.select(rounds).order_by(rounds.c.id.desc()).limit(LIST_LIMIT)).mappings().all()
        numbers = [row["id"] for row in found]
        sent = connection.execute(sa.select(adapters).where(adapters.c.round.in_(numbers)).order_by(adapters.c.id)).mappings().all()
    by_round = defaultdict(list)
    for row in sent:
        by_round[row["round"]].append(row)
    return tuple(_round(row, by_round[row["id"]]) for row in found)


def round_numbered(ledger: Ledger, number: int) -> Round | None:
    """One round, or None."""
    with ledger.read() as connection:
        row = connection.execute(sa.select(rounds).where(rounds.c.id == number)).mappings().one_or_none()
        if row is None:
            return None
        sent = connection.execute(sa.select(adapters).where(adapters.c.round == number).order_by(adapters.c.id)).mappings().all()
    return _round(row, sent)


def escalations(ledger: Ledger, *, now: int, silent_after_s: int) -> Escalations:
    """All about asking, over the span that the overview shows."""
    start, step = span(ledger, now)
    state, peer = events.c.detail["state"].as_string(), events.c.detail["peer"].as_string()
    asked_here = (events.c.kind == "escalation") & (events.c.received >= start)
    known = {node.name: node for node in all_nodes(ledger, now=now, silent_after_s=silent_after_s)}
    with ledger.read() as connection:
        tally = connection.execute(
            sa.select(peer, state, sa.func.count(), sa.func.max(events.c.received)).where(asked_here).group_by(peer, state)
        ).all()
        seconds = defaultdict(list)
        recent = sa.select(peer, events.c.figures["seconds"].as_float()).where(asked_here).order_by(events.c.number.desc()).limit(5_000)
        for name, took in connection.execute(recent):
            if name and took is not None:
                seconds[name].append(took)
        late = sa.select(events).where(asked_here, state.in_(("expired", "refused"))).order_by(events.c.received.desc()).limit(50)
        unanswered = tuple(
            Escalation(row.node, row.detail.get("peer", ""), row.detail["state"], row.figures.get("confidence"), row.received,
                       row.detail.get("reason", ""))
            for row in connection.execute(late)
        )  # fmt: skip
    counts: dict[str, int] = defaultdict(int)
    by_peer: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    last: dict[str, int] = defaultdict(int)
    for name, what, count, newest in tally:
        counts[what or ""] += count
        if name:
            by_peer[name][what or ""] += count
            last[name] = max(last[name], newest)
    peers = tuple(
        Peer(
            name=name, asked=sum(states.values()), answered=states["upgraded"] + states["confirmed"], expired=states["expired"],
            refused=states["refused"], p50_s=_quantile(seconds[name], 0.5), p95_s=_quantile(seconds[name], 0.95), last=last[name],
            node=known.get(name),
        )
        for name, states in sorted(by_peer.items())
    )  # fmt: skip
    checked = counts["confirmed"] + counts["upgraded"]
    confirmed = None
    if checked:
        low, high = wilson(counts["confirmed"], checked)
        confirmed = Point(now, counts["confirmed"] / checked, low, high, checked)
    share = next((one.whole for one in _series(ledger, start=start, end=now, step=step) if one.kind == "escalation"), None)
    return Escalations(
        total=sum(counts.values()), counts=dict(counts), confirmed=confirmed, peers=peers, unanswered=unanswered,
        asked=share.value if share else None, newest=max(last.values(), default=0),
    )  # fmt: skip


def audit_rows(ledger: Ledger, *, before: int | None = None, limit: int = LIST_LIMIT) -> tuple[AuditRow, ...]:
    """The newest audit rows, or those before row `before`."""
    query = sa.select(audit).order_by(audit.c.id.desc()).limit(limit)
    if before is not None:
        query = query.where(audit.c.id < before)
    with ledger.read() as connection:
        return tuple(AuditRow(r.id, r.at, r.actor, r.action, r.subject, r.detail, r.hash) for r in connection.execute(query))


def refused_messages(ledger: Ledger, *, since: int = 0) -> tuple[RefusedMessage, ...]:
    """The newest refused messages."""
    query = sa.select(refused).where(refused.c.received >= since).order_by(refused.c.id.desc()).limit(50)
    with ledger.read() as connection:
        return tuple(RefusedMessage(r.topic, r.size, r.reason, r.received) for r in connection.execute(query))


def span(ledger: Ledger, now: int) -> tuple[int, int]:
    """(start, seconds a step) of what charts show: the shortest of SPANS that holds all there is, at most 30 days."""
    with ledger.read() as connection:
        oldest = connection.execute(
            sa.select(
                sa.select(sa.func.min(statuses.c.received)).scalar_subquery(), sa.select(sa.func.min(events.c.received)).scalar_subquery()
            )
        ).one()
    first = min((time for time in oldest if time is not None), default=now)
    length, step = next((one for one in SPANS if now - first <= one[0]), SPANS[-1])
    return now - length, step


def _node(row: RowMapping, now: int, silent_after_s: int, refusal: str) -> Node:
    shown = shown_state(row, now=now, silent_after_s=silent_after_s, refusal=refusal)
    plain = {key: row[key] for key in Node.__struct_fields__ if key in row}
    return Node(shown=shown, refusal=refusal, **plain)


def _refusals(connection: sa.Connection, number: int) -> dict[str, str]:
    """Node -> why, of those whose last word about release `number` was no."""
    mine = (
        sa.select(events).where(events.c.kind.in_(("release-refused", "release-activated"))).order_by(events.c.number.desc()).limit(5_000)
    )
    said: dict[str, str] = {}
    for row in connection.execute(mine):
        if int(row.figures.get("number", -1)) == number:
            said.setdefault(row.node, (row.detail.get("reason") or "no reason given") if row.kind == "release-refused" else "")
    return {node: reason for node, reason in said.items() if reason}


def _needs(ledger: Ledger, found: Sequence[Node], latest: PublishedRelease | None, now: int) -> tuple[Need, ...]:
    needs: list[Need] = []
    for node in found:
        values = {"node": node.name, "since": node.last_seen, "reason": node.refusal, "release": node.release}
        href = f"/nodes/{node.name}"
        if node.shown == "refused":
            needs.append(Need("refused", "red", href, "see-reason", values))
        elif node.shown == "no-model":
            needs.append(Need("no-model", "red", href, "see-node", values))
        elif node.shown == "silent":
            needs.append(Need("silent", "amber", href, "see-node", values))
        elif node.shown == "answering" and latest and node.release < latest.number and now - latest.published > BEHIND_S:
            needs.append(Need("behind", "amber", href, "see-node", values | {"latest": latest.number}))
    if latest and latest.evidence is None:
        needs.append(Need("no-evidence", "amber", f"/releases/{latest.number}", "see-release", {"release": latest.number}))
    needs += [
        Need("round-overdue", "amber", f"/rounds/{one.id}", "see-round", {"round": one.id, "since": one.deadline})
        for one in all_rounds(ledger)[:20]
        if one.closed is None and now > one.deadline
    ]
    with ledger.read() as connection:
        day = (events.c.kind == "escalation") & (events.c.received >= now - 86_400)
        state = events.c.detail["state"].as_string()
        tally = connection.execute(sa.select(state, sa.func.count()).where(day).group_by(state)).all()
        by_state: dict[str | None, int] = {row[0]: row[1] for row in tally}
        turned_away = connection.scalar(sa.select(sa.func.count()).select_from(refused).where(refused.c.received >= now - 86_400)) or 0
    total, expired = sum(by_state.values()), by_state.get("expired", 0)
    if total >= 10 and expired / total > EXPIRED_SHARE:
        needs.append(Need("expired", "amber", "/escalations", "see-peers", {"count": expired, "total": total}))
    if turned_away:
        needs.append(Need("messages-refused", "amber", "/audit#refused", "see-messages", {"count": turned_away, "n": turned_away}))
    broken = ledger.broken_audit()
    if broken is not None:
        needs.append(Need("audit-broken", "red", "/audit", "see-audit", {"row": broken}))
    return tuple(sorted(needs, key=lambda need: need.level != "red"))


def _series(ledger: Ledger, *, start: int, end: int, step: int) -> tuple[Series, ...]:
    """The four small charts: confirmed and asked always; data and energy where nodes report them, else latency and answers."""
    marks = tuple((kept.published, kept.number) for kept in ledger.releases() if start <= kept.published <= end)
    bucket = (statuses.c.received - start) // step
    counted = (
        sa.select(statuses.c.node, statuses.c.boot, bucket.label("bucket"), sa.func.max(statuses.c.answered).label("answered"),
                  sa.func.max(statuses.c.escalated).label("escalated"), sa.func.max(statuses.c.received).label("newest"))
        .where(statuses.c.received >= start, statuses.c.received <= end)
        .group_by(statuses.c.node, statuses.c.boot, bucket).order_by(statuses.c.node, statuses.c.boot, bucket)
    )  # fmt: skip
    event_bucket = (events.c.received - start) // step
    within = (events.c.received >= start) & (events.c.received <= end)
    state = events.c.detail["state"].as_string()
    checked = (
        sa.select(event_bucket, state, sa.func.count(), sa.func.max(events.c.received))
        .where(within, events.c.kind == "escalation", state.in_(("confirmed", "upgraded"))).group_by(event_bucket, state)
    )  # fmt: skip
    summaries = sa.select(event_bucket, events.c.figures, events.c.received).where(within, events.c.kind == "answers").limit(50_000)
    steps = (end - start + step - 1) // step
    answered, escalated, right, all_checked = ([0] * (steps + 1) for _ in range(4))
    latency: list[list[float]] = [[] for _ in range(steps + 1)]
    sums: dict[str, list[float]] = {}
    newest: dict[str, int] = defaultdict(int)
    with ledger.read() as connection:
        last: dict[tuple[str, str], tuple[int, int]] = {}
        for row in connection.execute(counted):
            before = last.get((row.node, row.boot), (0, 0))
            answered[row.bucket] += max(0, row.answered - before[0])
            escalated[row.bucket] += max(0, row.escalated - before[1])
            last[row.node, row.boot] = (row.answered, row.escalated)
            newest["answers"] = max(newest["answers"], row.newest)
        for at, what, count, latest in connection.execute(checked):
            all_checked[at] += count
            right[at] += count if what == "confirmed" else 0
            newest["confirmed"] = max(newest["confirmed"], latest)
        for at, figures, received in connection.execute(summaries):
            if "latency_p50_ms" in figures:
                latency[at].append(figures["latency_p50_ms"])
                newest["latency"] = max(newest["latency"], received)
            for name in ("data_bytes", "energy_wh"):
                if name in figures:
                    sums.setdefault(name, [0.0] * (steps + 1))[at] += figures[name]
                    newest[name] = max(newest[name], received)

    def made(kind: str, unit: Any, points: Sequence[Point], whole: Point | None, source: str) -> Series:
        latest = next((point for point in reversed(points) if point.value is not None), None)
        age = max(0, end - newest[source]) if newest[source] else 0
        return Series(kind, unit, tuple(points), start, end, marks, latest, whole, age)

    times = [min(end, start + number * step + step // 2) for number in range(steps)]
    shares = [
        made("confirmed", "share", *_shares(times, right, all_checked), "confirmed"),
        made("escalation", "share", *_shares(times, escalated, answered), "answers"),
    ]
    others = [
        made(name, unit, [Point(at, value or None) for at, value in zip(times, sums[name], strict=False)],
             Point(end, sum(sums[name])), name)
        for name, unit in (("data_bytes", "bytes"), ("energy_wh", "wh")) if name in sums
    ]  # fmt: skip
    medians = [Point(at, sum(found) / len(found) if found else None, n=len(found)) for at, found in zip(times, latency, strict=False)]
    flat = [value for found in latency for value in found]
    others.append(made("latency", "ms", medians, Point(end, sum(flat) / len(flat), n=len(flat)) if flat else None, "latency"))
    counts = [Point(at, float(value) if value else None) for at, value in zip(times, answered, strict=False)]
    others.append(made("answers", "count", counts, Point(end, float(sum(answered))) if sum(answered) else None, "answers"))
    return tuple(shares + others[:2])


def _shares(times: Sequence[int], right: Sequence[int], total: Sequence[int]) -> tuple[list[Point], Point | None]:
    points = []
    for at, part, n in zip(times, right, total, strict=False):
        part = min(part, n)  # a question may be counted in the step after its answer
        points.append(Point(at, part / n, *wilson(part, n), n) if n else Point(at, None))
    n, part = sum(total), min(sum(right), sum(total))
    return points, Point(times[-1] if times else 0, part / n, *wilson(part, n), n) if n else None


def _round(row: RowMapping, sent: Sequence[RowMapping]) -> Round:
    result = row["result"] if isinstance(row["result"], dict) else {}
    replies = []
    for reply in sent:
        header = reply["header"] or {}
        replies.append(
            ReplyRow(
                node=reply["node"], accepted=reply["accepted"], reason=reply["reason"], received=reply["received"],
                late_s=max(0, reply["received"] - row["opened"]), examples=header.get("examples"), rank=header.get("rank"),
                loss_before=header.get("loss_before") or None, loss_after=header.get("loss_after") or None, digest=reply["digest"],
            )
        )  # fmt: skip
    published = result.get("published") or result.get("release") or 0
    reasons = result.get("reasons")
    return Round(
        id=row["id"], release=row["release"], asked=tuple(row["asked"]), opened=row["opened"], deadline=row["deadline"],
        closed=row["closed"], replies=tuple(replies), decision=str(result.get("decision", "")),
        published=published if isinstance(published, int) and not isinstance(published, bool) else 0,
        reasons=tuple(str(reason) for reason in reasons) if isinstance(reasons, list) else (),
        changes=_changes(result), relative_error=_number(result.get("relative_error")),
    )  # fmt: skip


def _changes(result: Mapping[str, Any]) -> tuple[SiteChange, ...]:
    """Comparisons wherever a round's result keeps them: lists or mappings of objects with `before` and `after`."""
    found: list[SiteChange] = []

    def visit(value: Any, name: str) -> None:
        if isinstance(value, dict):
            before, after = _number(value.get("before")), _number(value.get("after"))
            if before is not None and after is not None:
                low, high, n = _number(value.get("low")), _number(value.get("high")), _number(value.get("n"))
                found.append(SiteChange(str(value.get("name", name)), before, after, low, high, int(n) if n is not None else None))
            else:
                for key, inner in value.items():
                    visit(inner, str(key))
        elif isinstance(value, list):
            for inner in value:
                visit(inner, name)

    visit(dict(result), "")
    return tuple({change.name: change for change in found}.values())


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None


def _quantile(values: Sequence[float], share: float) -> float | None:
    if not values:
        return None
    return sorted(values)[min(len(values) - 1, math.ceil(share * len(values)) - 1)]
