"""The first page, and what needs a person."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
import sqlalchemy as sa

from coordinator.dashboard.views.nodes import SHOWN, Node, Shown, all_nodes
from coordinator.dashboard.views.rounds import all_rounds
from coordinator.dashboard.views.series import Series, over_time, span
from coordinator.fleet.ledger import Ledger, PublishedRelease
from coordinator.fleet.tables import events, refused

EXPIRED_SHARE = 0.2  # of a day's questions; above it a person should look at the peers
BEHIND_S = 3_600  # a node that answers but has not taken a release for so long is told


class Need(msgspec.Struct, frozen=True):
    """Something that needs a person, with the one thing to do. `kind` and `action` are keys of the catalogue."""

    kind: str
    level: Literal["red", "amber"]
    href: str
    action: str
    values: dict[str, Any]


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


def first_page(ledger: Ledger, *, now: int, silent_after_s: int) -> Overview:
    """The first page's values."""
    found = all_nodes(ledger, now=now, silent_after_s=silent_after_s)
    latest = ledger.latest_release()
    start, step = span(ledger, now)
    series = over_time(ledger, start=start, end=now, step=step)
    asked = next((one.whole for one in series if one.kind == "escalation"), None)
    counts = {state: sum(node.shown == state for node in found) for state in SHOWN}
    sleepers = [node.sleeping_until for node in found if node.shown == "asleep"]
    return Overview(
        nodes=found, counts=counts, asleep_until=min(sleepers, default=0), release=latest.number if latest else 0,
        on_release=sum(node.release == latest.number for node in found) if latest else 0,
        asked=asked.value if asked else None, needs=_needs(ledger, found, latest, now), series=series, span_s=now - start,
    )  # fmt: skip


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
