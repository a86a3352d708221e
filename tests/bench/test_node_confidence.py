"""The measures of confidence run from end to end on tiny models, whose figures mean nothing; their arithmetic is held by hand."""

import random

import pytest

from bench import cascade, node_audc, node_calibration, node_gap_closed
from bench.node import TABLE
from bench.settings import Settings
from bench.stream import asked
from coordinator.forge.judging.calibrate import fit
from coordinator.forge.judging.metrics import deferral_area
from protocol.tasks import RANCH
from tests.evaluation.conftest import simulated


def made() -> cascade.Cascade:
    """A student that is right of six in ten and knows it fairly well, and a teacher that is right of nine in ten."""
    student, teacher = simulated(600, accuracy=0.6, seed=2), simulated(600, accuracy=0.9, seed=3)
    return cascade.Cascade(RANCH, fit(simulated(600, accuracy=0.6, seed=1)), student, teacher, simulated(600, accuracy=0.3, seed=4))


@pytest.mark.torch
@pytest.mark.llama
def test_all_three_run_from_end_to_end_and_ask_the_models_once(settings: Settings) -> None:
    first = {key: module.measure(settings) for key, module in MODULES.items()}
    kept = sorted(path.name for path in settings.folder("cascade").glob("*.json") if ".made." not in path.name)

    entries = [name for key, found in first.items() for name in TABLE.judged(key, found)]

    assert entries == ["audc", "audc_2", "gap_closed", "calibration", "calibration_2"]
    assert len(kept) == 9  # student and teacher, dev and test, both tasks; and the student elsewhere


MODULES = {"audc": node_audc, "gap_closed": node_gap_closed, "calibration": node_calibration}


def test_the_area_is_told_beside_the_baseline_and_what_could_be_known(settings: Settings) -> None:
    found = node_audc.entry(made(), settings)

    assert 0.2 < found["figure"] < found["bounds"][node_audc.KNOWN_STUDENT] <= 1.0
    assert found["above_mean_log_probability"]["low"] <= found["above_mean_log_probability"]["diff"]
    assert set(found["against"]) == {"mean log-probability", "verdict or answer probability, uncalibrated"}


def test_the_gap_is_closed_by_what_the_budget_really_asked(settings: Settings) -> None:
    found = node_gap_closed.closed(made(), settings)

    assert found["asked"] == pytest.approx(0.3, abs=0.02)
    assert 0.4 < found["closed"] < 1.2


def test_shares_hold_on_every_stream_where_a_fixed_threshold_does_not(settings: Settings) -> None:
    found = node_calibration.shares({"ranch": made()}, settings)

    assert found["figure"] < 0.04  # of 600 answers; the horizon is 20
    assert found["against"]["the planned threshold, fixed"] > 0.1
    assert {row["stream"] for row in found["rows"]} >= {"test", "another site", "ever less sure"}


def test_a_confidence_that_is_exactly_true_still_shows_an_error_by_chance() -> None:
    assert 0.01 < node_calibration.by_chance([step / 300 for step in range(300)], seed=1) < 0.08
    assert node_calibration.by_chance([1.0] * 300, seed=1) == 0.0


def test_asking_at_random_has_no_area_in_expectation_and_the_oracle_all() -> None:
    luck = random.Random(1)
    student, teacher = [float(luck.random() < 0.6) for _ in range(300)], [float(luck.random() < 0.9) for _ in range(300)]

    orders = [deferral_area([luck.random() for _ in student], student, teacher) or 0.0 for _ in range(200)]
    oracle = deferral_area([s - t for s, t in zip(student, teacher, strict=True)], student, teacher)

    assert sum(orders) / len(orders) == pytest.approx(0.0, abs=0.02)
    assert oracle == pytest.approx(1.0)


def test_a_stream_is_asked_in_its_order() -> None:
    one = made()

    sent = asked(one.confidences, one.calibration, share=0.25, seed=1)

    assert len(sent) == 600
    assert sum(sent) / 600 == pytest.approx(0.25, abs=0.03)
