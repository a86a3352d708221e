"""What was applied already: a second delivery changes nothing. In the receiver's own database, in the transaction that applies.

    with store.transaction() as session:
        if inbox.take(session, source, id):
            ...apply...

MQTT's QoS 1 delivers at least once, senders repeat until they hear an acknowledgement, and both survive kills; so the same message may
come minutes or weeks later. The id is remembered in the same transaction as its effect: after any kill there are both or neither.

Limit: the newest HORIZON ids of each source. A sender has at most its outbox (20,000) and its broker's queue (100,000) to repeat.
"""

from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from protocol.errors import BadInput
from protocol.outbox import Executes

HORIZON = 120_000  # ids of one source; about 100 bytes each
PRUNE_EVERY = 512  # ids between two prunings

metadata = sa.MetaData()

inbox = sa.Table(
    "inbox", metadata,
    sa.Column("position", sa.Integer, primary_key=True),  # order of application
    sa.Column("source", sa.String(128), nullable=False),  # who numbers its messages: a node, "site"
    sa.Column("id", sa.String(128), nullable=False),
    sa.UniqueConstraint("source", "id"),
    sa.Index("inbox_order", "source", "position"),
    sqlite_autoincrement=True,
)  # fmt: skip


class Inbox:
    """The ids that were applied, in `engine`'s database. Makes its table."""

    def __init__(self, engine: sa.Engine, *, horizon: int = HORIZON) -> None:
        if horizon < 1:
            raise BadInput("an inbox that remembers nothing applies everything twice; the horizon must be at least 1")
        self.horizon = horizon
        metadata.create_all(engine)

    def take(self, session: Executes, source: str, id: str) -> bool:
        """Remember `id` inside the caller's transaction. False: it was applied before, do nothing (but acknowledge it again).

        Raises:
            BadInput: no source or no id: then a second delivery could not be told from a first.
        """
        if not source or not id:
            raise BadInput("a message needs a source and an id: without them its second delivery cannot be recognised")
        done = session.execute(insert(inbox).values(source=source, id=id).on_conflict_do_nothing(index_elements=["source", "id"]))
        if done.rowcount == 0:
            return False
        position = int(done.inserted_primary_key[0])
        if position % PRUNE_EVERY == 0:
            self._prune(session, source)
        return True

    def _prune(self, session: Executes, source: str) -> None:
        mine = inbox.c.source == source
        last: Any = session.execute(sa.select(inbox.c.position).where(mine).order_by(inbox.c.position.desc()).offset(self.horizon).limit(1))
        oldest_kept = last.scalar_one_or_none()
        if oldest_kept is not None:
            session.execute(sa.delete(inbox).where(mine, inbox.c.position <= oldest_kept))
