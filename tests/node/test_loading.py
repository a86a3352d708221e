from pathlib import Path
from typing import Any

import pytest

from node.engine.loading import prove, read_calibration, speaker
from node.update.slots import ActiveRelease
from protocol.codec import encode
from protocol.confidence import FEATURES, Calibration
from protocol.errors import BadInput, DoesNotFit, MalformedMessage
from protocol.releases import KnownAnswer, Release
from tests.node.fake_engine import FakeEngine


def calibration(path: Path, **other: Any) -> Path:
    ones = (1.0,) * len(FEATURES)
    values: dict[str, Any] = {
        "task": "ranch", "model_digest": FakeEngine().model_digest, "adapter_digest": "", "means": ones, "scales": ones, "weights": ones,
        "bias": 0.0, "points": ((-1.0, 0.1), (1.0, 0.9)), "quantiles": (0.1, 0.5, 0.9), "count": 100, "right": 60, "method": "logistic",
        "names": FEATURES,
    }  # fmt: skip
    path.write_bytes(encode(Calibration(**(values | other))))
    return path


def active(known: KnownAnswer, role: Any = "student") -> ActiveRelease:
    release = Release(number=2, task="ranch", created=0, files=(), known_answers=(known,))
    return ActiveRelease(release=release, role=role, model=Path("m"))


def test_a_calibration_is_used_for_exactly_its_model_and_adapter(tmp_path: Path) -> None:
    fitting = speaker(FakeEngine(), task="ranch", release=1, calibration=calibration(tmp_path / "a.json"))
    other = speaker(FakeEngine(), task="ranch", release=1, calibration=calibration(tmp_path / "b.json", adapter_digest="a" * 64))

    assert fitting.calibration is not None
    assert other.calibration is None


def test_a_calibration_that_does_not_decode_frees_the_model(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text("{}")
    engine = FakeEngine()

    with pytest.raises(MalformedMessage, match=r"c\.json"):
        speaker(engine, task="ranch", release=1, calibration=tmp_path / "c.json")
    with pytest.raises(BadInput, match="cannot read"):
        read_calibration(tmp_path / "none.json")

    assert engine.closed


def test_a_student_must_give_the_known_answers_again() -> None:
    candidate = speaker(FakeEngine({"soil": " leak: a pipe"}), task="ranch", release=2, calibration=None)

    prove(candidate, active(KnownAnswer("soil\nen:", " leak: a pipe")))
    with pytest.raises(DoesNotFit, match="known answer 1 of 1"):
        prove(candidate, active(KnownAnswer("soil\nen:", " normal: all is well")))


def test_a_teacher_is_not_asked_for_the_student_s_answers() -> None:
    candidate = speaker(FakeEngine(), task="ranch", release=2, calibration=None)

    prove(candidate, active(KnownAnswer("soil\nen:", " what only the student says"), role="teacher"))

    assert len(candidate.engine.prompts) == 1  # type: ignore[attr-defined]  # the probe alone
