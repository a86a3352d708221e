"""The measure of what a cached view costs runs from end to end on a tiny model; its figures mean nothing there."""

from pathlib import Path

import pytest
import torch

from bench import forge_tail_gap_nat
from bench.forge import TABLE
from bench.settings import Settings

pytestmark = [pytest.mark.torch, pytest.mark.llama]


def test_every_arm_is_trained_once_and_judged_on_the_same_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    settings = Settings(tmp_path / "no-data", tmp_path / "work", quick=True)

    first = forge_tail_gap_nat.measure(settings)
    monkeypatch.setattr(forge_tail_gap_nat, "trained", None)  # whatever is trained again now breaks
    again = forge_tail_gap_nat.measure(settings)

    assert again == first
    assert list(TABLE.judged("tail_gap_nat", first)) == ["tail_gap_nat"]
    assert set(first["gaps"]) == {"hidden8", "topk", "topk_bare", "sampled", "cross_entropy"}
    low, high = first["interval"]
    assert low <= first["figure"] <= high
    assert set(first["caches"]) == {"topk", "sampled", "hidden8"}
