"""The doctor on batteries and learning."""

from pathlib import Path
from typing import Any

import pytest

from node.doctor import upkeep
from tests.node.conftest import settings

SOLAR = {"power__source": "solar", "power__longitude": -86.35, "power__latitude": 13.1}


def power(folder: Path, running: dict[str, Any] | None = None, **flags: Any) -> Any:
    return upkeep.power(settings(folder, **flags), running=running or {})


def test_the_mains_are_nothing_to_look_at(tmp_path: Path) -> None:
    assert power(tmp_path) == []


def test_a_battery_that_says_nothing_must_be_seen_to(tmp_path: Path) -> None:
    (found,) = power(tmp_path, **SOLAR, power__battery=str(tmp_path / "BAT0"))

    assert found.state == "bad" and "BAT0" in found.found and "answers go on" in found.advice


def test_a_battery_too_small_for_its_dark_days_is_named_with_what_to_do(tmp_path: Path) -> None:
    (found,) = power(tmp_path, **SOLAR, power__battery_wh=60.0)

    assert found.state == "warn" and "1.0 dark days" in found.found and "fit about 150 Wh" in found.advice


def test_a_panel_nobody_measures_is_worth_a_word(tmp_path: Path) -> None:
    (found,) = power(tmp_path, {"power": {"charge": 0.62}}, **SOLAR)

    assert found.state == "warn" and "62% by the model" in found.found and "power.battery" in found.advice


@pytest.mark.parametrize(("longitude", "state"), [(-86.35, "good"), (0.0, "warn")])
def test_a_measured_battery_is_good_where_noon_is_known(tmp_path: Path, longitude: float, state: str) -> None:
    (tmp_path / "charge").write_text("71")

    (found,) = power(tmp_path, **{**SOLAR, "power__longitude": longitude}, power__battery=str(tmp_path / "charge"))

    assert (found.state, "71% by" in found.found) == (state, True)


def test_a_training_that_failed_is_told_with_its_reason(tmp_path: Path) -> None:
    (found,) = upkeep.learning(settings(tmp_path), running={"learn": {"failure": "memory: 900 MiB needed"}})

    assert (found.state, found.found) == ("warn", "memory: 900 MiB needed")


def test_a_node_without_torch_answers_and_does_not_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    (found,) = upkeep.learning(settings(tmp_path), running={})

    assert found.state == "warn" and "does not learn" in found.found and "install-node.sh again with --train" in found.advice
    assert upkeep.learning(settings(tmp_path, learn__auto=False), running={}) == []


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"power__idle_w": 5.0, "power__busy_w": 4.0}, "power.busy_w"),
        ({"power__curve": [0.0, 1.0]}, "power.curve"),
        ({"power__curve": [2.0] * 24}, r"power.curve\[0\]"),
        ({"power__latitude": 100.0}, "power.latitude"),
        ({"learn__sync_hours": [25.0]}, "learn.sync_hours"),
    ],
)
def test_power_and_learning_settings_that_cannot_be_are_named(tmp_path: Path, flags: dict[str, Any], says: str) -> None:
    from protocol.errors import BadInput

    with pytest.raises(BadInput, match=says):
        settings(tmp_path, **flags)
