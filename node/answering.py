"""How a site record becomes an answer, and what may change it afterwards (architecture.md, 5).

Rules:
 * The local answer is returned at once, in every case. Below the threshold it is `provisional` while a peer is asked.
 * The answer, the question and the outbox row are one transaction; nothing is sent inside it.
 * A reply is an upgrade event, applied once. Late, repeated and mismatched replies change nothing.
 * The operator outranks a peer, and a peer outranks the node itself.
 * A confirmed answer becomes an example, and is remembered. It never leaves the site.
 * What is remembered answers without the model (node/memory). Such an answer says so, is final, and confirms nothing.

States: final (sure enough) | provisional -> upgraded (peer says otherwise), confirmed (peer agrees), unconfirmed (nobody replied in
time) | unconfirmed at once when not sure and nobody may be asked | any -> confirmed or corrected, by the operator.

The record is stored together with its answer, not before: the caller still waits and will ask again, and a second synced write would
cost more than the model on an SD card.
"""

import time
from collections.abc import Callable
from typing import Any, Protocol

import msgspec
from sqlalchemy import select
from sqlalchemy.orm import Session

from node.confidence.budget import Budget
from node.confidence.judging import Judge, Ruling
from node.engine.worker import Listening, Spoken, Worker
from node.memory.rules import Recalled, with_examples
from node.store import OPERATOR, AnswerRow, State, Store, learn_from, new_id, next_change, refuse
from protocol import reasons
from protocol.codec import checked_record
from protocol.confidence import Judgement
from protocol.digests import digest_bytes
from protocol.errors import BadInput, UnknownName
from protocol.messages import Question, Reply
from protocol.names import known
from protocol.reasons import Why
from protocol.tasks import Answer, Record, Task, task_named

PEER_WEIGHT_FLOOR = 0.1  # an example a peer was unsure of still counts a little
MEMORY = "memory"  # who stands behind an answer that was remembered


class NoSuchAnswer(UnknownName):
    """No answer by that id is stored here."""


class Asking(Protocol):
    """What answering needs of escalation. Both calls write inside the caller's transaction and send nothing."""

    deadline_s: float  # seconds a question waits for its reply

    def ask(self, session: Session, question: Question) -> None:
        """Put the question into the outbox."""

    def report(self, session: Session, kind: str, figures: dict[str, float], detail: dict[str, str]) -> None:
        """Put an event for the coordinator into the outbox."""


class Remembering(Protocol):
    """What answering needs of the memory; `node.memory.recall.Memory` is the real one. No call fails for want of a memory."""

    def recall(self, record: Record, task: Task, *, deadline_s: float) -> Recalled | None:
        """What is remembered for the record; None: ask the model."""

    def examples(self, record: Record, task: Task, *, deadline_s: float) -> tuple[Record, ...]:
        """Solved records to show the model before this one, the nearest last."""

    def remember(self, session: Session, row: AnswerRow, *, origin: str, weight: float, now: float) -> None:
        """Remember the answer as it stands now, inside the caller's transaction."""

    def used(self, session: Session, recalled: Recalled, *, now: float) -> None:
        """Note inside the caller's transaction that this entry answered."""


class Given(msgspec.Struct, frozen=True):
    """The local answer to one record, as it is returned at once. The model spoke, or memory did: one of the last two is there."""

    id: str
    record: Record
    answer: Answer
    judgement: Judgement
    state: State
    question: str  # id of the question to a peer, or ""
    seconds: float  # computing time: the model's, or the look into the memory
    spoken: Spoken | None
    recalled: Recalled | None = None

    @property
    def provisional(self) -> bool:
        """Whether a peer is being asked."""
        return self.state == "provisional"


class Watch(Protocol):
    """Who counts: the metrics. Called after the transaction."""

    def answered(self, given: Given) -> None:
        """A local answer was given."""

    def changed(self, state: str) -> None:
        """A reply, the operator or the clock changed an answer."""


class Answering:
    """The use cases around the model. Any thread may call them; the store and the worker order them."""

    def __init__(
        self,
        store: Store,
        worker: Worker,
        *,
        node: str,
        site: str = "",
        budget: float = 0.25,
        asking: Asking | None = None,
        clock: Callable[[], float] = time.time,
        watch: Watch | None = None,
        on_asked: Callable[[], None] = lambda: None,
        memory: Remembering | None = None,
        judge: Judge | None = None,
    ) -> None:
        self.store, self.worker, self.node, self.site = store, worker, node, site
        self.judge = judge or Judge(store, Budget(share=budget, audit=0.0), clock=clock)
        self.asking = asking  # None: nobody may be asked
        self.memory = memory  # None: nothing is remembered
        self._clock = clock
        self._watch = watch
        self._on_asked = on_asked  # called after the commit: the outbox may look now

    def answer(self, record: Record, *, deadline_s: float, origin: str = "api", listening: Listening | None = None) -> Given:
        """The local answer to `record`, within `deadline_s` seconds; stored, and asked of a peer when it is too unsure.

        Raises:
            BadInput: an unusable record (kept with the reason) or another task than the active model's.
            Busy, Late, NoModel, Gone: see `node.engine.worker`; nothing is stored.
        """
        try:
            record = checked_record(record)
            task = task_named(record.task)
            began = time.perf_counter()
            recalled = self.memory.recall(record, task, deadline_s=deadline_s) if self.memory else None
            if recalled is None:
                given = self._ask_model(record, task, ends=began + deadline_s, listening=listening)
            else:
                given = self._save_recalled(record, task, recalled, seconds=time.perf_counter() - began)
        except BadInput as error:
            self.refuse(record.source, reason=str(error), origin=origin)
            raise
        if given.provisional:
            self._on_asked()
        if self._watch is not None:
            self._watch.answered(given)
        return given

    def _ask_model(self, record: Record, task: Task, *, ends: float, listening: Listening | None) -> Given:
        """The model's answer, by `ends` of the performance counter; shown what memory has, where that fits the model's context."""

        def ask(prompt: str) -> Spoken:
            left = max(0.0, ends - time.perf_counter())
            return self.worker.ask(
                task.name, prompt, max_new_tokens=task.max_new_tokens, deadline_s=left, form=task.form, listening=listening
            )

        shown = self.memory.examples(record, task, deadline_s=max(0.0, ends - time.perf_counter())) if self.memory else ()
        try:
            spoken = ask(with_examples(task, record, shown))
        except BadInput:
            if not shown:
                raise
            shown, spoken = (), ask(task.prompt(record))
        answer = task.parse(spoken.generation.text)
        ruling = self.judge.rule(task, answer, spoken, prompt=task.prompt(record), left_s=ends - time.perf_counter())
        notes = (Why("examples-shown", {"count": len(shown)}),) if shown else ()
        return self._save(record, task.prompt(record), answer, ruling, spoken, notes=notes)

    def _save_recalled(self, record: Record, task: Task, recalled: Recalled, *, seconds: float) -> Given:
        """An answer from memory: stored like any other, `by` memory, and of no model."""
        now, answer = self._clock(), task.parse(recalled.text)
        judgement = Judgement(True, recalled.confidence, recalled.why)
        row = self._row(
            record, task.prompt(record), answer, judgement, now=now, state="final", by=MEMORY, model_digest="", adapter_digest="",
            release=0, seconds=seconds,
        )  # fmt: skip
        with self.store.transaction() as session:
            row.change = next_change(session)
            session.add(row)
            if self.memory:
                self.memory.used(session, recalled, now=now)
        return Given(row.id, record, answer, judgement, "final", "", seconds, None, recalled)

    def _save(self, record: Record, prompt: str, answer: Answer, ruling: Ruling, spoken: Spoken, *, notes: tuple[Why, ...]) -> Given:
        now = self._clock()
        judgement = msgspec.structs.replace(ruling.judgement, why=ruling.judgement.why.noting(*notes))
        asking = self.asking if judgement.ask else None
        state: State = "final" if judgement.keep else "provisional" if asking else "unconfirmed"
        question = None
        if asking:
            expires = now + asking.deadline_s
            question = Question(new_id(), self.node, record.task, prompt, judgement.confidence, int(expires))
        speaker = spoken.speaker
        row = self._row(
            record, prompt, answer, judgement, now=now, state=state, question=question.id if question else None,
            deadline=question.expires if question else 0.0, model_digest=speaker.model_digest, adapter_digest=speaker.adapter_digest,
            release=speaker.release, seconds=spoken.generation.seconds,
        )  # fmt: skip
        with self.store.transaction() as session:
            row.change = next_change(session)
            session.add(row)
            self.judge.remember(session, row.id, ruling)
            if asking and question:
                asking.ask(session, question)
        return Given(row.id, record, answer, judgement, state, question.id if question else "", spoken.generation.seconds, spoken)

    def _row(self, record: Record, prompt: str, answer: Answer, judgement: Judgement, *, now: float, **more: Any) -> AnswerRow:
        """A local answer as it is stored; `more` says who gave it and how it stands."""
        return AnswerRow(
            id=new_id(), created=now, record=record.id, task=record.task, site=record.site or self.site, lang=record.lang,
            source=record.source, prompt=prompt, local=answer.text, text=answer.text, verdict=answer.verdict,
            confidence=judgement.confidence, reason=reasons.kept(judgement.why), **more,
        )  # fmt: skip

    def refuse(self, text: str, *, reason: str, origin: str) -> None:
        """Keep an unusable input with the reason."""
        self.store.refuse(text, reason=reason, origin=origin, now=self._clock())

    def apply(self, reply: Reply) -> str:
        """Apply a peer's reply, once. Returns the answer's new state, or why nothing did: "late" (or repeated), "refused"."""
        now = self._clock()
        with self.store.transaction() as session:
            outcome = self._apply(session, reply, now)
        if outcome in ("upgraded", "confirmed") and self._watch is not None:
            self._watch.changed(outcome)
        return outcome

    def _apply(self, session: Session, reply: Reply, now: float) -> str:
        row = session.scalar(select(AnswerRow).where(AnswerRow.question == reply.question))
        if row is not None and row.state != "provisional":
            return "late"
        problem, answer = _read_reply(reply, row)
        if problem or row is None:
            refuse(session, reply.text, reason=problem, origin=f"peer:{reply.peer}", now=now)
            self._report(session, "refused", row, reply, now)
            return "refused"
        same = answer.verdict == row.verdict if row.verdict else answer.text == row.text
        state: State = "confirmed" if same else "upgraded"
        bare = bool(answer.verdict) and not answer.sentence  # by radio: a code without its sentence
        _change(session, row, state=state, by=f"peer:{reply.peer}", answer=None if bare and same else answer, now=now)
        weight = min(1.0, max(PEER_WEIGHT_FLOOR, reply.confidence))
        self._learn(session, row, weight=weight, partial=bare, now=now)
        self._report(session, state, row, reply, now)
        return state

    def unanswered(self, question: str) -> None:
        """No peer could help with this question: the local answer stands, `unconfirmed`, before the deadline. Safe to repeat."""
        now = self._clock()
        with self.store.transaction() as session:
            row = session.scalar(select(AnswerRow).where(AnswerRow.question == question, AnswerRow.state == "provisional"))
            if row is not None:
                _change(session, row, state="unconfirmed", by=row.by, answer=None, now=now)
        if row is not None and self._watch is not None:
            self._watch.changed("unconfirmed")

    def expire(self) -> int:
        """Mark provisional answers past their deadline `unconfirmed`; how many."""
        now = self._clock()
        with self.store.transaction() as session:
            rows = session.scalars(select(AnswerRow).where(AnswerRow.state == "provisional", AnswerRow.deadline < now)).all()
            for row in rows:
                _change(session, row, state="unconfirmed", by=row.by, answer=None, now=now)
                self._report(session, "expired", row, None, now)
        if self._watch is not None:
            for _ in rows:
                self._watch.changed("unconfirmed")
        return len(rows)

    def correct(self, answer_id: str, *, verdict: str = "", text: str = "") -> AnswerRow:
        """The operator's word on an answer: a verdict, a text, or both. Makes an example; outranks any peer.

        Raises:
            NoSuchAnswer: as it says.
            UnknownName: a verdict the task does not know.
            BadInput: neither verdict nor text, or the two disagree.
        """
        now = self._clock()
        with self.store.transaction() as session:
            row = session.scalar(select(AnswerRow).where(AnswerRow.id == answer_id))
            if row is None:
                raise NoSuchAnswer(f"no answer {answer_id!r} here; it may have been pruned")
            answer, partial = read_correction(task_named(row.task), Answer(row.text, row.verdict), verdict=verdict, text=text)
            same = answer.text == row.text
            _change(session, row, state="confirmed" if same else "corrected", by=OPERATOR, answer=answer, now=now)
            self._learn(session, row, weight=1.0, partial=partial, now=now)
        if self._watch is not None:
            self._watch.changed(row.state)
        return row

    def _learn(self, session: Session, row: AnswerRow, *, weight: float, partial: bool, now: float) -> None:
        """What `row.by` confirmed is an example from now on, and is remembered: both, or neither."""
        if learn_from(session, row, origin=row.by, weight=weight, partial=partial, now=now) and self.memory:
            self.memory.remember(session, row, origin=row.by, weight=weight, now=now)

    def _report(self, session: Session, state: str, row: AnswerRow | None, reply: Reply | None, now: float) -> None:
        """Tell the coordinator how an escalation ended: figures, never the text."""
        if self.asking is None:
            return
        figures = {"confidence": row.confidence, "seconds": max(0.0, now - row.created)} if row else {}
        if reply is not None:
            figures["peer_confidence"] = reply.confidence
        self.asking.report(session, "escalation", figures, {"state": state, "peer": reply.peer if reply else ""})


def read_correction(task: Task, before: Answer, *, verdict: str, text: str) -> tuple[Answer, bool]:
    """What the operator means, and whether the sentence is missing. Saying the verdict of `before` again confirms its sentence.

    Raises:
        UnknownName, BadInput: see `Answering.correct`.
    """
    text = " ".join(text.split())
    if not verdict and not text:
        raise BadInput("give a verdict, a text, or both; to confirm an answer, repeat its verdict or its text")
    if not task.codes:
        if verdict:
            raise BadInput(f"task {task.name!r} has no verdicts; give a text")
        return Answer(text=text, sentence=text), False
    if verdict:
        known(verdict, task.codes, what="verdict")
    parsed = task.parse(text)
    if parsed.verdict and verdict and parsed.verdict != verdict:
        raise BadInput(f"the verdict is {verdict!r}, the text begins with {parsed.verdict!r}; make them agree")
    if parsed.verdict:
        return parsed, False
    if text and not verdict:
        raise BadInput(f"the text must begin with a verdict and a colon, as in '{task.codes[0]}: ...'; or give `verdict` beside it")
    if text:
        return task.parse(task.render(verdict, text)), False
    if verdict == before.verdict:
        return task.parse(before.text), False
    return Answer(text=f"{verdict}:", verdict=verdict), True


def _read_reply(reply: Reply, row: AnswerRow | None) -> tuple[str, Answer]:
    """Why a reply is not usable, or "", and what it says."""
    nothing = Answer(text="")
    if row is None:
        return "a reply to a question this node did not ask", nothing
    if reply.question_digest != digest_bytes(row.prompt.encode()):
        return "the reply names the digest of another question", nothing
    if reply.refused:
        return f"the peer declined: {reply.refused}", nothing
    task = task_named(row.task)
    answer = task.parse(reply.text)
    if not answer.text or (task.codes and not answer.verdict):
        return "the peer's answer is not of the task's form", nothing
    return "", answer


def _change(session: Session, row: AnswerRow, *, state: State, by: str, answer: Answer | None, now: float) -> None:
    row.change = next_change(session)
    row.state, row.by, row.upgraded = state, by, now
    if answer is not None:
        row.text, row.verdict = answer.text, answer.verdict
    session.flush()
