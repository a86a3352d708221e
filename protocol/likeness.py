"""How alike two texts are, in pure Python: what votes and what compares a model's samples. No I/O.

chrF (Popovic 2015) because it needs no words, so it holds for any language; a node has no sacreBLEU. Limits: never the metric of a claim
about an answer that it helped to choose.
"""

from collections import Counter

ORDER = 6  # longest character n-gram (Popovic 2015)
BETA = 2.0  # recall counts four times as much as precision


def chrf(text: str, reference: str) -> float:
    """Character n-gram F-score in [0, 1], white space removed; a hundredth of sacreBLEU's sentence chrF2 without word n-grams."""
    precisions, recalls = [], []
    for n in range(1, ORDER + 1):
        ours, theirs = _ngrams(text, n), _ngrams(reference, n)
        if not ours or not theirs:
            break
        shared = (ours & theirs).total()
        precisions.append(shared / ours.total())
        recalls.append(shared / theirs.total())
    precision, recall = sum(precisions), sum(recalls)  # both over the same orders, so the mean's divisor cancels in the quotient
    if not precision + recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (BETA**2 * precision + recall) / len(precisions)


def _ngrams(text: str, n: int) -> Counter[str]:
    packed = "".join(text.split())
    return Counter(packed[index : index + n] for index in range(len(packed) - n + 1))
