"""The measures of store and forward run from end to end, small; only the lost records mean something here."""

import pytest

from bench import node_idle_bytes_day, node_offline_growth_mib, node_poison_s, node_records_lost
from bench.node import TABLE
from bench.settings import Settings

pytestmark = [pytest.mark.broker]


def test_a_few_hundred_records_survive_every_kind_of_fault(settings: Settings) -> None:
    found = node_records_lost.measure(settings)
    entries = TABLE.judged("records_lost", found)

    assert (entries["records_lost"]["figure"], entries["records_lost_2"]["figure"]) == (0.0, 0.0)
    assert sum(found["records_lost"]["faults"].values()) >= 4


def test_a_healthy_message_leaves_behind_a_poison_and_an_oversized_one(settings: Settings) -> None:
    found = node_poison_s.measure(settings)

    assert found["figure"] < 30.0  # seconds; a busy machine's test, not the promise
    assert found["slowest_s"]["oversized"] < found["slowest_s"]["poison"]


def test_an_idle_node_is_heard_of_for_little(settings: Settings) -> None:
    assert TABLE.judged("idle_bytes_day", node_idle_bytes_day.measure(settings))["idle_bytes_day"]["met"]


@pytest.mark.llama
def test_a_node_offline_keeps_everything_on_disk(settings: Settings) -> None:
    found = node_offline_growth_mib.measure(settings)

    assert found["outbox_messages"] == found["answers"] == found["n"]
