"""What a season at a site is counted as."""

import pytest

from deploy.season import Asked, figures
from protocol.tasks import Record


def asked(truth: str, first: str, final: str, *, confidence: float, escalated: bool = False, seconds: float = 0.1) -> Asked:
    record = Record(id="r", task="ranch", source="s", target=f"{truth}: x", verdict=truth)
    state = "upgraded" if escalated else "final"
    return Asked(record, "a", first, confidence, escalated, seconds, final=final, state=state, by="")


SEASON = [
    asked("leak", "leak", "leak", confidence=0.9, seconds=0.1),
    asked("leak", "normal", "leak", confidence=0.1, escalated=True, seconds=0.3),
    asked("normal", "normal", "leak", confidence=0.3, escalated=True, seconds=0.2),
    asked("normal", "leak", "leak", confidence=0.8, seconds=0.4),
    asked("normal", "normal", "normal", confidence=0.95, seconds=0.5),
]


def test_the_first_answers_and_the_final_ones_are_counted_apart() -> None:
    found = figures(SEASON)

    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["accuracy_with_escalation"] == pytest.approx(3 / 5)
    assert found["escalated"] == pytest.approx(2 / 5)
    assert found["accuracy_ci"][0] < 3 / 5 < found["accuracy_ci"][1]


def test_at_an_equal_budget_only_the_least_confident_share_is_the_peers() -> None:
    assert figures(SEASON)["accuracy_at_budget"] == pytest.approx(4 / 5)  # one of five: the answer at 0.1, which the peer mends


def test_latency_is_the_median_of_what_the_client_waited() -> None:
    assert figures(SEASON)["latency_p50_ms"] == pytest.approx(300)
