"""What is read from the logits of one position."""

import numpy as np
import pytest

from protocol.errors import DoesNotFit
from protocol.models.logits import drawn, figures, greedy, likeliest

LOGITS = np.array([1.0, 3.0, 2.0, -4.0], dtype=np.float32)
EXACT = LOGITS.astype(np.float64) - np.log(np.exp(LOGITS.astype(np.float64)).sum())
SOME = np.array([0, 3], dtype=np.int32)


def test_figures_are_those_of_the_softmax() -> None:
    sure = figures(LOGITS, 1)

    assert np.allclose([sure.logprob, sure.margin, sure.entropy], [EXACT[1], 1.0, -(np.exp(EXACT) * EXACT).sum()], atol=1e-6)


def test_a_token_that_was_not_the_best_has_its_own_probability_and_a_margin_below_zero() -> None:
    sure = figures(LOGITS, 3)

    assert np.allclose([sure.logprob, sure.margin], [EXACT[3], -7.0], atol=1e-6)


def test_the_likeliest_of_the_allowed_is_taken() -> None:
    assert (greedy(LOGITS, None), greedy(LOGITS, SOME)) == (1, 0)


def test_the_likeliest_are_told_best_first() -> None:
    assert [token for token, _ in likeliest(LOGITS, 3)] == [1, 2, 0]
    assert np.allclose([logprob for _, logprob in likeliest(LOGITS, 9)], sorted(EXACT, reverse=True), atol=1e-6)


def test_draws_follow_the_probabilities_at_the_temperature() -> None:
    uniform = (np.arange(10_000) + 0.5) / 10_000
    found = np.bincount([drawn(LOGITS, None, temperature=2.0, uniform=float(value)) for value in uniform], minlength=4) / 10_000
    wanted = np.exp(LOGITS / 2) / np.exp(LOGITS / 2).sum()

    assert np.allclose(found, wanted, atol=1e-3)


def test_draws_keep_to_the_allowed() -> None:
    assert {drawn(LOGITS, SOME, temperature=1.0, uniform=value) for value in (0.0, 0.5, 0.999999)} == {0, 3}


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_figures_that_are_not_finite_are_told(broken: float) -> None:
    with pytest.raises(DoesNotFit, match="not finite"):
        figures(np.array([1.0, broken, 0.0], dtype=np.float32), 1)
