"""What is remembered: a table in the node's own database, written in the transaction of the answer it comes from. No vectors here.

Rules:
 * One entry a record (task, language, normalised source). The operator's word replaces anybody's, a peer's never the operator's.
 * An entry is pruned by the age of its last use; a use is worth USE_S seconds. Patterns are the operator's to forget, and never pruned.
 * Only a pattern can be shareable, and only its operator makes it so. An entry that changes has not left yet.
Limits: `keep` answers, PATTERNS_LIMIT patterns; about 1 kB each.
"""

from collections.abc import Sequence
from typing import Any, Literal

from sqlalchemy import Float, Index, case, delete, func, literal, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from node.memory import rules
from node.store import OPERATOR, AnswerRow, Base, ExampleRow, Store
from protocol.errors import BadInput, NotEnough, TooLarge
from protocol.names import known
from protocol.tasks import Answer, Record, Task

PATTERNS_LIMIT = 1_000  # each record is held against all of its task: 1,000 cost about a millisecond
PATTERN_LIMIT = 300  # characters of what is seen, and of what it means; as much of an event's text as the coordinator keeps
KEY_LEAST = 6  # hexadecimal digits that name an entry, if no other begins with them

Kind = Literal["answer", "pattern"]
KINDS: tuple[Kind, ...] = ("answer", "pattern")


class MemoryRow(Base):
    """A record, or an operator's "when you see this", and what it means."""

    __tablename__ = "memory"
    key: Mapped[str] = mapped_column(primary_key=True)  # see rules.memory_key, rules.pattern_key
    kind: Mapped[str]
    task: Mapped[str]
    lang: Mapped[str]
    source: Mapped[str]  # as it was written
    words: Mapped[str]  # patterns: rules.spread of it; answers: ""
    text: Mapped[str]
    verdict: Mapped[str]
    origin: Mapped[str]  # "operator" or "peer:NAME"
    weight: Mapped[float]  # in (0, 1]: 1 for the operator, a peer's own confidence for a peer
    answer: Mapped[str]  # id of the answer it was confirmed on; "" for a pattern
    created: Mapped[float]  # when it last changed, seconds since 1970
    uses: Mapped[int]
    used: Mapped[float]  # when it last answered; 0: never
    shareable: Mapped[bool]
    shared: Mapped[float]  # when it left for the coordinator; 0: it did not, as it stands now
    __table_args__ = (Index("memory_scope", "kind", "task", "lang"),)


def prepare(store: Store, *, keep: int) -> None:
    """Make the table. A database from before there was a memory remembers its newest confirmed examples from now on."""
    Base.metadata.create_all(store.engine, tables=[MemoryRow.__table__])  # type: ignore[list-item]  # it is a Table
    with store.transaction() as session:
        if session.scalar(select(func.count()).select_from(MemoryRow)):
            return
        newest = session.scalars(select(ExampleRow).order_by(ExampleRow.created.desc()).limit(keep)).all()
        for one in reversed(newest):
            _keep(session, _entry(one, text=one.target, origin=one.origin, weight=one.weight, answer=one.answer, created=one.created))


def remember(session: Session, row: AnswerRow, *, origin: str, weight: float, now: float) -> None:
    """Remember the answer as it stands now. A peer's word does not replace the operator's."""
    _keep(session, _entry(row, text=row.text, origin=origin, weight=weight, answer=row.id, created=now))


def add_pattern(session: Session, task: Task, *, lang: str, when: str, means: Answer, shareable: bool, now: float) -> MemoryRow:
    """Remember "when you see this, it means that"; said again, it means what was said last.

    Raises:
        BadInput: hardly anything to recognise it by, or more than PATTERN_LIMIT characters.
        NotEnough: PATTERNS_LIMIT are there.
    """
    if max(len(when), len(means.text)) > PATTERN_LIMIT:
        raise TooLarge(f"a pattern has at most {PATTERN_LIMIT} characters on either side")
    words = rules.spread(when)
    if len(words.replace(" ", "")) < rules.PATTERN_LEAST:
        raise BadInput(f"a pattern needs at least {rules.PATTERN_LEAST} letters or digits to be known by; say more of what is seen")
    key = rules.pattern_key(task.name, lang, when)
    if session.get(MemoryRow, key) is None and count(session, "pattern") >= PATTERNS_LIMIT:
        raise NotEnough(f"{PATTERNS_LIMIT} patterns are remembered already; forget one first: milpa-node memory list --kind pattern")
    row = MemoryRow(
        key=key, kind="pattern", task=task.name, lang=lang, source=" ".join(when.split()), words=words, text=means.text,
        verdict=means.verdict, origin=OPERATOR, weight=1.0, answer="", created=now, uses=0, used=0.0, shareable=shareable, shared=0.0,
    )  # fmt: skip
    return session.merge(row)


def exact(session: Session, record: Record) -> MemoryRow | None:
    """The entry of this very record."""
    return session.get(MemoryRow, rules.memory_key(record.task, record.lang, record.source))


def pattern(session: Session, record: Record) -> MemoryRow | None:
    """The longest pattern whose words stand in the record."""
    query = (
        select(MemoryRow)
        .where(MemoryRow.kind == "pattern", MemoryRow.task == record.task, MemoryRow.lang == record.lang)
        .where(func.instr(literal(rules.spread(record.source)), MemoryRow.words) > 0)
        .order_by(func.length(MemoryRow.words).desc(), MemoryRow.created.desc())
    )
    return session.scalars(query.limit(1)).first()


def seen_before(session: Session, row: MemoryRow) -> tuple[int, int]:
    """How many remembered answers a pattern fits, and how many of these say otherwise."""
    sources = session.execute(
        select(MemoryRow.source, MemoryRow.verdict, MemoryRow.text).where(
            MemoryRow.kind == "answer", MemoryRow.task == row.task, MemoryRow.lang == row.lang
        )
    ).all()
    own = rules.meaning(row.verdict, row.text)
    fits = [rules.meaning(verdict, text) for source, verdict, text in sources if row.words in rules.spread(source)]
    return len(fits), sum(one != own for one in fits)


def used(session: Session, key: str, *, now: float) -> None:
    """Note that this entry answered."""
    row = session.get(MemoryRow, key)
    if row is not None:  # else it was forgotten between the look and the answer
        row.uses, row.used = row.uses + 1, now


def rows(session: Session, keys: Sequence[str]) -> dict[str, MemoryRow]:
    """The entries with these keys, as far as there are any."""
    return {row.key: row for row in session.scalars(select(MemoryRow).where(MemoryRow.key.in_(keys)))}


def named(session: Session, key: str) -> MemoryRow:
    """The entry whose key is, or begins with, `key`.

    Raises:
        BadInput: none, several, or too short a beginning.
    """
    if len(key) < KEY_LEAST or not all(sign in "0123456789abcdef" for sign in key):
        raise BadInput(f"an entry is named by its key, at least {KEY_LEAST} digits of it; see: milpa-node memory list")
    found = session.scalars(select(MemoryRow).where(MemoryRow.key.startswith(key)).limit(2)).all()
    if len(found) != 1:
        raise BadInput(f"{'several entries begin' if found else 'nothing remembered begins'} with {key!r}; see: milpa-node memory list")
    return found[0]


def share(session: Session, key: str, *, shareable: bool) -> MemoryRow:
    """Let a pattern leave the site, or not any more. What has left has left.

    Raises:
        BadInput: it is an answer, or there is none.
    """
    row = named(session, key)
    if row.kind != "pattern":
        raise BadInput("answers never leave the site, only patterns do; write what you have seen as one: milpa-node memory add")
    row.shareable = shareable
    return row


def forget(session: Session, key: str) -> MemoryRow:
    """Remove an entry, and an answer's example too: the site does not learn from it any more.

    Raises:
        BadInput: there is none.
    """
    row = named(session, key)
    session.delete(row)
    if row.kind == "answer":
        session.execute(delete(ExampleRow).where(ExampleRow.task == row.task, ExampleRow.lang == row.lang, ExampleRow.source == row.source))
    return row


def listed(session: Session, *, kind: str = "", shareable: bool = False, limit: int = 100) -> Sequence[MemoryRow]:
    """Entries, patterns first, then what changed last.

    Raises:
        UnknownName: no such kind.
    """
    query = select(MemoryRow).order_by(MemoryRow.kind.desc(), MemoryRow.created.desc(), MemoryRow.key).limit(limit)
    if kind:
        query = query.where(MemoryRow.kind == known(kind, KINDS, what="kind of memory"))
    return session.scalars(query.where(MemoryRow.shareable) if shareable else query).all()


def to_share(session: Session, *, limit: int) -> Sequence[MemoryRow]:
    """Shareable patterns that have not left yet, oldest first."""
    waiting = (MemoryRow.kind == "pattern", MemoryRow.shareable, MemoryRow.shared == 0.0)
    return session.scalars(select(MemoryRow).where(*waiting).order_by(MemoryRow.created).limit(limit)).all()


def best(session: Session, task: str, *, limit: int) -> list[tuple[str, str, str]]:
    """(key, language, source) of the task's answers that are worth a vector, the longest kept first."""
    query = select(MemoryRow.key, MemoryRow.lang, MemoryRow.source).where(MemoryRow.kind == "answer", MemoryRow.task == task)
    return [(key, lang, source) for key, lang, source in session.execute(query.order_by(_kept_until().desc()).limit(limit))]


def meanings(session: Session, task: Task) -> dict[str, dict[str, rules.Remembered]]:
    """By language: what each of the task's answers means, and what the model had said, by key, newest first."""
    said = case((AnswerRow.model_digest != "", AnswerRow.local))  # an answer from memory says nothing of the model
    query = (
        select(MemoryRow.key, MemoryRow.lang, MemoryRow.verdict, MemoryRow.text, said)
        .outerjoin(AnswerRow, AnswerRow.id == MemoryRow.answer)
        .where(MemoryRow.kind == "answer", MemoryRow.task == task.name)
    )
    found: dict[str, dict[str, rules.Remembered]] = {}
    for key, lang, verdict, text, local in session.execute(query.order_by(MemoryRow.created.desc())):
        model = None if local is None else rules.meaning(task.parse(local).verdict, local)
        found.setdefault(lang, {})[key] = rules.Remembered(rules.meaning(verdict, text), model)
    return found


def count(session: Session, kind: Kind) -> int:
    """How many there are."""
    return session.scalar(select(func.count()).where(MemoryRow.kind == kind)) or 0


def prune(session: Session, *, keep: int) -> int:
    """Forget the answers that were least and longest ago of use, past `keep`; how many. Their examples stay."""
    last = session.scalars(select(MemoryRow.key).where(MemoryRow.kind == "answer").order_by(_kept_until().desc()).offset(keep)).all()
    for begin in range(0, len(last), 500):  # SQLite takes a bounded number of parameters
        session.execute(delete(MemoryRow).where(MemoryRow.key.in_(last[begin : begin + 500])))
    return len(last)


def _keep(session: Session, fresh: MemoryRow) -> None:
    before = session.get(MemoryRow, fresh.key)
    if before is not None:
        if before.origin == OPERATOR and fresh.origin != OPERATOR:
            return
        fresh.uses, fresh.used = before.uses, before.used
    session.merge(fresh)


def _entry(of: AnswerRow | ExampleRow, *, text: str, origin: str, weight: float, answer: str, created: float) -> MemoryRow:
    """An answer or an example as what is remembered of it."""
    return MemoryRow(
        key=rules.memory_key(of.task, of.lang, of.source), kind="answer", task=of.task, lang=of.lang, source=of.source, words="", text=text,
        verdict=of.verdict, origin=origin, weight=weight, answer=answer, created=created, uses=0, used=0.0, shareable=False, shared=0.0,
    )  # fmt: skip


def _kept_until() -> Any:
    """Until when an entry has earned its place; only the order means something."""
    uses = func.min(MemoryRow.uses, rules.USES_LIMIT) + case((MemoryRow.origin == OPERATOR, rules.OPERATORS_USES), else_=0)
    return func.max(MemoryRow.created, MemoryRow.used, type_=Float) + uses * rules.USE_S
