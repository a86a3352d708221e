"""Figures against values worked out by hand, and against sacreBLEU itself."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from coordinator.forge.judging.metrics import (
    at_budget,
    calibration_error,
    deferral_area,
    deferral_curve,
    paired_difference,
    paired_ratio,
    reliability,
    sentence_chrf,
    text_scores,
    wilson,
)
from protocol.errors import BadInput

SAID = ["El gato duerme en la casa.", "Quiero agua fría ahora.", "La bomba está rota hoy.", "No sé nada de eso."] * 10
MEANT = ["El gato duerme en casa.", "Quiero agua fría ya.", "La bomba se rompió hoy.", "No sé nada de eso."] * 10


def test_scores_and_signatures_are_sacrebleus_own() -> None:
    found = text_scores(SAID, MEANT)
    bleu, chrf = BLEU(), CHRF()

    assert found.bleu == pytest.approx(bleu.corpus_score(SAID, [MEANT], n_bootstrap=1000).score)
    assert found.chrf == pytest.approx(chrf.corpus_score(SAID, [MEANT], n_bootstrap=1000).score)
    assert found.bleu_signature == str(bleu.get_signature())
    assert found.chrf_signature == str(chrf.get_signature())


def test_intervals_agree_with_sacrebleus_own_bootstrap() -> None:
    found = text_scores(SAID, MEANT)
    theirs = CHRF().corpus_score(SAID, [MEANT], n_bootstrap=1000)

    assert (found.chrf_ci[1] - found.chrf_ci[0]) / 2 == pytest.approx(theirs._ci, rel=0.05)
    assert found.chrf_ci[0] < found.chrf < found.chrf_ci[1]


def test_another_seed_gives_another_interval_and_names_itself() -> None:
    one, other = text_scores(SAID, MEANT, seed=1), text_scores(SAID, MEANT, seed=2)

    assert one.chrf == other.chrf
    assert one.chrf_ci != other.chrf_ci
    assert "seed:2" in other.chrf_signature


def test_sentence_chrf_is_100_for_the_reference_and_0_for_nothing() -> None:
    assert sentence_chrf(["igual", ""], ["igual", "algo"]) == pytest.approx((100.0, 0.0))


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962)],  # Newcombe 1998, method 3
)
def test_wilsons_interval_has_the_published_values(right: int, count: int, low: float, high: float) -> None:
    assert wilson(right, count) == pytest.approx((low, high), abs=1e-4)


@given(st.integers(1, 500).flatmap(lambda count: st.tuples(st.integers(0, count), st.just(count))))
def test_wilsons_interval_holds_the_share_and_stays_a_share(case: tuple[int, int]) -> None:
    low, high = wilson(*case)

    assert 0.0 <= low <= case[0] / case[1] <= high <= 1.0


def test_a_share_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="is not a share"):
        wilson(0, 0)


def test_a_paired_difference_sees_what_overlapping_intervals_hide() -> None:
    before = [1.0] * 60 + [0.0] * 40
    after = [1.0] * 68 + [0.0] * 32  # eight records mended, none broken
    low, high = wilson(60, 100)[1], wilson(68, 100)[0]

    found = paired_difference(before, after, seed=0)

    assert high < low  # the two intervals overlap
    assert found["diff"] == pytest.approx(0.08)
    assert found["low"] > 0
    assert found["p"] < 0.01


def test_no_difference_is_not_significant() -> None:
    found = paired_difference([1.0, 0.0] * 20, [0.0, 1.0] * 20, seed=0)

    assert found["low"] < 0 < found["high"]
    assert found["p"] > 0.5


def test_a_paired_comparison_repeats_with_its_seed() -> None:
    before, after = [0.0, 1.0, 1.0, 0.0, 1.0] * 8, [1.0, 1.0, 0.0, 1.0, 1.0] * 8

    assert paired_difference(before, after, seed=3) == paired_difference(before, after, seed=3)
    assert paired_difference(before, after, seed=3) != paired_difference(before, after, seed=4)


def test_a_paired_ratio_is_the_share_kept() -> None:
    found = paired_ratio([1.0] * 90 + [0.0] * 10, [1.0] * 81 + [0.0] * 19, seed=0)

    assert found is not None
    assert found["ratio"] == pytest.approx(0.9)
    assert found["low"] < 0.9 < found["high"] <= 1.0


def test_a_ratio_to_nothing_says_nothing() -> None:
    assert paired_ratio([0.0] * 20, [1.0] * 20, seed=0) is None


def test_calibration_error_is_the_weighted_gap_of_confidence_and_accuracy() -> None:
    sure, right = [0.95, 0.95, 0.15, 0.15], [1.0, 0.0, 0.0, 0.0]

    assert calibration_error(sure, right) == pytest.approx(0.30)  # (0.95 - 0.5) / 2 + 0.15 / 2
    assert [(bar.count, bar.accuracy) for bar in reliability(sure, right)] == [(2, 0.0), (2, 0.5)]


def test_certainty_has_a_place_in_the_last_bin() -> None:
    assert reliability([1.0], [1.0])[0].count == 1


STUDENT, TEACHER = [1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 0.0, 1.0]


def test_the_deferral_curve_hands_on_the_least_confident_first() -> None:
    assert deferral_curve([0.9, 0.1, 0.2, 0.8], STUDENT, TEACHER).tolist() == [0.5, 0.75, 0.75, 0.75, 0.75]


def test_asking_where_the_teacher_helps_is_1_at_random_0_and_where_it_does_not_below() -> None:
    assert deferral_area([0.9, 0.1, 0.2, 0.8], STUDENT, TEACHER) == pytest.approx(1.0)
    assert deferral_area([0.1, 0.9, 0.2, 0.3], STUDENT, TEACHER) == pytest.approx(-1.0)


def test_asking_cannot_matter_where_the_teacher_is_equally_better_everywhere() -> None:
    assert deferral_area([0.1, 0.2], [0.0, 0.0], [1.0, 1.0]) is None


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans(), st.booleans()), min_size=2, max_size=40))
def test_no_order_of_asking_beats_the_oracle(rows: list[tuple[float, bool, bool]]) -> None:
    sure, student, teacher = (list(column) for column in zip(*rows, strict=True))
    found = deferral_area(sure, [float(x) for x in student], [float(x) for x in teacher])

    assert found is None or -1.0 - 1e-9 <= found <= 1.0 + 1e-9


def test_quality_at_a_budget_hands_on_exactly_that_share() -> None:
    assert at_budget([0.9, 0.1, 0.2, 0.8], STUDENT, TEACHER, 0.0) == 0.5
    assert at_budget([0.9, 0.1, 0.2, 0.8], STUDENT, TEACHER, 0.25) == 0.75


def test_values_of_different_records_are_not_compared() -> None:
    with pytest.raises(BadInput, match="cannot compare 1 values with 2"):
        paired_difference([1.0], [1.0, 0.0], seed=0)
