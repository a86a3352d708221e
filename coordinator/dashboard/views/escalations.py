"""What asking peers brought, over the span that the overview shows."""

import math
from collections import defaultdict
from collections.abc import Sequence

import msgspec
import sqlalchemy as sa

from coordinator.dashboard.views.nodes import Node, all_nodes
from coordinator.dashboard.views.series import Point, over_time, span, wilson
from coordinator.fleet.ledger import Ledger
from coordinator.fleet.tables import events


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


def about_asking(ledger: Ledger, *, now: int, silent_after_s: int) -> Escalations:
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
    share = next((one.whole for one in over_time(ledger, start=start, end=now, step=step) if one.kind == "escalation"), None)
    return Escalations(
        total=sum(counts.values()), counts=dict(counts), confirmed=confirmed, peers=peers, unanswered=unanswered,
        asked=share.value if share else None, newest=max(last.values(), default=0),
    )  # fmt: skip


def _quantile(values: Sequence[float], share: float) -> float | None:
    if not values:
        return None
    return sorted(values)[min(len(values) - 1, math.ceil(share * len(values)) - 1)]
