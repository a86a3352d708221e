"""Asking peers with a larger model, and what their replies do.

    provisional answer -> question row + outbox row (one transaction, the caller's) -> ... -> reply row -> consensus -> `apply`, once

Rules:
 * Nothing is sent here and nothing waits: the outbox hands over and repeats. The reply is the question's acknowledgement.
 * `votes` peers are asked at once, the best by `choosing`; a group of base stations counts as one peer, the broker picks the member.
   One that declines, is busy, or says nothing for `patience` seconds after the broker has its question is not waited for: the next is
   asked as well. A busy peer is asked again when it said, and later (`choosing.wait_s`); a question to a sleeper waits at the broker.
 * A reply must come from a peer that was asked, over that peer's own topic, and name the digest of this very prompt. Its model must be one
   that the peer, or the peer it names as speaker, has announced; a reply whose birth is not here yet waits BIRTH_S for it. One of a model
   nobody announced is refused and kept, and the next peer is asked.
 * A question whose message expired while a clock was hours ahead is put into the outbox again, once the clock is right.
 * Decided when enough have answered, when those still out can change nothing, `patience` after the first answer, or when time runs out.
 * Every reply is stored before it is acted on and acting twice is harmless, so a kill between any two steps loses nothing.
 * When time runs out, whoever has replied decides; nobody: the local answer stands (`Answering.expire` says so to the site).
"""

import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from node.escalation import choosing
from node.escalation.choosing import Me, Peer
from node.escalation.consensus import Record, Vote, agree, settled, verdicts_on
from node.escalation.presence import Presence
from node.escalation.reporting import Reporter
from protocol import topics
from protocol.codec import decode_message, encode
from protocol.digests import digest_bytes
from protocol.errors import BadInput, MalformedMessage, TrustError
from protocol.messages import Question, Reply
from protocol.mqtt import Incoming
from protocol.names import checked_name
from protocol.outbox import Executes, Outbox
from protocol.tasks import Task, task_named

DEADLINE_S = 3_600.0  # seconds a question waits for its reply
MARGIN_S = 2.0  # seconds before the deadline at which those who have replied decide; at most a tenth of the whole wait
VOTES = 3  # peers asked at once, where so many are configured
PATIENCE_S = 30.0  # seconds a peer may be silent before the next is asked too; and the others have once the first has answered
BIRTH_S = 30.0  # seconds a reply waits for the word in which its peer announces that model
LOOK_S = 600.0  # seconds between two looks at a question of which nothing is expected
LOOKS = 200  # questions looked at in one sweep
GROUP_TRIES = 3  # times a group is asked, each time by whichever member the broker picks
LOST_TRIES = 3  # times a question is put into the outbox that did not keep it
SPEAKERS_LIMIT = 64  # nodes beyond the configured peers whose word is listened to, because a relayed reply named them

BUSY = "busy"  # Reply.refused of a peer whose queue is full
GROUP = "$"  # in front of a group's name where a peer's name could stand

log = logging.getLogger(__name__)
metadata = sa.MetaData()

questions = sa.Table(
    "asking_questions", metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("message", sa.LargeBinary, nullable=False),  # the Question, for the next peer
    sa.Column("prompt_digest", sa.String(64), nullable=False),
    sa.Column("decide", sa.Float, nullable=False),  # seconds since 1970 on this machine's clock, as the other times here
    sa.Column("expires", sa.Float, nullable=False),
    sa.Column("look", sa.Float, nullable=False, index=True),  # when something about it may have changed
)  # fmt: skip

asked = sa.Table(
    "asking_peers", metadata,
    sa.Column("question", sa.String(64), primary_key=True),
    sa.Column("peer", sa.String(49), primary_key=True),  # its name, or GROUP and the group's
    sa.Column("place", sa.Integer, nullable=False),  # order of asking
    sa.Column("at", sa.Float, nullable=False),  # since when its silence counts
    sa.Column("tries", sa.Integer, nullable=False),  # times it was asked
    sa.Column("again", sa.Float, nullable=False),  # when to ask it again; 0: the question is in the outbox
    sa.Column("model", sa.String(130), nullable=False),  # what it had announced when it was asked: "model adapter"
    sa.Column("reply", sa.LargeBinary, nullable=True),  # the Reply, once it came
    sa.Column("heard", sa.Float, nullable=False),  # when
    sa.Column("declined", sa.Boolean, nullable=False),
)  # fmt: skip

records = sa.Table(
    "asking_records", metadata,
    sa.Column("peer", sa.String(48), primary_key=True),
    sa.Column("agreed", sa.Float, nullable=False),
    sa.Column("outvoted", sa.Float, nullable=False),
    sa.Column("claimed", sa.Float, nullable=False),
)  # fmt: skip


class Outcome(NamedTuple):
    """What looking at a question found."""

    reply: Reply | None = None  # to act on now: the one that stands, or with `over` the last refusal
    slot: str = ""  # the row it came by
    over: bool = False  # nobody is left who could help
    judged: Mapping[str, Vote] = {}  # peer: whether it voted for what stands


class _Slot(NamedTuple):
    """One row of `asked`, looked at."""

    state: str  # "answer", "declined", "expected" (soon), "out" (some day)
    peer: str
    next: float  # when to look again
    reply: Reply | None = None
    heard: float = 0.0  # when the reply came
    refuse: str = ""  # why the reply is refused just now


class Asker:
    """Puts questions to `peers` and `groups` and hands the outcome to `apply`.

    Args:
        apply: called with the reply that stands, outside any transaction; returns "refused" when the answer cannot be used
            (then the next peer is asked), anything else when it is settled. Must take the same reply twice: `Answering.apply`.
        unanswered: called with the id of a question that no peer could help with, as soon as that is known: `Answering.unanswered`.
        refuse: keeps a reply that is not believed, with the reason.
        meet: called with the name of a node whose word is not heard yet and is needed: subscribe to its status.
        me: what this node speaks with now.
        linked: whether the broker has us. Without it nothing is asked of others: no silence means anything.
        votes: how many peers are asked at once; with more than one, `consensus` decides.
        quorum: how many answers are enough; 0: all that were asked for.
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
        groups: Sequence[str] = (),
        apply: Callable[[Reply], str] | None = None,
        unanswered: Callable[[str], None] | None = None,
        refuse: Callable[[Reply, str], None] | None = None,
        meet: Callable[[str], None] | None = None,
        me: Callable[[], Me] = Me,
        linked: Callable[[], bool] = lambda: True,
        votes: int = VOTES,
        quorum: int = 0,
        patience: float = PATIENCE_S,
        deadline_s: float = DEADLINE_S,
        clock: Callable[[], float] = time.time,
        rng: random.Random | None = None,
    ) -> None:
        if not (peers or groups) or votes < 1 or not 0 <= quorum <= votes:
            raise BadInput(
                "asking needs at least one peer or group, one vote, and a quorum of at most the votes;"
                " name peers in [peers] ask, or leave escalation off"
            )
        self.node, self.peers = node, tuple(checked_name(peer, what="peer") for peer in dict.fromkeys(peers))
        self.groups = tuple(checked_name(group, what="group") for group in dict.fromkeys(groups))
        if node in self.peers:
            raise BadInput(f"node {node!r} is named among its own peers; take it out of [peers] ask")
        self.outbox, self.engine, self.presence, self.reporter = outbox, engine, presence, reporter
        self.apply, self.unanswered, self._refuse, self._meet = apply, unanswered, refuse, meet
        self._me, self._linked = me, linked
        self.votes, self.patience = min(votes, len(self.peers) + len(self.groups)), patience
        self.quorum = min(quorum or self.votes, self.votes)
        self.deadline_s, self.clock, self._rng = deadline_s, clock, rng or random.Random()
        self._met = set(self.peers)  # nodes whose word is listened to
        metadata.create_all(engine)

    def ask(self, session: Executes, question: Question) -> None:
        """Queue `question` for its peers inside the caller's transaction. Call `outbox.wake` after the commit to save a second.

        Raises:
            TooLarge: the prompt does not fit a message.
        """
        now = self.clock()
        span = max(1.0, question.expires - now)
        row = {
            "id": question.id, "message": encode(question), "prompt_digest": digest_bytes(question.prompt.encode()),
            "expires": now + span, "decide": now + span - min(MARGIN_S, span / 10), "look": now + min(self.patience, span),
        }  # fmt: skip
        session.execute(sa.insert(questions).values(**row))
        if not self._ask_others(session, question, now + span, self.votes):
            session.execute(sa.update(questions).where(questions.c.id == question.id).values(look=now))  # over; the next sweep says so

    def knows(self, session: Executes, question: str) -> bool:
        """Whether a question of that id is open here."""
        return session.execute(sa.select(questions.c.id).where(questions.c.id == question)).one_or_none() is not None

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
        if reply.speaker:
            checked_name(reply.speaker, what="speaker")
        with self.engine.begin() as connection:
            question = connection.execute(sa.select(questions).where(questions.c.id == reply.question)).one_or_none()
            if question is None:
                return  # settled or given up: a late or repeated reply
            if reply.question_digest != question.prompt_digest:
                raise BadInput(f"the reply of {reply.peer} to {reply.question!r} names the digest of another prompt")
            row = self._slot_of(connection, reply)
            if row is None:
                raise BadInput(f"{reply.peer} replies to {reply.question!r} and was never asked")
            if row.reply is None:
                self._take(connection, row, reply)
        self.decide(reply.question)

    def digest_of(self, question: str) -> str | None:
        """The digest of an open question's prompt; None: it is not open."""
        with self.engine.begin() as connection:
            return connection.scalar(sa.select(questions.c.prompt_digest).where(questions.c.id == question))

    def decide(self, question: str) -> None:
        """Act on a question if its replies suffice. Safe to repeat."""
        for _ in range(len(self.peers) + len(self.groups) + 1):  # each round without an outcome has one peer less to hope for
            found = self._look(question)
            outcome = self.apply(found.reply) if found.reply and self.apply else ""
            if found.over or (found.reply and outcome != "refused"):
                if found.over and self.unanswered:
                    self.unanswered(question)
                self._forget(question, found.judged)
                return
            if found.reply is None:
                return
            with self.engine.begin() as connection:
                connection.execute(_update(question, found.slot).values(declined=True))

    def sweep(self) -> int:
        """Look at the questions whose time to look has come, and forget what nobody answered in time; how many of the latter.

        Call it every second or so, before `Answering.expire`; at start it finishes what a kill interrupted.
        """
        now = self.clock()
        waits = sa.and_(questions.c.look > now, questions.c.look <= now + 2 * LOOK_S)  # later than that: the clock was set back
        query = sa.select(questions.c.id).where(sa.not_(waits)).order_by(questions.c.look).limit(LOOKS)
        if not self._linked():  # then only what can end now: somebody has replied, or nobody could be asked
            silent = sa.select(asked.c.question).group_by(asked.c.question).having(sa.func.count(asked.c.reply) == 0)
            query = query.where(questions.c.id.not_in(silent))
        with self.engine.begin() as connection:
            due = connection.scalars(query).all()
        for question in due:
            try:
                self.decide(question)
            except Exception:  # a locked disk, or a row no rule expects: the others must not wait for it
                log.exception("asking: question %s could not be looked at now", question)
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

    def status(self) -> list[dict[str, Any]]:
        """Each peer as it is seen from here, for GET /v1/status."""
        me, told = self._me(), []
        with self.engine.begin() as connection:
            trust = _trust(connection)
        for place, name in enumerate((*self.peers, *(GROUP + group for group in self.groups))):
            peer = self._peer(name, place)
            says = peer.status
            told.append({
                "name": name, "awake": peer.likely, "asleep_s": round(peer.asleep_s), "trust": round(trust.get(name, 1.0), 2),
                "state": says.state if says else "", "model": says.model_digest if says else "", "queue": says.queue if says else 0,
                "why_not": choosing.why_not(peer, me, task=me.task, left_s=self.deadline_s, path=()),
            })  # fmt: skip
        return told

    # ---- one reply

    def _slot_of(self, connection: sa.Connection, reply: Reply) -> sa.Row[Any] | None:
        """The row a reply belongs to: its peer's own, else that of a group that was asked (`_believe` looks whether it is a member)."""
        rows = connection.execute(sa.select(asked).where(asked.c.question == reply.question).order_by(asked.c.place)).all()
        own = next((row for row in rows if row.peer == reply.peer), None)
        return own or next((row for row in rows if row.peer.startswith(GROUP)), None)

    def _take(self, connection: sa.Connection, row: sa.Row[Any], reply: Reply) -> None:
        """Store a first reply, or put the peer off that cannot answer now."""
        now, update = self.clock(), _update(row.question, row.peer)
        another_member = row.peer.startswith(GROUP) and bool(reply.refused) and row.tries < GROUP_TRIES
        if reply.refused == BUSY or another_member:
            if row.again:
                return  # said before
            again = now + choosing.wait_s(row.tries, retry_after=reply.retry_after, uniform=self._rng.uniform)
            connection.execute(update.values(again=again))
        else:
            connection.execute(update.values(reply=encode(reply), heard=now, declined=bool(reply.refused)))
        self.outbox.settle(connection, _row_id(row.question, row.peer))

    def _believe(self, row: sa.Row[Any], reply: Reply) -> str:
        """Why a reply is not believed: its model, or its membership, is not what the node that spoke has announced. "" when it is.

        Raises:
            TrustError: it has announced nothing yet; look again later.
        """
        speaker = reply.speaker or reply.peer
        spoken = (reply.model_digest, reply.adapter_digest)
        if row.peer.startswith(GROUP) and reply.peer not in self.presence.members(row.peer.removeprefix(GROUP)):
            raise TrustError(f"{reply.peer} has not said that it is a member of {row.peer}")
        if not reply.speaker and " ".join(spoken) == row.model:
            return ""
        known = self.presence.announced(speaker)
        if spoken in known:
            return ""
        if not known:
            self._listen_to(speaker)
        named = f"the reply of {reply.peer} names model {reply.model_digest[:12] or '(none)'} of {speaker}"
        raise TrustError(f"{named}, which it has not announced")

    def _listen_to(self, speaker: str) -> None:
        if self._meet and speaker not in self._met and len(self._met) < SPEAKERS_LIMIT:
            self._met.add(speaker)
            self._meet(speaker)

    # ---- one question

    def _look(self, id: str) -> Outcome:
        """What is to be done about a question now. Asks again, asks others, and refuses what is not believed."""
        with self.engine.begin() as connection:
            question = connection.execute(sa.select(questions).where(questions.c.id == id)).one_or_none()
            if question is None:
                return Outcome()
            message = msgspec.json.decode(question.message, type=Question)
            rows = connection.execute(sa.select(asked).where(asked.c.question == id).order_by(asked.c.place)).all()
            slots = [self._look_at(connection, question, message, row) for row in rows]
            found = self._weigh(connection, question, message, slots)
        for slot in slots:
            if slot.refuse and slot.reply:
                log.warning("asking: refused: %s", slot.refuse)
                if self._refuse:
                    self._refuse(slot.reply, slot.refuse)
        return found

    def _weigh(self, connection: sa.Connection, question: sa.Row[Any], message: Question, slots: list[_Slot]) -> Outcome:
        now, task, trust = self.clock(), task_named(message.task), _trust(connection)
        believed = [slot for slot in slots if slot.state == "answer"]
        answers = [slot.reply for slot in believed if slot.reply]
        expected = sum(slot.state == "expected" for slot in slots)
        out = expected + sum(slot.state == "out" for slot in slots)
        decide = min([question.decide] + [slot.heard + self.patience for slot in believed])
        in_time = now < decide
        if in_time and (missing := self.votes - len(answers) - expected) > 0:
            more = self._ask_others(connection, message, question.expires, missing)
            out += more
        if answers and (not in_time or not out or self._enough(answers, task, min(out, self.votes), trust)):
            common = agree(answers, task, trust=trust)
            slot = next(slot.peer for slot in slots if slot.reply and slot.reply.id == common.reply.id)
            return Outcome(common.reply, slot, False, verdicts_on(answers, task, common))
        if not answers and not out:
            refusals = [slot.reply for slot in slots if slot.reply and slot.reply.refused]
            return Outcome(refusals[-1] if refusals else None, "", True)
        later = min([slot.next for slot in slots if slot.next > now] + [now + LOOK_S, question.expires])
        if in_time:
            later = min(later, decide, now + self.patience)
        connection.execute(sa.update(questions).where(questions.c.id == question.id).values(look=later))
        return Outcome()

    def _enough(self, answers: Sequence[Reply], task: Task, pending: int, trust: Mapping[str, float]) -> bool:
        return len(answers) >= self.quorum or settled(answers, task, pending=pending, trust=trust)

    def _look_at(self, connection: sa.Connection, question: sa.Row[Any], message: Question, row: sa.Row[Any]) -> _Slot:
        reply = msgspec.json.decode(row.reply, type=Reply) if row.reply is not None else None
        if row.declined:
            return _Slot("declined", row.peer, 0.0, reply)
        if reply is not None:
            return self._look_at_reply(connection, row, reply)
        now = self.clock()
        if row.again > 0.0:
            if now < row.again <= now + 2 * choosing.RETRY_CAP_S:  # later than that: the clock was set back
                return _Slot("out", row.peer, row.again)
            return self._again(connection, question, message, row)
        if row.tries < LOST_TRIES and self.outbox.lost(connection, _row_id(row.question, row.peer)):
            return self._again(connection, question, message, row)  # a clock that was hours ahead made it expire; by this one it has time
        if not self.outbox.taken(connection, _row_id(row.question, row.peer)):  # silence counts from when the broker has it
            connection.execute(_update(row.question, row.peer).values(at=now))
            return _Slot("expected", row.peer, now + self.patience)
        if not 0.0 <= now - row.at < self.patience:
            if row.peer.startswith(GROUP) and row.tries < GROUP_TRIES:  # the member that has it may be gone; the broker picks another
                self.outbox.settle(connection, _row_id(row.question, row.peer))
                return self._again(connection, question, message, row)
            return _Slot("out", row.peer, 0.0)
        soon = choosing.tier(self._peer(row.peer, row.place)) in (choosing.AWAKE, choosing.UNHEARD)
        return _Slot("expected" if soon else "out", row.peer, row.at + self.patience)

    def _look_at_reply(self, connection: sa.Connection, row: sa.Row[Any], reply: Reply) -> _Slot:
        try:
            self._believe(row, reply)
        except TrustError as error:
            if 0.0 <= self.clock() - row.heard < BIRTH_S or not self._linked():  # without a link no word can come
                return _Slot("expected", row.peer, min(self.clock() + 1.0, row.heard + BIRTH_S))
            connection.execute(_update(row.question, row.peer).values(declined=True))
            return _Slot("declined", row.peer, 0.0, reply, row.heard, str(error))
        return _Slot("answer", row.peer, 0.0, reply, row.heard)

    def _again(self, connection: sa.Connection, question: sa.Row[Any], message: Question, row: sa.Row[Any]) -> _Slot:
        now = self.clock()
        connection.execute(_update(row.question, row.peer).values(again=0.0, at=now, tries=row.tries + 1))
        self._queue(connection, message, row.peer, question.expires)
        self.outbox.wake()
        return _Slot("expected", row.peer, now + self.patience)

    def _ask_others(self, session: Executes, question: Question, expires: float, count: int) -> int:
        """Put the question to up to `count` peers that have not had it, the best first; how many there were."""
        me = self._me()
        had = set(session.execute(sa.select(asked.c.peer).where(asked.c.question == question.id)).scalars())
        path = {*question.path, question.asker}
        known = [self._peer(name, place) for place, name in enumerate((*self.peers, *(GROUP + group for group in self.groups)))]
        spoken = {peer.status.model_digest for peer in known if peer.name in had and peer.status}
        left = expires - self.clock()
        fresh = [peer for peer in known if peer.name not in had]
        may = [peer for peer in fresh if not choosing.why_not(peer, me, task=question.task, left_s=left, path=path)]
        count = min(count, len(may))
        for place in range(len(had), len(had) + count):
            best = choosing.order(may, me, spoken=spoken)[0]
            may.remove(best)
            spoken |= {best.status.model_digest} if best.status else set()
            self._put(session, question, best, expires, place=place)
        return count

    def _peer(self, name: str, place: int) -> Peer:
        """What is known of a peer; of a group, what is known of the member that will answer soonest."""
        if not name.startswith(GROUP):
            return Peer(name, place, self.presence.last(name), self.presence.likely(name), self.presence.asleep_s(name))
        members = [self._peer(member, place) for member in self.presence.members(name.removeprefix(GROUP)) if member != self.node]
        if not members:
            return Peer(name, place, None, False)
        best = choosing.order(members, self._me())[0]
        return msgspec.structs.replace(best, name=name)

    def _put(self, session: Executes, question: Question, peer: Peer, expires: float, *, place: int) -> None:
        model = " ".join((peer.status.model_digest, peer.status.adapter_digest)) if peer.status and peer.status.model_digest else ""
        session.execute(
            sa.insert(asked).values(
                question=question.id, peer=peer.name, place=place, at=self.clock(), tries=1, again=0.0, heard=0.0, declined=False,
                model="" if peer.name.startswith(GROUP) else model,
            )
        )  # fmt: skip
        self._queue(session, question, peer.name, expires)

    def _queue(self, session: Executes, question: Question, peer: str, expires: float) -> None:
        group = peer.removeprefix(GROUP)
        topic = topics.question(peer, self.node) if group == peer else topics.group_question(group, self.node)
        self.outbox.put(
            session, topic, encode(question), id=_row_id(question.id, peer), kind="question", expires=expires,
            response_topic=topics.reply(self.node, group), correlation=question.id.encode(),
        )  # fmt: skip

    def _forget(self, question: str, judged: Mapping[str, Vote] | None = None) -> None:
        with self.engine.begin() as connection:
            peers = connection.scalars(sa.select(asked.c.peer).where(asked.c.question == question)).all()
            self.outbox.settle(connection, *(_row_id(question, peer) for peer in peers))
            connection.execute(sa.delete(asked).where(asked.c.question == question))
            if connection.execute(sa.delete(questions).where(questions.c.id == question)).rowcount and judged:  # once a question
                _count(connection, judged)


def _trust(connection: sa.Connection) -> dict[str, float]:
    rows = connection.execute(sa.select(records)).all()
    return {row.peer: _record(row).trust for row in rows}


def _record(row: sa.Row[Any]) -> Record:
    return Record(row.agreed, row.outvoted, row.claimed)


def _count(connection: sa.Connection, judged: Mapping[str, Vote]) -> None:
    for peer, vote in judged.items():
        row = connection.execute(sa.select(records).where(records.c.peer == peer)).one_or_none()
        values = msgspec.structs.asdict((_record(row) if row else Record()).after(vote))
        connection.execute(insert(records).values(peer=peer, **values).on_conflict_do_update(index_elements=["peer"], set_=values))


def _update(question: str, peer: str) -> sa.Update:
    return sa.update(asked).where(asked.c.question == question, asked.c.peer == peer)


def _row_id(question: str, peer: str) -> str:
    return f"{question}:{peer}"
