"""bench/node_blackhole_p95.py runs: a real daemon, a real broker that is stopped, a peer, a tiny model."""

import os

import pytest

from bench import node_blackhole_p95
from bench.node import TABLE
from bench.settings import Settings
from deploy.broker import find_mosquitto

pytestmark = [pytest.mark.broker, pytest.mark.llama, pytest.mark.torch]


def test_the_black_hole_is_measured_beside_the_link_that_is_up(settings: Settings) -> None:
    if find_mosquitto() is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("mosquitto is not installed: apt install mosquitto")

    found = TABLE.judged("blackhole_p95", node_blackhole_p95.measure(settings))["blackhole_p95"]

    assert found["figure"] > 0
    assert set(found["p50, ms"]) == set(node_blackhole_p95.LINKS)
    assert found["n"] == node_blackhole_p95.QUICK_REQUESTS
