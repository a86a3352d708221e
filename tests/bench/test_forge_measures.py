"""The measures of training speed run from end to end on tiny models; their figures mean nothing there."""

import pytest

from bench import forge_step, forge_time_to_quality, forge_with_capture
from bench.forge import TABLE
from bench.naive import padded
from bench.settings import Settings
from protocol.models.tokenizer import Example

pytestmark = [pytest.mark.torch, pytest.mark.llama, pytest.mark.filterwarnings("ignore")]


def test_a_step_is_measured_against_both_loops(settings: Settings) -> None:
    entries = TABLE.judged("step", forge_step.measure(settings))

    assert list(entries) == ["step", "step_2"]
    assert all(entry["figure"] > 0 and entry["against"] for entry in entries.values())


def test_a_distillation_with_its_capture_is_measured_and_not_repeated_after_a_kill(settings: Settings) -> None:
    first = TABLE.judged("with_capture", forge_with_capture.measure(settings))["with_capture"]

    again = forge_with_capture.measure(settings)

    assert first["figure"] > 0
    assert again["figure"] == first["figure"]


def test_labels_of_the_baselines_are_the_target_alone() -> None:
    ids, mask, labels = padded([Example([2, 5], [7, 1]), Example([2], [1])])

    assert ids.tolist() == [[2, 5, 7, 1], [2, 1, 0, 0]]
    assert mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert labels.tolist() == [[-100, -100, 7, 1], [-100, 1, -100, -100]]


def test_all_arms_of_time_to_quality_run_and_keep_their_curves(settings: Settings) -> None:
    entries = TABLE.judged("time_to_quality", forge_time_to_quality.measure(settings))

    assert list(entries) == ["time_to_quality", "time_to_quality_2"]
    for entry in entries.values():
        assert len(entry["against"]) == 4
        assert all(len(arm["curve"]) >= 2 for arm in (entry["ours"], *entry["against"].values()))
        assert all(arm["settings"]["steps"] > 0 for arm in entry["against"].values())


def test_a_baseline_that_was_stopped_counts_with_its_limit_and_says_so() -> None:
    mine = {"curve": [(0.0, 0.1), (10.0, 0.5), (20.0, 0.4)]}
    slow = {"curve": [(0.0, 0.1), (400.0, 0.3)], "stopped": True}

    never = forge_time_to_quality.ratio(mine, {"slow": slow})
    late = forge_time_to_quality.ratio(mine, {"fast": {"curve": [(0.0, 0.1), (100.0, 0.5)], "stopped": False}, "slow": slow})

    assert (never["figure"], never["at_least_so"]) == (40.0, True)
    assert (late["figure"], late["at_least_so"]) == (10.0, False)


def test_a_baseline_that_ended_by_itself_before_it_was_as_good_never_gets_there() -> None:
    mine = {"curve": [(0.0, 0.1), (10.0, 0.5)]}
    ended = {"curve": [(0.0, 0.1), (30.0, 0.3)], "stopped": False}

    found = forge_time_to_quality.ratio(mine, {"ended": ended, "slow": {"curve": [(0.0, 0.1), (200.0, 0.2)], "stopped": True}})

    assert (found["figure"], found["at_least_so"]) == (20.0, True)
    assert forge_time_to_quality.ratio(mine, {"ended": ended})["figure"] is None


def test_a_limit_cannot_hide_how_long_both_took_to_the_best_a_baseline_reached() -> None:
    mine = {"curve": [(0.0, 0.1), (10.0, 0.3), (20.0, 0.5)]}
    slow = {"curve": [(0.0, 0.1), (150.0, 0.25), (400.0, 0.2)], "stopped": True}
    dead = {"curve": [(0.0, 0.1), (400.0, 0.1)], "stopped": True}

    found = forge_time_to_quality.ratio(mine, {"slow": slow, "dead": dead})["against"]

    assert (found["slow"]["best"], found["slow"]["at_its_best"]) == (0.25, 15.0)
    assert found["dead"]["at_its_best"] is None  # it learned nothing: there is nothing to compare
