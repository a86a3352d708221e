"""No sentence goes past its interval, and none is written anywhere else."""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from coordinator.forge.judging import claims
from coordinator.forge.judging.claims import CLOSE, Unsupported
from coordinator.forge.judging.regressions import ALPHA, CHRF, KEPT, Comparison, corrected
from protocol.errors import BadInput

ROOT = Path(__file__).parents[2]
ULP = 1e-6  # of a printed percent or point: what floating point may add
any_figure = st.floats(allow_nan=True, allow_infinity=True)
likely = st.floats(-2, 2)
figure = likely | any_figure
count = st.integers(-1, 5000) | any_figure


def numbers(text: str) -> list[float]:
    return [float(found) for found in re.findall(r"[-+]?\d+(?:\.\d+)?", text)]


def said(make: Callable[[], str]) -> str:
    """The sentence, or "" where the gate made none."""
    try:
        return make()
    except (BadInput, Unsupported):
        return ""


@given(figure, figure, figure, count, st.integers(1, 9))
@example(0.995, 0.99, 0.999, 2000, 1)
@example(0.8951, 0.89499, 0.89521, 100000, 1)  # no whole percent lies inside
@example(0.98999999999999, 0.98, 1.0, 10, 2)
@example(1.0, 0.97, 1.03, 10, 1)
@example(0.5, 0.6, 0.7, 10, 1)  # the estimate outside its own interval
@example(1.7e308, 1.7e308, 1.7e308, 10, 1)
def test_a_share_kept_is_never_more_than_its_interval(ratio: float, low: float, high: float, n: float, comparisons: int) -> None:
    sentence = said(lambda: claims.keeps({"ratio": ratio, "low": low, "high": high, "n": n}, "s", "accuracy", comparisons=comparisons))

    low, high = min(low, ratio), max(high, ratio)
    if close := re.search(r"keeps ([\d.]+)% of", sentence):
        assert (high - low) / 2 <= CLOSE
        assert 100 * low - ULP <= float(close[1]) <= 100 * ratio + ULP
    if span := re.search(r"keeps between ([\d.]+)% and ([\d.]+)% of", sentence):
        assert float(span[1]) <= 100 * low + ULP
        assert float(span[2]) >= 100 * high - ULP
    assert not sentence or close or span
    assert ("one of" in sentence) == (comparisons > 1 and bool(sentence))


@given(figure, figure, figure, count, figure | st.none(), st.sampled_from(["verdict", "text"]))
@example(0.1, 0.04, 0.2, 100, 0.051, "verdict")  # the interval passes, the correction does not
@example(0.1, 0.04, 0.2, 100, float("nan"), "verdict")
def test_better_and_worse_are_said_only_where_the_interval_and_the_correction_say_so(
    diff: float, low: float, high: float, n: float, p_holm: float | None, kind: str
) -> None:
    change = {"diff": diff, "low": low, "high": high, "n": n} | ({} if p_holm is None else {"p_holm": p_holm, "comparisons": 3.0})

    peer = said(lambda: claims.against_peer("peer", change, "s", kind))
    packed = said(lambda: claims.quantisation(change, "s", kind))

    apart = p_holm is None or p_holm < ALPHA
    assert ("the student is better" not in peer) or (low > 0 and apart)
    assert ("peer is better" not in peer) or (high < 0 and apart)
    assert ("changed the student" not in packed) or ((low > 0 or high < 0) and apart)
    if peer:
        scale = 100 if kind == "verdict" else 1
        _, bottom, top = numbers(peer.replace("95% interval", "").split(":", 1)[1])[:3]
        assert bottom <= scale * low + ULP * max(1, abs(scale * low))
        assert top >= scale * high - ULP * max(1, abs(scale * high))


@given(figure, figure, figure, figure, st.booleans())
@example(-0.1, -0.2, -0.05, float("nan"), True)
@example(-0.1, -0.2, 0.0, 0.01, True)
def test_a_loss_is_named_only_where_the_corrected_test_and_the_interval_carry_it(
    diff: float, low: float, high: float, p_holm: float, named: bool
) -> None:
    row = Comparison("s", "numbers", KEPT, "previous", 100, diff, low, high, 0.01, None, p_holm, 40, named)

    sentence = said(lambda: claims.loss(row))

    assert not sentence or (named and high < 0 and p_holm < ALPHA)


@given(figure, figure, figure, count)
@example(1.7e308, 1.7e308, 1.7e308, 10)
def test_a_share_of_cost_is_its_interval(ratio: float, low: float, high: float, n: float) -> None:
    sentence = said(lambda: claims.cost({"ratio": ratio, "low": low, "high": high, "n": n}, "s", assumption="x"))

    if sentence:
        bottom, top = numbers(sentence)[:2]
        assert bottom <= 100 * min(low, ratio) + ULP * max(1, abs(100 * low))
        assert top >= 100 * max(high, ratio) - ULP * max(1, abs(100 * high))


@given(figure, figure, figure, figure, figure, figure)
def test_a_baseline_is_never_called_worse_than_its_interval(a: float, b: float, c: float, d: float, e: float, f: float) -> None:
    baseline, student = {"accuracy": a, "accuracy_ci": [b, c]}, {"accuracy": d, "accuracy_ci": [e, f]}

    sentence = said(lambda: claims.against("trees", baseline, student, "s"))

    assert ("is better" not in sentence) or min(a, b) > max(d, f)
    if not sentence and all(abs(value) < 2 for value in (a, b, c, d, e, f)) and b <= c and e <= f:
        assert max(a, c) < min(d, e)  # silent only where the student is clearly ahead


def test_where_only_a_range_is_carried_a_strict_caller_is_refused() -> None:
    wide = {"ratio": 0.9, "low": 0.8, "high": 1.0, "n": 60.0}

    with pytest.raises(Unsupported, match=r"keeps between 80% and 100% of the teacher's accuracy.*60 records allow no closer"):
        claims.keeps(wide, "s", "accuracy", strict=True)


@pytest.mark.parametrize(
    "figures",
    [(float("nan"), 0.8, 0.9, 10), (0.85, 0.9, 0.8, 10), (0.85, 0.8, 0.9, 0), (0.85, 0.8, float("inf"), 10), (-0.1, -0.2, 0.0, 10)],
)
def test_figures_that_cannot_be_make_no_sentence(figures: tuple[float, ...]) -> None:
    with pytest.raises(BadInput, match="no sentence is made from it"):
        claims.keeps(dict(zip(("ratio", "low", "high", "n"), figures, strict=True)), "s", "accuracy")


def test_a_share_is_rounded_down() -> None:
    assert "keeps 98% of" in claims.keeps({"ratio": 0.9899, "low": 0.979, "high": 0.998, "n": 2000.0}, "s", "x")


def test_among_several_the_number_of_them_is_told() -> None:
    found = claims.against_peer("p", {"diff": 2.0, "low": 1.0, "high": 3.0, "n": 200, "p_holm": 0.0121, "comparisons": 6.0}, "s", "text")

    assert found == (
        "s: the student is better than p: +2.0 chrF (95% interval +1.0 chrF to +3.0 chrF, paired, n = 200; "
        "p 0.013 after Holm over 6 comparisons)."
    )


def test_a_gain_on_one_set_is_told_with_what_the_other_sets_say() -> None:
    gain, none = {"diff": 8.0, "low": 7.0, "high": 9.0, "n": 2000}, {"diff": -3.0, "low": -4.0, "high": -2.0, "n": 997}

    assert claims.elsewhere("apertium", {"tatoeba": gain, "ntrex": none}, "text") == (
        "The gain over apertium at tatoeba is not found everywhere: ntrex -3.0 chrF (95% interval -4.0 chrF to -2.0 chrF, paired, n = 997)."
    )
    assert claims.elsewhere("apertium", {"tatoeba": gain, "ntrex": gain}, "text") == ""
    assert claims.elsewhere("apertium", {"ntrex": none}, "text") == ""


def row(**changes: object) -> Comparison:
    made = Comparison("general", "numbers", KEPT, "previous", 300, -0.1, -0.14, -0.06, 0.0001, 0.03)
    return msgspec.structs.replace(made, **changes)


def test_a_named_loss_says_where_how_much_and_among_how_many() -> None:
    found = claims.losses(corrected([row(), row(category="plain", p=0.5, low=-0.2, high=0.1)]))

    assert found == [
        "general, numbers: kept is worse than with the previous release: -10.0 points (95% interval -14.0 points to -6.0 points, "
        "paired, n = 300; p < 0.001 after Holm's correction over 2 tests)."
    ]


def test_no_loss_found_says_what_could_hide() -> None:
    rows = corrected([row(p=0.4, high=0.1), row(category="plain", measure=CHRF, p=0.6, high=0.1, detectable=1.25)])

    assert claims.losses(rows) == [
        "No loss by category found against the previous release: 2 of 2 tests, Holm's correction. "
        "The bluntest of them (general, numbers, kept, n = 300) misses one of 3.0 points in 2 of 10 runs."
    ]


# ------------------------------------------------------------------------------------- the gate is the only place that says such things
SENTENCES = re.compile(
    r"\b(?:keeps?|retains?|preserves?|retained|conserva)\b[^.;]{0,40}(?:%|percent|\{\})[^.;]{0,20}\bof\b"
    r"|\b(?:better|worse|faster|cheaper|smaller) than\b|\bas (?:good|fast|small) as\b|\b(?:mejor|peor) que\b"
    r"|\b(?:matches|equals|on par with|indistinguishable from) the (?:teacher|student|release)\b"
    r"|\bno (?:loss|difference)(?: in \w+)? found\b|\bnothing measurable\b|\d ?[x×] (?:faster|smaller|cheaper)",
    re.IGNORECASE,
)
MAY = {
    "coordinator/forge/judging/claims.py",  # the gate
}


def texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every string of a module that is no docstring, the fields of an f-string as {}."""
    skip = set()
    for part in ast.walk(tree):
        if isinstance(part, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and part.body:
            first = part.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                skip.add(id(first.value))
        if isinstance(part, ast.JoinedStr):
            skip |= {id(value) for value in part.values}
            yield part.lineno, "".join(str(value.value) if isinstance(value, ast.Constant) else "{}" for value in part.values)
    for part in ast.walk(tree):
        if isinstance(part, ast.Constant) and isinstance(part.value, str) and id(part) not in skip:
            yield part.lineno, part.value


def strays() -> list[str]:
    found = []
    for path in sorted(path for side in ("coordinator", "deploy", "node", "protocol", "bench") for path in (ROOT / side).rglob("*.*")):
        name = path.relative_to(ROOT).as_posix()
        if name in MAY or path.suffix not in (".py", ".html"):
            continue
        text = path.read_text(encoding="utf-8")
        strings = texts(ast.parse(text)) if path.suffix == ".py" else enumerate(text.splitlines(), start=1)
        found += [f"{name}:{line}: {string.strip()[:100]}" for line, string in strings if SENTENCES.search(string)]
    return found


def test_no_other_module_and_no_template_writes_such_a_sentence() -> None:
    assert not strays(), "say it through coordinator/forge/judging/claims.py, which looks at the interval first"


@pytest.mark.parametrize(
    "text",
    [
        'say = f"the student retains {share:.0%} of the teacher"',
        'say = "keeps 99% of the quality"',
        'say = "it is 40x faster"',
        'say = f"{a} is better than {b}"',
        'say = "no loss found"',
    ],
)
def test_the_search_would_find_one(text: str) -> None:
    assert any(SENTENCES.search(string) for _, string in texts(ast.parse(text)))
