"""Rounds: who was asked, who answered, what came of it."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy import RowMapping

from coordinator.dashboard.views import LIST_LIMIT
from coordinator.fleet.ledger import Ledger
from coordinator.fleet.tables import adapters, rounds


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
