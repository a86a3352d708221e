"""Whom to ask, and when to ask again. No I/O: what is known of the peers comes in, an order comes out.

Never asked: a peer on the question's path (a loop), one that takes no questions, knows another task, has this node's own model or a
smaller one (it has nothing to add), or means to sleep past the deadline.
The others in this order: awake, never heard of, asleep, gone; among equals a larger model before one of unknown or equal size, then
one that brings another model than those asked already (equal models err alike), then the least expected wait, then the configured order.
Busy or silent peers are asked again after what they said plus a random part that doubles ("full jitter": callers spread out).
"""

import math
from collections.abc import Callable, Collection, Iterable

import msgspec

from protocol.messages import Status

AWAKE, UNHEARD, ASLEEP, GONE = 0, 1, 2, 3  # tiers: how probable it is that a peer answers soon
LINK_S = {"lan": 0.0, "cellular": 2.0, "lora": 60.0}  # seconds a question and its reply take on the peer's link, roughly
RETRY_BASE_S = 5.0  # seconds; the random part of the first wait
RETRY_CAP_S = 600.0  # seconds; of each part of a wait, the peer's own word included


class Me(msgspec.Struct, frozen=True):
    """What this node speaks with."""

    task: str = ""
    model_digest: str = ""
    adapter_digest: str = ""
    parameters: int = 0  # 0: not known


class Peer(msgspec.Struct, frozen=True):
    """A peer that could be asked, or a group through the best of its members."""

    name: str
    place: int  # in the configured order
    status: Status | None  # its last word; None: never heard
    likely: bool  # whether it would probably answer now
    asleep_s: float = 0.0  # seconds until it means to be back


def why_not(peer: Peer, me: Me, *, task: str, left_s: float, path: Collection[str]) -> str:
    """Why this peer is not asked, for the operator; "" when it may be."""
    status = peer.status
    if peer.name in path:
        return "the question came by it"
    if status is None:
        return ""
    if not status.serves:
        return "it takes no questions"
    if task and status.task and status.task != task:
        return f"it answers {status.task}"
    if status.model_digest and (status.model_digest, status.adapter_digest) == (me.model_digest, me.adapter_digest):
        return "its model is this node's own"
    if 0 < status.parameters < me.parameters:
        return "its model has fewer parameters than this node's"
    if status.state == "sleeping" and peer.asleep_s >= left_s:
        return "it sleeps past the deadline"
    return ""


def order(peers: Iterable[Peer], me: Me, *, spoken: Collection[str] = ()) -> list[Peer]:
    """The peers, best first.

    Args:
        spoken: digests of the models that were asked already.
    """

    def key(peer: Peer) -> tuple[int, bool, bool, float, int]:
        status = peer.status
        larger = status is not None and 0 < me.parameters < status.parameters
        again = status is not None and status.model_digest in spoken
        return tier(peer), not larger, again, expected_s(peer), peer.place

    return sorted(peers, key=key)


def tier(peer: Peer) -> int:
    """AWAKE, UNHEARD, ASLEEP or GONE."""
    if peer.status is None:
        return UNHEARD
    if peer.likely:
        return AWAKE
    return ASLEEP if peer.status.state == "sleeping" else GONE


def expected_s(peer: Peer) -> float:
    """Seconds until its reply, as far as its last word tells: sleep, link, and the queue before us."""
    if peer.status is None:
        return 0.0
    return peer.asleep_s + LINK_S.get(peer.status.link, 0.0) + (peer.status.queue + 1) * max(0.0, peer.status.answer_s)


def wait_s(tries: int, *, retry_after: float, uniform: Callable[[float, float], float]) -> float:
    """Seconds until a peer is asked again: what it said, and a random part up to RETRY_BASE_S * 2^tries."""
    said = min(RETRY_CAP_S, max(0.0, retry_after)) if math.isfinite(retry_after) else 0.0
    return said + uniform(0.0, min(RETRY_CAP_S, RETRY_BASE_S * 2.0 ** min(tries, 30)))
