"""When a site trains, when it opens a sync window, and whether what it trained is good enough to answer with. No I/O.

Training is due when enough was confirmed that is new, the power allows it and the day's joules are not spent; one that was interrupted
goes on before a new one begins. A failure is not tried again before RETRY_S.

A site answers with its own adapter when all of this holds, on examples that were never trained on, each answered with and without it:
 * more of the site's held-out answers became right than wrong, by a one-sided sign test at ALPHA, shared out over the variants tried;
 * on general records that came with the release, no more than GENERAL_LOSS of them more became wrong than right.
A site has a dozen held-out examples, not hundreds: ALPHA is generous, because the loss on the same examples fell already, the general
records guard against harm, and the next release drops the adapter anyway.
"""

import math
from collections.abc import Sequence

import msgspec

from protocol.links import Verdict

ALPHA = 0.2
GENERAL_LOSS = 0.03  # share of the records; the fleet's own gate allows as much
ALIKE = 0.02  # texts whose likeness to the confirmed answer differs by less than this are a tie
RETRY_S = 6 * 3600.0  # seconds after a training that failed
MIXTURES = ((0.0, 1.0), (0.5, 0.5), (1.0, 1.0))  # shares of the release's adapter and of the site's own; see docs/adr/0027


class Standing(msgspec.Struct, frozen=True):
    """What the site has to learn from, and what it made of it."""

    why_not: str = ""  # training is impossible here: no release, nothing to start from, no torch
    examples: int = 0  # confirmed, to train on
    held_out: int = 0
    learned: int = 0  # of `examples`, as many there were at the last training on this release
    unfinished: bool = False  # a training was interrupted
    unjudged: bool = False  # an adapter was trained, and nobody knows yet whether it helps
    not_before: float = 0.0  # after a failure


def training_due(standing: Standing, *, now: float, minimum: int, held_out: int, new: int, power: Verdict, joules_left: float) -> Verdict:
    """Whether to start (or go on with) a training now.

    Args:
        minimum, held_out: examples a training needs.
        new: more examples than last time that are worth another training.
        power: what `Power.may("train")` says.
        joules_left: of today's.
    """
    if standing.why_not:
        return Verdict(False, standing.why_not)
    if standing.examples < minimum or standing.held_out < held_out:
        return Verdict(
            False, f"{standing.examples} examples and {standing.held_out} held out; a training needs {minimum} and {held_out}"
        )  # fmt: skip
    fresh = standing.examples - standing.learned
    if not standing.unjudged and not worth_another(standing.examples, standing.learned, new=new, unfinished=standing.unfinished):
        return Verdict(False, f"{fresh} new examples since the last training; {new} are worth another")
    if now < standing.not_before:
        return Verdict(False, f"the last training failed; the next try is in {(standing.not_before - now) / 3600:.1f} hours")
    if joules_left <= 0:
        return Verdict(False, "today's joules for training are spent; it goes on tomorrow")
    if not power.ok:
        return Verdict(False, f"waits for power: {power.reason}")
    return Verdict(True, "goes on" if standing.unfinished else "judges" if standing.unjudged else f"{fresh} new examples; {power.reason}")


def worth_another(examples: int, learned: int, *, new: int, unfinished: bool) -> bool:
    """Whether a training of so many examples is worth its energy after one of `learned` (0: none yet) on the same release."""
    return unfinished or not learned or examples - learned >= new


def window_due(*, now: float, last: float, every_s: float, hours: Sequence[float], window_s: float) -> bool:
    """Whether the schedule has a sync window now: at fixed hours of the day (UTC) if there are any, else every so often.

    Args:
        last: when the last window began; 0: never.
        hours: such as (6.0, 18.5): each opens one window, at that time or within a window's length after it.
    """
    if hours:
        seconds = now % 86_400
        return any(0 <= seconds - 3600 * hour < window_s for hour in hours) and not 0 <= now - last < window_s
    return every_s > 0 and not 0 <= now - last < every_s


def better(own: Sequence[tuple[float, float]], general: Sequence[tuple[float, float]], *, tried: int = 1) -> Verdict:
    """Whether an adapter is good enough to answer with, from scores (without it, with it) in [0, 1] on the same records.

    Args:
        own: the site's held-out examples; `general`: records that came with the release, () where there are none.
        tried: variants among which this one was the best.
    """
    wins, losses = discordant(own)
    chance = sign_test(wins, losses)
    told = f"{wins} held-out answers became right and {losses} wrong of {len(own)}"
    if wins <= losses or chance > ALPHA / tried:
        return Verdict(False, f"{told} (p {chance:.2f}, {ALPHA / tried:.2f} is asked)")
    gained, lost = discordant(general)
    told += f"; of {len(general)} general ones {gained} and {lost}" if general else "; there were no general records to look at"
    if lost - gained > GENERAL_LOSS * len(general):
        return Verdict(False, f"{told}: too many lost")
    return Verdict(True, told)


def discordant(pairs: Sequence[tuple[float, float]]) -> tuple[int, int]:
    """How many became better, and how many worse; nearly alike is neither."""
    return sum(after - before > ALIKE for before, after in pairs), sum(before - after > ALIKE for before, after in pairs)


def sign_test(wins: int, losses: int) -> float:
    """P(at least `wins` of wins + losses) if both were as likely; 1 without any."""
    n = wins + losses
    return sum(math.comb(n, k) for k in range(wins, n + 1)) / 2**n
