"""The measures of what it costs and risks to run: the unit's exposure for real, the footprint small."""

import pytest

from bench import node_footprint, node_systemd_exposure
from bench.node import TABLE
from bench.settings import Settings


@pytest.mark.llama
def test_a_daemon_without_a_model_stays_under_its_limit_and_every_figure_is_had(settings: Settings) -> None:
    entries = TABLE.judged("footprint", node_footprint.measure(settings))

    assert list(entries) == ["footprint", "footprint_2", "footprint_3", "footprint_4"]
    assert entries["footprint"]["met"] and entries["footprint_2"]["met"]
    assert entries["footprint_4"]["figure"] > 0.0


def test_the_unit_is_exposed_less_than_promised_and_far_less_than_one_without_walls(settings: Settings) -> None:
    found = node_systemd_exposure.measure(settings)

    assert TABLE.judged("systemd_exposure", found)["systemd_exposure"]["met"]
    assert found["against"]["a unit without walls"] > 9.0
