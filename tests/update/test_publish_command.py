import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from coordinator.fleet.publishing import Publisher
from tests.update.conftest import make_file

SCRIPT = (
    "import typer; from protocol.console import run; from coordinator.commands.publish import publish; "
    "app = typer.Typer(); app.command()(publish); run(app)"
)


def command(*words):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run([sys.executable, "-c", SCRIPT, *map(str, words)], capture_output=True, text=True, timeout=60, env=environment)


def test_one_command_makes_a_store_and_publishes_into_it(tmp_path):
    model, evidence = make_file(tmp_path / "m.gguf", 10_000, 1), tmp_path / "evidence.json"
    evidence.write_text('{"student": {"peak_rss_mb": 120.4}}')

    done = command("--store", tmp_path / "store", "--init", "--model", model, "--evidence", evidence, "--note", "first", "--json")

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["number"] == 1
    release = Publisher(tmp_path / "store" / "repository").latest()
    assert (release.min_memory_mb, release.note, len(release.files)) == (121, "first", 2)


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
