"""Answering other nodes' questions with this node's model, and handing on those it is not sure of.

Rules:
 * A question is stored before it is acknowledged to the broker, and its reply is stored with the outbox rows that carry it: a kill
   anywhere computes at most one answer again and loses none.
 * A question (id and prompt) is computed once, however often it comes and by however many ways; whoever asked it gets the stored reply.
 * QUEUE_LIMIT questions wait. One more is declined as "busy", with the seconds until there is room; that refusal is not stored.
 * How long a question is worth answering is told by the broker (message expiry), measured on this machine's clock from its arrival;
   the asker's own clock may be wrong. Past that it is dropped in silence: the asker has given it up.
 * The reply goes to the asker's own reply topic and nowhere else, whatever the question's response topic says.
 * Handing on: an answer this node is unsure of is kept, and the question goes to its own peers with a tenth of the time held back.
   What they say is relayed, naming the speaker, if they are at least as sure; else, and when nobody helps in time, its own answer goes.
   The names of those who asked stand in the question: nobody is asked twice, nobody hands on more than `hop_limit` times.
   Unsure is what the node's own judge says, by the same budget of share, bytes and joules that its site's answers are asked from.
   Whoever brings the same question while it is out gets this node's own answer at once, so that two nodes never wait for each other.
"""

import logging
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from node.confidence.judging import Judge, Ruling
from node.engine.worker import Busy, Worker
from node.escalation.asking import BUSY
from protocol import topics
from protocol.codec import decode_message, encode
from protocol.digests import digest_bytes
from protocol.errors import BadInput, MalformedMessage, MilpaError
from protocol.messages import Question, Reply
from protocol.mqtt import Incoming
from protocol.names import checked_name
from protocol.outbox import Executes, Outbox
from protocol.tasks import task_named

QUEUE_LIMIT = 256  # questions waiting; a row each, and minutes of work for a 270M model on one core
STORED_LIMIT = 10_000  # replies kept for questions that come again; about 10 MB
HOP_LIMIT = 2  # how often a question may have been handed on
ASKERS_LIMIT = 16  # nodes that wait for one question's reply
NO_EXPIRY_S = 600.0  # seconds a question without an expiry is worth answering
WAIT_LIMIT_S = 86_400.0  # seconds; no question is worth more
ANSWER_DEADLINE_S = 120.0  # seconds for one answer, the model's queue included
HAND_ON_S = 5.0  # seconds that must be left for others, or the question is not handed on
HELD_BACK = 0.1  # share of the time left that is kept for the way back
RETRY_S = (1.0, 600.0)  # bounds of the seconds a busy node names
FIRST_GUESS_S = 1.0  # seconds an answer takes, before any was given
REMEMBERED = 0.2  # weight of the latest answer in the running mean of seconds an answer

log = logging.getLogger(__name__)
metadata = sa.MetaData()

served = sa.Table(
    "serving_questions", metadata,
    sa.Column("position", sa.Integer, primary_key=True),
    sa.Column("question", sa.String(64), nullable=False, index=True),  # Question.id
    sa.Column("prompt_digest", sa.String(64), nullable=False),
    sa.Column("message", sa.LargeBinary, nullable=False),  # the Question as it came first
    sa.Column("until", sa.Float, nullable=False),  # seconds since 1970 on this machine's clock: worth answering
    sa.Column("own", sa.LargeBinary, nullable=True),  # this node's own Reply, while the question is handed on
    sa.Column("hand_until", sa.Float, nullable=False),  # seconds since 1970: then `own` goes out
    sa.Column("reply", sa.LargeBinary, nullable=True),  # None: not answered yet
    sa.UniqueConstraint("question", "prompt_digest"),
    sqlite_autoincrement=True,
)  # fmt: skip

waiting_askers = sa.Table(
    "serving_askers", metadata,
    sa.Column("position", sa.Integer, primary_key=True),  # the question's
    sa.Column("asker", sa.String(48), primary_key=True),
    sa.Column("correlation", sa.LargeBinary, nullable=False),
    sa.Column("until", sa.Float, nullable=False),
)  # fmt: skip


class Spoke(msgspec.Struct, frozen=True):
    """An answer of this node's model."""

    text: str
    confidence: float
    model_digest: str
    seconds: float
    adapter_digest: str = ""
    sure: bool = True  # whether it stands by itself
    ruling: Ruling | None = None  # None: it could not be asked of anybody, so nothing counts


class Speaks(Protocol):
    """What serving needs of this node's model and of its judge; `Judged` is the real one."""

    def answer(self, question: Question, *, deadline_s: float, may_ask: bool) -> Spoke:
        """The answer within `deadline_s` seconds; always sure where `may_ask` is False."""

    def remember(self, connection: Executes, reply: str, spoke: Spoke) -> None:
        """Write down how the answer in the reply with that id was judged, inside the caller's transaction."""


HandOn = Callable[[Executes, Question], bool]  # puts it to this node's own peers, inside the transaction; False: it cannot


class Judged:
    """The node's own engine thread, where a question takes its turn among the site's records, and the node's own judge."""

    def __init__(self, worker: Worker, judge: Judge) -> None:
        self._worker, self._judge = worker, judge

    def answer(self, question: Question, *, deadline_s: float, may_ask: bool) -> Spoke:
        """See `Speaks`; errors as `Worker.ask`."""
        task, ends = task_named(question.task), time.perf_counter() + deadline_s
        spoken = self._worker.ask(task.name, question.prompt, max_new_tokens=task.max_new_tokens, deadline_s=deadline_s, form=task.form)
        speaker, said, ruling = spoken.speaker, spoken.generation, None
        answer = task.parse(said.text)
        if may_ask and answer.text:
            ruling = self._judge.rule(task, answer, spoken, prompt=question.prompt, left_s=ends - time.perf_counter(), audits=False)
        confidence = ruling.judgement.confidence if ruling else self._judge.confidence(task, answer, spoken)
        sure = ruling is None or not ruling.judgement.ask
        return Spoke(said.text, confidence, speaker.model_digest, said.seconds, speaker.adapter_digest, sure, ruling)

    def remember(self, connection: Executes, reply: str, spoke: Spoke) -> None:
        """See `Speaks`."""
        if spoke.ruling is not None:
            self._judge.remember(connection, reply, spoke.ruling)


class Server:
    """Takes questions to `node` and to its `groups`, and answers them, one at a time, in order of arrival.

    Args:
        hand_on: where unsure answers may go; None: nowhere.
        on_load: called when the queue fills, and when it is empty again: the node's status should say so.
    """

    def __init__(
        self,
        node: str,
        outbox: Outbox,
        model: Speaks,
        *,
        engine: sa.Engine,
        groups: Sequence[str] = (),
        hand_on: HandOn | None = None,
        on_load: Callable[[], None] = lambda: None,
        queue_limit: int = QUEUE_LIMIT,
        hop_limit: int = HOP_LIMIT,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.node, self.outbox, self.model, self.engine, self.groups = node, outbox, model, engine, tuple(groups)
        self.hand_on, self._on_load = hand_on, on_load
        self.queue_limit, self.hop_limit, self.clock = queue_limit, hop_limit, clock
        self.answer_s = FIRST_GUESS_S  # running mean of seconds an answer
        self._full = False
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        metadata.create_all(engine)

    def start(self) -> None:
        """Start the thread that answers; it begins with what an earlier process left."""
        self._thread = threading.Thread(target=self._run, name="serving", daemon=True)
        self._thread.start()

    def stop(self, timeout: float = 5.0) -> None:
        """End the thread within `timeout` seconds; an answer under way is computed again by the next process."""
        self._stopping.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout)

    @property
    def alive(self) -> bool:
        """Whether the thread runs; for a watchdog."""
        return self._thread is not None and self._thread.is_alive()

    def heard(self, message: Incoming) -> None:
        """Handle one message of this node's question topics, or its groups': store it, or say at once why not.

        Raises:
            MalformedMessage: not a question, or not from the node that its topic names.
        """
        question = decode_message(message.payload)
        if not isinstance(question, Question) or message.topic not in self._topics(question):
            raise MalformedMessage(f"{message.topic} carries something other than that node's question")
        now = self.clock()
        until = now + min(WAIT_LIMIT_S, NO_EXPIRY_S if message.expiry is None else message.expiry)
        with self.engine.begin() as connection:
            known = connection.execute(_same(question)).one_or_none()
            if refusal := self._refusal(connection, question, known=known is not None):
                self._send(connection, question.asker, self._refuse(connection, question, refusal), message.correlation, until=until)
            elif known is not None and (said := known.reply or self._own_for(connection, known, question)):
                self._send(connection, question.asker, _reply(said), message.correlation, until=until)
            else:
                self._wait(connection, question, message, until=until)
        self._tell_load(full=refusal == BUSY)
        self._wake.set()
        self.outbox.wake()

    @property
    def waiting(self) -> int:
        """Questions this node has not answered yet."""
        with self.engine.begin() as connection:
            return _count_waiting(connection)

    def step(self) -> bool:
        """Answer the oldest waiting question. False: none waits. For the thread, and for tests."""
        now = self.clock()
        waits = sa.and_(served.c.reply.is_(None), served.c.own.is_(None))
        with self.engine.begin() as connection:
            past = sa.or_(served.c.until <= now, served.c.until > now + 2 * WAIT_LIMIT_S)  # the second: the clock was set back
            gone = connection.scalars(sa.select(served.c.position).where(waits, past)).all()
            _drop(connection, *gone)
            row = connection.execute(sa.select(served).where(waits).order_by(served.c.position).limit(1)).one_or_none()
        if row is None:
            self._tell_load(full=False)
            return False
        question = msgspec.json.decode(row.message, type=Question)
        reply, spoke = self._compute(question, min(ANSWER_DEADLINE_S, row.until - now), may_ask=self._for_others(question, row.until) > 0)
        with self.engine.begin() as connection:
            if spoke is not None:
                self.model.remember(connection, reply.id, spoke)
            if reply.refused == BUSY:  # whoever asked may ask again
                self._send_to_all(connection, row.position, reply)
                _drop(connection, row.position)
            elif spoke is None or spoke.sure or not self._hand(connection, row, question, reply):
                self._finish(connection, row.position, reply)
            self._forget_oldest(connection, row.position)
        self.outbox.wake()
        return True

    def handed(self, question: str) -> bool:
        """Whether a question of that id was handed on by this node, rather than asked by it."""
        was = sa.select(served.c.position).where(served.c.question == question, served.c.hand_until > 0.0).limit(1)
        with self.engine.begin() as connection:
            return connection.execute(was).one_or_none() is not None

    def relay(self, reply: Reply) -> str:
        """Pass on what this node's own peers say, or this node's answer if that is surer; as `Answering.apply`."""
        with self.engine.begin() as connection:
            row = connection.execute(_out(reply.question)).one_or_none()
            if row is None:
                return "late"
            task = task_named(msgspec.json.decode(row.message, type=Question).task)
            answer = task.parse(reply.text)
            if reply.refused or not answer.text or (task.codes and not answer.verdict):
                return "refused"
            own = _reply(row.own)
            better = reply.confidence >= own.confidence
            speaker = reply.speaker or reply.peer
            relayed = msgspec.structs.replace(reply, id=own.id, peer=self.node, speaker=speaker, text=answer.text) if better else own
            self._finish(connection, row.position, relayed)
        self.outbox.wake()
        return "upgraded" if better else "confirmed"

    def unanswered(self, question: str) -> None:
        """None of this node's peers could help: its own answer goes out. Safe to repeat."""
        with self.engine.begin() as connection:
            row = connection.execute(_out(question)).one_or_none()
            if row is not None:
                self._finish(connection, row.position, _reply(row.own))
        self.outbox.wake()

    def sweep(self) -> int:
        """Send this node's own answers where the time for others is up; how many. Call it every second or so."""
        now = self.clock()
        late = sa.or_(served.c.hand_until <= now, served.c.hand_until > now + 2 * WAIT_LIMIT_S)  # the second: the clock was set back
        with self.engine.begin() as connection:
            rows = connection.execute(sa.select(served).where(served.c.own.is_not(None), served.c.reply.is_(None), late)).all()
            for row in rows:
                self._finish(connection, row.position, _reply(row.own))
        if rows:
            self.outbox.wake()
        return len(rows)

    # ---- the thread

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._wake.clear()
            try:
                if self.step():
                    continue
            except Exception:  # a locked or full disk: the question is stored, the next round takes it again
                log.exception("serving: a question could not be answered now")
                self._stopping.wait(1.0)
            self._wake.wait(5.0)

    def _compute(self, question: Question, deadline_s: float, *, may_ask: bool) -> tuple[Reply, Spoke | None]:
        """The reply, and what the model said; None where it said nothing."""
        try:
            spoke = self.model.answer(question, deadline_s=deadline_s, may_ask=may_ask)
        except Busy as error:
            return msgspec.structs.replace(self._empty(question, BUSY), retry_after=float(error.retry_after_s)), None
        except MilpaError as error:
            return self._empty(question, str(error)[:200]), None
        except Exception as error:
            log.exception("serving: the model failed on a question of %s", question.asker)
            return self._empty(question, f"the model failed: {type(error).__name__}"), None
        self.answer_s += REMEMBERED * (spoke.seconds - self.answer_s)
        answer = task_named(question.task).parse(spoke.text)
        if not answer.text:
            return self._empty(question, "the model had no answer"), None
        reply = msgspec.structs.replace(
            self._empty(question), text=answer.text, confidence=spoke.confidence, model_digest=spoke.model_digest,
            adapter_digest=spoke.adapter_digest, seconds=spoke.seconds,
        )  # fmt: skip
        return reply, spoke

    def _for_others(self, question: Question, until: float) -> float:
        """Seconds that this node's own peers have for the question; 0 where it may not travel on, or they have too few."""
        left = (until - self.clock()) * (1.0 - HELD_BACK)
        return left if self.hand_on is not None and len(question.path) < self.hop_limit and left >= HAND_ON_S else 0.0

    def _hand(self, connection: sa.Connection, row: sa.Row[Any], question: Question, own: Reply) -> bool:
        """Put the question to this node's own peers, if it may travel on and there is time. False: it may not, or there is not."""
        left = self._for_others(question, row.until)
        if self.hand_on is None or not left:
            return False
        expires, path = int(self.clock() + left), (*question.path, question.asker)
        further = msgspec.structs.replace(question, asker=self.node, confidence=own.confidence, expires=expires, path=path)
        if not self.hand_on(connection, further):
            return False
        values = {"own": encode(own), "hand_until": float(expires)}
        connection.execute(sa.update(served).where(served.c.position == row.position).values(**values))
        return True

    # ---- replies

    def _refusal(self, connection: sa.Connection, question: Question, *, known: bool) -> str:
        """Why the question is not even queued, or ""."""
        if self.node in (question.asker, *question.path):
            return f"the question came by {self.node} before"
        if len(question.path) > self.hop_limit:
            return f"handed on {len(question.path)} times, the limit is {self.hop_limit}"
        if known:
            return ""
        try:
            task_named(question.task)
        except BadInput as error:
            return str(error)
        return BUSY if _count_waiting(connection) >= self.queue_limit else ""

    def _refuse(self, connection: sa.Connection, question: Question, why: str) -> Reply:
        reply = self._empty(question, why)
        if why != BUSY:
            return reply
        low, high = RETRY_S  # a quarter of the queue: room for it and for some others
        after = min(high, max(low, self.answer_s * _count_waiting(connection) / 4))
        return msgspec.structs.replace(reply, retry_after=round(after, 1))

    def _own_for(self, connection: sa.Connection, row: sa.Row[Any], question: Question) -> bytes | None:
        """This node's own answer, for one who brings the question while it is out; None for one who waits for it already."""
        mine = sa.and_(waiting_askers.c.position == row.position, waiting_askers.c.asker == question.asker)
        waits = connection.execute(sa.select(waiting_askers.c.asker).where(mine)).one_or_none() is not None
        return None if waits else row.own

    def _wait(self, connection: sa.Connection, question: Question, message: Incoming, *, until: float) -> None:
        values = {"question": question.id, "prompt_digest": digest_bytes(question.prompt.encode()), "message": message.payload}
        connection.execute(insert(served).values(**values, until=until, hand_until=0.0).on_conflict_do_nothing())
        row = connection.execute(_same(question)).one()
        if until > row.until:  # whoever waits longest decides how long it is worth answering
            connection.execute(sa.update(served).where(served.c.position == row.position).values(until=until))
        many = sa.select(sa.func.count()).select_from(waiting_askers).where(waiting_askers.c.position == row.position)
        if connection.execute(many).scalar_one() < ASKERS_LIMIT:
            asker = insert(waiting_askers).values(
                position=row.position, asker=question.asker, correlation=message.correlation, until=until
            )  # fmt: skip
            connection.execute(asker.on_conflict_do_nothing())

    def _finish(self, connection: sa.Connection, position: int, reply: Reply) -> None:
        connection.execute(sa.update(served).where(served.c.position == position).values(reply=encode(reply), own=None))
        self._send_to_all(connection, position, reply)

    def _send_to_all(self, connection: sa.Connection, position: int, reply: Reply) -> None:
        rows = connection.execute(sa.select(waiting_askers).where(waiting_askers.c.position == position)).all()
        for row in rows:
            self._send(connection, row.asker, reply, row.correlation, until=row.until)
        connection.execute(sa.delete(waiting_askers).where(waiting_askers.c.position == position))

    def _send(self, session: Executes, asker: str, reply: Reply, correlation: bytes, *, until: float) -> None:
        self.outbox.put(
            session, topics.reply(asker, self.node), encode(reply), id=f"{reply.id}:{asker}", kind="reply", expires=until,
            correlation=correlation,
        )  # fmt: skip

    def _empty(self, question: Question, refused: str = "") -> Reply:
        return Reply(
            id=uuid.uuid4().hex, question=question.id, question_digest=digest_bytes(question.prompt.encode()), peer=self.node,
            model_digest="", text="", refused=refused,
        )  # fmt: skip

    def _forget_oldest(self, connection: sa.Connection, newest: int) -> None:
        old = sa.select(served.c.position).where(served.c.reply.is_not(None), served.c.position <= newest - STORED_LIMIT)
        _drop(connection, *connection.scalars(old).all())

    def _tell_load(self, *, full: bool) -> None:
        if full != self._full:
            self._full = full
            self._on_load()

    def _topics(self, question: Question) -> set[str]:
        asker = checked_name(question.asker, what="asker")
        return {topics.question(self.node, asker), *(topics.group_question(group, asker) for group in self.groups)}


def _same(question: Question) -> sa.Select[Any]:
    digest = digest_bytes(question.prompt.encode())
    return sa.select(served).where(served.c.question == question.id, served.c.prompt_digest == digest)


def _out(question: str) -> sa.Select[Any]:
    """The row of a question that is handed on and not answered yet."""
    return sa.select(served).where(served.c.question == question, served.c.own.is_not(None), served.c.reply.is_(None)).limit(1)


def _reply(data: bytes) -> Reply:
    return msgspec.json.decode(data, type=Reply)


def _drop(connection: sa.Connection, *positions: int) -> None:
    connection.execute(sa.delete(waiting_askers).where(waiting_askers.c.position.in_(positions)))
    connection.execute(sa.delete(served).where(served.c.position.in_(positions)))


def _count_waiting(connection: sa.Connection) -> int:
    waits = sa.select(sa.func.count()).select_from(served).where(served.c.reply.is_(None), served.c.own.is_(None))
    return int(connection.execute(waits).scalar_one())
