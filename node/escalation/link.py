"""A node's link to the others: one MQTT session, one outbox, and who handles what. The node runs as well without it.

    link = Link("esteli", store.engine, host=..., port=..., peers=("base",), describe=app.status, ...)
    answering = Answering(..., asking=link.asker)
    link.start(answering.apply)
    every second: link.tick(); answering.expire()
    link.stop()

`start` returns at once, broker or no broker. Questions, replies and events wait in the outbox for as long as it takes.
"""

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import sqlalchemy as sa

from node.escalation.asking import DEADLINE_S, Asker
from node.escalation.presence import Presence, Voice, new_boot, will
from node.escalation.reporting import Reporter
from node.escalation.serving import HOP_LIMIT, Answer, Server
from protocol import topics
from protocol.codec import decode_message
from protocol.errors import MalformedMessage
from protocol.messages import ReleaseNotice, Reply, State, Status
from protocol.mqtt import Incoming, Session
from protocol.names import checked_name
from protocol.outbox import Drain, Inbox, Outbox

WILL_DELAY_S = 15  # a gap this short is not a death


class Link:
    """Wires session, outbox, presence, asking and serving on `engine`'s database.

    Args:
        peers: whom to ask, in order; empty: `asker` is None.
        serve: answers other nodes' questions (see `serving.with_worker`); None: this node serves nobody.
        describe: this node's state for its status word; node, boot, sequence, time and waiting messages are filled in.
        on_release: told of every release notice, which carries no authority.
        on_parked: told (topic, payload, reason) of every message that could not be used.
        rng, backoff_base, backoff_cap: see `mqtt.Session`.
    """

    def __init__(
        self,
        node: str,
        engine: sa.Engine,
        *,
        host: str,
        port: int,
        describe: Callable[[], Status],
        username: str = "",
        password: str = "",
        ca_file: Path | None = None,
        cert_file: Path | None = None,
        key_file: Path | None = None,
        role: str = "student",
        peers: Sequence[str] = (),
        votes: int = 1,
        deadline_s: float = DEADLINE_S,
        serve: Answer | None = None,
        hops: int = HOP_LIMIT,
        heartbeat: float = 300.0,
        will_delay: int = WILL_DELAY_S,
        on_release: Callable[[ReleaseNotice], None] | None = None,
        on_parked: Callable[[str, bytes, str], None] | None = None,
        backoff_base: float = 0.5,
        backoff_cap: float = 60.0,
        resend: float = 60.0,
        clock: Callable[[], float] = time.time,
        rng: random.Random | None = None,
    ) -> None:
        self.node = checked_name(node, what="node")
        self.boot = new_boot()
        self._on_release, self._on_parked = on_release, on_parked
        self.outbox = Outbox(engine, clock=clock, resend=resend)
        self.presence = Presence()
        self.reporter = Reporter(node, self.outbox, engine=engine, clock=clock)
        self.session = Session(
            node, host, port, username=username or node, password=password, ca_file=ca_file, cert_file=cert_file, key_file=key_file,
            will=will(node, self.boot, role=role), will_delay=will_delay, on_parked=self._parked,
            backoff_base=backoff_base, backoff_cap=backoff_cap, rng=rng,
        )  # fmt: skip
        self.drain = Drain(self.outbox, self.session, inbox=Inbox(engine, clock=clock))
        self.voice = Voice(node, self.boot, self.session, describe, heartbeat=heartbeat, clock=clock, rng=rng)
        self.asker: Asker | None = None
        self.server: Server | None = None
        self.session.subscribe(topics.ALL_STATUS, self.presence.hear)
        self.session.subscribe(topics.ack(node), self.reporter.acknowledged)
        self.session.subscribe(topics.RELEASE, self._released)
        if peers:
            self.asker = Asker(
                node, peers, self.outbox, engine=engine, presence=self.presence, reporter=self.reporter, votes=votes,
                deadline_s=deadline_s, clock=clock,
            )  # fmt: skip
            self.session.subscribe(topics.replies_to(node), self.asker.heard)
        if serve is not None:
            self.server = Server(node, self.outbox, serve, engine=engine, hop_limit=hops, clock=clock)
            self.session.subscribe(topics.questions_to(node), self.server.heard)

    def start(self, apply: Callable[[Reply], str] | None = None) -> None:
        """Start all threads. `apply` takes the reply that stands: `Answering.apply`."""
        if self.asker is not None:
            self.asker.apply = apply
        if self.server is not None:
            self.server.start()
        self.voice.start()
        self.drain.start()
        self.session.start()

    def tick(self) -> None:
        """What is to be done every second or so: decide on questions whose time is over."""
        if self.asker is not None:
            self.asker.sweep()

    def stop(self, state: State = "stopped", *, sleeping_until: int = 0) -> None:
        """Say goodbye and end all threads, each within a few seconds. What is still to be said stays in the outbox."""
        if self.server is not None:
            self.server.stop()
        self.drain.stop()
        self.voice.stop(state, sleeping_until=sleeping_until)
        self.session.stop()

    @property
    def healthy(self) -> bool:
        """Whether every thread that should run does; being offline is healthy."""
        return self.drain.alive and not self.session.broken

    def _released(self, message: Incoming) -> None:
        notice = decode_message(message.payload)
        if not isinstance(notice, ReleaseNotice):
            raise MalformedMessage(f"{message.topic} carries a {type(notice).__name__}, not a release notice")
        if self._on_release is not None:
            self._on_release(notice)

    def _parked(self, message: Incoming, reason: str) -> None:
        if self._on_parked is not None:
            self._on_parked(message.topic, message.payload, reason)
