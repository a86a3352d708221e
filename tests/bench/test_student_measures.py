"""The measures of students run from end to end on tiny models; their figures mean nothing there."""

from argparse import Namespace
from pathlib import Path

import pytest

from bench import forge_decode, forge_size_mb, forge_trim
from bench.crossover import Crossover
from bench.cut import Table
from bench.forge import TABLE
from bench.settings import Settings
from bench.shapes import Shapes
from bench.speed import decode_speed
from protocol.errors import NotEnough
from protocol.models.engine import Engine
from tests.tiny import tiny_checkpoint

pytestmark = [pytest.mark.torch, pytest.mark.llama, pytest.mark.filterwarnings("ignore")]


def test_decoding_is_measured_against_the_teachers_file(settings: Settings) -> None:
    entry = TABLE.judged("decode", forge_decode.measure(settings))["decode"]

    assert entry["figure"] > 0
    assert entry["megabytes"]["student"] < entry["megabytes"]["teacher"]


def test_file_and_memory_are_measured(settings: Settings) -> None:
    entries = TABLE.judged("size_mb", forge_size_mb.measure(settings))

    assert list(entries) == ["size_mb", "size_mb_3"]  # ternary rows are multiples of 256, and a tiny model's are not
    assert entries["size_mb"]["figure"] < 1 < entries["size_mb_3"]["figure"]


def test_trimming_is_measured_by_size_speed_and_coverage(settings: Settings) -> None:
    entries = TABLE.judged("trim", forge_trim.measure(settings))

    assert list(entries) == ["trim", "trim_2", "trim_3"]
    assert entries["trim"]["figure"] > 1
    assert 0 < entries["trim_3"]["figure"] <= 1


def test_an_engine_that_says_nothing_has_no_speed(settings: Settings) -> None:
    with Engine(settings.base()) as engine, pytest.raises(NotEnough, match="silent wrote 0 tokens"):
        decode_speed({"silent": engine}, [], turns=1)


def test_scratch_and_cut_are_trained_at_each_budget_until_one_is_ahead(settings: Settings) -> None:
    found = Crossover(settings, settings.trimmed(), "tiny").measured([0.2, 0.4], limit_s=60.0)

    assert found["budgets"][0]["seconds"] == 0.2
    assert all(row[kind]["steps"] > 0 for row in found["budgets"] for kind in ("cut", "scratch"))
    assert (found["crossover_s"] is None) != (found["beyond_s"] is None)


def test_every_way_of_cutting_is_in_the_table(settings: Settings) -> None:
    table = Table(settings, settings.trimmed(), examples=4, calibration=8).figures()

    assert {"teacher", "2 blocks, by loss", "32 of 64 channels, first", "small, random"} <= set(table)
    assert all(row["nats"] > 0 for row in table.values())


def test_shapes_learn_one_lesson_for_equal_cpu_time_and_are_compared_with_the_first(tmp_path: Path) -> None:
    base, shapes = tmp_path / "base.gguf", ["2x256x512x2", "1x256x256x1"]
    tiny_checkpoint(layers=3, hidden=256, heads=2, feed_forward=512, kind="F16").write(base)
    said = Namespace(
        shapes=shapes, task="ranch", data=tmp_path, train=None, records=40, stages=tmp_path / "stages", correct=1.0, capture=2.0, own=1.0,
        cpu=0.5, judged=8, threads=1, seed=1,
    )  # fmt: skip

    found = Shapes(said, base=base).figures()

    first, second = (found[name] for name in shapes)
    assert first["steps"] >= 1 and second["steps"] >= 1
    assert second["megabytes"] < first["megabytes"]
    assert second["parameters"] < first["parameters"]
    assert first["against_the_first"]["diff"] == 0.0
    assert len(list((tmp_path / "stages").glob("capture-*"))) == 1
