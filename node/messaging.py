"""Everything of a node that goes through the broker, wired together: session, outbox, presence, asking, serving, events.

The broker may be away for months. Nothing here waits for it: rows go into the outbox, the session connects when it can.
"""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import sqlalchemy as sa

from node.confidence.judging import Judge
from node.engine.worker import Worker
from node.escalation import presence
from node.escalation.asking import Asker
from node.escalation.choosing import Me
from node.escalation.radio import Gateway, Radio, stored_prompt
from node.escalation.reporting import Reporter
from node.escalation.serving import Judged, Server
from node.link import Link
from node.settings import NodeSettings
from node.store import AnswerRow, Store
from protocol import topics
from protocol.codec import decode_message
from protocol.drain import Drain
from protocol.errors import MalformedMessage
from protocol.messages import Question, ReleaseNotice, Reply, Status
from protocol.mqtt import Incoming, Session
from protocol.outbox import Executes, Outbox

WILL_DELAY_S = 10  # seconds the broker waits before it calls a node lost: a short gap is no death

log = logging.getLogger("milpa.node")


class Messaging:
    """The node's side of MQTT. Built with the node, started after its model.

    Args:
        judge: of this node's answers, those to other nodes too: one budget.
        describe: the node's state now, for its status; what others choose their peers by is added here.
        link: counts and limits what goes over the link; None: nothing does.
    """

    def __init__(
        self,
        settings: NodeSettings,
        store: Store,
        worker: Worker,
        judge: Judge,
        *,
        boot: str,
        describe: Callable[[], Status],
        link: Link | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        name, broker, peers = settings.node.name, settings.broker, settings.peers
        self.name, self.host, self.port = name, broker.host, broker.port
        self._settings, self._store, self._worker, self._describe, self._clock = settings, store, worker, describe, clock
        by_radio = settings.link_rules.frames_only
        self.session = Session(
            name, **broker.login(name, what="broker"),
            will=None if by_radio else lambda connection: presence.will(name, boot, connection, role=settings.node.role),
            will_delay=WILL_DELAY_S, on_parked=self._keep, keepalive=int(settings.link_rules.keepalive_s),
            backoff_cap=settings.link_rules.backoff_cap_s, meter=link.meter if link else None,
        )  # fmt: skip
        self.outbox = Outbox(store.engine, clock=clock)
        self.session.on_connected(lambda _: self.outbox.connected(self.session.maximum_packet))
        self._radio = self._by_radio() if by_radio else None
        self._drain = Drain(self.outbox, self._radio or self.session, meter=link.meter if link else None)
        self._reporter = Reporter(name, self.outbox, engine=store.engine, clock=clock)
        self._voice = presence.Voice(name, boot, self._radio or self.session, self._say, heartbeat=settings.heartbeat_s, clock=clock)
        self._presence = presence.Presence()
        self.asker: Asker | None = None  # None: nobody may be asked
        self._server: Server | None = None
        self._running = False  # between `start` and `stop`
        self._gateway = self._for_radios() if settings.link.radio else None
        if not by_radio:
            self.session.subscribe(topics.ack(name), self._reporter.acknowledged)
        if peers.ask or peers.ask_groups:
            self._ask_others()
        if peers.serve:
            self._answer_others(judge)

    def _ask_others(self) -> None:
        peers = self._settings.peers
        listens_to_all = bool(peers.ask_groups)  # who is in a group, its members say in their status
        self.asker = Asker(
            self.name, peers.ask, self.outbox, engine=self._store.engine, presence=self._presence, reporter=self._reporter,
            groups=peers.ask_groups, refuse=self._distrust, meet=None if listens_to_all or self._radio else self._listen_to, me=self._me,
            linked=lambda: self.session.connected, votes=peers.votes, quorum=peers.quorum, patience=peers.patience_s,
            deadline_s=peers.deadline_s, clock=self._clock,
        )  # fmt: skip
        if self._radio:
            return
        if listens_to_all:
            self.session.subscribe(topics.ALL_STATUS, self._presence.hear)
            self.session.subscribe(topics.ALL_ALIVE, self._presence.hear_alive)
        for peer in () if listens_to_all else self.asker.peers:
            self._listen_to(peer)
        self.session.subscribe(topics.replies_to(self.name), self.asker.heard)

    def _answer_others(self, judge: Judge) -> None:
        peers = self._settings.peers
        self._server = Server(
            self.name, self.outbox, Judged(self._worker, judge), engine=self._store.engine,
            groups=peers.serve_groups, hand_on=self._hand_on if self.asker else None, on_load=self.announce, queue_limit=peers.queue,
            hop_limit=peers.hops, clock=self._clock,
        )  # fmt: skip
        self.session.subscribe(topics.questions_to(self.name), self._server.heard)
        for group in peers.serve_groups:
            self.session.subscribe(topics.shared_questions(group), self._server.heard)

    def start(self, *, apply: Callable[[Reply], str], unanswered: Callable[[str], None], on_release: Callable[[], None]) -> None:
        """Start all threads. Returns at once, broker or no broker.

        Args:
            apply: what a reply that stands does; see `Answering.apply`.
            unanswered: what happens to a question nobody could help with; see `Answering.unanswered`.
            on_release: called when a release is announced. The notice carries no authority, so nothing of it is passed on.
        """

        def announced(message: Incoming) -> None:
            notice = decode_message(message.payload)
            if not isinstance(notice, ReleaseNotice):
                raise MalformedMessage(f"{message.topic} carries something other than a release notice")
            if self._gateway:
                self._gateway.announce(notice)
            on_release()

        if not self._radio:
            self.session.subscribe(topics.RELEASE, announced)
        if self.asker:
            self.asker.apply, self.asker.unanswered = self._or_relay(apply), self._or_own(unanswered)
        self.session.start()
        self._drain.start()
        self._voice.start()
        if self._server:
            self._server.start()
        self._running = True

    def stop(self, *, sleeping_until: int = 0) -> None:
        """Say goodbye and end all threads.

        Args:
            sleeping_until: seconds since 1970, when this node means to be back; 0: nobody knows.
        """
        self._running = False
        for group in self._settings.peers.serve_groups:  # or the broker keeps its share of the group's questions for us
            self.session.unsubscribe(topics.shared_questions(group))
        if self._server:
            self._server.stop()
        self._drain.stop()
        self._voice.stop(sleeping_until=sleeping_until)
        self.session.stop()

    def report(self, session: Executes, kind: str, figures: Mapping[str, float], detail: Mapping[str, str]) -> None:
        """Queue an event for the coordinator inside the caller's transaction."""
        self._reporter.report(session, kind, figures, detail)

    def wake(self) -> None:
        """Something was put into the outbox and committed."""
        self.outbox.wake()

    def announce(self) -> None:
        """Tell the fleet soon how this node is."""
        self._voice.announce()

    def sweep(self) -> None:
        """Decide and forget questions whose time is up, this node's own and those it handed on."""
        if self.asker:
            self.asker.sweep()
        if self._server:
            self._server.sweep()

    def trouble(self) -> str:
        """Which of the threads is dead, or in the outbox's case stuck (`protocol.drain.STUCK_S`); being offline is no trouble."""
        lives = {"session": not self.session.broken, "outbox": self._drain.alive, "presence": self._voice.alive}
        if self._server:
            lives["serving"] = self._server.alive
        found = [what for what, well in lives.items() if not well]
        return f"a thread is dead or stuck: {', '.join(found)}" if found and self._running else ""

    @property
    def connected(self) -> bool:
        """Whether the broker has us."""
        return self.session.connected

    @property
    def open_questions(self) -> int:
        """Questions to peers without an outcome."""
        return self.asker.open if self.asker else 0

    @property
    def to_answer(self) -> int:
        """Questions of others that wait here."""
        return self._server.waiting if self._server else 0

    def waiting(self) -> int:
        """Messages in the outbox."""
        return self.outbox.depth()

    def status(self) -> dict[str, Any]:
        """For GET /v1/status."""
        return {
            "host": self.host, "port": self.port, "connected": self.connected, "problem": self.session.problem, "outbox": self.waiting(),
            "held": self._drain.held, "set_aside": len(self.outbox.set_aside()),
            "open_questions": self.open_questions, "to_answer": self.to_answer, "peers": self.asker.status() if self.asker else [],
        }  # fmt: skip

    def _say(self) -> Status:
        """The node's word about itself, with what others choose their peers by."""
        speaker, serving, me = self._worker.speaker, self._server, self._me()
        return msgspec.structs.replace(
            self._describe(), model_digest=me.model_digest, adapter_digest=me.adapter_digest, parameters=me.parameters,
            task=speaker.task if speaker else "", serves=serving is not None, groups=self._settings.peers.serve_groups,
            queue=self._worker.waiting + self.to_answer, answer_s=round(serving.answer_s, 3) if serving else 0.0,
            link=self._settings.link.class_,
        )  # fmt: skip

    def _me(self) -> Me:
        speaker = self._worker.speaker
        if speaker is None:
            return Me()
        engine = speaker.engine
        return Me(speaker.task, engine.model_digest, engine.adapter_digest, engine.parameters)

    def _by_radio(self) -> Radio:
        """This node's end of a radio: frames instead of messages, and nothing else."""
        radio = Radio(
            self.name, self.session, peers=self._settings.peers.ask, task=lambda: self._settings.model.task, vouch=self._vouch,
            digest_of=lambda question: self.asker.digest_of(question) if self.asker else None, clock=self._clock,
        )  # fmt: skip

        def heard(message: Incoming) -> None:
            reply = radio.heard(message)
            if reply is not None and self.asker:
                self.asker.heard(reply)

        self.session.subscribe(topics.radio_down(self.name), heard)
        return radio

    def _vouch(self, peer: str, model: str) -> None:
        """The gateway says with which model a peer spoke; over a radio nothing else is heard of peers."""
        self._presence.note(Status(peer, "radio", time.monotonic_ns(), "answering", model_digest=model, serves=True))

    def _for_radios(self) -> Gateway:
        """The other end: this node speaks for those on a radio, from the prompts it has answered itself."""
        prompts = sa.select(AnswerRow.prompt).order_by(AnswerRow.row.desc())
        return Gateway(
            self.session, self.outbox, self._settings.link.radio, peers=(self.name, *self._settings.peers.ask),
            prompt_of=stored_prompt(self._store.engine, prompts), tasks=lambda: (self._settings.model.task,), clock=self._clock,
        )  # fmt: skip

    def _listen_to(self, peer: str) -> None:
        self.session.subscribe(topics.status(peer), self._presence.hear)
        self.session.subscribe(topics.alive(peer), self._presence.hear_alive)

    def _hand_on(self, session: Executes, question: Question) -> bool:
        """Put a question of another node to this node's own peers; not one that is open here already under that id."""
        if self.asker is None or self.asker.knows(session, question.id):
            return False
        self.asker.ask(session, question)
        return True

    def _or_relay(self, apply: Callable[[Reply], str]) -> Callable[[Reply], str]:
        def outcome(reply: Reply) -> str:
            serving = self._server
            return serving.relay(reply) if serving and serving.handed(reply.question) else apply(reply)

        return outcome

    def _or_own(self, unanswered: Callable[[str], None]) -> Callable[[str], None]:
        def outcome(question: str) -> None:
            serving = self._server
            return serving.unanswered(question) if serving and serving.handed(question) else unanswered(question)

        return outcome

    def _keep(self, message: Incoming, reason: str) -> None:
        """A message no handler could take is kept with the reason."""
        self._store.refuse(message.payload.decode("utf-8", "replace"), reason=reason, origin=message.topic, now=self._clock())

    def _distrust(self, reply: Reply, reason: str) -> None:
        """A reply that is not believed is kept with the reason."""
        self._store.refuse(reply.text, reason=reason, origin=f"peer:{reply.peer}", now=self._clock())
