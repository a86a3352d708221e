"""What the ledger promises, on SQLite and on PostgreSQL: the same tests, one subclass each."""

import itertools
import multiprocessing
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from coordinator.fleet import ledger as ledger_module
from coordinator.fleet import tables
from coordinator.fleet.ledger import Ledger
from protocol.adapters import AdapterHeader, Module
from protocol.errors import BadInput, Unavailable
from protocol.messages import Event, Status
from protocol.releases import Release, ReleaseFile

NOW = 1_700_000_000


def status(sequence: int = 1, *, boot: str = "boot-a", state: str = "answering", **more: object) -> Status:
    return Status(node="esteli", boot=boot, sequence=sequence, state=state, **more)  # type: ignore[arg-type]


def release(number: int = 1, note: str = "first") -> Release:
    file = ReleaseFile(name="student.gguf", role="student", kind="model", digest="a" * 64, size=10)
    return Release(number=number, task="ranch", created=NOW, files=(file,), note=note)


HEADER = AdapterHeader(
    site="esteli", release=1, base_digest="a" * 64, initial_digest="b" * 64, rank=4, alpha=8.0,
    modules=(Module("blk.0.attn_q.weight", 8, 8),), examples=40, loss_before=1.5, loss_after=1.25,
)  # fmt: skip


def rows(ledger: Ledger, table: sa.Table) -> list[sa.RowMapping]:
    with ledger.read() as connection:
        return list(connection.execute(sa.select(table)).mappings())


def node(ledger: Ledger) -> sa.RowMapping:
    (found,) = rows(ledger, tables.nodes)
    return found


def write_events(url: str, writer: int, count: int) -> None:
    ledger = Ledger(url)
    for number in range(count):
        ledger.add_event(Event(id=f"{writer}-{number}", node="esteli", kind="answers"), NOW)
        ledger.note("test", "wrote", f"{writer}-{number}")
    ledger.close()


class LedgerContract:
    @pytest.fixture
    def url(self) -> str:
        raise NotImplementedError

    @pytest.fixture
    def ledger(self, url: str) -> Iterator[Ledger]:
        ledger = Ledger(url, clock=lambda: NOW)
        ledger.migrate()
        yield ledger
        ledger.close()

    def test_migrations_build_exactly_the_tables_the_program_expects(self, ledger):
        with ledger.read() as connection:
            differences = compare_metadata(MigrationContext.configure(connection), tables.metadata)

        assert differences == []

    def test_migrating_twice_changes_nothing(self, ledger):
        ledger.add_event(Event(id="e1", node="esteli", kind="answers"), NOW)

        ledger.migrate()

        assert len(rows(ledger, tables.events)) == 1

    def test_a_ledger_of_a_newer_program_is_refused_with_what_to_do(self, ledger):
        with ledger.write() as connection:
            connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")

        with pytest.raises(BadInput, match="newer Milpa"):
            ledger.migrate()

    def test_a_first_status_makes_the_node_known(self, ledger):
        assert ledger.seen_status(status(release=3, answered=5), NOW)

        assert (node(ledger)["state"], node(ledger)["release"], node(ledger)["first_seen"]) == ("answering", 3, NOW)

    def test_the_same_status_twice_is_applied_once(self, ledger):
        ledger.seen_status(status(1), NOW)

        assert not ledger.seen_status(status(1), NOW + 60)
        assert node(ledger)["last_seen"] == NOW

    def test_a_sequence_going_back_within_a_boot_is_ignored(self, ledger):
        ledger.seen_status(status(5, release=2), NOW)

        assert not ledger.seen_status(status(4, release=1), NOW + 1)
        assert node(ledger)["release"] == 2

    def test_a_new_boot_starts_its_own_count(self, ledger):
        ledger.seen_status(status(90, answered=500), NOW)

        assert ledger.seen_status(status(1, boot="boot-b", answered=0), NOW + 60)
        assert (node(ledger)["boot"], node(ledger)["answered"]) == ("boot-b", 0)

    def test_a_late_death_of_an_older_boot_does_not_bury_the_living(self, ledger):
        ledger.seen_status(status(7), NOW)
        ledger.seen_status(status(1, boot="boot-b"), NOW + 60)

        assert not ledger.seen_status(status(0, state="lost"), NOW + 61)
        assert node(ledger)["state"] == "answering"

    def test_a_death_of_the_current_boot_counts_although_its_sequence_is_old_and_keeps_the_counters(self, ledger):
        ledger.seen_status(status(7, answered=12, release=2), NOW)

        assert ledger.seen_status(status(0, state="lost"), NOW + 100)
        assert [node(ledger)[key] for key in ("state", "answered", "release", "last_seen")] == ["lost", 12, 2, NOW]

    def test_a_late_death_of_an_earlier_connection_does_not_bury_the_living(self, ledger):
        ledger.seen_status(status(7, connection=1), NOW)
        ledger.seen_status(status(8, connection=2), NOW + 60)

        assert not ledger.seen_status(status(0, state="lost", connection=1), NOW + 61)
        assert node(ledger)["state"] == "answering"
        assert ledger.seen_status(status(0, state="lost", connection=2), NOW + 62)

    @pytest.mark.parametrize("goodbye", ["sleeping", "stopped"])
    def test_a_death_after_a_goodbye_is_no_alarm(self, ledger, goodbye):
        ledger.seen_status(status(7, state=goodbye, connection=1), NOW)

        assert not ledger.seen_status(status(0, state="lost", connection=1), NOW + 90)
        assert node(ledger)["state"] == goodbye

    def test_a_node_that_was_lost_and_reconnects_is_alive_again(self, ledger):
        ledger.seen_status(status(7), NOW)
        ledger.seen_status(status(0, state="lost"), NOW + 100)

        assert ledger.seen_status(status(8), NOW + 130)
        assert node(ledger)["state"] == "answering"

    def test_status_history_is_bounded_for_each_node(self, ledger, monkeypatch):
        monkeypatch.setattr(ledger_module, "STATUS_LIMIT", 10)

        for sequence in range(1, 129):
            ledger.seen_status(status(sequence), NOW + sequence)

        kept = [row["sequence"] for row in rows(ledger, tables.statuses)]
        assert kept == list(range(119, 129))

    @pytest.mark.parametrize("wrong", [{"boot": "x" * 65}, {"answered": -1}, {"sequence": 2**60}, {"version": "a\x00b"}])
    def test_a_status_out_of_bounds_is_refused_and_changes_nothing(self, ledger, wrong):
        with pytest.raises(BadInput):
            ledger.seen_status(Status(**{"node": "esteli", "boot": "b", "sequence": 1, "state": "answering"} | wrong), NOW)

        assert rows(ledger, tables.nodes) == []

    def test_an_event_delivered_twice_is_kept_once(self, ledger):
        event = Event(id="e1", node="esteli", kind="escalation", figures={"confidence": 0.4}, detail={"state": "upgraded", "peer": "base"})

        assert ledger.add_event(event, NOW)
        assert not ledger.add_event(event, NOW + 5)
        assert [(row["received"], row["detail"]["peer"]) for row in rows(ledger, tables.events)] == [(NOW, "base")]

    def test_no_site_text_enters_through_an_event(self, ledger):
        detail = {"state": "upgraded", "prompt": "la bomba no jala", "reason": "late\x00\nvery"}

        ledger.add_event(Event(id="e1", node="esteli", kind="escalation", detail=detail), NOW)

        (row,) = rows(ledger, tables.events)
        assert row["detail"] == {"state": "upgraded", "reason": "late  very"}

    def test_a_pattern_brings_the_text_its_operator_let_go_and_nothing_else(self, ledger):
        detail = {"key": "5f", "lang": "es", "when": "chuco", "means": "panel-soiled: limpie", "prompt": "la bomba no jala"}

        for number, kind in enumerate(("pattern", "answers")):
            ledger.add_event(Event(id=f"e{number}", node="esteli", kind=kind, detail=detail), NOW)

        assert [sorted(row["detail"]) for row in rows(ledger, tables.events)] == [["key", "lang", "means", "when"], []]

    def test_an_event_without_an_id_is_refused(self, ledger):
        with pytest.raises(BadInput, match="no id"):
            ledger.add_event(Event(id="", node="esteli", kind="answers"), NOW)

    def test_a_refused_message_is_kept_short_and_the_oldest_fall_out(self, ledger, monkeypatch):
        monkeypatch.setattr(ledger_module, "REFUSED_LIMIT", 3)

        for number in range(5):
            ledger.add_refused("milpa/v1/node/x/event", bytes([number]) * 5_000, "does not decode", NOW + number)

        kept = rows(ledger, tables.refused)
        assert [(row["received"] - NOW, len(row["payload"]), row["size"]) for row in kept] == [
            (number, ledger_module.PAYLOAD_LIMIT, 5_000) for number in (2, 3, 4)
        ]

    def test_a_release_comes_back_as_it_was_published(self, ledger):
        assert ledger.add_release(release(), {"teacher": {"chrf": 50.0}}, NOW)

        (kept,) = ledger.releases()
        assert (kept.manifest, kept.evidence, kept.published) == (release(), {"teacher": {"chrf": 50.0}}, NOW)
        assert ledger.latest_release() == kept

    def test_a_release_number_is_never_reused(self, ledger):
        ledger.add_release(release(1), None, NOW)

        assert not ledger.add_release(release(1), None, NOW + 1)
        with pytest.raises(BadInput, match="never reused"):
            ledger.add_release(release(1, note="another"), None, NOW + 2)

    def test_evidence_may_arrive_after_its_release(self, ledger):
        ledger.add_release(release(1), None, NOW)

        ledger.add_release(release(1), {"student": {}}, NOW + 1)

        assert ledger.latest_release().evidence == {"student": {}}

    def test_a_reply_to_a_round_is_kept_once_and_refusals_are_rows(self, ledger):
        number = ledger.open_round(1, ["esteli", "malacatoya"], NOW + 600)

        assert ledger.add_reply(number, "esteli", HEADER, "c" * 64, True, "", NOW)
        assert not ledger.add_reply(number, "esteli", HEADER, "c" * 64, True, "", NOW + 1)
        assert ledger.add_reply(number, "malacatoya", None, "", False, "holds a NaN", NOW)
        assert [(row["node"], row["accepted"], row["reason"]) for row in rows(ledger, tables.adapters)] == [
            ("esteli", True, ""), ("malacatoya", False, "holds a NaN"),
        ]  # fmt: skip

    def test_a_round_closes_once(self, ledger):
        number = ledger.open_round(1, ["esteli"], NOW + 600)
        ledger.close_round(number, {"decision": "published", "loss": float("nan")})

        with pytest.raises(BadInput, match="closed already"):
            ledger.close_round(number, {})
        assert rows(ledger, tables.rounds)[0]["result"] == {"decision": "published", "loss": None}

    def test_a_reply_to_an_unknown_round_is_refused(self, ledger):
        with pytest.raises(BadInput, match="round 7"):
            ledger.add_reply(7, "esteli", None, "", False, "late", NOW)

    def test_only_the_first_account_is_made_by_token(self, ledger):
        assert ledger.add_first_user("ana", "hash-1")
        assert not ledger.add_first_user("eva", "hash-2")
        assert ledger.user("ana").password == "hash-1" and ledger.user("eva") is None

    def test_a_session_ends_when_its_time_is_over(self, ledger):
        ledger.add_first_user("ana", "hash")
        ledger.open_session("d" * 64, "ana", "csrf", lifetime_s=100)

        assert ledger.session("d" * 64).user == "ana"
        ledger.clock = lambda: NOW + 100
        assert ledger.session("d" * 64) is None

    def test_audit_shows_a_row_that_was_changed_or_taken_out(self, ledger):
        for subject in ("one", "two", "three"):
            ledger.note("ana", "did", subject)
        assert ledger.broken_audit() is None

        with ledger.write() as connection:
            connection.execute(tables.audit.update().where(tables.audit.c.id == 2).values(subject="TWO"))
        assert ledger.broken_audit() == 2
        with ledger.write() as connection:
            connection.execute(tables.audit.delete().where(tables.audit.c.id == 2))
        assert ledger.broken_audit() == 3

    def test_every_change_on_purpose_leaves_an_audit_row(self, ledger):
        ledger.add_release(release(1), None, NOW)
        number = ledger.open_round(1, ["esteli"], NOW)
        ledger.add_reply(number, "esteli", HEADER, "c" * 64, True, "", NOW)
        ledger.close_round(number, {})
        ledger.add_first_user("ana", "hash")
        ledger.open_session("d" * 64, "ana", "csrf", lifetime_s=9)
        ledger.close_session("d" * 64)

        assert [row["action"] for row in rows(ledger, tables.audit)] == [
            "release published", "round opened", "adapter accepted", "round closed", "account created", "logged in", "logged out",
        ]  # fmt: skip

    def test_the_mark_moves_with_every_change_worth_showing(self, ledger):
        marks = [ledger.mark()]
        for change in (
            lambda: ledger.seen_status(status(1), NOW),
            lambda: ledger.add_event(Event(id="e", node="esteli", kind="answers"), NOW),
            lambda: ledger.add_refused("t", b"x", "why", NOW),
            lambda: ledger.add_release(release(), None, NOW),
        ):
            change()
            marks.append(ledger.mark())

        assert len(set(marks)) == len(marks)

    def test_writers_in_other_processes_and_threads_lose_nothing_and_keep_the_chain_whole(self, ledger, url):
        context = multiprocessing.get_context("spawn")
        workers: list[threading.Thread | multiprocessing.Process] = [context.Process(target=write_events, args=(url, 1, 20))]  # type: ignore[list-item]
        workers += [threading.Thread(target=write_events, args=(url, writer, 20)) for writer in (2, 3)]

        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)

        written = {row["id"] for row in rows(ledger, tables.events)}
        assert written == {f"{writer}-{number}" for writer, number in itertools.product((1, 2, 3), range(20))}
        assert len(rows(ledger, tables.audit)) == 60 and ledger.broken_audit() is None


class TestSqliteLedger(LedgerContract):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"sqlite:///{tmp_path}/ledger.db"

    def test_the_file_survives_a_power_cut_and_only_its_owner_reads_it(self, ledger, tmp_path):
        with ledger.read() as connection:
            assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
            assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL
        assert (tmp_path / "ledger.db").stat().st_mode & 0o077 == 0


@pytest.mark.postgres
class TestPostgresLedger(LedgerContract):
    @pytest.fixture
    def url(self, postgres_url: str) -> str:
        return postgres_url


def test_a_database_that_does_not_answer_is_named_without_its_password():
    ledger = Ledger("postgresql://milpa:secret@127.0.0.1:1/milpa")

    with pytest.raises(Unavailable, match=r"milpa:\*\*\*@127.0.0.1") as told:
        ledger.migrate()
    assert "secret" not in str(told.value)


@pytest.mark.parametrize("url", ["ledger.db", "mysql://host/milpa"])
def test_a_url_of_another_database_is_refused(url):
    with pytest.raises(BadInput, match=r"ledger\.url"):
        Ledger(url)
