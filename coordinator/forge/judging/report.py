"""Two pages for people: the evidence of one release, and the report of one run of the whole loop.

Each is one self-contained HTML file: no scripts, nothing fetched, readable in light, dark and on paper. The pages add no claim: sentences
come from `claims`, verdicts from the gate, and where nothing got better the page says so first.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from coordinator.forge.judging import charts, claims, evidence
from coordinator.forge.judging.regressions import CHRF
from protocol.blobs import write_atomically

LABELS = {
    **claims.LABELS, "teacher": "teacher", "student_float": "student, float", "student": "student, GGUF", "previous": "previous release",
    "untrained": "untrained cut",
}  # fmt: skip
MEASURES = {"verdict right": "verdicts right", "chrF": "chrF of the sentence, mean", "kept": "what makes the category stands in the answer"}


def evidence_page(bundle: Mapping[str, Any]) -> str:
    """The HTML page for what `evidence.bundle` made."""
    tested = (bundle.get("regressions") or {}).get("rows", [])
    sets = {
        name: {**found, **_set_charts(name, found), "forests": _forests(name, [row for row in tested if row["set"] == name])}
        for name, found in bundle["sets"].items()
    }
    models = [(key, model) for found in bundle["sets"].values() for key, model in found["models"].items()]
    page = {**bundle, "sets": sets, "signatures": _signatures(model for _, model in models)}
    page["digests"] = list({(key, model["model_digest"]): None for key, model in models if model.get("model_digest")})
    page["digests"] += [
        (f"records of {name}", found["records"]["digest"]) for name, found in bundle["sets"].items() if found.get("records")
    ]
    page["digests"] += [("code", bundle["code_digest"])] if bundle.get("code_digest") else []
    return _environment().get_template("evidence.html").render(e=page)


def run_page(run: Mapping[str, Any]) -> str:
    """The HTML report of one run of the loop.

    Args:
        run: plain JSON values. Shares are in [0, 1]. Keys:

            seconds, seed, machine (dict of `evidence.machine` or text), commit, command, created (seconds since 1970)
            releases        [1, 2]: numbers in order
            improved        bool; verdict: the sentence that says what got better, or why nothing did
            teacher, student, student_float    figures as of `Evaluation.figures` (student_float may be missing)
            baselines       {name: {accuracy, accuracy_ci}}
            sites           {name: {before: S, after: S, paired: {diff, low, high, p}}} with
                            S = {accuracy, accuracy_ci, escalated, accuracy_with_escalation, accuracy_at_budget, latency_p50_ms, n}
                            and, for the plots, what `evidence.operating_point` or `evidence.live_curve` gives (optional)
            budget          the share behind accuracy_at_budget (optional)
            stages          [{name, seconds, cached}] in order
            gate            {release: bool, reasons: [sentence, ...]} (optional)
            evidence        bundle of the release (optional): its sentences, lineage and signatures are shown
            lineage         as `evidence.lineage_steps` takes it (where the evidence has none)
            not_tested      [sentence, ...];   dashboard_url (optional)
    """
    proof = run.get("evidence") or {}
    models = [(key, run[key]) for key in ("teacher", "student_float", "student") if run.get(key)]
    models += [
        (f"{LABELS.get(name, name)} (baseline)", figures) for name, figures in (run.get("baselines") or {}).items() if "accuracy" in figures
    ]
    found = {
        "models": charts.bars(
            [(LABELS.get(key, key), model["accuracy"], model.get("accuracy_ci"), key == "student") for key, model in models],
            unit="verdicts right, %", label="Verdicts right on the general held-out records, by model",
        ),
        "deferral": {name: chart for name, site in run["sites"].items() if (chart := _site_deferral(name, site))},
        "reliability": {name: chart for name, site in run["sites"].items() if (chart := _site_reliability(name, site))},
        "timeline": charts.timeline(run["stages"], label="Seconds by stage") if run.get("stages") else "",
    }  # fmt: skip
    return _environment().get_template("run.html").render(
        r={**run, "caution": _caution(run), "not_tested": run.get("not_tested") or proof.get("not_tested") or []},
        charts=found, models=models, lineage=proof.get("lineage") or evidence.lineage_steps(run.get("lineage") or ()),
        signatures=_signatures(model for _, model in models),
    )  # fmt: skip


def write_page(path: Path, html: str) -> None:
    """Write a page; it appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, html.encode())


def _caution(run: Mapping[str, Any]) -> str:
    """What a reader of an improved run should know before believing it; empty when the intervals carry it."""
    pairs = [site["paired"] for site in run["sites"].values() if site.get("paired")]
    if not run["improved"] or not pairs or any(pair["low"] > 0 for pair in pairs):
        return ""
    return "Better by the gate, which looks at the sites together; at no single site does the interval leave zero out."


def _set_charts(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    verdicts = any("accuracy" in model for model in found["models"].values())
    key = "accuracy" if verdicts else "chrf"
    rows: list[charts.Row] = [
        (LABELS.get(which, which), model[key], model[f"{key}_ci"], which == "student") for which, model in found["models"].items()
    ]
    rows += [
        (f"{LABELS.get(which, which)} (baseline)", base[key], base.get(f"{key}_ci"), False)
        for which, base in found["baselines"].items()
        if key in base
    ]
    result: dict[str, Any] = {
        "verdicts": verdicts,
        "bars": charts.bars(rows, unit="verdicts right, %" if verdicts else "chrF", label=f"{name}: quality by model", share=verdicts),
        "pareto": _sizes_chart(name, found, key),
    }
    if sure := found.get("confidence"):
        if sure.get("curve"):
            points = {"student": (sure["escalated"], sure["accuracy_with_escalation"])}
            result["deferral"] = charts.deferral(
                {"student": sure["curve"]}, points=points, unit="%" if verdicts else "mean sentence chrF", label=f"{name}: deferral curve"
            )
        result["reliability"] = charts.calibration({"student": sure["reliability"]}, label=f"{name}: reliability", target=sure["target"])
    return result


def _forests(name: str, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """A forest plot for each model compared with and each measure."""
    found = []
    for against, measure in dict.fromkeys((row["against"], row["measure"]) for row in rows):
        these = [row for row in rows if (row["against"], row["measure"]) == (against, measure)]
        scale = 1.0 if measure == CHRF else 100.0
        differences: list[charts.Difference] = [
            (f"{row['category']} ({row['n']})", scale * row["diff"], scale * row["low"], scale * row["high"], row["loss"]) for row in these
        ]
        other = LABELS.get(against, against)
        unit = f"student \N{MINUS SIGN} {other}, {'chrF' if measure == CHRF else 'points'}"
        label = f"{name}: {measure}, student against {other}, by category"
        found.append(
            {"title": f"Against {other}: {MEASURES.get(measure, measure)}", "chart": charts.forest(differences, unit=unit, label=label)}
        )
    return found


def _sizes_chart(name: str, found: Mapping[str, Any], key: str) -> str:
    """The size and quality of every file that was measured; empty for fewer than two."""
    sized: list[charts.Sized] = [
        (LABELS.get(which, which), model["file_mb"], model[key], model[f"{key}_ci"], which == "student")
        for which, model in found["models"].items()
        if model.get("file_mb") and which != evidence.UNTRAINED  # nobody would ship it
    ]
    unit = "verdicts right, %" if key == "accuracy" else "chrF"
    return charts.pareto(sized, unit=unit, label=f"{name}: size and quality", share=key == "accuracy") if len(sized) > 1 else ""


def _site_deferral(name: str, site: Mapping[str, Any]) -> str:
    curves = {when: site[when]["curve"] for when in ("before", "after") if site[when].get("curve")}
    points = {when: (site[when]["escalated"], site[when]["accuracy_with_escalation"]) for when in curves}
    return charts.deferral(curves, points=points, unit="%", label=f"{name}: verdicts right by share asked of the peer") if curves else ""


def _site_reliability(name: str, site: Mapping[str, Any]) -> str:
    groups = {when: site[when]["reliability"] for when in ("before", "after") if site[when].get("reliability")}
    target = next((site[when]["target"] for when in groups if site[when].get("target")), "verdict is right")
    return charts.calibration(groups, label=f"{name}: reliability", target=target) if groups else ""


def _signatures(models: Any) -> list[tuple[str, str]]:
    """Each metric's signature once."""
    found = {
        (metric, model[key]): None
        for model in models
        for metric, key in (("BLEU", "bleu_signature"), ("chrF", "chrf_signature"))
        if key in model
    }
    return list(found)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=jinja2.ChainableUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "percent": lambda value: _or_dash(value, lambda v: f"{100 * v:.1f}%"),
        "whole": lambda value: f"{100 * value:.0f}%",
        "span": lambda interval: f"[{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]",
        "signed": lambda value: f"{100 * value:+.1f}".replace("-", "\N{MINUS SIGN}"),
        "chance": lambda value: "< 0.001" if value < 0.001 else f"{value:.3f}",
        "decimal": lambda value: _or_dash(value, lambda v: f"{v:.1f}"),
        "thousandths": lambda value: _or_dash(value, lambda v: f"{v:.3f}"),
        "ms": lambda value: _or_dash(value, lambda v: f"{v:,.0f} ms"),
        "mb": lambda value: _or_dash(value or None, lambda v: f"{v:,.1f} MiB" if v < 100 else f"{v:,.0f} MiB"),
        "day": lambda seconds: time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds)),
        "duration": lambda seconds: f"{seconds / 60:.1f} minutes" if seconds >= 100 else f"{seconds:.0f} seconds",
        "label": lambda key: LABELS.get(key, key),
        "count": lambda value: _or_dash(value, lambda v: f"{v:,.0f}" if v >= 100 else f"{v:.3g}"),
        "inside": lambda row, measure: _inside(row, measure),
        "change": _change,
    }
    return environment


def _or_dash(value: Any, form: Any) -> str:
    missing = value is None or isinstance(value, jinja2.Undefined)
    return "\N{EN DASH}" if missing else form(value)


def _change(after: Any, before: Any) -> str:
    if any(value is None or isinstance(value, jinja2.Undefined) for value in (after, before)):
        return ""
    return f"{100 * (after - before):+.1f}".replace("-", "\N{MINUS SIGN}")


def _inside(row: Mapping[str, float], measure: str) -> str:
    """A value with its interval: "91.2 [88.0, 93.5]", shares in percent."""
    scale = 1.0 if measure == CHRF else 100.0
    return f"{scale * row['value']:.1f} [{scale * row['low']:.1f}, {scale * row['high']:.1f}]"
