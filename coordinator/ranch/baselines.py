"""What needs no language model, on the same records: the figures that a student has to beat.

* majority     the most frequent verdict of the training records
* nearest      the verdict of the nearest training text (TF-IDF of character 1- to 4-grams, cosine)
* trees        gradient-boosted trees on the window's raw figures, blind to the note
* trees_note   the same with the note's words beside the figures: the strong one
"""

from collections import Counter
from collections.abc import Sequence
from math import sqrt

import numpy as np

from protocol.errors import BadInput
from protocol.tasks import Record

ROUNDS = 60  # of boosting; 100 rounds at rate 0.1 gave the same accuracy within two points
NOTE_WORDS = 200  # most frequent words of the notes that the trees see


def baselines(train: Sequence[Record], test: Sequence[Record], *, seed: int = 0) -> dict[str, dict[str, object]]:
    """Verdict accuracy of each baseline: {"majority": {"accuracy": a, "accuracy_ci": [low, high], "n": n}, ...}; Wilson intervals, 95%.

    Raises:
        BadInput: no records, a record without a verdict, or figures missing or of unequal number.
    """
    if not train or not test:
        raise BadInput("baselines need at least one record to train on and one to test on")
    if any(not record.verdict for record in (*train, *test)):
        raise BadInput("baselines need records with a verdict")
    if len({len(record.numbers) for record in (*train, *test)}) != 1 or not train[0].numbers:
        raise BadInput("baselines need the raw figures (numbers) in every record, as many in each")
    truth = [record.verdict for record in test]
    figures, test_figures = np.array([record.numbers for record in train]), np.array([record.numbers for record in test])
    words, test_words = _words(train, test)
    guesses = {
        "majority": [Counter(record.verdict for record in train).most_common(1)[0][0]] * len(test),
        "nearest": _nearest(train, test),
        "trees": _trees(figures, train, test_figures, seed),
        "trees_note": _trees(np.hstack([figures, words]), train, np.hstack([test_figures, test_words]), seed),
    }
    return {name: _score(guess, truth) for name, guess in guesses.items()}


def wilson(right: int, total: int) -> tuple[float, float]:
    """The 95% score interval of a proportion (Wilson 1927)."""
    z, share = 1.959964, right / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def _score(guess: Sequence[str], truth: Sequence[str]) -> dict[str, object]:
    right = sum(a == b for a, b in zip(guess, truth, strict=True))
    return {"accuracy": right / len(truth), "accuracy_ci": list(wilson(right, len(truth))), "n": len(truth)}


def _nearest(train: Sequence[Record], test: Sequence[Record]) -> list[str]:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.neighbors import KNeighborsClassifier

    grams = TfidfVectorizer(analyzer="char", ngram_range=(1, 4), sublinear_tf=True)
    nearest = KNeighborsClassifier(n_neighbors=1, metric="cosine")
    nearest.fit(grams.fit_transform(record.source for record in train), [record.verdict for record in train])
    return [str(code) for code in nearest.predict(grams.transform(record.source for record in test))]


def _trees(figures: np.ndarray, train: Sequence[Record], test_figures: np.ndarray, seed: int) -> list[str]:
    from sklearn.ensemble import HistGradientBoostingClassifier
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    trees = HistGradientBoostingClassifier(max_iter=ROUNDS, learning_rate=0.15, max_leaf_nodes=15, random_state=seed)
    with threadpool_limits(1):  # on a busy machine OpenMP's threads wait for one another: ten times slower with two
        trees.fit(figures, [record.verdict for record in train])
        return [str(code) for code in trees.predict(test_figures)]


def _words(train: Sequence[Record], test: Sequence[Record]) -> tuple[np.ndarray, np.ndarray]:
    """Which of the notes' most frequent words each record's note has: (n, words) of 0 and 1."""
    from sklearn.feature_extraction.text import CountVectorizer

    notes, test_notes = ([record.source.partition(";")[2] for record in records] for records in (train, test))
    if not any(note.strip() for note in notes):
        return np.zeros((len(train), 0)), np.zeros((len(test), 0))
    counter = CountVectorizer(binary=True, max_features=NOTE_WORDS)
    return counter.fit_transform(notes).toarray(), counter.transform(test_notes).toarray()
