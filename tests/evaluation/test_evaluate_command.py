"""`milpa-coordinator evaluate`, from the files a person brings to one JSON object."""

import json
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import typer
from typer.testing import CliRunner

from coordinator.commands.evaluate import evaluate, lineage_of, named
from coordinator.forge.judging import schema
from coordinator.forge.judging.evidence import repeat_line
from protocol.digests import digest_file
from protocol.errors import BadInput, MalformedMessage, UnknownName
from protocol.tasks import Record
from tests.evaluation.conftest import ranch_records
from tests.evaluation.test_evaluation import CONTRACT
from tests.tiny import tiny_gguf

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


@pytest.mark.llama
def test_other_models_and_held_out_sets_are_judged_beside_the_model(tiny: Path, pairs_file: PairsFile, tmp_path: Path) -> None:
    own, news = pairs_file(PAIRS, "own.tsv"), pairs_file("No water in 3 tanks.\tNo hay agua en 3 tanques.\n", "news.tsv")
    other = tiny_gguf(tmp_path / "other.gguf", seed=3)
    evidence, page = tmp_path / "evidence.json", tmp_path / "evidence.html"

    out, error = run(
        "--model", tiny, "--against", f"teacher={other}", "--pairs", own, "--pairs", f"news={news}", "--evidence", evidence,
        "--report", page, "--watts", 3, "--json",
    )  # fmt: skip

    found, proof = json.loads(out), schema.check(json.loads(evidence.read_bytes()))
    assert error is None
    assert set(found) >= CONTRACT - {"accuracy", "accuracy_ci"}  # the old keys stay, of the first set
    assert (found["n"], found["sets"]["own"]["models"]["student"]["chrf"]) == (3, found["chrf"])
    assert list(proof.sets) == ["own", "news"]
    assert all(set(each.models) == {"student", "teacher"} for each in proof.sets.values())
    assert proof.sets["own"].models["teacher"]["model_digest"] != found["model_digest"]
    assert "numbers" in {row.category for row in proof.sets["news"].categories}
    assert found["economics"]["power"]["watts_per_core"] == 3.0
    assert found["cpu_seconds_per_1000"] > 0
    assert proof.command.startswith(f"milpa-coordinator evaluate --model {tiny} --source English --target Spanish")
    assert f"--pairs own={own} --pairs news={news}" in proof.command
    assert f"--against teacher={other}" in proof.command
    assert "Category by category" in page.read_text(encoding="utf-8")


def translations(folder: Path, name: str, *sources: str) -> Path:
    """A file of translation records, as `synthesise --targets` writes them."""
    rows = [
        Record(id=f"{name}-{n}", task="translate-english-spanish", source=one, lang="es", target="Sí.") for n, one in enumerate(sources)
    ]
    path = folder / f"{name}.jsonl"
    path.write_bytes(b"\n".join(msgspec.json.encode(row) for row in rows))
    return path


@pytest.mark.llama
@pytest.mark.parametrize("form", ["pairs", "records of a verdict task", "records of a translation"])
def test_the_command_in_the_evidence_repeats_it(form: str, tiny: Path, pairs_file: PairsFile, tmp_path: Path) -> None:
    ranch = tmp_path / "ranch.jsonl"
    ranch.write_bytes(b"\n".join(msgspec.json.encode(record) for record in ranch_records(4)))
    words: dict[str, list[object]] = {
        "pairs": [
            "--pairs", f"own={pairs_file(PAIRS)}", "--few-shot", 1, "--examples", pairs_file("Good sun.\tBuen sol.\n", "shown.tsv"),
        ],
        "records of a verdict task": ["--task", "ranch", "--records", ranch, "--limit", 3, "--watts", 3],
        "records of a translation": [
            "--task", "translate-english-spanish", "--records", translations(tmp_path, "own", "No water in 3 tanks.", "Good sun."),
            "--few-shot", 1, "--examples", translations(tmp_path, "shown", "The pump is dry."),
        ],
    }  # fmt: skip
    proof = tmp_path / "evidence.json"
    _, error = run("--model", tiny, *words[form], "--seed", 5, "--evidence", proof)
    assert error is None
    told = json.loads(proof.read_bytes())

    again, error = run(*shlex.split(told["command"])[2:])

    assert error is None
    measured = json.loads(again)["sets"]
    assert list(measured) == list(told["sets"])
    for name, found in told["sets"].items():
        assert measured[name]["categories"] == found["categories"]
        assert measured[name]["records"] == found["records"]
        keys = ("chrf", "chrf_ci", "bleu", "model_digest")
        assert [measured[name]["models"]["student"][key] for key in keys] == [found["models"]["student"][key] for key in keys]


def test_a_command_that_repeats_names_odd_files_so_that_they_are_read_again(tmp_path: Path) -> None:
    odd = tmp_path / "a=b c.tsv"
    odd.write_text(PAIRS)

    line = repeat_line(
        Path("m.gguf"), {"--limit": None, "--peer": "apertium"}, "--pairs", {"a=b c": odd}, {"old": (Path("o.gguf"), odd)}, seed=1
    )

    words = shlex.split(line)
    assert "--limit" not in words
    assert named([words[words.index("--pairs") + 1]], "--pairs") == {"a=b c": str(odd)}
    assert words[words.index("--against") + 1] == f"old=o.gguf+{odd}"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--pairs", "{pairs}", "--pairs", "{pairs}"), "every one needs a name of its own"),
        (("--pairs", "a={pairs}", "--pairs", "a={pairs}"), "every one needs a name of its own"),
        (("--pairs", "{pairs}", "--against", "teacher=/nowhere/t.gguf"), "--against teacher: there is no file /nowhere/t.gguf"),
        (("--pairs", "{pairs}", "--against", "previous={pairs}+/nowhere/a.gguf"), "there is no file /nowhere/a.gguf"),
        (("--pairs", "{pairs}", "--against", "student={pairs}"), "is what --model is called"),
        (("--pairs", "{pairs}", "--report", "/nowhere/e.html"), "--report /nowhere/e.html: there is no folder"),
        (("--pairs", "{pairs}", "--evidence", "/nowhere/e.json"), "--evidence /nowhere/e.json: there is no folder"),
        (("--pairs", "{pairs}", "--watts", "0"), "give the watts of one busy core"),
        (("--pairs", "{pairs}", "--train", "{pairs}"), "--train is for verdict tasks"),
        (("--pairs", "{pairs}", "--records", "{pairs}"), "give --pairs FILE.tsv, or"),
    ],
)
def test_comparisons_that_do_not_fit_are_told_before_the_long_work(arguments: tuple[str, ...], told: str, pairs_file: PairsFile) -> None:
    file = pairs_file(PAIRS)

    _, error = run("--model", "m.gguf", *(argument.format(pairs=file) for argument in arguments))

    assert isinstance(error, BadInput)
    assert told in str(error)


TRIMMED = {"before": 32_000, "after": 25_000, "texts": 500, "identical": 0.9996, "same": 0.9871, "longer": 0.01, "unseen": True}


def distilled(tiny: Path, folder: Path) -> tuple[Path, dict[str, object]]:
    """A student in a folder as `distill` leaves it, and its lineage."""
    student, teacher = folder / "student.gguf", tiny_gguf(folder / "teacher.gguf", seed=4)
    student.write_bytes(tiny.read_bytes())
    files = {file.name: {"digest": digest_file(file), "bytes": file.stat().st_size} for file in (teacher, student)}
    lineage = {"base_digest": "ab" * 32, "trim": TRIMMED, "export": {"student": "Q8_0", "teacher": "Q8_0", "files": files}}
    (folder / "lineage.json").write_text(json.dumps(lineage))
    return student, lineage


@pytest.mark.llama
def test_the_evidence_of_a_distilled_student_says_how_it_was_made_and_what_the_trim_covers(
    tiny: Path, pairs_file: PairsFile, tmp_path: Path
) -> None:
    student, _ = distilled(tiny, tmp_path)

    out, error = run("--model", student, "--pairs", pairs_file(PAIRS), "--evidence", tmp_path / "e.json", "--report", tmp_path / "e.html")

    assert error is None, out
    lineage = json.loads((tmp_path / "e.json").read_bytes())["lineage"]
    assert [step["name"] for step in lineage] == ["base model", "vocabulary trimmed", "teacher.gguf", "student.gguf"]
    assert "of 500 unseen texts 99.9% are read as before, of their tokens 98.7%" in lineage[1]["note"]
    assert lineage[1]["note"] in (tmp_path / "e.html").read_text(encoding="utf-8")


def test_a_lineage_that_does_not_lead_to_the_model_is_passed_over_and_a_damaged_one_refused(tiny: Path, tmp_path: Path) -> None:
    student, lineage = distilled(tiny, tmp_path)
    own = lineage_of(student, None)

    assert own[-1]["digest"] == digest_file(student)
    assert lineage_of(tmp_path / "teacher.gguf", None) == []
    assert lineage_of(tiny, None) == []
    assert lineage_of(student, tmp_path / "teacher.gguf")[-1] == {
        "name": "teacher.gguf", "digest": digest_file(tmp_path / "teacher.gguf"), "note": "adapter",
    }  # fmt: skip
    (tmp_path / "lineage.json").write_text(json.dumps(lineage)[:-1])
    with pytest.raises(BadInput, match=r"lineage.json is not what .* wrote .*; move it away"):
        lineage_of(student, None)


def test_a_file_with_an_equals_sign_in_its_name_is_a_file(tmp_path: Path) -> None:
    odd = tmp_path / "a=b.tsv"
    odd.write_text(PAIRS)

    assert named([str(odd), "x=y.tsv"], "--pairs") == {"a=b": str(odd), "x": "y.tsv"}
