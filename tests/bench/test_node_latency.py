"""The measure of latency runs from end to end on a tiny model, whose figures mean nothing; its interval is held by hand."""

import os

import pytest

from bench import node_latency_ms
from bench.node import TABLE
from bench.settings import Settings
from deploy.broker import find_mosquitto


@pytest.mark.broker
@pytest.mark.torch
@pytest.mark.llama
def test_it_runs_from_end_to_end(settings: Settings) -> None:
    if find_mosquitto() is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("mosquitto is not installed: apt install mosquitto")

    found = node_latency_ms.measure(settings)

    assert list(TABLE.judged("latency_ms", found)) == ["latency_ms", "latency_ms_2"]
    assert [one["examples"] for one in found["latency_ms"]["prefix"]] == [0, 2, 4]


def test_the_interval_holds_a_delay_that_every_answer_has() -> None:
    alone = [40.0 + number % 7 for number in range(100)]

    low, high = node_latency_ms.interval([one + 3.0 for one in alone], alone, seed=1)

    assert low <= 3.0 <= high and high - low < 2.0
