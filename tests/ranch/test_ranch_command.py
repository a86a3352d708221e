import json

import pytest
import typer
from typer.testing import CliRunner

from coordinator.commands.ranch import ranch
from coordinator.ranch import SITES
from protocol.codec import decode_record
from protocol.errors import MilpaError
from tests.ranch.test_sites import GOOD

app = typer.Typer()
app.command()(ranch)


@pytest.fixture
def call(tmp_path, cache, days, monkeypatch):
    monkeypatch.setenv("MILPA_CACHE", str(cache))
    (tmp_path / "mine.toml").write_text(GOOD)
    return lambda *words: CliRunner().invoke(app, ["--site-file", str(tmp_path / "mine.toml"), *map(str, words)])


def test_the_command_writes_records_that_decode(call, tmp_path):
    done = call("--count", 12, "--seed", 4, "--out", tmp_path / "out.jsonl")

    records = [decode_record(line) for line in (tmp_path / "out.jsonl").read_bytes().splitlines()]
    assert done.exit_code == 0, done.output
    assert len(records) == 12 and all(record.target for record in records)


def test_two_runs_write_the_same_bytes_and_json_tells_their_digest(call, tmp_path):
    first = json.loads(call("--count", 8, "--out", tmp_path / "a.jsonl", "--json").stdout)
    second = json.loads(call("--count", 8, "--out", tmp_path / "b.jsonl", "--json").stdout)

    assert first["sha256"] == second["sha256"]
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert sum(first["verdicts"].values()) == first["count"] == 8


def test_what_was_in_the_file_stays_when_the_records_cannot_be_made(call, tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text("before")

    done = call("--split", "tests", "--out", out)

    assert isinstance(done.exception, MilpaError) and "did you mean 'test'" in str(done.exception)
    assert out.read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.toml", "out.jsonl"]


def test_some_records_can_be_read_without_a_file(call):
    done = call("--count", 5, "--show", 2)

    assert done.exit_code == 0
    assert done.stdout.count("soil") >= 2 and done.stdout.count("\n\n") == 2


@pytest.mark.parametrize("words", [(), ("--out", "/no/such/folder/out.jsonl")])
def test_nothing_to_write_or_nowhere_to_write_is_told_before_the_work(call, words):
    done = call(*words)

    assert isinstance(done.exception, MilpaError)


def test_the_sites_that_ship_can_be_listed(call):
    listed = json.loads(call("--list-sites", "--json").stdout)

    assert set(listed["sites"]) == set(SITES)
