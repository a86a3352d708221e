"""bench/consensus.py: the report on votes, on answers made up so that the truth is known."""

import random

import pytest

from bench import consensus
from coordinator.forge.judging.evaluation import Evaluation, Scored
from coordinator.forge.judging.metrics import TextScores
from protocol.confidence import FEATURES
from protocol.errors import BadInput
from protocol.tasks import RANCH, RANCH_CODES, Record

NO_SCORES = TextScores(0.0, 0.0, (0.0, 0.0), (0.0, 0.0), "", "")
RECORDS = [
    Record(id=str(n), task="ranch", source=f"window {n}", target=f"{RANCH_CODES[n % 16]}: x", verdict=RANCH_CODES[n % 16])
    for n in range(400)
]


def model(name: str, right: float, *, seconds: float = 0.1) -> Evaluation:
    """Right on that share of the records, on others than any other model, and surer where it is."""
    chance, answers = random.Random(name), []
    for record in RECORDS:
        correct = chance.random() < right
        verdict = record.verdict if correct else chance.choice([code for code in RANCH_CODES if code != record.verdict])
        sure = chance.gauss(-0.3 if correct else -1.5, 0.5)
        values = tuple(1.0 if one == "in_form" else min(0.0, sure) if one == "verdict_sum" else 0.0 for one in FEATURES)
        answers.append(
            Scored(record.id, "", f"{verdict}: x", 0.0, verdict, record.verdict, correct, values, seconds, 5, "end", seconds)
        )  # fmt: skip
    return Evaluation("ranch", "verdict", tuple(answers), NO_SCORES, name, name)


@pytest.fixture(scope="module")
def report():
    found = {"local": model("local", 0.6), **{name: model(name, 0.8, seconds=1.0) for name in ("a", "b", "c")}}
    return consensus.compared(RANCH, RECORDS, found, seed=1)


def test_peers_that_err_apart_are_better_together(report):
    everything = report["all asked"]

    assert everything["vote"]["accuracy"] > max(everything[name]["accuracy"] for name in ("a", "b", "c"))
    assert everything["vote minus best peer"]["low"] > 0
    assert report["judged_by"] == "truth of the simulator"


def test_at_equal_cost_a_vote_of_three_gets_a_third_of_the_questions(report):
    for one in report["least sure asked"]:
        assert one["share voted on at equal cost"] == pytest.approx(one["share asked of the best peer"] / 3, abs=1e-3)


def test_one_liar_among_three_does_not_make_the_vote_worthless(report):
    everything = report["all asked"]

    assert everything["vote with a liar"]["accuracy"] > 0.7
    assert everything["vote with a liar"]["accuracy"] < everything["vote"]["accuracy"]


def test_the_table_names_the_best_peer_and_every_comparison(report):
    text = "\n".join(" ".join(row) for row in consensus.table(report))

    assert f"{report['best single peer']} *" in text
    assert text.count("vote, equal cost") == len(consensus.SHARES)


def test_a_vote_of_two_is_no_vote():
    with pytest.raises(BadInput, match="three peers"):
        consensus.compared(RANCH, RECORDS, {"local": model("local", 0.6), "a": model("a", 0.8), "b": model("b", 0.8)}, seed=1)
