"""Asking peers with a larger model, and what their replies do.

    provisional answer -> question row + outbox row (one transaction, the caller's) -> ... -> reply row -> consensus -> `apply`, once

Rules:
 * Nothing is sent here: the outbox hands over, repeats and expires. The reply is the question's acknowledgement.
 * Peers in the configured order, those that seem awake first. `votes` of them are asked; one that declines is replaced by the next.
   Once the first has answered, the others have `patience` seconds: a peer that sleeps delays nothing for long.
 * A reply must come from a peer that was asked, over that peer's own topic, and name the digest of this very prompt.
 * Every reply is stored before it is acted on and acting twice is harmless, so a kill between any two steps loses nothing.
 * When time runs out, whoever has replied decides; nobody: the local answer stands (`Answering.expire` says so to the site).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import sqlalchemy as sa

from node.escalation.consensus import agree
from node.escalation.presence import Presence
from node.escalation.reporting import Reporter
from protocol import topics
from protocol.codec import decode_message, encode
from protocol.digests import digest_bytes
from protocol.errors import BadInput, MalformedMessage
from protocol.messages import Question, Reply
from protocol.mqtt import Incoming
from protocol.names import checked_name
from protocol.outbox import Executes, Outbox
from protocol.tasks import task_named

DEADLINE_S = 3_600.0  # seconds a question waits for its reply
MARGIN_S = 2.0  # seconds before the deadline at which those who have replied decide; at most a tenth of the whole wait
VOTES = 3  # peers asked at once, where so many are configured
PATIENCE_S = 30.0  # seconds the others have once the first has answered

BUSY = "busy"  # Reply.refused of a peer whose queue is full

metadata = sa.MetaData()

questions = sa.Table(
    "escalation_questions", metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("message", sa.LargeBinary, nullable=False),  # the Question, for the next peer
    sa.Column("prompt_digest", sa.String(64), nullable=False),
    sa.Column("decide", sa.Float, nullable=False),  # seconds since 1970 on this machine's clock
    sa.Column("expires", sa.Float, nullable=False),
)  # fmt: skip

asked = sa.Table(
    "escalation_asked", metadata,
    sa.Column("question", sa.String(64), primary_key=True),
    sa.Column("peer", sa.String(48), primary_key=True),
    sa.Column("place", sa.Integer, nullable=False),  # order of asking
    sa.Column("reply", sa.LargeBinary, nullable=True),  # the Reply, once it came
    sa.Column("declined", sa.Boolean, nullable=False, default=False),
)  # fmt: skip


class Asker:
    """Puts questions to `peers` and hands the outcome to `apply`.

    Args:
        apply: called with the reply that stands, outside any transaction; returns "refused" when the answer cannot be used
            (then the next peer is asked), anything else when it is settled. Must take the same reply twice: `Answering.apply`.
        unanswered: called with the id of a question that no peer could help with, as soon as that is known: `Answering.unanswered`.
        votes: how many peers are asked at once; with more than one, `consensus` decides.
        patience: seconds.
    """

    def __init__(
        self,
        node: str,
        peers: Sequence[str],
        outbox: Outbox,
        *,
        engine: sa.Engine,
        presence: Presence,
        reporter: Reporter,
        apply: Callable[[Reply], str] | None = None,
        unanswered: Callable[[str], None] | None = None,
        votes: int = VOTES,
        patience: float = PATIENCE_S,
        deadline_s: float = DEADLINE_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if not peers or votes < 1:
            raise BadInput("asking needs at least one peer and one vote; name peers in [peers] ask, or leave escalation off")
        self.node, self.peers = node, tuple(checked_name(peer, what="peer") for peer in dict.fromkeys(peers))
        if node in self.peers:
            raise BadInput(f"node {node!r} is named among its own peers; take it out of [peers] ask")
        self.outbox, self.engine, self.presence, self.reporter = outbox, engine, presence, reporter
        self.apply, self.unanswered = apply, unanswered
        self.votes, self.patience = min(votes, len(self.peers)), patience
        self.deadline_s, self.clock = deadline_s, clock
        metadata.create_all(engine)

    def ask(self, session: Executes, question: Question) -> None:
        """Queue `question` for its peers inside the caller's transaction. Call `outbox.wake` after the commit to save a second.

        Raises:
            TooLarge: the prompt does not fit a message.
        """
        now = self.clock()
        span = max(1.0, question.expires - now)
        session.execute(
            sa.insert(questions).values(
                id=question.id, message=encode(question), prompt_digest=digest_bytes(question.prompt.encode()),
                expires=now + span, decide=now + span - min(MARGIN_S, span / 10),
            )
        )  # fmt: skip
        for place, peer in enumerate(self.presence.order(self.peers)[: self.votes]):
            self._put(session, question, peer, now + span, place=place)

    def report(self, session: Executes, kind: str, figures: Mapping[str, float], detail: Mapping[str, str]) -> None:
        """Queue an event for the coordinator inside the caller's transaction."""
        self.reporter.report(session, kind, figures, detail)

    def heard(self, message: Incoming) -> None:
        """Handle one message of this node's reply topics.

        Raises:
            MalformedMessage: not a reply, or not from the peer it names.
            BadInput: it answers something else than what was asked.
        """
        reply = decode_message(message.payload)
        if not isinstance(reply, Reply) or message.topic != topics.reply(self.node, reply.peer):
            raise MalformedMessage(f"{message.topic} carries something other than that peer's reply")
        if message.correlation and message.correlation != reply.question.encode():
            raise BadInput(f"the reply of {reply.peer} answers question {reply.question!r} under another correlation")
        with self.engine.begin() as connection:
            question = connection.execute(sa.select(questions).where(questions.c.id == reply.question)).one_or_none()
            if question is None:
                return  # settled or given up: a late or repeated reply
            if reply.question_digest != question.prompt_digest:
                raise BadInput(f"the reply of {reply.peer} to {reply.question!r} names the digest of another prompt")
            known = connection.execute(_asked(reply.question, reply.peer)).one_or_none()
            if known is None:
                raise BadInput(f"{reply.peer} replies to {reply.question!r} and was never asked")
            if reply.refused == BUSY:  # it stays asked, the outbox repeats the question later; meanwhile somebody else may have time
                self._ask_another(connection, question)
            elif known.reply is None:
                connection.execute(
                    sa.update(asked)
                    .where(asked.c.question == reply.question, asked.c.peer == reply.peer)
                    .values(reply=encode(reply), declined=bool(reply.refused))
                )
                self.outbox.settle(connection, _row_id(reply.question, reply.peer))
                if not reply.refused:
                    soon = min(question.decide, self.clock() + self.patience)
                    connection.execute(sa.update(questions).where(questions.c.id == reply.question).values(decide=soon))
        self.decide(reply.question)

    def decide(self, question: str) -> None:
        """Act on a question if its replies suffice. Safe to repeat."""
        for _ in range(len(self.peers) + 1):  # each round without an outcome has one peer less to hope for
            chosen, over = self._weigh(question)
            outcome = self.apply(chosen) if chosen and self.apply else ""
            if over or (chosen and outcome != "refused"):
                if over and self.unanswered:
                    self.unanswered(question)
                self._forget(question)
                return
            if chosen is None:
                return
            with self.engine.begin() as connection:
                connection.execute(sa.update(asked).where(asked.c.question == question, asked.c.peer == chosen.peer).values(declined=True))

    def sweep(self) -> int:
        """Decide what waits no longer, and forget what nobody answered in time; how many of the latter.

        Call it every second or so, before `Answering.expire`; at start it finishes what a kill interrupted.
        """
        now = self.clock()
        with self.engine.begin() as connection:
            replied = sa.select(asked.c.question).where(asked.c.reply.is_not(None))
            ready = connection.scalars(sa.select(questions.c.id).where(questions.c.id.in_(replied))).all()
        for question in ready:
            self.decide(question)
        with self.engine.begin() as connection:
            over = connection.scalars(sa.select(questions.c.id).where(questions.c.expires <= now)).all()
        for question in over:
            self._forget(question)
        return len(over)

    @property
    def open(self) -> int:
        """Questions without an outcome."""
        with self.engine.begin() as connection:
            return int(connection.execute(sa.select(sa.func.count()).select_from(questions)).scalar_one())

    def _weigh(self, id: str) -> tuple[Reply | None, bool]:
        """The reply to act on now, or None; and whether the question is over with that. Asks another peer for one that declined."""
        with self.engine.begin() as connection:
            question = connection.execute(sa.select(questions).where(questions.c.id == id)).one_or_none()
            if question is None:
                return None, False
            rows = connection.execute(sa.select(asked).where(asked.c.question == id).order_by(asked.c.place)).all()
            replies = [(msgspec.json.decode(row.reply, type=Reply), row.declined) for row in rows if row.reply is not None]
            answers = [reply for reply, declined in replies if not declined]
            pending = len(rows) - len(replies)
            in_time = self.clock() < question.decide
            if in_time and len(answers) + pending < self.votes and self._ask_another(connection, question):
                return None, False
        if in_time and pending and len(answers) < self.votes:
            return None, False
        if answers:
            message = msgspec.json.decode(question.message, type=Question)
            return agree(answers, task_named(message.task)).reply, False
        if pending:
            return None, False
        refusals = [reply for reply, _ in replies if reply.refused]
        return (refusals[-1] if refusals else None), True

    def _ask_another(self, session: Executes, question: sa.Row[Any]) -> bool:
        """Put the question to the next peer that has not had it. False: all have."""
        had = set(session.execute(sa.select(asked.c.peer).where(asked.c.question == question.id)).scalars())
        untried = [peer for peer in self.presence.order(self.peers) if peer not in had]
        if not untried:
            return False
        self._put(session, msgspec.json.decode(question.message, type=Question), untried[0], question.expires, place=len(had))
        return True

    def _put(self, session: Executes, question: Question, peer: str, expires: float, *, place: int) -> None:
        session.execute(sa.insert(asked).values(question=question.id, peer=peer, place=place, declined=False))
        self.outbox.put(
            session, topics.question(peer, self.node), encode(question), id=_row_id(question.id, peer), kind="question",
            expires=expires, response_topic=topics.reply(self.node, peer), correlation=question.id.encode(),
        )  # fmt: skip

    def _forget(self, question: str) -> None:
        with self.engine.begin() as connection:
            peers = connection.scalars(sa.select(asked.c.peer).where(asked.c.question == question)).all()
            self.outbox.settle(connection, *(_row_id(question, peer) for peer in peers))
            connection.execute(sa.delete(asked).where(asked.c.question == question))
            connection.execute(sa.delete(questions).where(questions.c.id == question))


def _asked(question: str, peer: str) -> sa.Select[tuple[object, ...]]:
    return sa.select(asked).where(asked.c.question == question, asked.c.peer == peer)


def _row_id(question: str, peer: str) -> str:
    return f"{question}:{peer}"
