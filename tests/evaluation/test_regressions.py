"""A gain on average hides no loss in a category, and chance names none beyond the stated rate."""

import numpy as np
import pytest

from coordinator.forge.judging.categories import NUMBERS
from coordinator.forge.judging.evaluation import Evaluation, evaluate_texts
from coordinator.forge.judging.metrics import detectable_loss, holm, loss_p
from coordinator.forge.judging.regressions import (
    ALL,
    ALPHA,
    CHRF,
    FEWEST,
    KEPT,
    VERDICT,
    Comparison,
    compare,
    corrected,
    losses,
    measured,
    places,
    values,
)
from protocol.errors import BadInput
from protocol.tasks import RANCH, Record
from tests.evaluation.conftest import SPANISH, ranch_records, simulated

ENDINGS = ("la casa vieja", "el tanque del norte", "la bomba grande", "el camino de siempre")


def translations(count: int) -> list[Record]:
    """A third with a number, a third denied, the rest plain."""
    rows = []
    for place in range(count):
        end = ENDINGS[place % len(ENDINGS)]
        target = (f"Hay {10 + place} animales cerca de {end}.", f"No veo nada cerca de {end}.", f"El perro duerme cerca de {end}.")[
            place % 3
        ]
        rows.append(Record(id=str(place), task=SPANISH.name, source=f"source {place}", target=target, lang="es"))
    return rows


def judged(records: list[Record], texts: list[str]) -> Evaluation:
    return evaluate_texts(texts, records, SPANISH)


def test_numbers_spoiled_in_a_tenth_of_the_answers_are_named_although_the_mean_improves() -> None:
    records = translations(900)
    before = [record.target.replace("cerca de", "junto a") for record in records]
    after = [record.target for record in records]  # every sentence is better...
    for place in range(0, 900, 10):  # ...but in a tenth of the answers that have a number its digits are wrong
        after[3 * (place // 3)] = after[3 * (place // 3)].replace("Hay ", "Hay 9")
    where = places(records, SPANISH)
    old, new = (measured(judged(records, texts), records, SPANISH, where) for texts in (before, after))

    rows = corrected(compare("general", "previous", old, new, seed=1))

    found = {(row.category, row.measure): row for row in rows}
    assert found[ALL, CHRF].diff > 0
    assert found[NUMBERS, CHRF].diff > 0  # not even the category's own mean shows it
    assert (NUMBERS, KEPT) in {(row.category, row.measure) for row in losses(rows)}
    assert {row.measure for row in losses(rows)} == {KEPT}
    assert found[NUMBERS, KEPT].diff == pytest.approx(-0.3, abs=0.05)


def null_run(seed: int, records: list[Record], where: dict[str, list[int]]) -> bool:
    """Whether a loss is named between two systems that err alike at random."""
    random = np.random.default_rng(seed)
    sides = []
    for _ in range(2):
        figures = {}
        chrf, right = random.normal(60, 15, len(records)), random.random(len(records)) < 0.8
        for category, chosen in where.items():
            figures[category, CHRF] = [float(chrf[place]) for place in chosen]
            figures[category, KEPT] = [float(right[place]) for place in chosen]
        sides.append(figures)
    return bool(losses(corrected(compare("s", "previous", sides[0], sides[1], seed=seed, flips=999, resamples=200))))


def test_chance_alone_names_a_loss_no_more_often_than_stated() -> None:
    records = translations(240)
    where = places(records, SPANISH)

    alarms = sum(null_run(seed, records, where) for seed in range(200))

    assert alarms <= ALPHA * 200


def test_a_true_loss_in_one_category_is_found_in_most_runs() -> None:
    where = {ALL: list(range(600)), NUMBERS: list(range(0, 600, 3))}
    found = 0
    for seed in range(20):
        random = np.random.default_rng(seed)
        old, new = (random.random(600) < 0.9 for _ in range(2))
        new[::3] &= random.random(200) < 0.8
        sides = [{(category, KEPT): [float(side[place]) for place in chosen] for category, chosen in where.items()} for side in (old, new)]
        found += any(row.category == NUMBERS for row in losses(corrected(compare("s", "x", sides[0], sides[1], seed=seed, resamples=200))))

    assert found >= 18


def test_a_category_with_few_records_is_shown_and_not_tested() -> None:
    records = translations(3 * (FEWEST - 1))
    where = places(records, SPANISH)
    figures = measured(judged(records, [record.target for record in records]), records, SPANISH, where)

    tested = {row.category for row in compare("s", "x", figures, figures, seed=1)}

    assert NUMBERS in {row.category for row in values("student", figures, seed=1)}
    assert NUMBERS not in tested
    assert ALL in tested


def test_verdicts_are_measured_by_their_code_and_their_sentence() -> None:
    records = ranch_records(64)
    figures = measured(simulated(64, accuracy=0.5), records, RANCH, places(records, RANCH))

    assert {measure for category, measure in figures if category == ALL} == {VERDICT, CHRF}
    assert len(figures["verdicts: power", VERDICT]) == 12
    assert ("language: en", KEPT) in figures


def test_a_values_interval_holds_it() -> None:
    records = ranch_records(64)
    figures = measured(simulated(64, accuracy=0.5), records, RANCH, places(records, RANCH))

    assert all(row.low <= row.value <= row.high for row in values("student", figures, seed=1))


def test_an_evaluation_of_other_records_is_refused() -> None:
    records = translations(6)

    with pytest.raises(BadInput, match="other records"):
        measured(judged(records[:5], ["x"] * 5), records, SPANISH, places(records, SPANISH))


def row_of(p: float, *, high: float = -0.01) -> Comparison:
    return Comparison(set="s", category="c", measure=KEPT, against="x", n=100, diff=-0.1, low=-0.2, high=high, p=p, detectable=0.1)


def test_a_p_that_passes_alone_does_not_among_many() -> None:
    assert [row.loss for row in corrected([row_of(0.03)])] == [True]
    assert not losses(corrected([row_of(0.03), *(row_of(0.5) for _ in range(9))]))
    assert corrected([row_of(0.03), row_of(0.5)])[0].tests == 2


def test_a_loss_whose_interval_reaches_zero_is_not_named() -> None:
    assert not losses(corrected([row_of(0.001, high=0.0)]))


def test_holms_values_are_the_published_ones() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))  # R: p.adjust(c(.01,.04,.03,.005), "holm")
    assert holm([]) == ()
    assert holm([0.9, 0.8]) == (1.0, 1.0)


def test_a_loss_of_verdicts_has_the_sign_tests_p() -> None:
    before, after = [1.0] * 9 + [0.0] * 3 + [1.0] * 50, [0.0] * 9 + [1.0] * 3 + [1.0] * 50

    assert loss_p(before, after, seed=0) == pytest.approx(299 / 4096)  # P(at least 9 of 12 fair coins)
    assert loss_p(after, before, seed=0) == pytest.approx(1 - 79 / 4096)  # P(at least 3)
    assert loss_p(before, before, seed=0) == 1.0


def test_a_loss_of_points_has_the_randomisation_tests_p() -> None:
    assert loss_p([0.0] * 6, [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0], seed=0) == pytest.approx(1 / 64, abs=0.005)
    assert loss_p([0.0] * 6, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], seed=0) == 1.0


def test_what_could_have_been_found_shrinks_with_the_root_of_the_records() -> None:
    few, many = ([0.0] * n for n in (100, 400))
    gains = [1.0, -1.0] * 50

    small, large = detectable_loss(few, gains, alpha=0.05), detectable_loss(many, gains * 4, alpha=0.05)

    assert small == pytest.approx(2.486 / 10, rel=0.01)  # (1.645 + 0.842) * sd 1.005 / 10
    assert large == pytest.approx(small / 2, rel=0.01)
    assert detectable_loss(few, few, alpha=0.05) is None
