"""How sure a model is, and what follows from it."""

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.confidence import (
    ABOVE_ALL,
    CALIBRATION_LIMIT,
    FEATURES,
    FIRST_FEATURES,
    LOGPROB_FLOOR,
    VERSION,
    Agreed,
    Calibration,
    Tree,
    agreement,
    confidence,
    features,
    interpolate,
    judge,
    log_odds,
    logistic,
    quantile,
    repetition,
    verdict_tokens,
)
from protocol.models.generation import Generation
from protocol.tasks import RANCH, translation

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
        names=FEATURES, version=VERSION,
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


def test_signals_of_the_whole_answer_are_quantiles_margins_and_ratios() -> None:
    found = dict(zip(FEATURES, features(SPOKEN), strict=True))

    assert found["quarter"] == pytest.approx(-0.5)
    assert found["median"] == pytest.approx(-0.2)
    assert found["margin_mean"] == pytest.approx(15.3 / 5)
    assert found["margin_min"] == 0.1
    assert found["verdict_margin"] == 2.5  # of the verdict's own tokens
    assert found["entropy_mean"] == pytest.approx(0.6)
    assert found["entropy_max"] == 1.5
    assert found["repetition"] == 0.0
    assert found["length_ratio"] == pytest.approx(math.log(5 / 7))
    assert found["probability"] == pytest.approx(sum(map(math.exp, SPOKEN.logprobs)) / 5)
    assert found["probability_margin"] == pytest.approx(
        sum(math.exp(p) * (1 - math.exp(-m)) for p, m in zip(SPOKEN.logprobs, SPOKEN.margins, strict=True)) / 5
    )
    assert found["later"] == pytest.approx(-0.5)  # " pump" " wet" and the end
    assert found["spread"] == pytest.approx(math.sqrt((0.16**2 + 0.26**2 + 0.64**2 + 0.14**2 + 0.36**2) / 5))
    assert found["word"] == pytest.approx(-0.6)  # three words
    assert found["tokens_per_character"] == pytest.approx(5 / 15)


@pytest.mark.parametrize(("tokens", "share"), [((7,), 0.0), ((1, 2, 3), 0.0), ((1, 1, 1, 1), 2 / 3), ((1, 2, 1, 2, 1), 0.5), ((), 0.0)])
def test_repetition_is_the_share_of_pairs_that_stood_there_before(tokens: tuple[int, ...], share: float) -> None:
    assert repetition(tokens) == pytest.approx(share)


def test_samples_agree_by_verdict_or_by_likeness() -> None:
    verdicts = agreement(" leak: pump wet", [" leak: the pump", " dry-run: no water", " babble", " leak:"], RANCH)
    texts = agreement(" el gato duerme", [" el gato duerme", " xyz"], translation("English", "Spanish"))

    assert verdicts == 0.5
    assert texts == pytest.approx(0.5)


def test_a_broken_answer_agrees_with_nothing() -> None:
    assert agreement(" babble", [" babble", " babble"], RANCH) == 0.0
    with pytest.raises(ValueError, match="at least one sample"):
        agreement(" leak: x", [], RANCH)


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
        ({"names": ["other"]}, "signals unknown here"),
        ({"version": 3}, "update it"),
        ({"trees": [[[0], [1.0], [1.0]]]}, "splits and values"),
        ({"trees": [[[0, 0], [1.0, 1.0], [1.0, 2.0, 3.0]]]}, "power of two"),
        ({"trees": [[[99], [1.0], [1.0, 2.0]]]}, "does not name"),
        ({"trees": [[[], [], [1.0]]] * 201}, "limit"),
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


def test_a_file_of_version_1_is_read_as_what_it_was() -> None:
    """Nine signals, no version: the signals are found by name among today's."""
    weights = [1.0 if name == "mean" else 0.0 for name in FIRST_FEATURES]
    old = {
        "task": "ranch", "model_digest": "m", "adapter_digest": "", "means": [0.0] * 9, "scales": [1.0] * 9, "weights": weights,
        "bias": 0.0, "points": [[-1.0, 0.0], [0.0, 1.0]], "quantiles": [0.0, 1.0], "count": 50, "right": 25, "method": "logistic",
        "target": "verdict is right", "names": list(FIRST_FEATURES),
    }  # fmt: skip

    read = msgspec.json.decode(msgspec.json.encode(old), type=Calibration)

    assert read.score(features(SPOKEN)) == pytest.approx(-0.36)


def test_a_tree_goes_up_where_the_signal_is_above_its_split() -> None:
    tree = Tree(signals=(0, 1, 1), at=(0.5, 10.0, 20.0), values=(1.0, 2.0, 3.0, 4.0))

    assert [tree.value(values) for values in ((0.5, 10.0), (0.0, 11.0), (1.0, 20.0), (1.0, 21.0))] == [1.0, 2.0, 3.0, 4.0]


def test_trees_add_to_the_linear_score() -> None:
    place = FEATURES.index("length")
    made = calibration(trees=(Tree((place,), (4.0,), (-1.0, 0.5)),))

    assert made.score(features(SPOKEN)) == pytest.approx(-0.2 + 0.5)


def test_agreement_moves_the_probability_only_where_it_was_fitted() -> None:
    fitted = calibration(agreed=Agreed(samples=3, temperature=0.7, bias=-1.0, slope=1.0, weight=2.0))
    values = features(SPOKEN)
    plain = fitted.confidence(values)

    assert fitted.confidence(values, agreement=1.0) == pytest.approx(logistic(log_odds(plain) + 1.0))
    assert fitted.confidence(values, agreement=0.0) < plain
    assert calibration().confidence(values, agreement=0.0) == plain


def test_confidence_of_a_broken_answer_is_nothing() -> None:
    assert confidence(features(SPOKEN), calibration(), in_form=False) == 0.0


def test_a_judgement_below_the_threshold_is_asked() -> None:
    assert judge(features(SPOKEN), calibration=None, threshold=0.9).ask
    assert not judge(features(SPOKEN), calibration=None, threshold=0.1).ask


def test_the_largest_calibration_fits_its_file() -> None:
    tree = Tree((23, 23, 23), (-1.23456e-5,) * 3, (-1.23456e-5,) * 4)
    points = tuple((-1.23456 + step / 300, step / 300) for step in range(300))
    made = calibration(trees=(tree,) * 200, points=points, quantiles=tuple(step / 100 for step in range(101)))

    assert len(msgspec.json.encode(made)) < CALIBRATION_LIMIT
