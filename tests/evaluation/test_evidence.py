"""Which sentences the figures allow."""

import msgspec
import pytest

from coordinator.forge.judging import claims, evidence
from coordinator.forge.judging.calibrate import fit
from coordinator.forge.judging.evaluation import Evaluation
from tests.evaluation.conftest import simulated


def with_right(evaluation: Evaluation, right: int) -> Evaluation:
    """The same answers, with exactly the first `right` of them correct."""
    rows = tuple(msgspec.structs.replace(answer, correct=place < right) for place, answer in enumerate(evaluation.answers))
    return msgspec.structs.replace(evaluation, answers=rows)


BASE = simulated(1500, accuracy=0.9)


def test_a_share_of_the_teacher_is_claimed_where_the_interval_is_narrow() -> None:
    sentence = claims.retention(with_right(BASE, 1350), with_right(BASE, 1215), "general", seed=1)

    assert sentence.startswith("general: the student keeps 90% of the teacher's verdict accuracy (95% interval 88.")
    assert "n = 1500" in sentence


def test_few_records_allow_a_range_only() -> None:
    few = msgspec.structs.replace(BASE, answers=BASE.answers[:60])

    sentence = claims.retention(with_right(few, 50), with_right(few, 40), "esteli", seed=1)

    assert "keeps between" in sentence
    assert "60 records allow no closer statement" in sentence


def test_a_teacher_that_knows_nothing_allows_no_ratio() -> None:
    assert "too near zero" in claims.retention(with_right(BASE, 0), with_right(BASE, 10), "general", seed=1)


STUDENT = {"accuracy": 0.80, "accuracy_ci": [0.76, 0.84]}


@pytest.mark.parametrize(
    ("interval", "told"),
    [([0.85, 0.90], "is better than the student"), ([0.75, 0.78], "as good as the student within the intervals"), ([0.60, 0.70], "")],
)
def test_a_baseline_as_good_as_the_student_is_named(interval: list[float], told: str) -> None:
    sentence = claims.against("trees_note", {"accuracy": sum(interval) / 2, "accuracy_ci": interval}, STUDENT, "general")

    assert told in sentence
    assert bool(sentence) == bool(told)


def test_what_quantisation_costs_is_said_with_its_interval() -> None:
    hidden = claims.quantisation({"diff": -0.004, "low": -0.012, "high": 0.004}, "general", "verdict")
    seen = claims.quantisation({"diff": -1.5, "low": -2.5, "high": -0.5}, "general", "text")

    assert hidden.startswith("general: no difference found")
    assert "-1.2 points to +0.4 points" in hidden
    assert seen == "general: quantisation changed the student by -1.5 chrF (95% interval -2.5 chrF to -0.5 chrF, paired)."


def test_a_peer_that_is_better_is_called_better() -> None:
    assert claims.against_peer("apertium", {"diff": -3.0, "low": -4.0, "high": -2.0}, "s", "text").startswith("s: apertium is better")


def test_the_bundle_holds_every_model_on_every_set_and_what_was_not_tested() -> None:
    teacher, student = simulated(200, accuracy=0.95, seed=1), simulated(200, accuracy=0.7, seed=2)

    made = evidence.bundle(
        release=3, task="ranch", sets={"general": {"teacher": teacher, "student_float": student, "student": student}},
        baselines={"general": {"trees": {"accuracy": 0.7, "accuracy_ci": [0.63, 0.76]}}},
        calibration=fit(simulated(200, accuracy=0.7, seed=3)), seed=9, command="milpa-fleet demo --seed 9",
        not_tested=["Rain on the antenna."], lineage={"base_digest": "ab", "cut": {"kept": [0, 2], "of": 4}},
    )  # fmt: skip

    general = made["sets"]["general"]
    assert set(general["models"]) == {"teacher", "student_float", "student"}
    assert general["models"]["student"]["accuracy"] == student.figures()["accuracy"]
    assert any("boosted trees" in sentence for sentence in made["statements"])
    assert made["not_tested"][0] == "Rain on the antenna."
    assert [step["note"] for step in made["lineage"]] == ["", "2 of 4 blocks"]
    assert msgspec.json.decode(msgspec.json.encode(made)) == made  # plain JSON, nothing else


def test_asking_the_peer_is_described_from_the_answers() -> None:
    student, teacher = simulated(400, accuracy=0.6, seed=1), simulated(400, accuracy=0.95, seed=2)

    found = evidence.operating_point(student, teacher, fit(simulated(400, accuracy=0.6, seed=3)), budget=0.25)

    assert found["escalated"] == pytest.approx(0.25, abs=0.07)
    assert found["ends"] == pytest.approx([student.figures()["accuracy"], teacher.figures()["accuracy"]])
    assert student.figures()["accuracy"] < found["accuracy_with_escalation"]
    assert found["curve"][0] == [0.0, found["ends"][0]]
    assert found["curve"][-1] == pytest.approx([1.0, found["ends"][1]])


def test_a_live_curve_ends_where_the_peers_answers_end() -> None:
    found = evidence.live_curve([0.1, 0.9, 0.2, 0.8], [0.0, 1.0, 0.0, 1.0], [1.0, 1.0, 0.0, 1.0], [True, False, True, False])

    assert found["curve"] == [[0.0, 0.5], [0.25, 0.75], [0.5, 0.75]]


def test_codes_that_the_student_lost_come_first() -> None:
    student, teacher = simulated(200, accuracy=0.6, seed=1), simulated(200, accuracy=0.95, seed=2)

    rows = evidence.by_code(student, teacher)

    losses = [(row["student"] - row["teacher"]) / row["n"] for row in rows]
    assert losses == sorted(losses)
    assert sum(row["n"] for row in rows) == 200


def test_this_machine_has_a_name_and_cores() -> None:
    found = evidence.machine()

    assert found["cpu"]
    assert found["cores"] >= 1
    assert "sacrebleu" in found["libraries"]


def test_a_site_that_asked_nothing_has_no_curve() -> None:
    assert evidence.live_curve([0.9, 0.8], [1.0, 0.0], [1.0, 0.0], [False, False])["curve"] == []
