"""`milpa-coordinator evaluate`, from the files a person brings to one JSON object."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import typer
from typer.testing import CliRunner

from coordinator.commands.evaluate import evaluate
from protocol.errors import BadInput, MalformedMessage, UnknownName
from tests.evaluation.conftest import ranch_records
from tests.evaluation.test_evaluation import CONTRACT

PairsFile = Callable[..., Path]
PAIRS = "The cat sat on a mat.\tEl gato.\nThe pump is dry.\tLa bomba es seca.\nA {brace}.\tUna {llave}.\n"


def run(*arguments: object) -> tuple[str, BaseException | None]:
    """Standard output and the error of one call."""
    app = typer.Typer()
    app.command()(evaluate)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.stdout, result.exception if result.exit_code else None


@pytest.mark.llama
def test_pairs_become_one_json_object_with_the_contracts_names(tiny: Path, pairs_file: PairsFile) -> None:
    out, error = run("--model", tiny, "--pairs", pairs_file(PAIRS), "--json")

    found = json.loads(out)
    assert error is None
    assert set(found) >= CONTRACT - {"accuracy", "accuracy_ci"}
    assert found["n"] == 3
    assert found["chrf_ci"][0] <= found["chrf"] <= found["chrf_ci"][1]
    assert found["task"] == "translate-english-spanish"


@pytest.mark.llama
def test_records_of_a_verdict_task_have_an_accuracy(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    file.write_bytes(b"\n".join(msgspec.json.encode(record) for record in ranch_records(4)))

    out, error = run("--model", tiny, "--task", "ranch", "--records", file, "--limit", 3, "--json")

    found = json.loads(out)
    assert error is None
    assert set(found) >= CONTRACT
    assert found["n"] == 3


@pytest.mark.llama
def test_answers_go_to_a_file_on_request(tiny: Path, pairs_file: PairsFile, tmp_path: Path) -> None:
    out, error = run("--model", tiny, "--pairs", pairs_file(PAIRS), "--out", tmp_path / "out.json")

    found = json.loads((tmp_path / "out.json").read_text())
    assert error is None
    assert len(found["answers"]) == found["n"] == 3
    assert "tokens/s" in out


@pytest.mark.llama
@pytest.mark.skipif(shutil.which("apertium") is None and not os.environ.get("CI"), reason="sudo apt-get install apertium-eng-spa")
def test_a_peer_answers_the_same_records_beside_the_model(tiny: Path, pairs_file: PairsFile) -> None:
    out, error = run("--model", tiny, "--pairs", pairs_file(PAIRS), "--peer", "apertium", "--json")

    peer = json.loads(out)["peers"]["apertium"]
    assert error is None
    assert peer["n"] == peer["paired"]["n"] == 3
    assert peer["paired"]["diff"] < 0  # random weights are no translator


@pytest.mark.llama
def test_solved_examples_change_what_the_model_reads(tiny: Path, pairs_file: PairsFile) -> None:
    examples = pairs_file("Good sun.\tBuen sol.\nNo water.\tSin agua.\n", "examples.tsv")

    plain, shown = (
        json.loads(run("--model", tiny, "--pairs", pairs_file(PAIRS), *more, "--json")[0])
        for more in ((), ("--few-shot", 2, "--examples", examples))
    )

    assert (plain["few_shot"], shown["few_shot"]) == (0, 2)
    assert shown["latency_p50_ms"] > 0


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a\tb\nonly one column\n", r"pairs.tsv, line 2: expected SOURCE<tab>TARGET.*got 1 column"),
        ("a\tb\tc\n", r"line 1: .*got 3 column"),
        ("a\tb\n\nbroken\nc\td\n", r"line 3: expected"),  # an empty line is passed over but counted
        ("a\t\n", r"line 1: .*both filled"),
        ("", r"pairs.tsv holds no records"),
        ("x" * 4001 + "\tb\n", r"line 1: .*4001 characters, the limit is 4000"),
    ],
)
def test_a_broken_line_is_named(text: str, told: str, pairs_file: PairsFile) -> None:
    _, error = run("--model", "m.gguf", "--pairs", pairs_file(text))

    assert isinstance(error, BadInput)
    with pytest.raises(BadInput, match=told):
        raise error


def test_a_file_that_is_not_utf8_is_told_how_to_be(tmp_path: Path) -> None:
    file = tmp_path / "latin.tsv"
    file.write_bytes(b"a\tb\nsi\ts\xed\n")

    _, error = run("--model", "m.gguf", "--pairs", file)

    assert "line 2: not UTF-8" in str(error)


def test_a_record_with_a_missing_field_names_file_line_and_field(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    file.write_text('{"id":"1","task":"ranch","source":"w","target":"leak: x"}\n{"id":"2","task":"ranch"}\n')

    _, error = run("--model", "m.gguf", "--task", "ranch", "--records", file)

    assert isinstance(error, MalformedMessage)
    assert "records.jsonl, line 2" in str(error)
    assert "`source`" in str(error)


def test_an_unknown_task_is_refused(tmp_path: Path) -> None:
    _, error = run("--model", "m.gguf", "--task", "ranhc", "--records", tmp_path / "x.jsonl")

    assert isinstance(error, UnknownName)
    assert "did you mean 'ranch'" in str(error)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "give --pairs FILE.tsv, or --task NAME --records FILE.jsonl"),
        (("--records", "x.jsonl"), "--records needs --task"),
        (("--pairs", "/nowhere/x.tsv"), "cannot read /nowhere/x.tsv"),
        (("--pairs", "{pairs}", "--few-shot", "2"), "--few-shot needs --examples"),
        (("--pairs", "{pairs}", "--few-shot", "2", "--examples", "{pairs}"), "is also evaluated on"),
        (("--pairs", "{pairs}", "--out", "/nowhere/out.json"), "there is no folder /nowhere"),
        (("--pairs", "{pairs}", "--peer", "apertum"), "did you mean 'apertium'"),
    ],
)
def test_what_does_not_fit_together_is_told_before_the_long_work(arguments: tuple[str, ...], told: str, pairs_file: PairsFile) -> None:
    file = pairs_file(PAIRS)

    _, error = run("--model", "m.gguf", *(argument.format(pairs=file) for argument in arguments))

    assert isinstance(error, BadInput)
    assert told in str(error)
