"""The pages: whole, quiet, readable, and never better than the figures."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coordinator.forge.judging import evidence, report
from coordinator.forge.judging.calibrate import fit
from coordinator.forge.judging.evaluation import evaluate_texts, paired_bootstrap
from protocol.tasks import Record
from tests.evaluation.conftest import SPANISH, simulated


def run_of(*, improved: bool = True, seed: int = 0, gain: float = 0.15) -> dict[str, Any]:
    """A run as the demo fills it, from simulated models."""
    teacher, student = simulated(200, accuracy=0.95, seed=seed + 1), simulated(200, accuracy=0.6, seed=seed + 2)
    better = simulated(200, accuracy=0.6 + gain, seed=seed + 3)
    made = fit(simulated(200, accuracy=0.6, seed=seed + 4))
    sides = {
        when: evidence.operating_point(model, teacher, made) | model.figures() for when, model in (("before", student), ("after", better))
    }
    return {
        "seconds": 700.0, "seed": seed, "machine": {"cpu": "a CPU", "cores": 2, "system": "Linux", "python": "3.11"}, "commit": "c0ffee",
        "releases": [1, 2], "improved": improved, "verdict": "Release 2 is better at <esteli>.", "budget": 0.25,
        "teacher": teacher.figures(), "student": student.figures(), "student_float": None,
        "baselines": {"trees_note": {"accuracy": 0.7, "accuracy_ci": [0.63, 0.76], "n": 200}},
        "sites": {"esteli": {**sides, "paired": paired_bootstrap(student, better, seed=1)}},
        "stages": [{"name": "distil", "seconds": 190.0, "cached": False}, {"name": "trim", "seconds": 0.2, "cached": True}],
        "gate": {"release": improved, "reasons": ["general: not worse"]}, "not_tested": ["A link slower than this machine's."],
        "lineage": {"base_digest": "ab" * 32, "licence": {"name": "a licence"}},
        "evidence": evidence.bundle(
            release=2, task="ranch", sets={"general": {"teacher": teacher, "student": student}}, seed=1, command="x"
        ),
    }  # fmt: skip


def text_of(html: str) -> str:
    """What a reader sees, in one line."""
    return " ".join(re.sub(r"<(style|svg).*?</\1>|<[^>]+>", " ", html, flags=re.DOTALL).split())


@pytest.fixture(scope="module")
def page() -> str:
    return report.run_page(run_of())


@pytest.fixture(scope="module")
def evidence_page() -> str:
    teacher, student = simulated(200, accuracy=0.95, seed=1), simulated(200, accuracy=0.6, seed=2)
    sets = {"general": {"teacher": teacher, "student": student, "<b>peer</b>": student}}
    bundle = evidence.bundle(release=4, task="ranch", sets=sets, seed=1, command="milpa-fleet demo", calibration=fit(student), created=1)
    return report.evidence_page(bundle)


def test_a_page_needs_nothing_but_itself(page: str, evidence_page: str) -> None:
    for html in (page, evidence_page):
        assert "<script" not in html
        assert not re.findall(r"""(?:src|href)=["'](?!#)(?!http://127)[^"']""", re.sub(r'xlink:href="#[^"]*"', "", html))
        assert "@import" not in html
        assert "url(http" not in html


def test_the_report_shows_the_runs_figures(page: str) -> None:
    run, seen = run_of(), text_of(page)

    for when in ("before", "after"):
        side = run["sites"]["esteli"][when]
        for key in ("accuracy", "escalated", "accuracy_with_escalation", "accuracy_at_budget"):
            assert f"{100 * side[key]:.1f}%" in seen
    assert f"{run['teacher']['chrf']:.1f}" in seen
    assert run["teacher"]["chrf_signature"] in seen
    assert "boosted trees on figures and note (baseline)" in seen
    assert "A link slower" in seen


def test_another_run_gives_another_report(page: str) -> None:
    assert text_of(report.run_page(run_of(seed=50))) != text_of(page)


def test_the_verdict_is_the_headline_and_text_stays_text(page: str) -> None:
    assert "<h1>Release 2 is better at &lt;esteli&gt;.</h1>" in page


def test_when_nothing_got_better_the_report_says_so_first() -> None:
    html = report.run_page(run_of(improved=False, gain=0.0) | {"verdict": "Esteli lost 3 points.", "releases": [1]})

    assert "<h1>Nothing got better in this run.</h1>" in html
    assert "Esteli lost 3 points." in html
    assert "Why release 1 stayed" in html
    assert "Better by the gate" not in html


def test_an_improvement_that_no_sites_interval_carries_is_said_to_be_so() -> None:
    run = run_of(gain=0.0)
    run["sites"]["esteli"]["paired"] |= {"low": -0.02, "high": 0.09}

    assert "at no single site does the interval leave zero out" in text_of(report.run_page(run))
    assert "at no single site" not in text_of(report.run_page(run_of(gain=0.3)))


def test_a_run_with_the_least_it_may_have_still_makes_a_page() -> None:
    run = run_of()
    side = {key: run["sites"]["esteli"]["before"][key] for key in ("accuracy", "accuracy_ci", "escalated", "latency_p50_ms")}
    least = {key: run[key] for key in ("seconds", "seed", "releases", "improved", "verdict", "teacher", "student")}

    html = report.run_page(least | {"sites": {"esteli": {"before": side, "after": side}}})

    assert "esteli" in text_of(html)


def test_the_evidence_page_holds_sentences_figures_and_what_was_not_tested(evidence_page: str) -> None:
    seen = text_of(evidence_page)

    assert "the student keeps between" in seen
    assert "no difference found between the student and &lt;b&gt;peer&lt;/b&gt;" in seen
    assert "Raspberry Pi" in seen
    assert "milpa-fleet demo" in seen


def luminance(colour: str) -> float:
    """Relative luminance of "#rrggbb" (WCAG 2.1)."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_text_has_enough_contrast_in_light_and_dark(page: str) -> None:
    themes = [dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block)) for block in re.findall(r":root \{(.*?)\}", page, flags=re.DOTALL)]

    assert len(themes) == 2
    for theme in themes:
        for name in ("ink", "muted", "accent", "amber", "red"):
            low, high = sorted((luminance(theme["page"]), luminance(theme[name])))
            assert (high + 0.05) / (low + 0.05) >= 4.5, f"{name} on {theme['page']}"


def test_charts_take_their_colours_from_the_page(page: str) -> None:
    charts = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))

    assert "var(--accent)" in charts
    assert set(re.findall(r"#[0-9a-fA-F]{6}\b", charts)) <= {"#000000"}  # matplotlib's own default, on shapes that are not filled


def test_a_page_is_written_whole(tmp_path: Path) -> None:
    report.write_page(tmp_path / "runs" / "report.html", "<!doctype html>")

    assert [file.name for file in (tmp_path / "runs").iterdir()] == ["report.html"]


@pytest.fixture
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield found
        found.close()


@pytest.mark.browser
@pytest.mark.skipif(shutil.which("chromium") is None and not os.environ.get("CI"), reason="sudo apt-get install chromium")
@pytest.mark.parametrize("width", [390, 1200])
def test_a_page_fits_the_screen_in_both_colours(width: int, page: str, evidence_page: str, tmp_path: Path, browser: Any) -> None:
    backgrounds = set()
    for name, html in (("run", page), ("evidence", evidence_page)):
        (tmp_path / f"{name}.html").write_text(html, encoding="utf-8")
        for scheme in ("light", "dark"):
            tab = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 800})
            problems: list[str] = []
            tab.on("console", lambda message, problems=problems: problems.append(message.text))
            tab.on("request", lambda request, problems=problems: None if request.url.startswith("file:") else problems.append(request.url))
            tab.goto(f"file://{tmp_path}/{name}.html")

            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            assert tab.locator("svg").count() >= 2
            assert not problems
            backgrounds.add(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
            tab.close()
    assert len(backgrounds) == 2


def test_a_translation_release_is_judged_by_chrf() -> None:
    records = [Record(id=str(i), task=SPANISH.name, source="x", target="el gato duerme en la casa", lang="es") for i in range(30)]
    teacher = evaluate_texts(["el gato duerme en la casa"] * 30, records, SPANISH, name="teacher")
    student = evaluate_texts(["el gato duerme en casa"] * 30, records, SPANISH, name="student")
    sets = {"tatoeba": {"teacher": teacher, "student": student, "apertium eng-spa": student}}

    html = report.evidence_page(evidence.bundle(release=1, task=SPANISH.name, sets=sets, seed=1, command="x"))

    assert "mean sentence chrF" in text_of(html)
    assert "verdict right" not in text_of(html)
    assert f"{student.figures()['chrf']:.1f}" in text_of(html)
