"""Ways to join the signals of an answer into one score, and the choice among them.

A combiner learns from records with known answers and comes out as plain numbers (`protocol.confidence.Calibration` runs them on a node):

 * single     one signal as it is: the verdict's log-probability, or the mean token's
 * margin     the first token's, which needs no learning either and is the best single one for short answers (Ramirez et al. 2024)
 * logistic   L2-regularised, on standardised signals, of "the answer may stand"
 * distance   ridge regression of how far the student's answer is from the teacher's. What asking gains is that distance, times a
              coin that falls the teacher's way more often than not; the coin is noise that no signal of the student's can know, and
              learning the gain itself learns it too (docs/log.md)
 * boosted    shallow gradient-boosted trees of the same (Friedman 2001): bends and pairs of signals
 * both       the mean of a linear score and the boosted one, each scaled to the same spread

`choose` takes the one whose order of held-out records (FOLDS folds) has the largest area under the deferral curve; a more complicated
one must be better by EDGE, because the folds' areas are noisy and a plain one travels better to a site it has not seen.
"""

import msgspec
import numpy as np
from numpy.typing import NDArray

from coordinator.forge.judging.metrics import deferral_area
from protocol.confidence import FEATURES, Tree

FOLDS = 5
EDGE = 0.01  # of area
STRENGTH = 0.3  # inverse of the L2 penalty on standardised signals; twenty-four signals, some hundred records
RIDGE = 100.0
TREES, DEPTH, RATE, LEAST = 80, 2, 0.05, 20  # trees of 4 leaves; at least LEAST records a leaf
MARGIN = FEATURES.index("first_margin")
PADDED = 1e30  # a split that everything is below

Floats = NDArray[np.float64]


class Known(msgspec.Struct, frozen=True):
    """Records to learn from."""

    signals: Floats  # (records, signals)
    right: Floats  # (records,): 1.0 where the answer may stand
    student: Floats  # (records,): quality
    teacher: Floats  # (records,); the best there is where nobody knows: a teacher that is always right
    apart: Floats  # (records,): how far the student's answer is from the teacher's; from the truth where nobody knows the teacher's
    single: int  # which signal stands alone

    def part(self, rows: NDArray[np.int64]) -> "Known":
        """Some of the records."""
        return Known(self.signals[rows], self.right[rows], self.student[rows], self.teacher[rows], self.apart[rows], self.single)


class Combiner(msgspec.Struct, frozen=True):
    """score = bias + sum(weights * (signals - means) / scales) + sum of the trees' values; high where the answer may stand."""

    means: Floats
    scales: Floats
    weights: Floats
    bias: float = 0.0
    trees: tuple[Tree, ...] = ()

    def scores(self, signals: Floats) -> Floats:
        """(records,)"""
        scores = self.bias + ((signals - self.means) / self.scales) @ self.weights
        for tree in self.trees:
            scores = scores + _values(tree, signals)
        return np.asarray(scores, dtype=np.float64)


def single(known: Known, signal: int) -> Combiner:
    """One signal, standardised."""
    means, scales = _standard(known.signals)
    weights = np.zeros(len(means))
    weights[signal] = 1.0
    return Combiner(means, scales, weights)


def logistic(known: Known) -> Combiner:
    """Log-odds that the answer may stand."""
    from sklearn.linear_model import LogisticRegression

    means, scales = _standard(known.signals)
    model = LogisticRegression(C=STRENGTH, max_iter=1000).fit((known.signals - means) / scales, known.right)
    return Combiner(means, scales, model.coef_[0], float(model.intercept_[0]))


def distance(known: Known) -> Combiner:
    """Minus the expected distance to the teacher's answer, in standard deviations of it."""
    from sklearn.linear_model import Ridge

    means, scales = _standard(known.signals)
    model = Ridge(alpha=RIDGE).fit((known.signals - means) / scales, _nearness(known))
    return Combiner(means, scales, model.coef_, float(model.intercept_))


def boosted(known: Known, seed: int) -> Combiner:
    """The same by trees."""
    from sklearn.ensemble import GradientBoostingRegressor

    model = GradientBoostingRegressor(
        n_estimators=TREES, max_depth=DEPTH, learning_rate=RATE, min_samples_leaf=LEAST, subsample=0.5, max_features=0.4, random_state=seed
    ).fit(known.signals, _nearness(known))
    nothing = np.zeros(known.signals.shape[1])
    trees = tuple(_tree(each[0].tree_, RATE) for each in model.estimators_)
    return Combiner(nothing, nothing + 1.0, nothing, float(model.init_.constant_[0][0]), trees)


def mean_of(one: Combiner, other: Combiner, known: Known) -> Combiner:
    """A linear combiner and one of trees, each scaled to a spread of one half on these records."""
    halves = [0.5 / max(1e-9, float(each.scores(known.signals).std())) for each in (one, other)]
    trees = tuple(msgspec.structs.replace(tree, values=tuple(halves[1] * value for value in tree.values)) for tree in other.trees)
    return Combiner(one.means, one.scales, one.weights * halves[0], one.bias * halves[0] + other.bias * halves[1], trees)


def combiners(known: Known, seed: int) -> dict[str, Combiner]:
    """All of them, the plain ones first."""
    plain = {"single": single(known, known.single), "margin": single(known, MARGIN)}
    found = plain | {"logistic": logistic(known), "distance": distance(known), "boosted": boosted(known, seed)}
    mixed = {f"{name} and boosted": mean_of(found[name], found["boosted"], known) for name in ("logistic", "distance")}
    return found | mixed


def choose(known: Known, seed: int) -> tuple[str, Combiner, Floats, dict[str, float]]:
    """The best combiner by held-out area under the deferral curve.

    Returns:
        Its name, itself fitted on all records, each record's score by one fitted without it (records,), and every candidate's area.
    """
    from sklearn.model_selection import StratifiedKFold

    made = combiners(known, seed)
    unseen = {name: np.zeros(len(known.right)) for name in made}
    for train, test in StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(known.signals, known.right):
        for name, combiner in combiners(known.part(train), seed).items():
            unseen[name][test] = combiner.scores(known.signals[test])
    student, teacher = known.student.tolist(), known.teacher.tolist()
    areas = {name: deferral_area(scores.tolist(), student, teacher) or 0.0 for name, scores in unseen.items()}
    best = "single"
    for name, area in areas.items():
        if area > areas[best] + EDGE:
            best = name
    return best, made[best], unseen[best], areas


def _standard(signals: Floats) -> tuple[Floats, Floats]:
    means, scales = signals.mean(axis=0), signals.std(axis=0)
    return means, np.where(scales < 1e-9, 1.0, scales)


def _nearness(known: Known) -> Floats:
    """(records,), by its spread."""
    return np.asarray(-known.apart / max(1e-9, float(known.apart.std())), dtype=np.float64)


def _values(tree: Tree, signals: Floats) -> Floats:
    """`Tree.value` of many records at once: (records,)."""
    node = np.zeros(len(signals), dtype=np.int64)
    while node[0] < len(tree.signals):
        above = signals[np.arange(len(signals)), np.array(tree.signals)[node]] > np.array(tree.at)[node]
        node = 2 * node + 1 + above
    return np.array(tree.values)[node - len(tree.signals)]


def _tree(grown: object, rate: float) -> Tree:
    """A tree of scikit-learn as a full one: where it stopped early, splits that everything is below."""
    left, right = grown.children_left, grown.children_right  # type: ignore[attr-defined]
    signal, at, value = grown.feature, grown.threshold, grown.value  # type: ignore[attr-defined]
    level, signals, places = [0], [], []
    for _ in range(DEPTH):
        below = []
        for node in level:
            leaf = left[node] < 0
            signals.append(0 if leaf else int(signal[node]))
            places.append(PADDED if leaf else float(at[node]))
            below += [node, node] if leaf else [int(left[node]), int(right[node])]
        level = below
    return Tree(tuple(signals), tuple(places), tuple(rate * float(value[node][0][0]) for node in level))
