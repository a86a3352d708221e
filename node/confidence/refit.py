"""The shipped probabilities moved toward what the site's confirmed answers say. No I/O: outcomes in, a correction out.

    log-odds' = offset + slope * log-odds        (Platt 1999, on top of the shipped curve)

 * Maximum a posteriori: offset is near 0 and slope near 1 unless the site says otherwise; the shipped curve counts as PRIOR answers do. By
   Newton's method from the same start, so the same outcomes give the same correction on every machine. The slope is positive, so the
   order of answers, and with it who is asked, never changes: only what the number means.
 * Only answers that were asked get confirmed, mostly the unsure ones. Each counts by one over its chance to be asked (inverse propensity;
   the audited share of sure answers gives the rest a voice), at most WEIGHT_LIMIT, and weights are scaled to mean 1.
 * Used only where it is not worse than the shipped curve on confirmed answers that it did not see (weighted log-loss), and never
   with fewer than FEWEST to fit on and FEWEST_HELD_OUT to be judged by.
Limits: one correction for all of a site's answers, not one a verdict.
"""

import math
from collections.abc import Sequence

import msgspec

from protocol.confidence import log_odds, logistic

FEWEST = 40  # confirmed answers to fit on
FEWEST_HELD_OUT = 15  # and to be judged by
PRIOR = 30.0  # answers that the shipped curve counts as ...
PRIOR_ODDS = 2.0  # ... spread around log-odds 0 by this: how firm the slope is
SLOPE_LIMITS = (0.2, 3.0)
OFFSET_LIMIT = 4.0  # log-odds
WEIGHT_LIMIT = 20.0  # one audited answer of a 2% audit would count 50 times; that would be all noise
STEPS = 50  # of Newton's method; it takes about six


class Outcome(msgspec.Struct, frozen=True):
    """One answer that somebody confirmed or corrected."""

    probability: float  # the shipped one
    right: bool
    chance: float  # that such an answer is asked, in (0, 1]
    held_out: bool


class Refit(msgspec.Struct, frozen=True):
    """A correction, and how it was judged."""

    offset: float = 0.0
    slope: float = 1.0
    fitted: int = 0  # answers
    held_out: int = 0
    loss_shipped: float = 0.0  # nats an answer, held out
    loss: float = 0.0
    used: bool = False
    why: str = "no confirmed answers yet"

    def apply(self, probability: float) -> float:
        """The corrected probability; the shipped one where the correction is not used. 0 stays 0: a broken answer."""
        if not self.used or probability <= 0.0:
            return probability
        return logistic(self.offset + self.slope * log_odds(probability))


def refit(outcomes: Sequence[Outcome]) -> Refit:
    """The correction that these outcomes ask for."""
    seen = [one for one in outcomes if not one.held_out]
    unseen = [one for one in outcomes if one.held_out]
    if len(seen) < FEWEST or len(unseen) < FEWEST_HELD_OUT:
        needed = f"{FEWEST} to fit on and {FEWEST_HELD_OUT} to judge by are needed"
        return Refit(fitted=len(seen), held_out=len(unseen), why=f"{len(seen)} and {len(unseen)} confirmed answers; {needed}")
    offset, slope = _fit(seen)
    made = Refit(offset=offset, slope=slope, used=True)
    shipped, corrected = _loss(unseen, Refit()), _loss(unseen, made)
    used = corrected < shipped
    why = f"log-loss {corrected:.3f} against {shipped:.3f} as shipped, on {len(unseen)} confirmed answers"
    return Refit(offset, slope, len(seen), len(unseen), shipped, corrected, used, why)


def weights(outcomes: Sequence[Outcome]) -> list[float]:
    """What each outcome counts: one over its chance, limited, with mean 1."""
    raw = [min(WEIGHT_LIMIT, 1.0 / max(one.chance, 1e-9)) for one in outcomes]
    mean = math.fsum(raw) / len(raw)
    return [weight / mean for weight in raw]


def _fit(outcomes: Sequence[Outcome]) -> tuple[float, float]:
    """Offset and slope at the top of the posterior."""
    counts = weights(outcomes)
    odds = [log_odds(one.probability) for one in outcomes]
    told = [float(one.right) for one in outcomes]
    stiff_offset, stiff_slope = PRIOR / 4, PRIOR / 4 * PRIOR_ODDS**2  # an answer at probability 1/2 has curvature 1/4
    offset, slope = 0.0, 1.0
    for _ in range(STEPS):
        guesses = [logistic(offset + slope * x) for x in odds]
        missed = [count * (right - guess) for count, right, guess in zip(counts, told, guesses, strict=True)]
        curved = [count * guess * (1 - guess) for count, guess in zip(counts, guesses, strict=True)]
        toward = (
            math.fsum(missed) - stiff_offset * offset,
            math.fsum(miss * x for miss, x in zip(missed, odds, strict=True)) - stiff_slope * (slope - 1),
        )
        a = math.fsum(curved) + stiff_offset
        b = math.fsum(curve * x for curve, x in zip(curved, odds, strict=True))
        c = math.fsum(curve * x * x for curve, x in zip(curved, odds, strict=True)) + stiff_slope
        determinant = a * c - b * b  # above 0: both stiffnesses are
        step = (c * toward[0] - b * toward[1]) / determinant, (a * toward[1] - b * toward[0]) / determinant
        step = min(max(step[0], -1.0), 1.0), min(max(step[1], -0.5), 0.5)  # far from the top Newton leaps
        offset, slope = offset + step[0], slope + step[1]
        if abs(step[0]) + abs(step[1]) < 1e-10:
            break
    low, high = SLOPE_LIMITS
    return min(max(offset, -OFFSET_LIMIT), OFFSET_LIMIT), min(max(slope, low), high)


def _loss(outcomes: Sequence[Outcome], correction: Refit) -> float:
    """Weighted mean of -log p(what happened), nats."""
    total = 0.0
    for one, count in zip(outcomes, weights(outcomes), strict=True):
        odds = log_odds(correction.apply(one.probability))
        total -= count * math.log(logistic(odds if one.right else -odds))
    return total / len(outcomes)
