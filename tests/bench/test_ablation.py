"""The ablations run from end to end on tiny models; their figures mean nothing here."""

from pathlib import Path

import numpy as np
import pytest

from bench.ablation import ABLATIONS, main
from bench.forge_gates_auc import auc, interval, measure
from bench.settings import Settings

pytestmark = [pytest.mark.torch, pytest.mark.llama]


@pytest.mark.parametrize("name", sorted(ABLATIONS))
def test_an_ablation_puts_both_arms_side_by_side(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([name, "--quick", "--work", str(tmp_path), "--seconds", "1"])

    table = capsys.readouterr().out
    assert "first - second" in table
    assert "p = " in table


def test_copies_are_refused_and_every_kind_of_damage_has_a_figure(tmp_path: Path) -> None:
    found = measure(Settings(data=tmp_path, work=tmp_path, quick=True))

    assert list(found) == ["gates_auc", "gates_auc_2", "gates_auc_3", "gates_auc_4"]
    assert found["gates_auc"]["figure"] == 1.0
    assert all(0.0 <= row["against"]["likelihood alone"] <= 1.0 for row in found.values())


def test_an_area_of_one_half_is_what_chance_gives() -> None:
    assert auc(np.array([1.0, 1.0]), np.array([1.0, 1.0])) == 0.5
    low, high = interval(0.9, 500)
    assert 0.85 < low < 0.9 < high < 0.95
