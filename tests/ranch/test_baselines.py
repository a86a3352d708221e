import msgspec
import pytest

from coordinator.ranch import baselines, generate
from coordinator.ranch.baselines import wilson
from protocol.errors import BadInput
from protocol.tasks import Record


@pytest.fixture(scope="module")
def records(site, cache):
    few = msgspec.structs.replace(site, faults={"normal": 2.0, "leak": 1.0, "gateway-loss": 1.0, "overflow": 1.0})
    return generate(few, seed=1, count=160, cache=cache), generate(few, seed=1, count=60, split="test", cache=cache)


def test_trees_on_the_figures_beat_the_majority_and_every_figure_has_an_interval(records):
    scores = baselines(*records)

    assert set(scores) == {"majority", "nearest", "trees", "trees_note"}
    assert scores["trees"]["accuracy"] > scores["majority"]["accuracy"] + 0.1
    for score in scores.values():
        low, high = score["accuracy_ci"]
        assert 0 <= low < score["accuracy"] < high <= 1 and score["n"] == 60


def test_the_majority_is_that_of_the_training_records():
    def record(verdict: str, number: float) -> Record:
        return Record(id=f"{verdict}{number}", task="ranch", source=f"soil{number}; {verdict}", verdict=verdict, numbers=(number,))

    train = [record("leak", value) for value in range(30)] + [record("normal", 100.0 + value) for value in range(25)]
    test = [record("leak", 3.0), record("normal", 110.0), record("normal", 111.0)]

    scores = baselines(train, test)

    assert scores["majority"]["accuracy"] == pytest.approx(1 / 3)
    assert scores["nearest"]["accuracy"] == scores["trees_note"]["accuracy"] == 1


def test_the_interval_is_wilsons():
    # 8 of 10: Wilson (1927); Newcombe 1998 gives 0.490 to 0.943
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_records_without_truth_or_figures_are_refused(records):
    train, test = records
    bare = [msgspec.structs.replace(record, verdict="") for record in test]
    blind = [msgspec.structs.replace(record, numbers=()) for record in test]

    with pytest.raises(BadInput, match="verdict"):
        baselines(train, bare)
    with pytest.raises(BadInput, match="raw figures"):
        baselines(train, blind)
    with pytest.raises(BadInput, match="at least one"):
        baselines(train, [])
