import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from node.store import Store, counts, is_held_out, read_answers
from protocol.errors import BadInput


def test_the_file_survives_a_power_cut_by_its_settings(tmp_path: Path) -> None:
    store = Store(tmp_path / "node.db")

    with store.transaction() as session:
        found = [session.execute(text(f"PRAGMA {name}")).scalar() for name in ("journal_mode", "synchronous", "busy_timeout")]

    assert found == ["wal", 2, 10_000]
    store.close()


def test_a_second_writer_waits_for_the_first(tmp_path: Path) -> None:
    one, two = Store(tmp_path / "node.db"), Store(tmp_path / "node.db")
    inside, done = threading.Event(), threading.Event()

    def write_in_between() -> None:
        inside.wait(10)
        two.refuse("second", reason="r", origin="api", now=2.0)
        done.set()

    other = threading.Thread(target=write_in_between)
    other.start()
    with one.transaction() as session:
        session.execute(text("INSERT INTO refused (created, origin, reason, text) VALUES (1, 'api', 'r', 'first')"))
        inside.set()
        blocked = not done.wait(0.2)
    other.join(20)

    assert blocked and done.is_set()
    with one.transaction() as session:
        assert list(session.scalars(text("SELECT text FROM refused ORDER BY row"))) == ["first", "second"]
    one.close()
    two.close()


def test_an_exception_undoes_the_whole_transaction(tmp_path: Path) -> None:
    store = Store(tmp_path / "node.db")

    with pytest.raises(RuntimeError), store.transaction() as session:
        session.execute(text("INSERT INTO meta (key, value) VALUES ('a', 'b')"))
        raise RuntimeError("kill")

    with store.transaction() as session:
        assert session.scalar(text("SELECT count(*) FROM meta WHERE key = 'a'")) == 0
    store.close()


def test_a_file_that_is_no_database_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "node.db").write_text("this is a shopping list, and a long one at that " * 100)

    with pytest.raises(BadInput, match="as a database"):
        Store(tmp_path / "node.db")


def test_a_file_of_a_newer_milpa_is_left_alone(tmp_path: Path) -> None:
    Store(tmp_path / "node.db").close()
    with sqlite3.connect(tmp_path / "node.db") as connection:
        connection.execute("UPDATE meta SET value = '99' WHERE key = 'schema'")
    connection.close()

    with pytest.raises(BadInput, match="newer Milpa"):
        Store(tmp_path / "node.db")


def test_old_answers_are_pruned_and_open_questions_and_examples_kept(unsure: Any) -> None:
    given = [unsure.answer(f"window {number}") for number in range(6)]
    for one in given[1:]:
        unsure.answering.correct(one.id, verdict="leak", text="a pipe")

    gone = unsure.store.prune(answers=2)

    assert gone == 3
    with unsure.store.transaction() as session:
        assert counts(session) == {"corrected": 2, "provisional": 1}
    assert unsure.store.example_count("ranch") == 5


def test_refused_input_is_bounded(unsure: Any) -> None:
    for number in range(5):
        unsure.answering.refuse(f"bad {number}", reason="because", origin="api")

    unsure.store.prune(refused=2)

    assert len(unsure.refused()) == 2


def test_changes_are_numbered_so_that_no_upgrade_is_missed(sure: Any) -> None:
    first, second = sure.answer("a"), sure.answer("b")
    with sure.store.transaction() as session:
        seen = read_answers(session, since=0, limit=10)[-1].change
    sure.answering.correct(first.id, verdict="leak", text="a pipe")

    with sure.store.transaction() as session:
        news = [row.id for row in read_answers(session, since=seen, limit=10)]

    assert news == [first.id] and second.id not in news


def test_one_example_in_five_is_held_out_and_always_the_same() -> None:
    keys = [f"{number * 2654435761 % 2**32:08x}" + "0" * 56 for number in range(1000)]

    held = [key for key in keys if is_held_out(key)]

    assert 150 < len(held) < 250
    assert held == [key for key in keys if is_held_out(key)]
