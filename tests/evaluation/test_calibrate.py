"""A calibration fitted on some records, judged on others."""

import functools

import msgspec
import numpy as np
import pytest

from coordinator.forge.judging.calibrate import fit, good_enough
from coordinator.forge.judging.evaluation import Evaluation, evaluate_texts
from coordinator.forge.judging.metrics import calibration_error, deferral_area
from protocol.confidence import FEATURES, Calibration
from protocol.errors import BadInput, NotEnough
from protocol.tasks import RANCH, Record
from tests.evaluation.conftest import SPANISH, ranch_records, simulated


def test_calibration_tells_the_truth_on_records_it_has_not_seen() -> None:
    made = fit(simulated(600, accuracy=0.6, seed=1, overconfident=2.0))
    unseen = simulated(600, accuracy=0.6, seed=2, overconfident=2.0)

    plain, calibrated = (calibration_error(unseen.confidences(use), unseen.quality()) for use in (None, made))

    assert plain > 0.15  # the raw probability boasts
    assert calibrated < 0.06
    assert max(unseen.confidences(made)) - min(unseen.confidences(made)) > 0.5  # not just the base rate for everything


def test_calibration_keeps_the_order_of_the_signals() -> None:
    made = usual()
    unseen = simulated(600, accuracy=0.6, seed=2)
    teacher = [1.0] * 600

    plain, calibrated = (deferral_area(unseen.confidences(use), unseen.quality(), teacher) for use in (None, made))

    assert plain is not None and calibrated is not None
    assert calibrated > plain - 0.02
    assert calibrated > 0.5


@pytest.mark.parametrize("budget", [0.1, 0.25, 0.4])
def test_the_threshold_spends_the_budget(budget: float) -> None:
    made = usual()
    fitted, unseen = simulated(600, accuracy=0.6, seed=1), simulated(2000, accuracy=0.6, seed=2)

    shares = [sum(sure < made.threshold(budget) for sure in each.confidences(made)) / len(each.answers) for each in (fitted, unseen)]

    assert shares[0] == pytest.approx(budget, abs=0.01)
    assert shares[1] == pytest.approx(budget, abs=0.05)


def test_few_records_of_a_kind_leave_one_signal() -> None:
    made = fit(simulated(60, accuracy=0.8, seed=3))

    assert made.method == "single"
    assert sum(weight != 0 for weight in made.weights) == 1


@pytest.mark.parametrize("accuracy", [0.0, 1.0])
def test_one_kind_only_gives_a_cautious_base_rate(accuracy: float) -> None:
    evaluation = simulated(50, accuracy=accuracy, seed=4)

    made = fit(evaluation)

    assert made.method == "constant"
    assert all(abs(sure - accuracy) < 0.05 for sure in evaluation.confidences(made))
    assert made.threshold(0.2) < made.threshold(0.8)  # the order is still there to spend a budget by


def test_a_handful_of_records_is_not_enough() -> None:
    with pytest.raises(NotEnough, match="5 calibration records; at least 20"):
        fit(simulated(5, accuracy=0.5))


def test_text_alone_cannot_be_calibrated() -> None:
    records = ranch_records(30)

    with pytest.raises(BadInput, match="gave text only"):
        fit(evaluate_texts([record.target for record in records], records, RANCH))


def test_a_calibration_belongs_to_the_model_that_was_evaluated() -> None:
    made = fit(msgspec.structs.replace(simulated(60, accuracy=0.5), model_digest="a" * 64, adapter_digest="b" * 64))

    assert made.fits("a" * 64, "b" * 64)


def test_a_translation_may_stand_when_it_is_about_as_good_as_the_teachers() -> None:
    records = [Record(id=str(i), task=SPANISH.name, source="x", target="el gato duerme en la casa", lang="es") for i in range(3)]
    teacher = evaluate_texts(["el gato duerme en la casa", "el gato duerme", "perro"], records, SPANISH)
    student = evaluate_texts(["el gato duerme en la casa", "el gato", "perro"], records, SPANISH)

    good, meaning = good_enough(student, teacher=teacher)

    assert good == (1.0, 0.0, 1.0)  # the last: both are bad, asking gains nothing
    assert meaning == "chrF within 5 points of the teacher's"
    assert good_enough(student)[0] == (1.0, 0.0, 0.0)


def test_the_order_is_never_worse_than_one_signal_where_one_signal_is_the_truth() -> None:
    """With nothing to gain from more signals the choice stays with the plain one."""
    assert usual().method in ("single", "margin", "logistic", "distance")


def test_the_teachers_answers_say_what_asking_buys() -> None:
    """Where answers are long the teacher is wrong too: a calibration that saw it asks the short ones first."""
    student, teacher = hopeless_when_long(seed=1)
    unseen, answers = hopeless_when_long(seed=2)

    blind, seeing = fit(student), fit(student, teacher=teacher)

    areas = [deferral_area(unseen.confidences(made), unseen.quality(), answers.quality()) or 0.0 for made in (blind, seeing)]
    assert areas[1] > areas[0] + 0.1


def test_agreement_is_weighed_by_what_it_told() -> None:
    evaluation = simulated(600, accuracy=0.6, seed=1, skill=0.5)
    told = [0.9 if answer.correct else 0.2 for answer in evaluation.answers]

    made = fit(evaluation, agreement=told, samples=4, temperature=0.8)

    assert made.agreed is not None and made.agreed.samples == 4
    values = evaluation.answers[0].features
    assert made.confidence(values, agreement=0.9) > 0.8 > 0.3 > made.confidence(values, agreement=0.2)


def test_agreements_of_other_records_are_refused() -> None:
    with pytest.raises(BadInput, match="one each"):
        fit(simulated(60, accuracy=0.5), agreement=[1.0])


def test_what_ships_is_small_and_what_was_fitted_is_what_ships() -> None:
    made = usual()

    data = msgspec.json.encode(made)

    assert len(data) < 16_000
    assert msgspec.json.decode(data, type=Calibration) == made


@functools.cache
def usual() -> Calibration:
    """Of the same answers for every test that only looks."""
    return fit(simulated(600, accuracy=0.6, seed=1))


def hopeless_when_long(*, seed: int) -> tuple[Evaluation, Evaluation]:
    """A student that is unsure of short and of long answers alike, and a teacher that knows the short ones only."""
    student = simulated(800, accuracy=0.6, seed=seed)
    random = np.random.default_rng(seed + 100)
    long = random.random(800) < 0.5
    place = FEATURES.index("length")
    answers, known = [], []
    for answer, is_long in zip(student.answers, long, strict=True):
        signals = [*answer.features]
        signals[place] = 30.0 if is_long else 8.0
        answers.append(msgspec.structs.replace(answer, features=tuple(signals)))
        known.append(answer if is_long else msgspec.structs.replace(answer, correct=True, verdict=answer.expected))
    return tuple(msgspec.structs.replace(student, answers=tuple(each)) for each in (answers, known))  # type: ignore[return-value]
