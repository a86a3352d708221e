"""How sure a model is, and what follows from it."""

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.confidence import (
    ABOVE_ALL,
    FEATURES,
    LOGPROB_FLOOR,
    Calibration,
    features,
    interpolate,
    judge,
    quantile,
    verdict_tokens,
)
from protocol.models.engine import Generation

# by hand: " leak" ":" " pump" " wet" and the end token
SPOKEN = Generation(
    text=" leak: pump wet",
    tokens=(1, 2, 3, 4, 5),
    logprobs=(-0.2, -0.1, -1.0, -0.5, 0.0),
    margins=(2.5, 3.0, 0.1, 0.7, 9.0),
    entropies=(0.4, 0.2, 1.5, 0.9, 0.0),
    pieces=(" leak", ":", " pump", " wet", ""),
    prompt_tokens=7,
    seconds=0.1,
    stopped="end",
)


def calibration(**changes: object) -> Calibration:
    """Score = the verdict's log-probability; probability rises from 0.2 at -2 to 0.9 at 0."""
    weights = tuple(1.0 if name == "verdict_sum" else 0.0 for name in FEATURES)
    made = Calibration(
        task="ranch", model_digest="m", adapter_digest="", means=(0.0,) * len(FEATURES), scales=(1.0,) * len(FEATURES), weights=weights,
        bias=0.0, points=((-2.0, 0.2), (0.0, 0.9)), quantiles=(0.2, 0.4, 0.6, 0.8, 0.9), count=100, right=60, method="single",
    )  # fmt: skip
    return msgspec.structs.replace(made, **changes)


def test_signals_of_a_verdict_are_those_of_its_own_tokens() -> None:
    found = dict(zip(FEATURES, features(SPOKEN), strict=True))

    assert found["in_form"] == 1.0
    assert found["verdict_sum"] == pytest.approx(-0.2)
    assert found["verdict_min"] == pytest.approx(-0.2)
    assert found["first_margin"] == 2.5
    assert found["verdict_entropy"] == pytest.approx(0.4)
    assert found["mean"] == pytest.approx(-0.36)
    assert found["lowest"] == -1.0
    assert found["tenth"] == pytest.approx(-0.8)  # 0.4 of the way from -1.0 to -0.5
    assert found["length"] == 5.0


@pytest.mark.parametrize(
    ("pieces", "count"),
    [
        ((" dry", "-run", ":", " x", ""), 3 - 1),
        ((" leak:", " x"), 1),  # the colon in the code's own token: that token counts
        ((" The", " cat", ":", " x"), 0),  # not of a code's form
        ((" leak", " x"), 0),  # no colon
        ((":", " x"), 0),
        ((), 0),
    ],
)
def test_the_verdict_is_what_stands_before_the_colon(pieces: tuple[str, ...], count: int) -> None:
    assert verdict_tokens(pieces) == count


def test_free_text_is_judged_as_a_whole() -> None:
    text = msgspec.structs.replace(SPOKEN, pieces=(" el", " gato", " duerme", " hoy", ""))

    found = dict(zip(FEATURES, features(text), strict=True))

    assert found["in_form"] == 0.0
    assert found["verdict_sum"] == pytest.approx(-1.8)


def test_figures_that_are_not_numbers_count_as_no_confidence() -> None:
    broken = msgspec.structs.replace(SPOKEN, logprobs=(math.nan, -math.inf, 0.0, 0.0, 0.0), entropies=(math.nan, 0.0, 0.0, 0.0, 0.0))

    found = features(broken)

    assert all(math.isfinite(value) for value in found)
    assert found[FEATURES.index("verdict_sum")] == LOGPROB_FLOOR


def test_no_answer_is_not_a_confident_answer() -> None:
    with pytest.raises(ValueError, match="without tokens"):
        features(msgspec.structs.replace(SPOKEN, logprobs=(), pieces=()))


def test_without_a_calibration_the_verdicts_probability_decides_and_the_reason_says_so() -> None:
    judgement = judge(features(SPOKEN), calibration=None, threshold=0.9)

    assert not judgement.keep
    assert judgement.confidence == pytest.approx(math.exp(-0.2))
    assert judgement.reason == "verdict probability 0.82 below 0.90 (not calibrated)"


def test_with_a_calibration_the_budget_sets_the_threshold() -> None:
    unsure = msgspec.structs.replace(SPOKEN, logprobs=(-2.0, -0.1, 0.0, 0.0, 0.0))

    judgement = judge(features(unsure), calibration=calibration(), threshold=None, budget=0.25)

    assert not judgement.keep
    assert judgement.reason == "probability of a right verdict 0.20 below 0.40 (budget 25%)"
    assert judge(features(SPOKEN), calibration=calibration(), threshold=None, budget=0.25).keep


def test_a_broken_answer_never_stands() -> None:
    judgement = judge(features(SPOKEN), calibration=calibration(), threshold=0.0, in_form=False)

    assert not judgement.keep
    assert judgement.confidence == 0.0


def test_a_verdict_calibration_gives_free_text_no_confidence() -> None:
    text = msgspec.structs.replace(SPOKEN, pieces=(" el", " gato", " duerme", " hoy", ""))

    assert calibration().confidence(features(text)) == 0.0


def test_budgets_at_the_ends_ask_nothing_and_everything() -> None:
    made = calibration()

    assert made.threshold(0.0) == 0.0
    assert made.threshold(1.0) == ABOVE_ALL
    assert made.threshold(0.5) == pytest.approx(0.6)
    with pytest.raises(ValueError, match=r"1\.5"):
        made.threshold(1.5)


def test_a_calibration_holds_for_one_model_and_adapter_only() -> None:
    made = calibration()

    assert made.fits("m", "")
    assert not made.fits("m", "a")
    assert not made.fits("other", "")


def test_a_calibration_survives_its_file() -> None:
    made = calibration()

    assert msgspec.json.decode(msgspec.json.encode(made), type=Calibration) == made


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"names": ["other"]}, "other signals"),
        ({"scales": [0.0] * len(FEATURES)}, "above 0"),
        ({"weights": [1.0]}, "means, scales and weights"),
        ({"points": []}, "isotonic point"),
        ({"points": [[0.0, 0.9], [1.0, 0.2]]}, "must rise"),
    ],
)
def test_a_calibration_that_cannot_be_used_is_refused_when_read(change: dict[str, object], told: str) -> None:
    data = msgspec.json.encode(msgspec.to_builtins(calibration()) | change)

    with pytest.raises(msgspec.ValidationError, match=told):
        msgspec.json.decode(data, type=Calibration)


@given(st.floats(-20, 20), st.floats(-20, 20))
def test_a_higher_score_is_never_less_confident(one: float, other: float) -> None:
    made = calibration()
    low, high = (tuple(score if name == "verdict_sum" else 1.0 for name in FEATURES) for score in sorted((one, other)))

    assert 0.0 <= made.confidence(low) <= made.confidence(high) <= 1.0


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.floats(0, 1))
def test_a_quantile_lies_among_the_values(values: list[float], share: float) -> None:
    assert min(values) <= quantile(values, share) <= max(values)
    assert (quantile(values, 0.0), quantile(values, 1.0)) == (min(values), max(values))


def test_interpolation_is_flat_outside_its_points() -> None:
    points = ((0.0, 1.0), (2.0, 3.0))

    assert [interpolate(x, points) for x in (-1.0, 0.0, 1.0, 2.0, 9.0)] == [1.0, 1.0, 2.0, 3.0, 3.0]
