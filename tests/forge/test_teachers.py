"""Teachers one by one: how a spec is read, what a server may do wrong, what is read once, and how teachers agree with each other."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from coordinator.forge.teachers import NoLogits, asked, open_teacher
from coordinator.forge.teachers.cost import cost_of_text_only
from coordinator.forge.teachers.server import ATTEMPTS, PAUSE_LIMIT_S, ServerTeacher
from protocol.errors import BadInput, TooLarge, Unavailable, UnknownName
from protocol.models.tokenizer import Example
from protocol.tasks import RANCH, Record, translation
from tests.forge.teaching_server import TeachingServer

FIVE = [f"soil moisture {number} %, pump dry\nen:" for number in range(5)]


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[TeachingServer]:
    with TeachingServer(tiny) as running:
        yield running


@pytest.fixture
def pauses() -> list[float]:
    return []


@pytest.fixture
def remote(server: TeachingServer, pauses: list[float]) -> Iterator[ServerTeacher]:
    teacher = ServerTeacher(server.address, pause=pauses.append, at_once=1)
    server.plan.clear()
    server.seen.clear()
    yield teacher
    server.plan.clear()
    teacher.close()


def ask(teacher: ServerTeacher, prompt: str = "agua") -> str:
    ((said,),) = teacher.generate([prompt], n=1, temperature=0.0, seed=0, max_new_tokens=3)
    return said.text


@pytest.mark.parametrize("spec", ["", "gemma", "ftp://host/v1", "google/gemma-3-270m"])
def test_a_spec_of_no_known_form_is_refused_with_the_forms(spec: str) -> None:
    with pytest.raises(UnknownName, match=r"say MODEL\.gguf, hf:FOLDER"):
        open_teacher(spec)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("nowhere.gguf", "cannot read the model file"),
        ("hf:google/gemma-3-270m", "Milpa downloads none"),
        ("hf:nowhere.gguf", "does not exist"),
        ("file:nowhere.tsv", "cannot read"),
        ("command:no-such-program-here", "no program 'no-such-program-here'"),
        ("command:", "no program"),
        ("command:'", "cannot be read"),
        ("http://", "names no server"),
        ("http://user:secret@127.0.0.1:9/v1", "leave the password out"),
    ],
)
def test_what_is_not_there_is_one_clear_line(spec: str, words: str) -> None:
    with pytest.raises(BadInput, match=words) as caught:
        open_teacher(spec)

    assert "secret" not in str(caught.value)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')

    with pytest.raises(BadInput, match="no causal model that transformers can load"):
        open_teacher(f"hf:{tmp_path}")


def test_a_refused_connection_says_what_to_do() -> None:
    with pytest.raises(Unavailable, match=r"nothing answers at .* start the server or mend the address"):
        open_teacher("http://127.0.0.1:9/v1")


def test_a_model_that_the_server_does_not_have_is_named_with_those_it_has(server: TeachingServer) -> None:
    with pytest.raises(BadInput, match="no model 'gemma'; it has: tiny"):
        open_teacher(f"{server.address}#gemma")


def test_something_that_is_no_such_api_is_told_so(server: TeachingServer) -> None:
    server.plan.append((200, {}, b"<html>"))

    with pytest.raises(BadInput, match="does not answer in JSON"):
        open_teacher(server.address)


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again_after_a_growing_pause(
    remote: ServerTeacher, server: TeachingServer, pauses: list[float], status: int
) -> None:
    server.plan += [(status, {}, b"{}")] * 3

    ask(remote)

    assert [0.25 <= pauses[0] <= 0.5, 0.5 <= pauses[1] <= 1.0, 1.0 <= pauses[2] <= 2.0] == [True] * 3


def test_a_server_that_says_when_is_asked_then_within_a_limit(remote: ServerTeacher, server: TeachingServer, pauses: list[float]) -> None:
    server.plan += [(429, {"Retry-After": "3"}, b"{}"), (429, {"Retry-After": "86400"}, b"{}")]

    ask(remote)

    assert pauses == [3.0, PAUSE_LIMIT_S]


def test_a_server_that_stays_busy_is_given_up_with_its_words(remote: ServerTeacher, server: TeachingServer, pauses: list[float]) -> None:
    server.plan += [(503, {}, b'{"error": {"message": "loading model"}}')] * ATTEMPTS

    with pytest.raises(Unavailable, match="503: loading model"):
        ask(remote)
    assert len(pauses) == ATTEMPTS - 1


def test_a_refused_request_is_not_tried_again(remote: ServerTeacher, server: TeachingServer, pauses: list[float]) -> None:
    server.plan.append((400, {}, b'{"error": {"message": "context too long"}}'))

    with pytest.raises(BadInput, match="400: context too long"):
        ask(remote)
    assert pauses == []


def test_a_refused_key_says_where_the_right_one_goes(remote: ServerTeacher, server: TeachingServer) -> None:
    server.plan.append((401, {}, b"{}"))

    with pytest.raises(BadInput, match="MILPA_TEACHER_KEY"):
        ask(remote)


def test_a_reply_over_the_limit_is_not_read_to_its_end(
    remote: ServerTeacher, server: TeachingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.forge.teachers.server.REPLY_LIMIT", 1 << 20)
    server.plan.append((200, {}, b" " * (3 << 20)))

    with pytest.raises(TooLarge, match="more than 1 MiB"):
        ask(remote)


def test_a_completion_of_another_form_is_refused(remote: ServerTeacher, server: TeachingServer) -> None:
    server.plan.append((200, {}, b'{"choices": []}'))

    with pytest.raises(BadInput, match="not of OpenAI's form"):
        ask(remote)


def test_the_models_own_distribution_is_asked_for(remote: ServerTeacher, server: TeachingServer) -> None:
    ask(remote)

    body = server.seen[0][1]
    assert (body["top_p"], body["top_k"], body["min_p"], body["repeat_penalty"], body["stop"]) == (1.0, 0, 0.0, 1.0, ["\n"])


def test_a_server_that_refuses_our_settings_is_asked_with_the_standard_ones(server: TeachingServer) -> None:
    models = b'{"data": [{"id": "tiny"}]}'
    server.plan += [(200, {}, models), (400, {}, b'{"error": {"message": "unrecognized argument: top_k"}}')]
    server.seen.clear()

    ServerTeacher(server.address).close()

    assert "top_k" in server.seen[1][1]
    assert "top_k" not in server.seen[2][1]


def test_a_server_with_another_vocabulary_tells_text_only_and_says_why(server: TeachingServer, tiny: Path) -> None:
    ids = b'{"tokens": [1, 2, 3]}'
    models = b'{"data": [{"id": "tiny"}]}'
    server.plan += [(200, {}, models), (200, {}, b"{}"), (200, {}, ids)]

    teacher = ServerTeacher(server.address, vocabulary=tiny)

    with pytest.raises(NoLogits, match=r"it does not tokenise as tiny\.gguf does"):
        teacher.score([Example([2], [1])], k=3)
    teacher.close()


def test_a_key_is_sent_and_never_shown(server: TeachingServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILPA_TEACHER_KEY", "s3cret")

    teacher = open_teacher(server.address)

    assert teacher._client.headers["Authorization"] == "Bearer s3cret"  # type: ignore[attr-defined]
    assert "s3cret" not in teacher.name
    teacher.close()


def test_a_command_reads_sources_and_a_model_reads_prompts(tmp_path: Path, server: TeachingServer) -> None:
    task = translation("English", "Spanish")
    record = Record(id="1", task=task.name, source="the cat", lang="es")
    remote = open_teacher(server.address)

    assert asked(open_teacher("command:cat"), task, [record]) == ["the cat"]
    assert asked(remote, task, [record]) == ["English: the cat\nSpanish:"]
    remote.close()


def test_a_program_that_changed_has_another_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "translate"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    digests = []
    for line in ("cat", "tr a-z A-Z"):
        program.write_text(f"#!/bin/sh\n{line}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        digests.append(open_teacher("command:translate").digest)

    assert digests[0] != digests[1]


def test_a_file_gives_its_own_answers_once_each_and_none_to_what_it_does_not_know(tmp_path: Path) -> None:
    file = tmp_path / "pairs.tsv"
    file.write_text("the water\tel agua\nthe water\tagua\nthe  water\tel agua\n", encoding="utf-8")

    answers = open_teacher(f"file:{file}").generate(["the water", "a mat"], n=4, temperature=1.0, seed=0, max_new_tokens=9)

    assert [[said.text for said in row] for row in answers] == [["el agua", "agua"], []]


def test_the_cost_of_text_only_names_what_falls_away_with_figures() -> None:
    cost = cost_of_text_only("apertium")

    assert cost.teacher == "apertium"
    assert len(cost.missing) == 3
    assert "AUC 0.66" in cost.sentence


@pytest.mark.llama
def test_a_common_beginning_is_read_once_and_changes_no_answer(tiny: Path) -> None:
    from coordinator.forge.teachers.gguf import GgufTeacher

    shown = "English: the water\nSpanish: el agua\n\n" * 3
    with GgufTeacher(tiny, slots=2) as together, GgufTeacher(tiny, slots=1) as alone:
        found = together.generate([shown + one for one in FIVE], n=1, temperature=0.0, seed=0, max_new_tokens=6)

        assert len(together._common) > 20
        expected = [alone.generate([shown + one], n=1, temperature=0.0, seed=0, max_new_tokens=6)[0] for one in FIVE]
        assert [one.text for (one,) in found] == [one.text for (one,) in expected]


@pytest.mark.llama
def test_what_is_not_of_the_next_batch_is_forgotten(tiny: Path) -> None:
    from coordinator.forge.teachers.gguf import GgufTeacher

    with GgufTeacher(tiny, slots=4) as used, GgufTeacher(tiny, slots=4) as fresh:
        used.generate(
            ["the tank is low and the pump is dry and the soil is wet " + one for one in FIVE],
            n=1,
            temperature=0.0,
            seed=0,
            max_new_tokens=6,
        )

        found = used.generate(FIVE, n=2, temperature=1.0, seed=3, max_new_tokens=6)

        assert found == fresh.generate(FIVE, n=2, temperature=1.0, seed=3, max_new_tokens=6)


@pytest.mark.llama
def test_samples_of_a_prompt_do_not_depend_on_its_company(tiny: Path) -> None:
    with_company, alone = [
        open_teacher(str(tiny)).generate(prompts, n=3, temperature=1.0, seed=7, max_new_tokens=6)[0] for prompts in (FIVE, FIVE[:1])
    ]

    assert [said.tokens for said in with_company] == [said.tokens for said in alone]


@pytest.mark.torch
def test_llama_cpp_and_torch_draw_the_same_answers_from_the_same_model(tiny: Path) -> None:
    import torch

    from coordinator.forge.teachers.hf import CheckpointTeacher

    torch_says = CheckpointTeacher(tiny, dtype=torch.float32).generate(FIVE, n=2, temperature=0.8, seed=1, max_new_tokens=6)
    llama_says = open_teacher(str(tiny)).generate(FIVE, n=2, temperature=0.8, seed=1, max_new_tokens=6)

    pairs = [(a, b) for ours, theirs in zip(torch_says, llama_says, strict=True) for a, b in zip(ours, theirs, strict=True)]
    same = [a.tokens == b.tokens for a, b in pairs]
    assert sum(same) >= 7  # of 10 answers of 6 draws: one on the edge between two tokens may fall either way
    assert max(abs((a.log_prob or 0) - (b.log_prob or 0)) for (a, b), equal in zip(pairs, same, strict=True) if equal) < 1e-2


@pytest.mark.torch
def test_open_teachers_score_as_the_capture_cached(tiny: Path, tmp_path: Path) -> None:
    import torch

    from coordinator.forge.targets.cache import TargetCache
    from coordinator.forge.targets.capture import capture, header_of
    from coordinator.forge.teachers.hf import CheckpointTeacher
    from protocol.models.checkpoint import Checkpoint
    from protocol.models.tokenizer import Tokenizer
    from protocol.models.torch_model import to_torch

    checkpoint = Checkpoint.read(tiny)
    task = translation("English", "Spanish")
    records = [Record(id=str(at), task=task.name, source=f"the tank {at} is low", target="el agua", lang="es") for at in range(6)]
    cache = TargetCache(tmp_path / "cache", header_of(checkpoint))
    with Tokenizer(tiny) as tokenizer:
        captured, _ = capture(to_torch(checkpoint), tokenizer, task, records, cache=cache, log=tmp_path / "log.jsonl", answers="given")
    examples = [Example(one.prompt, one.target) for one in captured]

    for teacher in (open_teacher(str(tiny)), CheckpointTeacher(tiny, dtype=torch.float32)):
        assert (teacher.digest, teacher.tokenizer) == (cache.header.teacher, cache.header.tokenizer)
        for example, found in zip(examples, teacher.score(examples, k=cache.header.k), strict=True):
            kept = cache.get(example)
            assert kept is not None
            assert np.abs(found.log_probs - kept.log_probs).max() < 1e-2
    assert len(examples) == len(records)


@pytest.mark.llama
def test_a_prompt_over_the_context_is_told_before_anything_is_computed(tiny: Path) -> None:
    with pytest.raises(TooLarge, match="context of 512"):
        open_teacher(str(tiny)).generate(["a b " * 600], n=1, temperature=0.0, seed=0, max_new_tokens=4)


@pytest.mark.llama
def test_the_command_tells_what_a_teacher_is_in_json(tiny: Path) -> None:
    import json

    from coordinator.cli import complete

    result = CliRunner().invoke(complete(), ["teacher", "check", str(tiny), "--json"], catch_exceptions=False)

    found = json.loads(result.stdout)
    assert (found["open"], found["costs"], len(found["answers"])) == (True, None, 3)
    assert found["tokens_per_second"] > 0


def test_the_command_tells_what_text_only_costs() -> None:
    from coordinator.cli import complete

    result = CliRunner().invoke(complete(), ["teacher", "check", "command:cat"], catch_exceptions=False)

    assert "text only: no sparse KL" in result.stderr
    assert "answers/s" in result.stderr


def test_the_ranch_task_is_asked_by_its_prompt(server: TeachingServer) -> None:
    teacher = open_teacher(server.address)

    assert asked(teacher, RANCH, [Record(id="1", task="ranch", source="tank low", lang="es")]) == ["tank low\nes:"]
    teacher.close()
