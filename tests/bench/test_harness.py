"""The harness of the figures: finds measures, keeps results by key, and says what was met."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from bench import harness, stamps
from bench.forge import TABLE as forge
from bench.node import TABLE as node
from bench.settings import LIMIT_S, Settings
from protocol.errors import BadInput

ROOT = Path(__file__).parents[2]


def test_a_figure_is_met_at_its_goal_and_one_of_size_below_it() -> None:
    fast = forge.judged("step", {"step": {"figure": 5.0}, "step_2": {"figure": 1.9}})
    small = forge.judged("tail_gap_nat", {"figure": 0.01})

    assert [fast[key]["met"] for key in ("step", "step_2")] == [True, False]
    assert small["tail_gap_nat"]["met"]
    assert small["tail_gap_nat"]["at_most"] == 0.02


def test_a_figure_that_could_not_be_had_is_not_met() -> None:
    assert not forge.judged("throughput", {"figure": None})["throughput"]["met"]


def test_a_figure_that_no_row_promises_is_refused() -> None:
    with pytest.raises(BadInput, match="step_3"):
        forge.judged("step", {"step_3": {"figure": 1.0}})
    with pytest.raises(BadInput, match="no figure is called speed"):
        forge.chosen("step,speed")


def test_measuring_one_key_keeps_the_others_in_the_order_of_the_table(tmp_path: Path) -> None:
    file = tmp_path / "results" / "forge.json"
    forge.merge({"throughput": {"figure": 0.9}, "trim": {"figure": 2.0}}, file)

    forge.merge({"step": {"figure": 5.0}, "trim": {"figure": 3.0}}, file)

    figures = msgspec.json.decode(file.read_bytes())["figures"]
    assert list(figures) == ["step", "throughput", "trim"]
    assert figures["trim"]["figure"] == 3.0


def test_a_key_measured_before_is_not_measured_again_unless_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def ran(command: list[str], **_: Any) -> Any:
        calls.append(command)
        (tmp_path / "throughput.json").write_bytes(b"{}")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(harness.subprocess, "run", ran)
    settings = Settings(tmp_path, tmp_path, quick=True)
    for again in (False, False, True):
        assert forge.measured("throughput", settings, again=again)

    assert len(calls) == 2


def test_the_table_to_read_has_every_row_and_says_what_is_not_measured(tmp_path: Path) -> None:
    entries = forge.judged("step", {"step": {"figure": 5.25, "interval": [5.0, 5.5], "n": 40}, "step_2": {"figure": 1.9}})

    forge.merge(entries, tmp_path / "forge.json")

    rows = [line.split(" | ") for line in (tmp_path / "forge.md").read_text().splitlines() if line.startswith("| `")]
    assert [row[0].strip("| `") for row in rows] == [name for key, row in forge.rows.items() for name in row.names(key)]
    told = {row[0].strip("| `"): row[2:7] for row in rows}
    assert told["step"] == ["5.25", ">= 5", "yes", "5 to 5.5", "40"]
    assert (told["step_2"][2], told["throughput"][:3]) == ("no", ["", ">= 0.85", "-"])


def test_the_table_says_of_what_an_interval_is_and_that_a_figure_may_be_larger(tmp_path: Path) -> None:
    entries = forge.judged("decode", {"figure": 6.5, "interval": [6.4, 6.6], "interval_of": "lowest to highest turn"})
    entries |= forge.judged("time_to_quality", {"time_to_quality": {"figure": 3.427, "at_least_so": True}})

    forge.merge(entries, tmp_path / "forge.json")

    told = {line.split("`")[1]: line for line in (tmp_path / "forge.md").read_text().splitlines() if line.startswith("| `")}
    assert "| at least 3.427 |" in told["time_to_quality"]
    assert "| 6.4 to 6.6, lowest to highest turn |" in told["decode"]


def test_the_command_of_an_entry_has_the_limit_where_one_was_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure_by(monkeypatch, lambda settings: {"figure": 1.0})

    commands = [kept(Settings(tmp_path, tmp_path, limit_s=limit))["command"] for limit in (LIMIT_S, 900.0)]

    assert [command.partition("SEED=1")[2] for command in commands] == ["", " LIMIT=900"]


def test_an_entry_of_parts_that_were_found_says_who_made_them_and_counts_their_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure_by(monkeypatch, lambda settings: {"figure": settings.kept("throughput", "part", lambda: 1.0)})
    monkeypatch.setattr(stamps, "_commit", lambda: "a" * 40)
    kept(Settings(tmp_path, tmp_path))
    part = tmp_path / "throughput" / "part.json"
    stamps.write(part, stamps.Stamp((stamps.Run("a" * 40, "2026-01-02T03:04:05+00:00"),), seconds=5_400.0, here=5_400.0))
    monkeypatch.setattr(stamps, "_commit", lambda: "b" * 40 + "+changes")

    entry = kept(Settings(tmp_path, tmp_path))

    assert 5_400.0 <= entry["seconds"] < 5_460.0
    assert entry["commit"] == f"{'a' * 40} to {'b' * 40}+changes"
    assert entry["day"].startswith("2026-01-02 to ")
    forge.merge({"throughput": entry}, tmp_path / "forge.json")
    assert "aaaaaaa to bbbbbbb+changes," in (tmp_path / "forge.md").read_text()


def test_parts_kept_without_a_stamp_are_used_and_their_maker_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure_by(monkeypatch, lambda settings: {"figure": settings.kept("throughput", "part", lambda: 1.0)})
    (tmp_path / "throughput").mkdir()
    (tmp_path / "throughput" / "part.json").write_text("0.5")

    entry = kept(Settings(tmp_path, tmp_path))

    assert entry["figure"] == 0.5
    assert entry["unknown"] == ["throughput/part.json"]
    assert entry["commit"].startswith("unknown to ")


def test_a_part_whose_maker_was_killed_is_of_both_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(tmp_path, tmp_path)
    file = settings.folder("throughput") / "model"

    def killed() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stamps, "_commit", lambda: "first")
    with pytest.raises(KeyboardInterrupt):
        settings.once(file, killed)
    monkeypatch.setattr(stamps, "_commit", lambda: "second")
    settings.once(file, lambda: file.write_bytes(b"whole"))

    assert [run.commit for run in stamps.read(file).runs] == ["first", "second"]
    assert stamps.read(file).known


def measure_by(monkeypatch: pytest.MonkeyPatch, measure: Callable[[Settings], dict[str, Any]]) -> None:
    monkeypatch.setattr(harness.importlib, "import_module", lambda name: SimpleNamespace(measure=measure))


def kept(settings: Settings) -> dict[str, Any]:
    """The entry of a measurement in this process."""
    forge.keep("throughput", settings)
    entry: dict[str, Any] = msgspec.json.decode((settings.work / "throughput.json").read_bytes())["throughput"]
    return entry


@pytest.mark.parametrize("table", [forge, node], ids=lambda table: str(table.name))
def test_the_tables_in_the_tree_say_what_the_results_say(table: harness.Table) -> None:
    file = harness.RESULTS / f"{table.name}.json"

    assert file.with_suffix(".md").read_text() == table.page(msgspec.json.decode(file.read_bytes())["figures"])


@pytest.mark.torch
@pytest.mark.llama
def test_a_quick_run_measures_prints_the_table_and_leaves_the_results_alone(tmp_path: Path) -> None:
    results = ROOT / "bench" / "results" / "forge.json"
    before = results.read_bytes() if results.is_file() else b""
    command = [sys.executable, "-m", "bench.forge", "--quick", "--only", "throughput", "--work", str(tmp_path), "--data", "nowhere"]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)

    assert done.returncode == 0, done.stderr
    assert any(line.startswith("throughput") and "of the machine's limit" in line for line in done.stdout.splitlines())
    assert (results.read_bytes() if results.is_file() else b"") == before
    entry = msgspec.json.decode((tmp_path / "quick" / "throughput.json").read_bytes())["throughput"]
    assert entry["figure"] > 0
    assert {"met", "at_least", "machine", "commit", "day", "seconds", "n", "interval"} <= set(entry)
