"""Answering other nodes' questions with this node's model.

Rules:
 * A question is stored before it is acknowledged to the broker, and its reply is stored with the outbox row that carries it: a kill
   anywhere computes at most one answer again and loses none.
 * A question that comes again (same id, same asker) gets the stored reply again; it is never computed twice.
 * QUEUE_LIMIT questions wait. One more is declined as "busy", and that refusal is not stored: asked again later it may find room.
 * How long a question is worth answering is told by the broker (message expiry), measured on this machine's clock from its arrival;
   the asker's own clock may be wrong. Past that it is dropped in silence: the asker has given it up.
 * The reply goes to the asker's own reply topic and nowhere else, whatever the question's response topic says.
"""

import logging
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from node.engine.worker import Busy, Worker
from node.escalation.asking import BUSY
from protocol import topics
from protocol.codec import decode_message, encode
from protocol.confidence import features, judge
from protocol.digests import digest_bytes
from protocol.errors import BadInput, MalformedMessage, MilpaError
from protocol.messages import Question, Reply
from protocol.mqtt import Incoming
from protocol.names import checked_name
from protocol.outbox import Executes, Outbox
from protocol.tasks import task_named

QUEUE_LIMIT = 256  # questions waiting; a row each, and minutes of work for a 270M model on one core
STORED_LIMIT = 10_000  # replies kept for questions that come again; about 10 MB
HOP_LIMIT = 1  # how often a question may have been handed on
NO_EXPIRY_S = 600.0  # seconds a question without an expiry is worth answering
WAIT_LIMIT_S = 86_400.0  # seconds; no question is worth more
ANSWER_DEADLINE_S = 120.0  # seconds for one answer, the model's queue included

log = logging.getLogger(__name__)
metadata = sa.MetaData()

served = sa.Table(
    "escalation_served", metadata,
    sa.Column("position", sa.Integer, primary_key=True),
    sa.Column("id", sa.String(112), nullable=False, unique=True),  # asker and Question.id
    sa.Column("message", sa.LargeBinary, nullable=False),  # the Question
    sa.Column("until", sa.Float, nullable=False),  # seconds since 1970 on this machine's clock
    sa.Column("correlation", sa.LargeBinary, nullable=False),
    sa.Column("reply", sa.LargeBinary, nullable=True),  # None: not answered yet
    sqlite_autoincrement=True,
)  # fmt: skip


class Spoke(msgspec.Struct, frozen=True):
    """An answer of this node's model."""

    text: str
    confidence: float
    model_digest: str
    seconds: float


Answer = Callable[[str, str, int, float], Spoke]  # task, prompt, max_new_tokens, deadline in seconds


def with_worker(worker: Worker) -> Answer:
    """Answer with the node's own engine thread; a question takes its turn among the site's records."""

    def answer(task: str, prompt: str, max_new_tokens: int, deadline_s: float) -> Spoke:
        spoken = worker.ask(task, prompt, max_new_tokens=max_new_tokens, deadline_s=deadline_s)
        speaker = spoken.speaker
        judgement = judge(features(spoken.generation), calibration=speaker.calibration, threshold=None)
        return Spoke(spoken.generation.text, judgement.confidence, speaker.engine.model_digest, spoken.generation.seconds)

    return answer


class Server:
    """Takes questions to `node` and answers them, one at a time, in order of arrival."""

    def __init__(
        self,
        node: str,
        outbox: Outbox,
        answer: Answer,
        *,
        engine: sa.Engine,
        queue_limit: int = QUEUE_LIMIT,
        hop_limit: int = HOP_LIMIT,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.node, self.outbox, self.answer, self.engine = node, outbox, answer, engine
        self.queue_limit, self.hop_limit, self.clock = queue_limit, hop_limit, clock
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

    def heard(self, message: Incoming) -> None:
        """Handle one message of this node's question topics: store it, or say at once why not.

        Raises:
            MalformedMessage: not a question, or not from the node that its topic names.
        """
        question = decode_message(message.payload)
        if not isinstance(question, Question) or message.topic != topics.question(self.node, checked_name(question.asker)):
            raise MalformedMessage(f"{message.topic} carries something other than that node's question")
        now = self.clock()
        worth = min(WAIT_LIMIT_S, NO_EXPIRY_S if message.expiry is None else message.expiry)
        with self.engine.begin() as connection:
            known = connection.execute(sa.select(served).where(served.c.id == _key(question))).one_or_none()
            if known is not None:
                if known.reply is not None:  # the reply was lost, or is still under way: then its row is there and nothing is added
                    self._send(connection, question, msgspec.json.decode(known.reply, type=Reply), known.correlation, until=now + worth)
            elif refusal := self._refusal(connection, question):
                self._send(connection, question, self._reply(question, refused=refusal), message.correlation, until=now + worth)
            else:
                connection.execute(
                    insert(served).values(
                        id=_key(question), message=message.payload, until=now + worth, correlation=message.correlation
                    )
                )  # fmt: skip
        self._wake.set()
        self.outbox.wake()

    @property
    def waiting(self) -> int:
        """Questions not answered yet."""
        with self.engine.begin() as connection:
            return _count_waiting(connection)

    def step(self) -> bool:
        """Answer the oldest waiting question. False: none waits. For the thread, and for tests."""
        now = self.clock()
        with self.engine.begin() as connection:
            past = sa.or_(served.c.until <= now, served.c.until > now + 2 * WAIT_LIMIT_S)  # the second: the clock was set back
            connection.execute(sa.delete(served).where(served.c.reply.is_(None), past))
            row = connection.execute(sa.select(served).where(served.c.reply.is_(None)).order_by(served.c.position).limit(1)).one_or_none()
        if row is None:
            return False
        question = msgspec.json.decode(row.message, type=Question)
        reply = self._compute(question, min(ANSWER_DEADLINE_S, row.until - now))
        with self.engine.begin() as connection:
            self._send(connection, question, reply, row.correlation, until=row.until)
            if reply.refused == BUSY:  # it may ask again
                connection.execute(sa.delete(served).where(served.c.position == row.position))
            else:
                connection.execute(sa.update(served).where(served.c.position == row.position).values(reply=encode(reply)))
            connection.execute(sa.delete(served).where(served.c.reply.is_not(None), served.c.position <= row.position - STORED_LIMIT))
        self.outbox.wake()
        return True

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

    def _refusal(self, connection: sa.Connection, question: Question) -> str:
        """Why the question is not even queued, or ""."""
        if question.hops > self.hop_limit:
            return f"handed on {question.hops} times, the limit is {self.hop_limit}"
        try:
            task_named(question.task)
        except BadInput as error:
            return str(error)
        return BUSY if _count_waiting(connection) >= self.queue_limit else ""

    def _compute(self, question: Question, deadline_s: float) -> Reply:
        task = task_named(question.task)
        try:
            spoke = self.answer(task.name, question.prompt, task.max_new_tokens, deadline_s)
        except Busy:
            return self._reply(question, refused=BUSY)
        except MilpaError as error:
            return self._reply(question, refused=str(error)[:200])
        except Exception as error:
            log.exception("serving: the model failed on a question of %s", question.asker)
            return self._reply(question, refused=f"the model failed: {type(error).__name__}")
        text = task.parse(spoke.text).text
        if not text:
            return self._reply(question, refused="the model had no answer")
        reply = self._reply(question)
        return msgspec.structs.replace(
            reply, text=text, confidence=spoke.confidence, model_digest=spoke.model_digest, seconds=spoke.seconds
        )  # fmt: skip

    def _reply(self, question: Question, *, refused: str = "") -> Reply:
        return Reply(
            id=uuid.uuid4().hex, question=question.id, question_digest=digest_bytes(question.prompt.encode()), peer=self.node,
            model_digest="", text="", refused=refused,
        )  # fmt: skip

    def _send(self, session: Executes, question: Question, reply: Reply, correlation: bytes, *, until: float) -> None:
        self.outbox.put(
            session,
            topics.reply(question.asker, self.node),
            encode(reply),
            id=reply.id,
            kind="reply",
            expires=until,
            correlation=correlation,
        )


def _key(question: Question) -> str:
    return f"{question.asker}:{question.id}"


def _count_waiting(connection: sa.Connection) -> int:
    count: Any = connection.execute(sa.select(sa.func.count()).select_from(served).where(served.c.reply.is_(None)))
    return int(count.scalar_one())
