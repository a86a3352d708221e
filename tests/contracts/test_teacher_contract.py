"""What every teacher keeps: one suite, one subclass per implementation. Open teachers keep more."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import httpx
import numpy as np
import pytest

from coordinator.forge.teachers import NoLogits, Teacher, open_teacher
from protocol.errors import BadInput, Unavailable
from protocol.models.tokenizer import Example, Tokenizer
from tests.forge.teaching_server import TeachingServer
from tests.tiny import tiny_gguf

PROMPTS = ["soil moisture 12 %, pump dry since 3 hours\nen:", "the tank is low\nes:", "agua, agua\nen:"]
TOKENS = 10


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf(tmp_path_factory.mktemp("teachers") / "tiny.gguf", layers=6)  # one global block, five local ones


class TeacherContract:
    """The suite. A subclass says which teacher, and which prompts it is asked."""

    prompts: ClassVar[list[str]] = PROMPTS

    @pytest.fixture
    def teacher(self) -> Iterator[Teacher]:
        raise NotImplementedError

    def ask(self, teacher: Teacher, **figures: Any) -> list[list[Any]]:
        asked = {"n": 1, "temperature": 0.0, "seed": 0, "max_new_tokens": TOKENS} | figures
        return teacher.generate(self.prompts, **asked)

    def test_every_prompt_gets_an_answer_of_one_line(self, teacher: Teacher) -> None:
        answers = self.ask(teacher)

        assert [len(said) for said in answers] == [1] * len(self.prompts)
        assert all("\n" not in said.text for (said,) in answers)

    def test_greedy_answers_repeat(self, teacher: Teacher) -> None:
        assert [said.text for (said,) in self.ask(teacher)] == [said.text for (said,) in self.ask(teacher)]

    def test_samples_repeat_with_their_seed(self, teacher: Teacher) -> None:
        first, second = (self.ask(teacher, n=3, temperature=1.0, seed=5) for _ in range(2))

        assert [[said.text for said in row] for row in first] == [[said.text for said in row] for row in second]

    def test_it_names_itself_and_its_digest(self, teacher: Teacher) -> None:
        assert teacher.name
        assert len(teacher.digest) == 64

    @pytest.mark.parametrize("wrong", [{"n": 0}, {"n": 2}, {"max_new_tokens": 0}, {"n": 1, "temperature": -1.0}])
    def test_figures_that_cannot_be_are_bad_input(self, teacher: Teacher, wrong: dict[str, Any]) -> None:
        with pytest.raises(BadInput):
            self.ask(teacher, **wrong)

    def test_an_empty_prompt_is_bad_input(self, teacher: Teacher) -> None:
        with pytest.raises(BadInput, match="empty"):
            teacher.generate([""], n=1, temperature=0.0, seed=0, max_new_tokens=TOKENS)

    def test_nothing_asked_is_nothing_answered(self, teacher: Teacher) -> None:
        assert teacher.generate([], n=1, temperature=0.0, seed=0, max_new_tokens=TOKENS) == []

    def test_it_closes_twice(self, teacher: Teacher) -> None:
        teacher.close()
        teacher.close()


class SamplingContract(TeacherContract):
    """Of teachers that are language models."""

    def test_n_samples_are_n_answers_and_not_all_the_same(self, teacher: Teacher) -> None:
        answers = self.ask(teacher, n=4, temperature=1.5, seed=1)

        assert [len(said) for said in answers] == [4] * len(self.prompts)
        assert len({said.text for said in answers[0]}) > 1

    def test_another_seed_gives_other_samples(self, teacher: Teacher) -> None:
        first, second = (self.ask(teacher, n=4, temperature=1.5, seed=seed) for seed in (1, 2))

        assert [said.text for said in first[0]] != [said.text for said in second[0]]

    def test_greedy_answers_are_those_of_the_engine(self, teacher: Teacher, tiny: Path) -> None:
        from protocol.models.engine import Engine

        with Engine(tiny, context=256) as engine:
            expected = [engine.generate(prompt, max_new_tokens=TOKENS).text.strip() for prompt in self.prompts]

        assert [said.text.strip() for (said,) in self.ask(teacher)] == expected


class OpenContract(SamplingContract):
    """Of teachers that give ids and log-probabilities."""

    @pytest.fixture
    def examples(self, tiny: Path) -> list[Example]:
        with Tokenizer(tiny) as tokenizer:
            return [
                Example(tokenizer.encode(prompt, bos=True), [*tokenizer.encode(target, bos=False), tokenizer.eos])
                for prompt, target in zip(PROMPTS, (" leak: the tank is low", " normal", " todo en orden, sin fuga"), strict=True)
            ]

    def test_it_is_open_and_names_the_vocabulary(self, teacher: Teacher, tiny: Path) -> None:
        with Tokenizer(tiny) as tokenizer:
            assert (teacher.open, teacher.tokenizer, teacher.vocabulary) == (True, tokenizer.digest, tokenizer.size)

    def test_what_it_said_has_the_log_probability_that_it_scores(self, teacher: Teacher, tiny: Path) -> None:
        said = [one for row in self.ask(teacher, n=2, temperature=1.0, seed=3) for one in row]
        with Tokenizer(tiny) as tokenizer:
            examples = [Example(tokenizer.encode(self.prompts[at // 2], bos=True), list(one.tokens)) for at, one in enumerate(said)]

        scored = [float(values.sum()) for values in teacher.log_probs(examples)]

        assert scored == pytest.approx([one.log_prob for one in said], abs=1e-2)

    def test_scores_are_those_of_the_torch_model_within_a_hundredth_of_a_nat(
        self, teacher: Teacher, examples: list[Example], tiny: Path
    ) -> None:
        from coordinator.forge.targets.score import score
        from protocol.models.checkpoint import Checkpoint
        from protocol.models.torch_model import to_torch

        expected = score(to_torch(Checkpoint.read(tiny)), examples, k=10)

        for found, wanted in zip(teacher.score(examples, k=10), expected, strict=True):
            assert found.ids.shape == wanted.ids.shape
            assert np.abs(found.log_probs - wanted.log_probs).max() < 1e-2  # of the same rank: two near ones may change places
            assert np.abs(found.tail - wanted.tail).max() < 1e-2

    def test_the_top_and_the_tail_hold_all_mass(self, teacher: Teacher, examples: list[Example]) -> None:
        for found in teacher.score(examples, k=7):
            assert np.exp(found.log_probs).sum(-1) + np.exp(found.tail) == pytest.approx(1.0, abs=1e-4)

    def test_an_example_scores_the_same_alone_and_in_company(self, teacher: Teacher, examples: list[Example]) -> None:
        together = teacher.log_probs(examples)

        for example, values in zip(examples, together, strict=True):
            assert teacher.log_probs([example])[0] == pytest.approx(values, abs=1e-2)

    def test_ids_of_another_vocabulary_are_bad_input(self, teacher: Teacher) -> None:
        with pytest.raises(BadInput):
            teacher.score([Example([2, 10_000_000], [1])], k=3)


class TextOnlyContract(TeacherContract):
    """Of teachers that tell text and nothing else."""

    def test_it_says_so_and_names_no_vocabulary(self, teacher: Teacher) -> None:
        assert (teacher.open, teacher.tokenizer, teacher.vocabulary) == (False, "", 0)
        assert all(said.tokens is None and said.log_prob is None for row in self.ask(teacher) for said in row)

    @pytest.mark.parametrize("call", ["score", "log_probs"])
    def test_log_probabilities_are_refused_with_what_that_costs(self, teacher: Teacher, call: str) -> None:
        with pytest.raises(NoLogits, match=r"no sparse KL.*no on-policy scoring.*no teacher log-probability"):
            teacher.score([Example([2], [1])], k=3) if call == "score" else teacher.log_probs([Example([2], [1])])


@pytest.mark.llama
class TestGguf(OpenContract):
    @pytest.fixture
    def teacher(self, tiny: Path) -> Iterator[Teacher]:
        teacher = open_teacher(str(tiny))
        yield teacher
        teacher.close()


@pytest.mark.torch
class TestCheckpointInTorch(OpenContract):
    @pytest.fixture
    def teacher(self, tiny: Path) -> Iterator[Teacher]:
        import torch

        from coordinator.forge.teachers.hf import CheckpointTeacher

        teacher = CheckpointTeacher(tiny, dtype=torch.float32)
        yield teacher
        teacher.close()


@pytest.mark.torch
class TestTransformersFolder(OpenContract):
    """The tiny model saved by transformers, with a tokenizer that has the same pieces."""

    @pytest.fixture(scope="class")
    def folder(self, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        from tests.forge.tiny_folder import tiny_folder

        return tiny_folder(tiny, tmp_path_factory.mktemp("folder"))

    @pytest.fixture
    def teacher(self, folder: Path) -> Iterator[Teacher]:
        import torch

        from coordinator.forge.teachers.hf import FolderTeacher

        teacher = FolderTeacher(folder, dtype=torch.float32)
        yield teacher
        teacher.close()


@pytest.mark.llama
class TestLlamaCppServer(SamplingContract, TextOnlyContract):
    """A real llama.cpp server process on loopback."""

    @pytest.fixture(scope="class")
    def address(self, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
        log = tmp_path_factory.mktemp("server") / "log"  # a file: a full pipe would stop the server
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [
            sys.executable, "-m", "llama_cpp.server", "--model", str(tiny), "--model_alias", "tiny", "--n_ctx", "256", "--n_threads", "1",
            "--host", "127.0.0.1", "--port", str(port),
        ]  # fmt: skip
        with log.open("wb") as said:
            server = subprocess.Popen(command, stdout=said, stderr=said, env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            deadline = time.monotonic() + 120
            while True:
                assert server.poll() is None, log.read_text()[-500:]
                assert time.monotonic() < deadline, "the server did not start"
                try:
                    httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=5)
                    break
                except httpx.TransportError:
                    time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            server.wait(20)

    @pytest.fixture
    def teacher(self, address: str, tiny: Path) -> Iterator[Teacher]:
        teacher = open_teacher(f"{address}#tiny", vocabulary=tiny)
        yield teacher
        teacher.close()


@pytest.mark.llama
class TestServerWithTokenIds(OpenContract):
    """A server that scores by token ids, as vLLM does; its model is the tiny GGUF."""

    @pytest.fixture(scope="class")
    def address(self, tiny: Path) -> Iterator[str]:
        with TeachingServer(tiny) as server:
            yield server.address

    @pytest.fixture
    def teacher(self, address: str, tiny: Path) -> Iterator[Teacher]:
        teacher = open_teacher(address, vocabulary=tiny)
        yield teacher
        teacher.close()


class TestProgram(TextOnlyContract):
    @pytest.fixture
    def teacher(self) -> Teacher:
        return open_teacher("command:tr a-z A-Z")


@pytest.mark.skipif(
    shutil.which("apertium") is None and not os.environ.get("CI"), reason="apertium is missing: sudo apt-get install apertium-eng-spa"
)
class TestApertium(TextOnlyContract):
    prompts: ClassVar[list[str]] = ["The cat sleeps.", "The pump is dry", "Where is the water?"]

    @pytest.fixture
    def teacher(self) -> Teacher:
        return open_teacher("command:apertium -u eng-spa")


class TestFileOfPairs(TextOnlyContract):
    prompts: ClassVar[list[str]] = ["the cat", "the water"]

    @pytest.fixture
    def teacher(self, tmp_path: Path) -> Teacher:
        file = tmp_path / "pairs.tsv"
        file.write_text("the cat\tel gato\nthe water\tel agua\nthe water\tagua\n", encoding="utf-8")
        return open_teacher(f"file:{file}")


@pytest.mark.llama
def test_a_closed_model_says_so(tiny: Path) -> None:
    teacher = open_teacher(str(tiny))
    teacher.close()

    with pytest.raises(Unavailable, match="closed"):
        teacher.generate(["a"], n=1, temperature=0.0, seed=0, max_new_tokens=1)
