import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from coordinator.commands.publish import GOES_WITHOUT
from coordinator.fleet.publishing import Publisher
from coordinator.forge.judging import calibrate, evidence
from protocol.digests import digest_file
from tests.evaluation.conftest import simulated
from tests.update.conftest import make_file

SCRIPT = (
    "import typer; from protocol.console import run; from coordinator.commands.publish import publish; "
    "app = typer.Typer(); app.command()(publish); run(app)"
)


def command(*words):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run([sys.executable, "-c", SCRIPT, *map(str, words)], capture_output=True, text=True, timeout=60, env=environment)


def evidence_file(path: Path, model: Path, **peaks: float) -> Path:
    """Evidence as `evaluate` writes it, of a student that took so many MiB on each held-out set, and of a teacher that took far more."""
    teacher = msgspec.structs.replace(simulated(60, accuracy=0.9, seed=1), peak_rss_mb=900.0)
    student = msgspec.structs.replace(simulated(60, accuracy=0.8, seed=2), model_digest=digest_file(model))
    sets = {name: {"teacher": teacher, "student": msgspec.structs.replace(student, peak_rss_mb=peak)} for name, peak in peaks.items()}
    path.write_bytes(msgspec.json.encode(evidence.bundle(release=0, task="ranch", sets=sets, seed=1, command="x")))
    return path


def test_one_command_makes_a_store_and_publishes_into_it(tmp_path):
    model = make_file(tmp_path / "m.gguf", 10_000, 1)
    proof = evidence_file(tmp_path / "evidence.json", model, own=120.4)

    done = command("--store", tmp_path / "store", "--init", "--model", model, "--evidence", proof, "--note", "first", "--json")

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["number"] == 1
    release = Publisher(tmp_path / "store" / "repository").latest()
    assert (release.note, len(release.files)) == ("first", 2)


def test_a_node_must_have_the_memory_that_the_student_took_at_most_on_any_held_out_set(tmp_path):
    model = make_file(tmp_path / "m.gguf", 10_000, 1)
    proof = evidence_file(tmp_path / "evidence.json", model, own=120.4, news=128.2, more=90.0)

    done = command("--store", tmp_path / "store", "--init", "--model", model, "--evidence", proof, "--json")

    assert Publisher(tmp_path / "store" / "repository").latest().min_memory_mb == 129
    assert "min-memory-mb" not in json.loads(done.stdout)["missing"]


def test_evidence_of_another_model_is_refused(tmp_path):
    proof = evidence_file(tmp_path / "evidence.json", make_file(tmp_path / "other.gguf", 10_000, 2), own=120.4)

    done = command("--store", tmp_path / "store", "--init", "--model", make_file(tmp_path / "m.gguf", 10_000, 1), "--evidence", proof)

    assert done.returncode == 2
    assert "it is of the model" in done.stderr
    assert Publisher(tmp_path / "store" / "repository").latest() is None


def test_a_file_that_is_no_evidence_is_refused(tmp_path):
    model, proof = make_file(tmp_path / "m.gguf", 10_000, 1), tmp_path / "evidence.json"
    proof.write_text('{"student": {"peak_rss_mb": 120.4}}')

    done = command("--store", tmp_path / "store", "--init", "--model", model, "--evidence", proof)

    assert done.returncode == 2
    assert "give what `milpa-coordinator evaluate --evidence` wrote" in done.stderr and "required field" in done.stderr
    assert Publisher(tmp_path / "store" / "repository").latest() is None


def test_what_a_release_goes_without_is_told_with_what_nodes_will_not_do_and_the_option_that_adds_it(tmp_path):
    model = make_file(tmp_path / "m.gguf", 10_000, 1)

    done = command("--store", tmp_path / "store", "--init", "--model", model, "--json")

    warnings = done.stderr.strip().splitlines()
    assert json.loads(done.stdout)["missing"] == ["calibration", "initial-adapter", "rehearsal", "known", "min-memory-mb"]
    assert warnings == [f"warning: {told}" for told in GOES_WITHOUT.values()]
    assert all(f"--{option}" in told for option, told in GOES_WITHOUT.items())


def test_what_a_release_has_is_not_warned_of(tmp_path):
    model, adapter, calibration = (make_file(tmp_path / f"{n}.gguf", 500 + n, n) for n in (1, 2, 3))

    done = command(
        "--store", tmp_path / "store", "--init", "--model", model, "--initial-adapter", adapter, "--calibration", calibration,
        "--min-memory-mb", 100, "--json",
    )  # fmt: skip

    assert json.loads(done.stdout)["missing"] == ["rehearsal", "known"]
    assert [line.split(":")[1].strip() for line in done.stderr.strip().splitlines()] == ["no rehearsal records", "no known answers"]


def calibration_file(path: Path, model: Path) -> Path:
    made = calibrate.fit(simulated(60, accuracy=0.9, seed=1))
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(made, model_digest=digest_file(model), adapter_digest="")))
    return path


def test_a_teacher_s_calibration_goes_to_the_nodes_that_run_the_teacher(tmp_path):
    model, teacher = make_file(tmp_path / "m.gguf", 10_000, 1), make_file(tmp_path / "t.gguf", 20_000, 2)
    sure = calibration_file(tmp_path / "t.json", teacher)

    done = command("--store", tmp_path / "store", "--init", "--model", model, "--teacher", teacher, "--teacher-calibration", sure)

    assert done.returncode == 0, done.stderr
    release = Publisher(tmp_path / "store" / "repository").latest()
    assert [file.kind for file in release.files_for("teacher")] == ["model", "calibration"]
    assert release.file("teacher", "calibration").digest == digest_file(sure)
    assert release.file("student", "calibration") is None


@pytest.mark.parametrize("with_teacher", [True, False])
def test_a_calibration_of_another_model_than_the_teacher_is_refused_with_how_to_make_one(tmp_path, with_teacher):
    model, teacher = make_file(tmp_path / "m.gguf", 10_000, 1), make_file(tmp_path / "t.gguf", 20_000, 2)
    named = ("--teacher", teacher) if with_teacher else ()

    done = command(
        "--store", tmp_path / "store", "--init", "--model", model, *named,
        "--teacher-calibration", calibration_file(tmp_path / "t.json", model),
    )  # fmt: skip

    assert done.returncode == 2
    assert "milpa-coordinator calibrate --model TEACHER.gguf" in " ".join(done.stderr.split())
    assert Publisher(tmp_path / "store" / "repository").latest() is None


def test_an_adapter_is_bound_to_the_model_beside_it(tmp_path):
    model, adapter = make_file(tmp_path / "m.gguf", 10_000, 1), make_file(tmp_path / "a.gguf", 500, 2)

    command("--store", tmp_path / "store", "--init", "--model", model, "--adapter", adapter)

    release = Publisher(tmp_path / "store" / "repository").latest()
    assert release.file("student", "adapter").base_digest == release.file("student", "model").digest


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--model", "none.gguf"], "not a release store yet"),
        (["--init", "--model", "none.gguf"], "none.gguf is not a file"),
        ([], "--model FILE.gguf"),
        (["--init", "--task", "ranhc"], "unknown task 'ranhc'"),
    ],
)
def test_what_cannot_be_published_is_one_line_and_an_exit_code(tmp_path, words, told):
    done = command("--store", tmp_path / "store", *words)

    assert done.returncode == 2
    assert told in done.stderr and len(done.stderr.strip().splitlines()) == 1
