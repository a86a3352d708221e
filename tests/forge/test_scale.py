"""Several processes, one training: real processes over gloo, started as a user starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from coordinator.forge.training import scale
from protocol.digests import digest_file

pytestmark = [pytest.mark.torch, pytest.mark.llama]

ROOT = Path(__file__).parents[2]
LAUNCH = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
          "--dynamo_backend", "no", "--main_process_port", "0", "-m")  # fmt: skip


def run(*words: str) -> subprocess.CompletedProcess[str]:
    quiet = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment = {**quiet, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.run([sys.executable, "-m", *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


def losses(tmp_path: Path, tiny: Path, *launcher: str) -> Any:
    file = tmp_path / "losses.json"
    done = run(*launcher, "tests.forge.scaled", str(tiny), str(file))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(file.read_text())


def test_two_processes_give_the_loss_curve_of_one(tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()

    alone, together = losses(tmp_path / "one", tiny), losses(tmp_path / "two", tiny, *LAUNCH)

    assert (alone["processes"], together["processes"]) == (1, 2)
    assert together["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    assert alone["losses"][-1] < alone["losses"][0] - 0.1


def test_distill_under_a_launcher_leaves_one_student_and_one_answer(tmp_path: Path, tiny: Path) -> None:
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("".join(f"the cat sat on mat {i}\tel agua de la bomba {i}\n" for i in range(24)))
    out = tmp_path / "model"

    done = run(
        *LAUNCH, "coordinator.cli", "distill", "--pairs", str(pairs), "--teacher", str(tiny), "--out", str(out), "--budget", "10",
        "--blocks", "1", "--threads", "1", "--accumulate", "2", "--json",
    )  # fmt: skip

    assert done.returncode == 0, done.stderr[-3000:]
    made = json.loads(done.stdout)
    files = made["lineage"]["export"]["files"]
    assert all(digest_file(out / name) == entry["digest"] for name, entry in files.items())
    assert made["lineage"]["distil"]["training"]["steps"] > 0


def test_batches_that_cannot_be_shared_out_are_refused_in_one_line(tmp_path: Path, tiny: Path) -> None:
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("".join(f"the cat sat on mat {i}\tel agua de la bomba {i}\n" for i in range(24)))

    done = run(*LAUNCH, "coordinator.cli", "distill", "--pairs", str(pairs), "--teacher", str(tiny), "--out", str(tmp_path / "model"),
               "--budget", "10", "--blocks", "1", "--threads", "1")  # fmt: skip

    assert done.returncode != 0
    assert "use a multiple of 2" in done.stderr


def test_without_a_launcher_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    assert (scale.world().rank, scale.world().size) == (0, 1)
