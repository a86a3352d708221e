"""When a site trains and syncs, and which adapter is good enough to answer with."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.learn.rules import ALPHA, Standing, better, discordant, sign_test, training_due, window_due
from protocol.links import Verdict

SUN, NIGHT = Verdict(True, "sun"), Verdict(False, "no sun")
READY = Standing(examples=40, held_out=8)
scores = st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 1.0])), max_size=60)


def due(standing: Standing, *, power: Verdict = SUN, joules_left: float = math.inf, now: float = 1000.0) -> Verdict:
    return training_due(standing, now=now, minimum=32, held_out=4, new=16, power=power, joules_left=joules_left)


@pytest.mark.parametrize(
    ("standing", "power", "joules", "ok", "says"),
    [
        (READY, SUN, math.inf, True, "40 new examples"),
        (READY, NIGHT, math.inf, False, "waits for power: no sun"),
        (READY, SUN, 0.0, False, "goes on tomorrow"),
        (Standing(examples=31, held_out=8), SUN, math.inf, False, "31 examples and 8 held out"),
        (Standing(examples=40, held_out=3), SUN, math.inf, False, "3 held out"),
        (Standing(examples=50, held_out=8, learned=40), SUN, math.inf, False, "10 new examples since"),
        (Standing(examples=56, held_out=8, learned=40), SUN, math.inf, True, "16 new examples"),
        (Standing(examples=41, held_out=8, learned=40, unfinished=True), SUN, math.inf, True, "goes on"),
        (Standing(examples=40, held_out=8, learned=40, unjudged=True), SUN, math.inf, True, "judges"),
        (Standing(examples=40, held_out=8, not_before=4600.0), SUN, math.inf, False, "in 1.0 hours"),
        (Standing(why_not="no torch"), SUN, math.inf, False, "no torch"),
    ],
)
def test_training_is_due_when_enough_is_new_and_nothing_speaks_against_it(
    standing: Standing, power: Verdict, joules: float, ok: bool, says: str
) -> None:
    verdict = due(standing, power=power, joules_left=joules)

    assert (verdict.ok, says in verdict.reason) == (ok, True), verdict.reason


@given(standing=st.builds(Standing, examples=st.integers(0, 200), held_out=st.integers(0, 50), learned=st.integers(0, 200)))
def test_no_training_begins_without_power(standing: Standing) -> None:
    assert not due(standing, power=NIGHT).ok


def test_a_window_opens_every_so_often() -> None:
    assert window_due(now=1e6, last=0.0, every_s=3600, hours=(), window_s=120)
    assert not window_due(now=1e6, last=1e6 - 3599, every_s=3600, hours=(), window_s=120)
    assert window_due(now=1e6, last=2e6, every_s=3600, hours=(), window_s=120)  # the clock was set back
    assert not window_due(now=1e6, last=0.0, every_s=0.0, hours=(), window_s=120)


def test_a_window_at_fixed_hours_opens_once_at_each() -> None:
    noon = 43_200.0

    opened, last = [], 0.0
    for second in range(0, 2 * 86_400, 30):
        if window_due(now=86_400.0 * 100 + second, last=last, every_s=10.0, hours=(12.0, 18.5), window_s=120):
            last = 86_400.0 * 100 + second
            opened.append(second)

    assert opened == [noon, 18.5 * 3600, 86_400 + noon, 86_400 + 18.5 * 3600]


def test_three_answers_gained_and_none_lost_are_enough_and_two_are_not() -> None:
    stayed = [(1.0, 1.0)] * 8

    assert better([(0.0, 1.0)] * 3 + stayed, []).ok
    assert not better([(0.0, 1.0)] * 2 + stayed, []).ok


def test_more_variants_tried_ask_for_more_evidence() -> None:
    own = [(0.0, 1.0)] * 3 + [(1.0, 1.0)] * 8

    assert better(own, []).ok and not better(own, [], tried=3).ok
    assert better([(0.0, 1.0)] * 4 + own, [], tried=3).ok


def test_what_is_lost_in_general_keeps_an_adapter_from_answering() -> None:
    own = [(0.0, 1.0)] * 6

    verdict = better(own, [(1.0, 1.0)] * 18 + [(1.0, 0.0)] * 2)

    assert not verdict.ok and "too many lost" in verdict.reason
    assert better(own, [(1.0, 1.0)] * 99 + [(1.0, 0.0)] * 2).ok


@given(own=scores, general=scores)
def test_an_adapter_that_wins_nothing_never_answers(own: list[tuple[float, float]], general: list[tuple[float, float]]) -> None:
    wins, losses = discordant(own)

    verdict = better(own, general)

    assert not verdict.ok or (wins > losses and sign_test(wins, losses) <= ALPHA)
    assert not better([(b, a) for a, b in own], general).ok or not verdict.ok  # both ways cannot be better


def test_the_sign_test_is_the_binomials_tail() -> None:
    assert sign_test(3, 0) == 0.125
    assert sign_test(4, 1) == pytest.approx(6 / 32)
    assert sign_test(0, 0) == 1.0


def test_texts_that_differ_by_a_hair_are_a_tie() -> None:
    assert discordant([(0.50, 0.51), (0.50, 0.49), (0.2, 0.9)]) == (1, 0)
