"""Several peers answered one question: which answer stands, and how sure are they together. No I/O.

 * verdict tasks   the verdict with the most weight wins; among its sentences the rule for text.
 * text            minimum Bayes risk: the text that is on average most like the others, in chrF (Eikema & Aziz 2020; Freitag et al. 2022).
 * weight          confidence times trust; no voice has more than MAX_SHARE of all of three or more, so one that is sure of everything wins
                   against no others that agree. Two voices weigh the same, and the surer one breaks the tie.
 * voice           one a speaker and text: the same model relayed by two peers is one voice.
 * trust           falls with every vote a peer lost that others agreed on, and with claims that did not come true: who says 1.0 and stands
                   for a third of it is believed for a third. All counts fade, so that a repaired peer recovers.
 * stragglers      `settled` says when those still out can change nothing.
One reply is its own consensus, with its own confidence. Equal weights: the surer peer, then the first by name; the order of arrival plays
no part. Do not evaluate the outcome with chrF: it was chosen by chrF (bench/consensus.py judges by what did not vote).
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from protocol.likeness import chrf
from protocol.messages import Reply
from protocol.tasks import Task

WEIGHT_FLOOR = 0.05  # a peer that is unsure, or cannot tell, still has a voice
MAX_SHARE = 0.4  # of the weight of three voices or more; below 1/2, so that the others together always outweigh one
CONTEST = 3  # voices from which on an outvoted one is held to have erred, if another agrees with what stands; else nobody knows which
TRUST_FLOOR = 0.1
PRIOR = 3.0  # agreements, and claims that came true, that a new peer is credited with
MEMORY = 0.98  # of the counts at each further vote: half is forgotten after 34
ALIKE, UNLIKE = 0.6, 0.3  # chrF to the text that stands: from here on agreed, up to there outvoted, nothing between


class Consensus(msgspec.Struct, frozen=True):
    """What the peers say together."""

    reply: Reply  # the one that stands, its confidence replaced by the common one
    agreement: float  # share of the weight behind it (verdicts), or its mean likeness to all (text), in [0, 1]
    voices: int = 1


class Vote(NamedTuple):
    """One peer's part in what stands."""

    agreed: bool
    claimed: float  # its confidence, in [0, 1]


class Record(msgspec.Struct, frozen=True):
    """How often a peer was on the side that stood, and how sure it said it was; all counts fading."""

    agreed: float = 0.0
    outvoted: float = 0.0
    claimed: float = 0.0  # sum of its confidences

    @property
    def trust(self) -> float:
        """In [TRUST_FLOOR, 1]: the share of votes it won, times the share of its claims that came true; 1 if it never lost one."""
        won = self.agreed + PRIOR
        return max(TRUST_FLOOR, won / (won + self.outvoted) * min(1.0, won / (self.claimed + PRIOR)))

    def after(self, vote: Vote) -> "Record":
        """With one more vote counted."""
        return Record(self.agreed * MEMORY + vote.agreed, self.outvoted * MEMORY + (not vote.agreed), self.claimed * MEMORY + vote.claimed)


def agree(replies: Sequence[Reply], task: Task, *, trust: Mapping[str, float] | None = None) -> Consensus:
    """Choose among `replies`.

    confidence = that of the chosen reply * agreement: a lone voice among equals gets less, unanimity adds nothing, since
    peers with one teacher err alike.

    Args:
        trust: peer to [0, 1]; 1 for a peer that is not named.

    Raises:
        ValueError: no reply at all, or only refusals.
    """
    said = _voices(replies, trust or {})
    if not said:
        raise ValueError("nobody answered: there is nothing to agree on")
    weights = [weight(reply, trust or {}) for reply in said]
    shares = capped(weights)
    verdicts = [task.parse(reply.text).verdict for reply in said]
    agreement = 1.0
    among = list(range(len(said)))
    if any(verdicts):
        behind = {verdict: math.fsum(shares[i] for i in among if verdicts[i] == verdict) for verdict in verdicts if verdict}
        raw = {verdict: max(weights[i] for i in among if verdicts[i] == verdict) for verdict in behind}
        winner = max(behind, key=lambda verdict: (round(behind[verdict], 12), raw[verdict]))
        among, agreement = [i for i in among if verdicts[i] == winner], min(1.0, behind[winner])
    scores = {i: _centrality(i, among, said, shares) for i in among}
    best = max(among, key=lambda i: (round(scores[i], 12), weights[i]))
    if not any(verdicts) and len(said) > 1:
        agreement = min(1.0, scores[best])
    chosen = said[best]
    return Consensus(msgspec.structs.replace(chosen, confidence=_unit(chosen.confidence) * agreement), agreement, len(said))


def settled(replies: Sequence[Reply], task: Task, *, pending: int, trust: Mapping[str, float] | None = None) -> bool:
    """Whether `pending` more replies, all sure, trusted and of one other opinion, could not change what stands."""
    said = _voices(replies, trust or {})
    if not said:
        return False
    opinions = [task.parse(reply.text).verdict or reply.text for reply in said]
    weights = [weight(reply, trust or {}) for reply in said] + [1.0] * pending
    standing = agree(replies, task, trust=trust).reply.text
    winner = task.parse(standing).verdict or standing
    if not task.codes and opinions.count(winner) * 2 <= len(weights):
        return False  # texts that are merely alike: a further one may lie more in the middle
    shares = capped(weights)
    for other in {*opinions, ""} - {winner}:
        ours = math.fsum(share for share, opinion in zip(shares, opinions, strict=False) if opinion == winner)
        theirs = math.fsum(share for share, opinion in zip(shares, opinions + [other] * pending, strict=True) if opinion == other)
        if ours <= theirs + 1e-9:
            return False
    return True


def verdicts_on(replies: Sequence[Reply], task: Task, outcome: Consensus) -> dict[str, Vote]:
    """Which peers agreed with what stands and which were outvoted; peer to its vote.

    Nobody, with fewer than CONTEST voices, or where what stands is one peer's alone: then nobody knows who erred.
    """
    if outcome.voices < CONTEST:
        return {}
    stands = task.parse(outcome.reply.text)
    found: dict[str, Vote] = {}
    speakers: set[str] = set()  # that agree
    for reply in replies:
        if reply.refused or not reply.text:
            continue
        if task.codes:
            agreed = task.parse(reply.text).verdict == stands.verdict
        elif (alike := likeness(reply.text, outcome.reply.text)) >= ALIKE or alike <= UNLIKE:
            agreed = alike >= ALIKE
        else:
            continue
        found[reply.peer] = Vote(agreed, _unit(reply.confidence))
        speakers |= {reply.speaker or reply.peer} if agreed else set()
    return found if len(speakers) > 1 else {}


def likeness(one: str, other: str) -> float:
    """chrF both ways, in [0, 1]. One way alone prefers the longer text (recall counts more), and a long lie would win."""
    return (chrf(one, other) + chrf(other, one)) / 2


def weight(reply: Reply, trust: Mapping[str, float]) -> float:
    """What a reply weighs before the cap."""
    return max(WEIGHT_FLOOR, _unit(reply.confidence)) * max(TRUST_FLOOR, trust.get(reply.peer, 1.0))


def capped(weights: Sequence[float]) -> list[float]:
    """The weights as shares of 1, none above MAX_SHARE (three or more), or all equal (two): what one loses, the others share."""
    count = len(weights)
    cap = max(MAX_SHARE, 1.0 / count) if count >= CONTEST else 1.0 / max(1, count)
    full: set[int] = set()
    while True:
        rest = math.fsum(value for i, value in enumerate(weights) if i not in full)
        left = 1.0 - cap * len(full)
        shares = [cap if i in full else left * value / rest for i, value in enumerate(weights)]
        over = {i for i, share in enumerate(shares) if i not in full and share > cap + 1e-12}
        if not over:
            return shares
        full |= over


def _voices(replies: Sequence[Reply], trust: Mapping[str, float]) -> list[Reply]:
    """One reply a speaker and text, the weightiest; in an order that does not depend on that of arrival."""
    kept: dict[tuple[str, str], Reply] = {}
    for reply in sorted(replies, key=lambda reply: (-weight(reply, trust), reply.peer, reply.id)):
        if not reply.refused and reply.text:
            kept.setdefault((reply.speaker or reply.peer, reply.text), reply)
    return sorted(kept.values(), key=lambda reply: (reply.peer, reply.text, reply.id))


def _centrality(one: int, among: Sequence[int], said: Sequence[Reply], shares: Sequence[float]) -> float:
    """Mean likeness of one text to those it stands among, itself included, each by its share."""
    return math.fsum(shares[i] * likeness(said[one].text, said[i].text) for i in among) / math.fsum(shares[i] for i in among)


def _unit(value: float) -> float:
    return min(1.0, max(0.0, value)) if math.isfinite(value) else 0.0
