"""Everything of a node that goes through the broker, wired together: session, outbox, presence, asking, serving, events.

The broker may be away for months. Nothing here waits for it: rows go into the outbox, the session connects when it can.
"""

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from node.engine.worker import Worker
from node.escalation import presence
from node.escalation.asking import Asker
from node.escalation.reporting import Reporter
from node.escalation.serving import Server, with_worker
from node.settings import NodeSettings, secret
from node.store import Store
from protocol import topics
from protocol.codec import decode_message
from protocol.errors import MalformedMessage
from protocol.messages import ReleaseNotice, Reply, Status
from protocol.mqtt import Incoming, Session
from protocol.outbox import Drain, Executes, Outbox

WILL_DELAY_S = 10  # seconds the broker waits before it calls a node lost: a short gap is no death

log = logging.getLogger("milpa.node")


class Messaging:
    """The node's side of MQTT. Built with the node, started after its model.

    Args:
        describe: the node's state now, for its status.
    """

    def __init__(
        self,
        settings: NodeSettings,
        store: Store,
        worker: Worker,
        *,
        boot: str,
        describe: Callable[[], Status],
        clock: Callable[[], float] = time.time,
    ) -> None:
        name, broker, peers = settings.node.name, settings.broker, settings.peers
        self.name, self.host, self.port = name, broker.host, broker.port
        self._store, self._clock = store, clock
        password = secret(broker.password_file, what="broker.password_file")
        ca, cert, key = (Path(file).expanduser() if file else None for file in (broker.ca_file, broker.cert_file, broker.key_file))
        self.session = Session(
            name, broker.host, broker.port, username=broker.username or (name if password else ""), password=password,
            will=presence.will(name, boot, role=settings.node.role), will_delay=WILL_DELAY_S, ca_file=ca, cert_file=cert, key_file=key,
            on_parked=self._keep,
        )  # fmt: skip
        self.outbox = Outbox(store.engine, clock=clock)
        self._drain = Drain(self.outbox, self.session)
        self._reporter = Reporter(name, self.outbox, engine=store.engine, clock=clock)
        self._voice = presence.Voice(name, boot, self.session, describe, heartbeat=broker.heartbeat_s, clock=clock)
        self._presence = presence.Presence()
        self.asker: Asker | None = None  # None: nobody may be asked
        self._server: Server | None = None
        self.session.subscribe(topics.ack(name), self._reporter.acknowledged)
        if peers.ask:
            self.asker = Asker(
                name, peers.ask, self.outbox, engine=store.engine, presence=self._presence, reporter=self._reporter,
                votes=peers.votes, deadline_s=peers.deadline_s, clock=clock,
            )  # fmt: skip
            for peer in peers.ask:
                self.session.subscribe(topics.status(peer), self._presence.hear)
            self.session.subscribe(topics.replies_to(name), self.asker.heard)
        if peers.serve:
            self._server = Server(name, self.outbox, with_worker(worker), engine=store.engine, hop_limit=peers.hops, clock=clock)
            self.session.subscribe(topics.questions_to(name), self._server.heard)

    def start(self, *, apply: Callable[[Reply], str], unanswered: Callable[[str], None], on_release: Callable[[], None]) -> None:
        """Start all threads. Returns at once, broker or no broker.

        Args:
            apply: what a reply that stands does; see `Answering.apply`.
            unanswered: what happens to a question nobody could help with; see `Answering.unanswered`.
            on_release: called when a release is announced. The notice carries no authority, so nothing of it is passed on.
        """

        def announced(message: Incoming) -> None:
            if not isinstance(decode_message(message.payload), ReleaseNotice):
                raise MalformedMessage(f"{message.topic} carries something other than a release notice")
            on_release()

        self.session.subscribe(topics.RELEASE, announced)
        if self.asker:
            self.asker.apply, self.asker.unanswered = apply, unanswered
        self.session.start()
        self._drain.start()
        self._voice.start()
        if self._server:
            self._server.start()

    def stop(self) -> None:
        """Say goodbye and end all threads."""
        if self._server:
            self._server.stop()
        self._drain.stop()
        self._voice.stop()
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
        """Decide and forget questions whose time is up."""
        if self.asker:
            self.asker.sweep()

    @property
    def connected(self) -> bool:
        """Whether the broker has us."""
        return self.session.connected

    def waiting(self) -> int:
        """Messages in the outbox."""
        return self.outbox.depth()

    def status(self) -> dict[str, Any]:
        """For GET /v1/status."""
        return {
            "host": self.host, "port": self.port, "connected": self.connected, "problem": self.session.problem, "outbox": self.waiting(),
            "open_questions": self.asker.open if self.asker else 0, "to_answer": self._server.waiting if self._server else 0,
        }  # fmt: skip

    def _keep(self, message: Incoming, reason: str) -> None:
        """A message no handler could take is kept with the reason."""
        self._store.refuse(message.payload.decode("utf-8", "replace"), reason=reason, origin=message.topic, now=self._clock())
