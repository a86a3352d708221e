"""node/doctor/confidence.py: what the doctor says of a running node's judgements."""

from typing import Any

import pytest

from node.doctor.confidence import confidence


def told(**changes: Any) -> dict[str, Any]:
    """A node that keeps its budget."""
    status = {
        "calibrated": True,
        "realised": 0.24,
        "planned": 0.25,
        "over": 1000,
        "plan": 0.25,
        "bound": "share",
        "why": "share budget 25%",
    }
    return {"confidence": status | changes}


@pytest.mark.parametrize(
    ("running", "state", "found"),
    [
        ({}, "good", "nothing was judged yet"),
        (told(over=0), "good", "nothing was judged yet"),
        (told(), "good", "24.0% of the last 1000 answers were to be asked, 25.0% planned; share budget 25%"),
        (told(calibrated=False), "warn", "not calibrated"),
        (told(realised=0.4), "bad", "40.0% of the last 1000"),
        (told(realised=0.4, over=100), "good", "40.0% of the last 100"),
        (told(plan=0.0, bound="bytes", why="the day's 20000 bytes are spent"), "warn", "the day's 20000 bytes are spent"),
        (told(plan=0.0, why="share budget 0%", realised=0.0, planned=0.0), "good", "share budget 0%"),
    ],
)
def test_the_doctor_tells_what_is_wrong_with_the_confidence(running: dict[str, Any], state: str, found: str) -> None:
    finding = confidence(running)

    assert finding.state == state
    assert found in finding.found
    assert bool(finding.advice) == (state != "good")


def test_a_model_that_is_not_calibrated_is_another_matter_than_a_day_without_questions() -> None:
    spent = confidence(told(plan=0.0, bound="bytes", why="the day's 20000 bytes are spent"))

    assert confidence(told(calibrated=False)).what == "calibration"
    assert spent.what == "confidence"
