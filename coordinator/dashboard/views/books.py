"""The audit, and the messages that were refused."""

from typing import Any

import msgspec
import sqlalchemy as sa

from coordinator.dashboard.views import LIST_LIMIT
from coordinator.fleet.ledger import Ledger
from coordinator.fleet.tables import audit, refused


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
