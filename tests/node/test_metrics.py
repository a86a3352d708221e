"""The names of the figures keep Prometheus' rules, and the dashboard asks only for figures that a node really has."""

import re
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from protocol.ports import free_port
from tests.node.conftest import ROOT, settings

BASE_UNITS = ("seconds", "bytes", "joules", "ratio", "celsius", "volts")
OTHER_UNITS = {
    "s", "ms", "us", "sec", "milliseconds", "minutes", "hours", "days", "b", "kb", "mb", "gb", "kib", "mib", "kilobytes", "megabytes",
    "percent", "percentage", "wh", "kwh", "mj",
}  # fmt: skip
TYPES = {"gauge", "counter", "histogram", "summary"}
DASHBOARD = ROOT / "deploy" / "grafana" / "node.json"


@pytest.fixture
def whole(start: Any, tmp_path: Path) -> Any:
    """A node with every part that has figures."""
    away = {"broker__host": "127.0.0.1", "broker__port": free_port(), "topic__host": "127.0.0.1", "topic__port": free_port()}
    return start(settings(tmp_path, spool__enabled=True, peers__ask=("base",), peers__serve=True, **away))


def faults(name: str, kind: str, what: str) -> list[str]:
    """What is wrong with a metric's name, by the rules of `promtool check metrics` and ours."""
    words = name.split("_")
    unit = words[-1] if words[-1] != "total" else words[-2]
    return [
        fault
        for fault, found in (
            ("begins with milpa_node_", not name.startswith("milpa_node_")),
            ("is of small letters, digits and single underscores", not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name)),
            ("ends in _total when it counts", (kind == "counter") != (words[-1] == "total")),
            ("has no type in it", bool(TYPES & set(words))),
            ("has base units only", bool(OTHER_UNITS & set(words))),
            ("has its unit at the end", any(word in BASE_UNITS for word in words) and unit not in BASE_UNITS),
            ("says what it is", len(what) < 10),
        )
        if found
    ]


def test_every_figure_of_a_node_is_named_by_the_rules(whole: Any) -> None:
    named = [(f"{m.name}_total" if m.type == "counter" else m.name, m.type, m.documentation) for m in whole.metrics.registry.collect()]

    wrong = {name: found for name, kind, what in named if (found := faults(name, kind, what))}

    assert named and not wrong


@pytest.mark.parametrize(
    ("name", "kind", "rule"),
    [
        ("milpa_node_answer_ms", "gauge", "has base units only"),
        ("milpa_node_answers", "counter", "ends in _total when it counts"),
        ("milpa_node_seconds_waited", "gauge", "has its unit at the end"),
        ("node_ready", "gauge", "begins with milpa_node_"),
    ],
)
def test_the_rules_find_a_bad_name(name: str, kind: str, rule: str) -> None:
    assert faults(name, kind, "what this figure is") == [rule]


def test_every_figure_the_dashboard_asks_for_is_one_a_node_has(whole: Any) -> None:
    told = httpx.get(whole.server.url + "/metrics").text
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)", told, re.MULTILINE))
    there = {name + end for name, kind in kinds.items() for end in (("_bucket", "_sum", "_count") if kind == "histogram" else ("",))}
    dashboard = msgspec.json.decode(DASHBOARD.read_bytes())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries = [one["query"] for one in dashboard["templating"]["list"]]

    asked = {name for text in (*expressions, *queries) for name in re.findall(r"milpa_\w+", text)}

    assert len(expressions) > 20 and asked <= there, asked - there


def test_the_dashboard_asks_for_labels_a_node_has(whole: Any) -> None:
    labels = {name for metric in whole.metrics.registry._collector_to_names for name in getattr(metric, "_labelnames", ())}
    text = DASHBOARD.read_text()

    asked = {name for names in re.findall(r"by \(([a-z, ]+)\)", text) for name in names.split(", ")} - {"le"}

    assert asked <= labels | {"work"}


def test_panels_of_the_dashboard_do_not_overlap() -> None:
    places = [panel["gridPos"] for panel in msgspec.json.decode(DASHBOARD.read_bytes())["panels"]]
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]

    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
