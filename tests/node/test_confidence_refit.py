"""node/confidence/refit.py: the shipped curve moves toward what the site's confirmed answers say, or not at all."""

import random

import pytest

from node.confidence.refit import FEWEST, FEWEST_HELD_OUT, WEIGHT_LIMIT, Outcome, Refit, refit, weights
from protocol.confidence import log_odds, logistic


def site(count: int, *, offset: float = 0.0, slope: float = 1.0, seed: int = 1, budget: float = 0.3, audit: float = 0.05) -> list[Outcome]:
    """Confirmed answers of a site where the truth is another curve than the shipped one; mostly the unsure ones are confirmed."""
    luck, found = random.Random(seed), []
    while len(found) < count:
        probability = luck.random()
        chance = 1.0 if probability < budget else audit
        if luck.random() < chance:
            right = luck.random() < logistic(offset + slope * log_odds(probability))
            found.append(Outcome(probability, right, chance, held_out=luck.random() < 0.2))
    return found


def test_a_site_where_the_curve_boasts_gets_a_modest_one() -> None:
    made = refit(site(600, offset=-1.5))

    assert made.used
    assert made.apply(0.8) == pytest.approx(logistic(log_odds(0.8) - 1.5), abs=0.12)
    assert made.loss < made.loss_shipped


def test_a_site_like_the_calibration_records_keeps_about_the_shipped_curve() -> None:
    made = refit(site(600))

    assert all(made.apply(sure) == pytest.approx(sure, abs=0.08) for sure in (0.1, 0.5, 0.9))


def test_few_confirmed_answers_change_nothing() -> None:
    made = refit(site(FEWEST // 2, offset=-3.0))

    assert not made.used
    assert made.apply(0.8) == 0.8
    assert f"{FEWEST} to fit on and {FEWEST_HELD_OUT} to judge by" in made.why


def test_a_correction_that_is_worse_on_unseen_answers_is_not_used() -> None:
    """What is fitted on says the curve boasts; what is held out says it does not."""
    seen = [Outcome(0.8, False, 1.0, held_out=False)] * 60
    unseen = [Outcome(0.8, True, 1.0, held_out=True)] * 30

    made = refit(seen + unseen)

    assert not made.used
    assert made.loss > made.loss_shipped
    assert made.apply(0.8) == 0.8


def test_a_correction_never_changes_the_order_nor_revives_a_broken_answer() -> None:
    made = refit(site(600, offset=-1.5, slope=-2.0))

    rising = [made.apply(step / 100) for step in range(101)]

    assert rising == sorted(rising)
    assert rising[0] == 0.0


def test_an_audited_answer_speaks_for_those_that_were_not_asked() -> None:
    counts = weights([Outcome(0.2, True, 1.0, False), Outcome(0.9, True, 0.1, False), Outcome(0.9, True, 0.0001, False)])

    assert counts[1] == pytest.approx(10 * counts[0])
    assert counts[2] == pytest.approx(WEIGHT_LIMIT * counts[0])
    assert sum(counts) == pytest.approx(3.0)


def test_the_fewer_confirmed_answers_the_less_the_curve_moves() -> None:
    few, many = (
        refit([Outcome(0.8, index % 2 == 0, 1.0, held_out=index % 5 == 0) for index in range(count)]) for count in (2 * FEWEST, 20 * FEWEST)
    )

    assert many.apply(0.8) == pytest.approx(0.5, abs=0.03)
    assert many.apply(0.8) + 0.05 < few.apply(0.8) < 0.75


def test_the_same_outcomes_give_the_same_correction() -> None:
    outcomes = site(300, offset=0.7)

    assert refit(outcomes) == refit(list(outcomes))


def test_without_a_correction_the_shipped_probability_stands() -> None:
    assert Refit(offset=2.0, slope=0.5).apply(0.3) == 0.3
