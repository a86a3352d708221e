"""The two tables about file types, on tiny models: every row is there, and what was measured is not measured again."""

from pathlib import Path

import pytest

from bench import importance, ternary
from bench.settings import Settings
from tests.tiny import tiny_checkpoint

pytestmark = [pytest.mark.torch, pytest.mark.llama]


def test_ternary_and_float_are_compared_as_the_same_student_and_at_the_same_bytes(tmp_path: Path) -> None:
    settings = Settings(data=tmp_path, work=tmp_path, quick=True)

    figures = ternary.measure(settings, steps=2)

    files = figures["files"]
    assert {"float Q8_0", "float Q4_K_M", "ternary TQ2_0", "ternary TQ1_0"} < set(files)
    assert any(name.endswith("blocks Q4_K_M") and one["mb"] <= files["ternary TQ2_0"]["mb"] for name, one in files.items())
    assert len(ternary.rows(figures)) == len(files) + 1
    assert ternary.measure(settings, steps=2) == figures


def test_importance_is_judged_on_text_it_was_not_counted_on(tmp_path: Path) -> None:
    tiny_checkpoint(hidden=256, feed_forward=512, kind="F16").write(tmp_path / "float.gguf")
    settings = Settings(data=tmp_path, work=tmp_path, quick=True)

    figures = importance.measure(settings, tmp_path / "float.gguf", kinds=["Q4_K_M"], held_out=6)

    found = figures["kinds"]["Q4_K_M"]
    assert found["with"] > 0 and found["without"] > 0
    assert found["fell_back"] == []
    assert importance.rows(figures)[1][0] == "Q4_K_M"
