"""The words on the wire, as frozen values. Decoding and its limits are in `codec`; where each travels is in `topics`.

Every message has an `id` that its receiver remembers, so that a second delivery changes nothing (QoS 1 delivers at least once).
Times are seconds since 1970, UTC, and may be wrong: a board without a clock starts in 1970. Nothing is decided on a sender's time alone.
"""

from typing import Literal

import msgspec

State = Literal["answering", "updating", "sleeping", "stopped", "lost", "no-model"]


class Status(msgspec.Struct, frozen=True, tag="status", forbid_unknown_fields=True):
    """A node's word about itself: birth, heartbeat, and (as the broker's will) death. Retained."""

    node: str
    boot: str  # one id a process start: a late death of an earlier boot is recognised and ignored
    sequence: int  # counts up within a boot
    state: State
    role: str = "student"
    release: int = 0
    model_digest: str = ""
    adapter_digest: str = ""
    at: int = 0
    sleeping_until: int = 0
    answered: int = 0  # since this boot
    escalated: int = 0
    waiting: int = 0  # outbox rows
    version: str = ""


class ReleaseNotice(msgspec.Struct, frozen=True, tag="release", forbid_unknown_fields=True):
    """ "There is a release": where the metadata is. Retained. Carries no authority: trust comes from TUF alone."""

    number: int
    url: str  # base URL of the repository: URL/metadata/, URL/blobs/


class Question(msgspec.Struct, frozen=True, tag="question", forbid_unknown_fields=True):
    """Asks a peer with a larger model. Response topic and correlation data are MQTT 5 properties and repeated nowhere."""

    id: str
    asker: str
    task: str
    prompt: str  # as the asker's own model read it
    confidence: float  # of the asker's own answer, calibrated, in [0, 1]
    expires: int  # seconds since 1970; the MQTT message expiry is the same span
    hops: int = 0


class Reply(msgspec.Struct, frozen=True, tag="reply", forbid_unknown_fields=True):
    """A peer's answer. Names the question's digest and the model that spoke, so it cannot be pinned to another question."""

    id: str
    question: str  # Question.id
    question_digest: str  # SHA-256 of the prompt, UTF-8
    peer: str
    model_digest: str
    text: str  # empty when refused
    confidence: float = 0.0
    seconds: float = 0.0  # the peer's own computing time
    refused: str = ""  # why there is no text: "busy", "expired", "no model"


class Event(msgspec.Struct, frozen=True, tag="event", forbid_unknown_fields=True):
    """Something that happened on a node, for the coordinator's ledger. Never a record's text.

    kind                 figures                                     detail
    escalation           confidence, peer_confidence, seconds        state: upgraded | confirmed | expired | refused;  peer
    answers              count, escalated, latency_p50_ms            (a summary, sent now and then)
    release-activated    number, seconds
    release-refused      number                                      reason
    adapter-trained      release, examples, loss_before, loss_after
    adapter-refused                                                  reason
    """

    id: str
    node: str
    kind: str
    at: int = 0
    figures: dict[str, float] = {}
    detail: dict[str, str] = {}


class Ack(msgspec.Struct, frozen=True, tag="ack", forbid_unknown_fields=True):
    """The coordinator's word that events are in its ledger: only now may the node forget them (a PUBACK is the broker's word)."""

    id: str
    events: tuple[str, ...]


Message = Status | ReleaseNotice | Question | Reply | Event | Ack
