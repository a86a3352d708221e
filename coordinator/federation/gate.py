"""Is the merged model better? Numbers come in, a decision with its reasons comes out. No I/O.

All must hold, each on held-out records that chose nothing (eta was chosen on dev records):
 * better at the sites together: the paired bootstrap interval of the difference lies above zero;
 * on the general set not worse by more than `margin` (point estimate), and not clearly worse (interval below zero);
 * at no site clearly worse (interval below zero).

Why a point estimate for the margin: a non-inferiority interval of +-2 points needs thousands of paired records; a round has hundreds.
The interval is in the reasons, so nobody has to take the point for more than it is; and a refusal says how often chance alone would have
refused a merge that loses nothing, because a general set of a few hundred records does that too often.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist, fmean, variance

import msgspec

GENERAL_MARGIN = 0.03  # of the metric's unit: 3 points of accuracy or chrF
TOO_OFTEN = 0.05  # of rounds; an unharmed model is refused that often: the general set is too small for the margin


class Comparison(msgspec.Struct, frozen=True):
    """Before and after on the same records, paired."""

    name: str
    n: int
    before: float  # mean of the metric, in [0, 1]
    after: float
    low: float  # 95 % interval of after - before
    high: float
    p: float = 1.0

    @property
    def diff(self) -> float:
        """after - before."""
        return self.after - self.before

    def words(self) -> str:
        """For people: "esteli 0.61 -> 0.72 (+0.11, 95 % +0.04..+0.18, n=200)"."""
        return f"{self.name} {self.before:.3f} -> {self.after:.3f} ({self.diff:+.3f}, 95 % {self.low:+.3f}..{self.high:+.3f}, n={self.n})"


class GateDecision(msgspec.Struct, frozen=True):
    """Release or not, and why; every rule leaves one reason."""

    release: bool
    reasons: tuple[str, ...]


def decide(
    together: Comparison, *, general: Comparison | None, sites: Sequence[Comparison], margin: float = GENERAL_MARGIN
) -> GateDecision:
    """Apply the rules above. `general` None: there is no general set, and the reasons say so."""
    passed: list[str] = []
    failed: list[str] = []
    (passed if together.low > 0 else failed).append(
        together.words() + ("" if together.low > 0 else "; the interval does not lie above zero")
    )
    if general is None:
        passed.append("no general set was given: loss of general ability was not looked for")
    else:
        too_low, clearly = general.diff < -margin, general.high < 0
        told = f"; worse by more than {margin:g}{_by_chance(general, margin)}" if too_low else "; clearly worse" if clearly else ""
        (failed if told else passed).append(f"general: {general.words()}{told}")
    for site in sites:
        (failed if site.high < 0 else passed).append(f"site {site.words()}" + ("; clearly worse" if site.high < 0 else ""))
    return GateDecision(release=not failed, reasons=tuple(failed + passed))


def smallest_as_good(quality: Mapping[float, Sequence[Sequence[float]]]) -> tuple[float, dict[float, float]]:
    """Which server scale to take: the smallest that is at most one standard error below the best; and each one's mean over the sets.

    A larger step towards the sites is a larger one away from everything else, so a lead that chance gives is not followed (the
    one-standard-error rule of Breiman et al. 1984, here on paired differences).

    Args:
        quality: scale -> dev sets -> one number a record, the same records in the same order for each scale.
    """
    means = {eta: fmean(fmean(values) for values in sets) for eta, sets in quality.items()}
    best = max(means, key=lambda eta: (means[eta], -eta))
    for eta in sorted(means):
        apart = [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(quality[best], quality[eta], strict=True)]
        error = math.sqrt(sum(variance(values) / len(values) for values in apart if len(values) > 1)) / len(apart)
        if means[best] - means[eta] <= error:
            return eta, means
    return best, means


def _by_chance(general: Comparison, margin: float) -> str:
    """What an operator should know of a refusal by the margin: a set this small refuses merges that lose nothing, too."""
    error = (general.high - general.low) / (2 * NormalDist().inv_cdf(0.975))
    share = NormalDist(0.0, error).cdf(-margin) if error else 0.0
    if share <= TOO_OFTEN:
        return ""
    enough = round(general.n * (error * NormalDist().inv_cdf(1 - TOO_OFTEN) / margin) ** 2)
    return f"; {general.n} records refuse {share:.0%} of the merges that lose nothing, about {enough} would refuse {TOO_OFTEN:.0%}"
