"""How well gates and consistency score tell a human translation from a spoiled one, against the teacher's likelihood alone.

Four ways to spoil a translation: the source copied, the first half of the words, the words shuffled, another sentence's translation. A text
that a gate refuses ranks below every one that passed; the others rank by score. AUC: the chance that a human translation ranks higher.
The weights were chosen on Tatoeba dev with the same four; this is Tatoeba test. The teacher is the packaged model, trimmed and not
corrected: it ends an answer with a line break, so that is the end whose probability counts. Round trip by Apertium where it is installed.
"""

import math
import random
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from bench.settings import TRANSLATION, Settings
from coordinator.forge.judging.peers import NotInstalled
from coordinator.forge.synthesis.gates import GATES, refusal
from coordinator.forge.synthesis.language import identify
from coordinator.forge.synthesis.scoring import Back, Candidate, Judge, Signals, consistency
from coordinator.forge.teachers import open_teacher
from protocol.errors import BadInput
from protocol.models.tokenizer import Tokenizer
from protocol.tasks import Record

PAIRS = 500
FEWEST_WORDS = 4  # of a translation; of shorter ones half is hardly a truncation, and shuffling changes little
KINDS = ("copied", "truncated", "shuffled", "wrong")
BACK = "command:apertium -u spa-eng"
Floats = NDArray[np.float64]


def measure(settings: Settings) -> dict[str, Any]:
    wanted = [record for record in settings.pairs("test") if len(record.target.split()) >= FEWEST_WORDS]
    records = wanted[: 12 if settings.quick else PAIRS]
    texts = {"human": [record.target for record in records]} | spoiled(records, settings.seed)
    known = {kind: settings.kept("gates_auc", kind, lambda rows=rows: signals(settings, records, rows)) for kind, rows in texts.items()}
    scores = {kind: rank(records, rows, known[kind]) for kind, rows in texts.items()}
    likely = {kind: np.array([one["mean"] for one in known[kind]]) for kind in texts}
    gated = {kind: refused(records, rows) for kind, rows in texts.items()}
    used = sorted({name for one in known["human"] for name in one["signals"]})
    return {
        name: {
            "figure": auc(scores["human"], scores[kind]),
            "interval": interval(auc(scores["human"], scores[kind]), len(records)),
            "against": {"likelihood alone": auc(likely["human"], likely[kind])},
            "score without gates": auc(*(np.array([one["score"] for one in known[which]]) for which in ("human", kind))),
            "refused by gates": gated[kind], "human refused": gated["human"], "n": len(records), "signals": used,
        }
        for name, kind in zip(("gates_auc", "gates_auc_2", "gates_auc_3", "gates_auc_4"), KINDS, strict=True)
    }  # fmt: skip


def spoiled(records: Sequence[Record], seed: int) -> dict[str, list[str]]:
    """The translations spoiled in each of KINDS."""
    chance = random.Random(seed)
    words = [record.target.split() for record in records]
    return {
        "copied": [record.source for record in records],
        "truncated": [" ".join(some[: len(some) // 2]) for some in words],
        "shuffled": [" ".join(shuffled(some, chance)) for some in words],
        "wrong": [records[at - 1].target for at in range(len(records))],
    }


def shuffled(words: Sequence[str], chance: random.Random) -> list[str]:
    """The words in another order, where there is one."""
    found = list(words)
    while found == list(words) and len(set(words)) > 1:
        chance.shuffle(found)
    return found


def signals(settings: Settings, records: Sequence[Record], texts: Sequence[str]) -> list[dict[str, Any]]:
    """For each text its signals, its score, and the mean log-probability of all its tokens."""
    path = settings.trimmed()
    with closing(open_teacher(f"hf:{path}", threads=settings.threads)) as teacher, Tokenizer(path) as text:
        end = text.encode("\n", bos=False)[-1:]
        judge = Judge(log_probs=teacher.log_probs, text=text, back=way_back())
        said = [[Candidate(one, (*text.encode(" " + one, bos=False), *end))] for one in texts]
        found = [row[0] for row in judge.signals(TRANSLATION, records, said)]
    return [
        {"signals": msgspec.to_builtins(one), "score": consistency(one), "mean": mean(one, len(row[0].tokens or ()))}
        for one, row in zip(found, said, strict=True)
    ]


def mean(one: Signals, tokens: int) -> float:
    """Mean log-probability a token, the end included: what a likelihood filter goes by."""
    return ((one.log_prob or 0.0) * (tokens - 1) + (one.end or 0.0)) / tokens


def way_back() -> Back | None:
    """Spanish to English by Apertium, or None where it is not installed."""
    try:
        teacher = open_teacher(BACK)
    except (BadInput, NotInstalled):
        return None
    return lambda texts: [said[0].text for said in teacher.generate(texts, n=1, temperature=0.0, seed=0, max_new_tokens=1)]


def rank(records: Sequence[Record], texts: Sequence[str], known: Sequence[dict[str, Any]]) -> Floats:
    """The score of each text; minus infinity where a gate refuses it."""
    passed = [refusal(TRANSLATION, record, text, identify=identify) is None for record, text in zip(records, texts, strict=True)]
    return np.array([one["score"] if stands else -math.inf for one, stands in zip(known, passed, strict=True)])


def refused(records: Sequence[Record], texts: Sequence[str]) -> dict[str, float]:
    """Share of the texts by the gate that refused them."""
    found = [refusal(TRANSLATION, record, text, identify=identify) for record, text in zip(records, texts, strict=True)]
    shares = {gate: sum(one is not None and one.gate == gate for one in found) / len(found) for gate in GATES}
    return {gate: share for gate, share in shares.items() if share}


def auc(better: Floats, worse: Floats) -> float:
    """Chance that one of `better` is above one of `worse`, ties half."""
    above = (better[:, None] > worse[None]).mean() + 0.5 * (better[:, None] == worse[None]).mean()
    return float(above)


def interval(area: float, n: int) -> tuple[float, float]:
    """95% interval of an AUC of n against n (Hanley and McNeil 1982)."""
    first, second = area / (2 - area), 2 * area**2 / (1 + area)
    error = math.sqrt(max(0.0, area * (1 - area) + (n - 1) * (first - area**2) + (n - 1) * (second - area**2)) / n**2)
    return max(0.0, area - 1.96 * error), min(1.0, area + 1.96 * error)
