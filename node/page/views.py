"""What the page shows, read from the store in one transaction; and figures out of the node's status. Nothing here changes anything."""

import math
from collections.abc import Mapping
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, case, func, select
from sqlalchemy.orm import Session

from node.store import AnswerRow, Store
from protocol.reasons import Why, read
from protocol.tasks import Task, task_named

LATEST = 12  # answers in the list; a phone shows four at once
COUNTED = 10_000  # newest answers among which those of today are counted: a look stays cheap over a full store
RECENT_S = 86_400.0  # seconds; older doubts are left to the list, nobody remembers what the field looked like
UNSURE = ("unconfirmed", "provisional")  # in this order: nobody else will answer the first kind


class Shown(msgspec.Struct, frozen=True):
    """One answer as it stands now."""

    id: str
    created: float
    task: Task
    lang: str
    source: str
    text: str
    verdict: str
    sentence: str  # after the verdict; of free text, all of it
    confidence: float
    why: Why
    state: str
    by: str


class Look(msgspec.Struct, frozen=True):
    """One look at the node."""

    card: Shown | None  # the answer to check
    asked_for: bool  # a person asked for this card; it may be a sure one
    more: int  # unsure answers beside it
    skip: int  # how many of them were left for later
    latest: tuple[Shown, ...]
    today: int  # answers of the last RECENT_S
    mark: int  # number of the newest change


def look(store: Store, now: float, *, answer: str = "", keep: str = "", skip: int = 0) -> Look:
    """Everything the page shows.

    Args:
        answer: the answer a person asked to see.
        keep: the card an open page shows: it stays while it is still unsure, so that none is exchanged under a finger.
        skip: unsure answers left for later.
    """
    with store.transaction() as session:
        unsure = _unsure(now)
        waiting = session.scalar(select(func.count()).where(unsure)) or 0
        card = _by_id(session, AnswerRow.id == answer) if answer else _by_id(session, AnswerRow.id == keep, unsure) if keep else None
        if card is None:
            order = (case((AnswerRow.state == UNSURE[0], 0), else_=1), AnswerRow.row.desc())
            card = session.scalar(select(AnswerRow).where(unsure).order_by(*order).offset(skip).limit(1))
        counted = card is not None and card.state in UNSURE and card.created > now - RECENT_S
        return Look(
            card=_shown(card) if card else None,
            asked_for=bool(answer) and card is not None and card.id == answer,
            more=max(0, waiting - (skip if skip < waiting else 0) - counted),
            skip=skip,
            latest=tuple(_shown(row) for row in session.scalars(select(AnswerRow).order_by(AnswerRow.row.desc()).limit(LATEST))),
            today=_today(session, now),
            mark=_mark(session),
        )


def mark(store: Store) -> int:
    """Number of the newest change."""
    with store.transaction() as session:
        return _mark(session)


def one(store: Store, answer: str) -> Shown | None:
    """The answer of that id."""
    with store.transaction() as session:
        row = _by_id(session, AnswerRow.id == answer)
        return _shown(row) if row else None


def energy(status: Mapping[str, Any]) -> tuple[float | None, str, float | None]:
    """Joules spent today, the power source and the battery's charge, as far as the node measures them."""
    told = status.get("power")
    if not isinstance(told, Mapping):
        return None, "", None
    joules = told.get("joules_today")  # by what they were spent on
    spent = math.fsum(_number(value) or 0.0 for value in joules.values()) if isinstance(joules, Mapping) else None
    return spent, str(told.get("source") or ""), _number(told.get("charge"))


def data(status: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Bytes spent today, both ways, and how many a day may bring; None when it is not measured, or not limited."""
    told = status.get("link")
    if not isinstance(told, Mapping):
        return None, None
    ways = [_number(told.get(name)) for name in ("up_bytes", "down_bytes")]
    return None if None in ways else math.fsum(way or 0.0 for way in ways), _number(told.get("bytes_a_day")) or None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _unsure(now: float) -> ColumnElement[bool]:
    return AnswerRow.state.in_(UNSURE) & (AnswerRow.created > now - RECENT_S)


def _today(session: Session, now: float) -> int:
    newest = select(AnswerRow.created).order_by(AnswerRow.row.desc()).limit(COUNTED).subquery()
    return session.scalar(select(func.count()).select_from(newest).where(newest.c.created > now - RECENT_S)) or 0


def _by_id(session: Session, *rules: ColumnElement[bool]) -> AnswerRow | None:
    return session.scalar(select(AnswerRow).where(*rules))


def _mark(session: Session) -> int:
    return session.scalar(select(func.max(AnswerRow.change))) or 0


def _shown(row: AnswerRow) -> Shown:
    task = task_named(row.task)
    parsed = task.parse(row.text)
    return Shown(
        id=row.id, created=row.created, task=task, lang=row.lang, source=row.source, text=row.text, verdict=row.verdict,
        sentence=parsed.sentence if row.verdict or not task.codes else row.text, confidence=row.confidence, why=read(row.reason),
        state=row.state, by=row.by,
    )  # fmt: skip
