"""node/confidence/budget.py: a budget becomes a threshold that follows what the site really sends."""

import itertools
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.confidence.budget import COLD, DAY_S, HORIZON, WINDOW, Budget, Cost, Decision, Spent, Tracker

FREE = Cost()
PRIOR = tuple(step / 100 for step in range(101))
MINUTE = 60.0


def run(
    tracker: Tracker, scores: list[float], *, seed: int = 1, cost: Cost = FREE, every_s: float = MINUTE, begin: float = 1e9
) -> list[Decision]:
    luck = random.Random(seed)
    return [
        tracker.decide(score, cost=cost, now=begin + index * every_s, luck=luck.random(), audit_luck=luck.random())
        for index, score in enumerate(scores)
    ]


def share(decisions: list[Decision]) -> float:
    return sum(decision.ask for decision in decisions) / len(decisions)


def drawn(draw: Callable[[random.Random], float], count: int = 1_000, seed: int = 7) -> list[float]:
    luck = random.Random(seed)
    return [draw(luck) for _ in range(count)]


@pytest.mark.parametrize("budget", [0.05, 0.25, 0.5, 0.9])
@pytest.mark.parametrize(
    "draw",
    [
        lambda luck: luck.random(),
        lambda luck: luck.random() ** 4,  # a site of which the model knows less than of the calibration records
        lambda luck: 0.9 + 0.1 * luck.random(),  # or more
        lambda luck: luck.choice((0.2, 0.9)),  # two values only
        lambda luck: 0.6,  # one
    ],
)
def test_the_asked_share_is_the_planned_one_whatever_the_site_sends(draw: Callable[[random.Random], float], budget: float) -> None:
    decisions = run(Tracker(Budget(share=budget), prior=PRIOR), drawn(draw))

    assert share(decisions) == pytest.approx(budget, abs=0.01)


@pytest.mark.parametrize("season", [lambda x, i: x + i, lambda x, i: x - i, lambda x, i: (x + i) % 1, lambda x, i: x if i < 0.5 else 1 - x])
def test_a_drifting_season_moves_the_threshold_and_not_the_share(season: Callable[[float, float], float]) -> None:
    scores = [season(0.2 * score, index / 1_000) for index, score in enumerate(drawn(lambda luck: luck.random()))]

    decisions = run(Tracker(Budget(share=0.25), prior=PRIOR), scores)

    assert share(decisions) == pytest.approx(0.25, abs=0.02)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.one_of(st.floats(0, 1), st.sampled_from((0.0, 0.5, 1.0))), min_size=1, max_size=300),
    st.floats(0, 1),
    st.floats(0, 0.5),
    st.integers(0, 99),
)
def test_no_series_of_confidences_puts_the_plan_more_than_the_horizon_behind(
    scores: list[float], budget: float, audit: float, seed: int
) -> None:
    decisions = run(Tracker(Budget(share=budget, audit=audit), prior=PRIOR), scores, seed=seed)

    assert all(abs(decision.owed) <= HORIZON for decision in decisions)
    assert abs(sum(decision.ask for decision in decisions) - budget * len(scores)) <= HORIZON + 1e-6


def test_the_least_sure_are_asked() -> None:
    decisions = run(Tracker(Budget(share=0.3, audit=0.0), prior=PRIOR), scores := drawn(lambda luck: luck.random(), 2_000))

    asked = [score for score, decision in zip(scores, decisions, strict=True) if decision.ask]
    kept = [score for score, decision in zip(scores, decisions, strict=True) if not decision.ask]
    assert sum(asked) / len(asked) == pytest.approx(0.15, abs=0.03)
    assert sum(score < 0.2 for score in kept) / len(kept) < 0.02


def test_equal_confidences_are_asked_by_lot_and_not_in_a_row() -> None:
    decisions = run(Tracker(Budget(share=0.5, audit=0.0), prior=(0.6,) * 100), [0.6] * 400)

    asks = [decision.ask for decision in decisions]
    turns = sum(one != other for one, other in itertools.pairwise(asks))
    assert turns > 120
    assert all(0.0 < decision.chance < 1.0 for decision in decisions[:10])


@pytest.mark.parametrize(("budget", "expected"), [(0.0, 0.0), (1.0, 1.0)])
def test_budgets_at_the_ends_ask_nothing_and_everything(budget: float, expected: float) -> None:
    assert share(run(Tracker(Budget(share=budget, audit=0.1)), drawn(lambda luck: luck.random()))) == expected


def test_the_day_s_bytes_are_never_overspent() -> None:
    """A quiet week says that ten questions a day are the plan; then a hundred unsure answers come within minutes."""
    tracker = Tracker(Budget(share=1.0, bytes_a_day=10_000), prior=PRIOR)
    run(tracker, drawn(lambda luck: luck.random(), 7 * 24), cost=Cost(1_000), every_s=3_600)

    run(tracker, [0.0] * 100, cost=Cost(1_000), every_s=3.6, begin=1e9 + 7 * DAY_S)

    assert tracker.spent(1e9 + 7 * DAY_S + 360)[0] == 10_000
    assert str(tracker.plan(Cost(1_000), 1e9 + 7 * DAY_S + 360).why) == "the day's 10000 bytes are spent"


def test_the_tightest_budget_decides_and_says_so() -> None:
    tracker = Tracker(Budget(share=0.5, bytes_a_day=1_000_000, joules_a_day=144), prior=PRIOR)

    decisions = run(tracker, drawn(lambda luck: luck.random(), 3_000), cost=Cost(bytes=1_000, joules=1.0))

    assert decisions[-1].plan.bound == "joules"
    assert str(decisions[-1].plan.why) == "144 joules a day pay for 10.0%"
    assert share(decisions[200:]) == pytest.approx(0.1, abs=0.01)


def test_joules_are_paced_so_that_the_least_sure_get_them_all_day() -> None:
    """A tenth is affordable: the tenth that is asked is the least sure one, not the first of the day."""
    scores = drawn(lambda luck: luck.random(), 1_440 * 2)

    decisions = run(Tracker(Budget(share=1.0, joules_a_day=144, audit=0.0), prior=PRIOR), scores, cost=Cost(joules=1.0))

    second_day = list(zip(scores, decisions, strict=True))[1_440:]
    asked = [score for score, decision in second_day if decision.ask]
    assert len(asked) <= 145
    assert sum(asked) / len(asked) < 0.1


def test_what_was_spent_is_forgotten_after_a_day_and_not_before() -> None:
    tracker = Tracker(Budget(bytes_a_day=100), prior=PRIOR)
    tracker.restore(spent=[Spent(1e9, Cost(bytes=60))])

    assert tracker.spent(1e9 + DAY_S - 1)[0] == 60
    assert tracker.spent(1e9 + DAY_S + MINUTE + 1)[0] == 0


def test_a_clock_set_back_does_not_pay_anything_back() -> None:
    tracker = Tracker(Budget(bytes_a_day=100), prior=PRIOR)
    tracker.restore(spent=[Spent(1e9, Cost(bytes=60))])

    assert tracker.spent(0.0)[0] == 60


def test_sure_answers_are_audited_at_their_share_within_the_budget() -> None:
    decisions = run(Tracker(Budget(share=0.25, audit=0.04), prior=PRIOR), drawn(lambda luck: luck.random(), 4_000))

    audits = sum(decision.audit for decision in decisions)
    assert audits / 4_000 == pytest.approx(0.04 * 0.75, abs=0.01)
    assert share(decisions) == pytest.approx(0.25, abs=0.01)


def test_the_chance_of_being_asked_is_what_happens() -> None:
    scores = drawn(lambda luck: luck.choice((0.1, 0.3, 0.3, 0.8)), 6_000)

    decisions = run(Tracker(Budget(share=0.3, audit=0.1), prior=PRIOR), scores)

    for value in (0.1, 0.3, 0.8):
        mine = [decision for score, decision in zip(scores, decisions, strict=True) if score == value]
        assert sum(decision.chance for decision in mine) / len(mine) == pytest.approx(share(mine), abs=0.03)


def test_without_a_calibration_the_fixed_threshold_stands_until_the_site_is_known() -> None:
    decisions = run(Tracker(Budget(share=0.25, audit=0.0), fallback=0.5), [0.9, 0.4] * 500)

    assert [decision.ask for decision in decisions[:6]] == [False, True] * 3
    assert share(decisions[COLD:]) == pytest.approx(0.25, abs=0.02)


def test_another_model_begins_anew_and_still_owes() -> None:
    tracker = Tracker(Budget(share=0.5), prior=PRIOR)
    run(tracker, [0.9] * 7)
    owed = tracker.owed

    tracker.begin((0.1,) * 50)

    assert tracker.owed == owed
    assert tracker.share_below(0.5) == 1.0


def test_a_tracker_goes_on_where_the_last_process_was() -> None:
    scores, before = drawn(lambda luck: luck.random() ** 3, 600), Tracker(Budget(share=0.2), prior=PRIOR)
    run(before, scores)
    after = Tracker(Budget(share=0.2), prior=PRIOR)

    after.restore(scores=scores[-WINDOW:], times=[1e9 + 60 * index for index in range(344, 600)], owed=before.owed)

    assert after.threshold(FREE, 2e9) == before.threshold(FREE, 2e9)
    assert after.questions_a_day() == pytest.approx(1_440)
