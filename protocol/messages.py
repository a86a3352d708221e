"""The words on the wire, as frozen values. Decoding and its limits are in `codec`; where each travels is in `topics`.

Every message has an `id` that its receiver remembers, so that a second delivery changes nothing (QoS 1 delivers at least once).
Times are seconds since 1970, UTC, and may be wrong: a board without a clock starts in 1970. Nothing is decided on a sender's time alone.
A field with its default value is left out on the wire. The rules that these words follow, with their ids: docs/protocol.md.
"""

from typing import Literal

import msgspec

State = Literal["answering", "updating", "sleeping", "stopped", "lost", "no-model"]


class Status(msgspec.Struct, frozen=True, tag="status", forbid_unknown_fields=True, omit_defaults=True):
    """A node's word about itself: birth, heartbeat, and (as the broker's will) death. Retained.

    What a peer is chosen by stands here as well: its task, its model's size, its queue, its link.
    """

    node: str
    boot: str  # one id a process start: a late death of an earlier boot is recognised and ignored
    sequence: int  # counts up within a boot
    state: State
    connection: int = 0  # counts up within a boot, one a connection to the broker: a late death of an earlier connection is ignored
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
    task: str = ""  # what its model answers
    parameters: int = 0  # of its model; 0: not told
    serves: bool = False  # whether it takes questions of others
    groups: tuple[str, ...] = ()  # whose questions it shares with the group's other members
    queue: int = 0  # questions and records that wait for its model
    answer_s: float = 0.0  # seconds an answer took, lately; 0: not known
    link: str = ""  # "lan", "cellular", "lora"; empty: not told


class ReleaseNotice(msgspec.Struct, frozen=True, tag="release", forbid_unknown_fields=True):
    """ "There is a release": where the metadata is. Retained. Carries no authority: trust comes from TUF alone."""

    number: int
    url: str  # base URL of the repository: URL/metadata/, URL/blobs/


class Question(msgspec.Struct, frozen=True, tag="question", forbid_unknown_fields=True, omit_defaults=True):
    """Asks a peer with a larger model. Response topic and correlation data are MQTT 5 properties and repeated nowhere.

    A peer that hands it on keeps id, task and prompt, becomes the asker, and puts the asker before into `path`.
    """

    id: str
    asker: str
    task: str
    prompt: str  # as the asker's own model read it
    confidence: float  # of the asker's own answer, calibrated, in [0, 1]
    expires: int  # seconds since 1970; the MQTT message expiry is the same span
    path: tuple[str, ...] = ()  # who asked before this asker, the first one first: as many as it was handed on, and no loop


class Reply(msgspec.Struct, frozen=True, tag="reply", forbid_unknown_fields=True, omit_defaults=True):
    """A peer's answer. Names the question's digest and the model that spoke, so it cannot be pinned to another question or model."""

    id: str
    question: str  # Question.id
    question_digest: str  # SHA-256 of the prompt, UTF-8
    peer: str
    model_digest: str
    text: str  # empty when refused
    confidence: float = 0.0
    seconds: float = 0.0  # the peer's own computing time
    refused: str = ""  # why there is no text: "busy", "no model", ...
    adapter_digest: str = ""
    speaker: str = ""  # whose model spoke, where the peer handed the question on; empty: the peer's own
    retry_after: float = 0.0  # seconds after which a busy peer may be asked again


class Event(msgspec.Struct, frozen=True, tag="event", forbid_unknown_fields=True):
    """Something that happened on a node, for the coordinator's ledger. Never a record's text; `pattern` carries what its operator marked.

    kind                 figures                                     detail
    escalation           confidence, peer_confidence, seconds        state: upgraded | confirmed | expired | refused;  peer
    answers              count, escalated, latency_p50_ms            (a summary, sent now and then)
    release-activated    number, seconds
    release-refused      number                                      reason
    adapter-trained      release, examples, loss_before, loss_after
    adapter-refused                                                  reason
    pattern                                                          key, task, lang, when, means
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
