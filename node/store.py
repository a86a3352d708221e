"""The node's memory: one SQLite file that the daemon and the training process share.

Rules:
 * WAL, synchronous=FULL, a busy timeout; every transaction is IMMEDIATE, so that two writers wait for each other and never fail half-way.
 * What the site sent and what was answered stays here. Nothing in this file decides what leaves.
 * Old answers are pruned past a cap; examples confirmed by somebody are kept; refused input is kept with its reason, bounded.
 * An answer's `change` number rises with every change of any answer: who remembers the last one seen misses no upgrade.
Limits: ANSWERS_KEPT and REFUSED_KEPT rows; about 1 kB a row.
"""

import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import msgspec
from sqlalchemy import Engine, String, create_engine, delete, event, func, select, true
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from protocol.digests import digest_bytes
from protocol.errors import BadInput
from protocol.tasks import Record

ANSWERS_KEPT = 100_000  # rows; at one record a minute, ten weeks and about 100 MB
REFUSED_KEPT = 1_000  # rows
REFUSED_TEXT = 4_000  # characters kept of a refused input
BUSY_TIMEOUT_S = 10.0  # seconds a writer waits for another; the training process holds the file for milliseconds
CACHE_KIB = 256  # of pages a connection; every thread has one, and SQLite's 2 MiB each would fill as the file grows
HELD_OUT_SHARE = 5  # one example in five is never trained on
SCHEMA = "1"
RECORD_INDEX = "CREATE INDEX IF NOT EXISTS ix_answers_record ON answers (record)"

State = Literal["final", "provisional", "upgraded", "confirmed", "unconfirmed", "corrected"]
OPERATOR = "operator"


class Base(DeclarativeBase):
    """The node's own tables. The outbox brings its table along (protocol/outbox.py)."""


class AnswerRow(Base):
    """One record and what was answered."""

    __tablename__ = "answers"
    row: Mapped[int] = mapped_column(primary_key=True)
    id: Mapped[str] = mapped_column(String(32), unique=True)
    change: Mapped[int] = mapped_column(index=True)
    created: Mapped[float]  # seconds since 1970, UTC, by this machine's clock
    record: Mapped[str] = mapped_column(index=True)  # the sender's own id of the record; not unique
    task: Mapped[str]
    site: Mapped[str]
    lang: Mapped[str]
    source: Mapped[str]
    prompt: Mapped[str]
    local: Mapped[str]  # the node's own answer, as parsed
    text: Mapped[str]  # the answer as it stands now
    verdict: Mapped[str]
    confidence: Mapped[float]
    reason: Mapped[str]  # as `protocol.reasons.kept` writes it
    state: Mapped[str] = mapped_column(index=True)
    by: Mapped[str] = mapped_column(default="")  # who stands behind `text`: "" the node itself, "peer:NAME", "operator"
    question: Mapped[str | None] = mapped_column(unique=True)  # Question.id, when a peer was asked
    deadline: Mapped[float] = mapped_column(default=0.0)  # for the peers' replies
    model_digest: Mapped[str]
    adapter_digest: Mapped[str]
    release: Mapped[int]
    seconds: Mapped[float]  # computing time of the local answer
    upgraded: Mapped[float] = mapped_column(default=0.0)  # when `state` last changed; 0: never


class ExampleRow(Base):
    """What the site learns from: a record with an answer that somebody confirmed."""

    __tablename__ = "examples"
    key: Mapped[str] = mapped_column(String(64), primary_key=True)  # SHA-256 of task, language and source: one truth a record
    answer: Mapped[str]
    record: Mapped[str]
    task: Mapped[str] = mapped_column(index=True)
    site: Mapped[str]
    lang: Mapped[str]
    source: Mapped[str]
    target: Mapped[str]
    verdict: Mapped[str]
    partial: Mapped[bool]
    origin: Mapped[str]
    weight: Mapped[float]
    held_out: Mapped[bool]
    created: Mapped[float]


class RefusedRow(Base):
    """Input that was not usable, and why."""

    __tablename__ = "refused"
    row: Mapped[int] = mapped_column(primary_key=True)
    created: Mapped[float]
    origin: Mapped[str]  # "api", "peer:NAME"
    reason: Mapped[str]
    text: Mapped[str]


class MetaRow(Base):
    """Small facts by name."""

    __tablename__ = "meta"
    key: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str]


class LearningExample(msgspec.Struct, frozen=True):
    """One confirmed example as the training process reads it."""

    record: Record  # with `target` and `verdict`
    origin: str  # "operator" or "peer:NAME"
    weight: float  # in (0, 1]: 1 for the operator, a peer's own confidence for a peer
    held_out: bool  # never to be trained on; the same for the same record always, on every node
    partial: bool  # the operator gave a verdict and no sentence: `target` ends after the colon, and nothing should be learned from its end


class Store:
    """The file at `path`, made if it is not there.

    Raises:
        BadInput: the file is not a database, or of a newer Milpa.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.engine = open_database(path)
        try:
            Base.metadata.create_all(self.engine)
            with self.engine.begin() as connection:
                connection.exec_driver_sql(RECORD_INDEX)  # a file made before there was one
            with self.transaction() as session:
                schema = session.get(MetaRow, "schema")
                if schema is None:
                    session.add(MetaRow(key="schema", value=SCHEMA))
                elif schema.value != SCHEMA:
                    raise BadInput(
                        f"{path} was written by a newer Milpa (schema {schema.value}, this one reads {SCHEMA}); update the program"
                    )
        except DatabaseError as error:
            raise BadInput(f"cannot use {path} as a database: {error.orig}") from error

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """One transaction: committed at the end, undone by any exception."""
        with Session(self.engine, expire_on_commit=False) as session, session.begin():
            yield session

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()

    def prune(self, *, answers: int = ANSWERS_KEPT, refused: int = REFUSED_KEPT) -> int:
        """Delete the oldest rows past the caps; how many answers went. Provisional answers are kept: a reply may be under way."""
        with self.transaction() as session:
            gone = _keep_newest(session, AnswerRow, answers, AnswerRow.state != "provisional")
            _keep_newest(session, RefusedRow, refused)
        return gone

    def examples(self, task: str, *, held_out: bool | None = None) -> list[LearningExample]:
        """Confirmed examples of `task`, oldest first; `held_out` picks one part, None both."""
        query = select(ExampleRow).where(ExampleRow.task == task).order_by(ExampleRow.created, ExampleRow.key)
        if held_out is not None:
            query = query.where(ExampleRow.held_out == held_out)
        with self.transaction() as session:
            return [_example(row) for row in session.scalars(query)]

    def example_count(self, task: str) -> int:
        """How many confirmed examples of `task` there are."""
        with self.transaction() as session:
            return session.scalar(select(func.count()).where(ExampleRow.task == task)) or 0

    def example_parts(self, task: str) -> tuple[int, int]:
        """How many confirmed examples of `task` there are to train on, and how many are held out."""
        with self.transaction() as session:
            rows = session.execute(select(ExampleRow.held_out, func.count()).where(ExampleRow.task == task).group_by(ExampleRow.held_out))
            found = {bool(held_out): int(count) for held_out, count in rows}
        return found.get(False, 0), found.get(True, 0)

    def refuse(self, text: str, *, reason: str, origin: str, now: float) -> None:
        """Keep an unusable input with the reason."""
        with self.transaction() as session:
            refuse(session, text, reason=reason, origin=origin, now=now)


def open_database(path: Path) -> Engine:
    """A SQLAlchemy engine on a SQLite file, safe against power cuts and a second process."""
    engine = create_engine(  # parameters hidden: an error that quotes a record must not reach a log
        f"sqlite:///{path}", hide_parameters=True, connect_args={"timeout": BUSY_TIMEOUT_S, "check_same_thread": False}
    )

    @event.listens_for(engine, "connect")
    def configure(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # SQLAlchemy says BEGIN itself, below; pysqlite's own is DEFERRED
        wait, cache = f"busy_timeout={int(BUSY_TIMEOUT_S * 1000)}", f"cache_size=-{CACHE_KIB}"
        for pragma in ("journal_mode=WAL", "synchronous=FULL", wait, cache, "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def new_id() -> str:
    """A fresh id for an answer or a message: 32 hexadecimal digits."""
    return uuid.uuid4().hex


def next_change(session: Session) -> int:
    """The number of the next change. Unique because every transaction is IMMEDIATE."""
    return (session.scalar(select(func.max(AnswerRow.change))) or 0) + 1


def refuse(session: Session, text: str, *, reason: str, origin: str, now: float) -> None:
    """Keep an unusable input with the reason, inside the caller's transaction."""
    session.add(RefusedRow(created=now, origin=origin, reason=reason, text=text[:REFUSED_TEXT]))


def learn_from(session: Session, answer: AnswerRow, *, origin: str, weight: float, partial: bool, now: float) -> bool:
    """Make the answer as it stands now an example; False when the operator already said otherwise about the same record."""
    key = example_key(answer.task, answer.lang, answer.source)
    before = session.get(ExampleRow, key)
    if before is not None and before.origin == OPERATOR and origin != OPERATOR:
        return False
    example = ExampleRow(key=key, target=answer.text, partial=partial, origin=origin, weight=weight, held_out=is_held_out(key), created=now)
    example.answer, example.record, example.task, example.site = answer.id, answer.record, answer.task, answer.site
    example.lang, example.source, example.verdict = answer.lang, answer.source, answer.verdict
    session.merge(example)
    return True


def example_key(task: str, lang: str, source: str) -> str:
    """One truth a record: its task, language and source."""
    return digest_bytes("\0".join((task, lang, source)).encode())


def is_held_out(key: str) -> bool:
    """Whether the example with this key belongs to the part that is never trained on. Depends on nothing but the record."""
    return int(key[:8], 16) % HELD_OUT_SHARE == 0


def read_answers(session: Session, *, since: int, limit: int, state: str = "") -> Sequence[AnswerRow]:
    """Answers changed after change number `since`, in the order of their changes."""
    query = select(AnswerRow).where(AnswerRow.change > since).order_by(AnswerRow.change).limit(limit)
    return session.scalars(query.where(AnswerRow.state == state) if state else query).all()


def answer_to(session: Session, record: Record) -> AnswerRow | None:
    """The latest answer to exactly this record, if there is one: equal id, task, language and source."""
    query = select(AnswerRow).where(
        AnswerRow.record == record.id, AnswerRow.source == record.source, AnswerRow.task == record.task, AnswerRow.lang == record.lang
    )
    return session.scalar(query.order_by(AnswerRow.row.desc()).limit(1))


def counts(session: Session) -> dict[str, int]:
    """Number of stored answers by state."""
    rows = session.execute(select(AnswerRow.state, func.count()).group_by(AnswerRow.state)).all()
    return dict(sorted((str(state), int(count)) for state, count in rows))


def _example(row: ExampleRow) -> LearningExample:
    record = Record(
        id=row.record, task=row.task, source=row.source, lang=row.lang, site=row.site, target=row.target, verdict=row.verdict
    )  # fmt: skip
    return LearningExample(record, row.origin, row.weight, row.held_out, row.partial)


def _keep_newest(session: Session, table: Any, keep: int, only: Any = None) -> int:
    last = session.scalar(select(table.row).order_by(table.row.desc()).offset(keep).limit(1))
    if last is None:
        return 0
    done: Any = session.execute(delete(table).where(table.row <= last, true() if only is None else only))
    return int(done.rowcount)
