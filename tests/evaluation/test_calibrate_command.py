"""`milpa-coordinator calibrate` on a tiny model: the file it writes is the one a node reads."""

from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from coordinator.cli import complete
from node.engine.loading import read_calibration
from protocol.confidence import CALIBRATION_LIMIT
from protocol.digests import digest_file
from tests.evaluation.conftest import ranch_records

pytestmark = pytest.mark.llama


@pytest.fixture
def records(tmp_path: Path) -> Path:
    path = tmp_path / "dev.jsonl"
    path.write_bytes(b"".join(msgspec.json.encode(record) + b"\n" for record in ranch_records(24)))
    return path


def test_a_calibration_is_bound_to_its_model_and_read_by_a_node(tiny: Path, records: Path, tmp_path: Path) -> None:
    out = tmp_path / "calibration.json"

    done = CliRunner().invoke(
        complete(),
        ["calibrate", "--model", str(tiny), "--teacher", str(tiny), "--task", "ranch", "--records", str(records), "--samples", "2",
         "--threads", "1", "--out", str(out), "--json"],
    )  # fmt: skip

    assert done.exit_code == 0, done.output
    made = read_calibration(out)
    assert made is not None and made.fits(digest_file(tiny), "")
    assert out.stat().st_size < CALIBRATION_LIMIT
    assert msgspec.json.decode(done.stdout)["records"] == 24


def test_a_folder_that_is_not_there_is_told_before_the_work(tiny: Path, records: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        complete(), ["calibrate", "--model", str(tiny), "--task", "ranch", "--records", str(records), "--out", str(tmp_path / "no" / "c")]
    )

    assert done.exit_code != 0
    assert "make it first" in f"{done.output}{done.exception}"
