"""Patterns that leave the site: only those the operator marked, each one by name, and only over a link rich enough.

The one exception to "no text leaves": an event `pattern` with what is seen and what it means. It goes through the outbox like any event, so
it is in the coordinator's ledger before the node forgets that it was sent. What has left cannot be called back; a changed pattern leaves
again, if it is still marked.
Limits: AT_ONCE patterns every EVERY_S seconds.
"""

import time
from collections.abc import Callable
from typing import Any, Protocol

from sqlalchemy.orm import Session

from node.memory import table
from node.store import Store

EVERY_S = 60.0  # seconds between looks
AT_ONCE = 10  # patterns
ENVELOPE_BYTES = 600  # of an event and its way through the broker, beside the text
EVENT = "pattern"  # kind of the event

MaySpend = Callable[[int], bool]  # bytes


class Report(Protocol):
    """Puts an event into the outbox inside the caller's transaction; sends nothing."""

    def __call__(self, session: Session, kind: str, figures: dict[str, float], detail: dict[str, str], /) -> Any:
        """Queue the event."""


class Sharing:
    """Looks for patterns to share. Called by the daemon's own thread."""

    def __init__(
        self, store: Store, *, report: Report | None, may_spend: MaySpend | None, clock: Callable[[], float],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._store, self._report, self._may_spend = store, report, may_spend or (lambda _: True)
        self._clock, self._monotonic = clock, monotonic
        self._next = 0.0

    def sweep(self) -> int:
        """Queue what may leave now, each in the transaction that notes it; how many."""
        if self._report is None or self._monotonic() < self._next:
            return 0
        self._next = self._monotonic() + EVERY_S
        left = 0
        with self._store.transaction() as session:
            for row in table.to_share(session, limit=AT_ONCE):
                detail = {"key": row.key, "task": row.task, "lang": row.lang, "when": row.source, "means": row.text}
                if not self._may_spend(ENVELOPE_BYTES + sum(len(text.encode()) for text in detail.values())):
                    break
                self._report(session, EVENT, {}, detail)
                row.shared = self._clock()
                left += 1
        return left
