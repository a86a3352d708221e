"""How every node is, for a person, and what happened on it."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
import sqlalchemy as sa
from sqlalchemy import RowMapping

from coordinator.dashboard.views import LIST_LIMIT
from coordinator.fleet.ledger import Ledger
from coordinator.fleet.tables import adapters, boots, events, nodes, statuses

NODE_LIMIT = 2_000
SLEEP_GRACE_S = 600  # a board without a clock wakes late

Shown = Literal["answering", "asleep", "updating", "silent", "refused", "no-model", "stopped"]
SHOWN: tuple[Shown, ...] = ("refused", "no-model", "silent", "stopped", "updating", "asleep", "answering")  # what needs eyes comes first


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


class Happened(msgspec.Struct, frozen=True):
    """One line of a node's timeline. `kind` is a key of the catalogue."""

    at: int
    kind: str
    values: dict[str, Any]
    level: Literal["", "amber", "red"] = ""


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
