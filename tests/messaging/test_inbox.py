"""protocol/inbox.py: applied once, whatever is delivered how often and killed when."""

import pytest
import sqlalchemy as sa

from protocol.errors import BadInput
from protocol.inbox import PRUNE_EVERY, Inbox, inbox


def take(box: Inbox, database, source: str, id: str) -> bool:
    with database.begin() as connection:
        return box.take(connection, source, id)


def test_a_message_is_taken_once_also_after_a_restart(database):
    assert take(Inbox(database), database, "esteli", "1") is True
    assert take(Inbox(database), database, "esteli", "1") is False


def test_two_sources_may_use_the_same_id(database):
    box = Inbox(database)

    assert take(box, database, "esteli", "1")
    assert take(box, database, "malacatoya", "1")


def test_an_id_shares_the_fate_of_what_it_did(database):
    box = Inbox(database)
    with pytest.raises(ZeroDivisionError), database.begin() as connection:
        box.take(connection, "esteli", "1")
        raise ZeroDivisionError

    assert take(box, database, "esteli", "1") is True


def test_what_is_remembered_is_bounded_for_each_source_and_the_newest_stay(database):
    box = Inbox(database, horizon=100)
    with database.begin() as connection:
        box.take(connection, "quiet", "an old one")
        for number in range(3 * PRUNE_EVERY):
            assert box.take(connection, "chatty", str(number))
        kept = connection.execute(sa.select(sa.func.count()).where(inbox.c.source == "chatty")).scalar_one()

        assert kept <= 100 + PRUNE_EVERY
        assert box.take(connection, "chatty", str(3 * PRUNE_EVERY - 50)) is False
        assert box.take(connection, "quiet", "an old one") is False


@pytest.mark.parametrize(("source", "id"), [("", "1"), ("esteli", "")])
def test_a_message_that_cannot_be_recognised_again_is_refused(database, source, id):
    box = Inbox(database)

    with pytest.raises(BadInput), database.begin() as connection:
        box.take(connection, source, id)
