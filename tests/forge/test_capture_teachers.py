"""A cache filled by teachers other than a Gemma 3 in torch: llama.cpp, a transformers folder, a server that scores by token ids."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np
import pytest
import torch

from coordinator.commands.capture import capture as command
from coordinator.forge.targets.cache import TargetCache, Targets
from coordinator.forge.targets.capture import capture, captured_in, examples_of, header_from, header_of
from coordinator.forge.targets.score import score
from coordinator.forge.teachers import NoLogits, model_file, open_teacher
from protocol.digests import digest_file
from protocol.errors import BadInput
from protocol.models.checkpoint import Checkpoint
from protocol.models.tokenizer import Tokenizer, make_example
from protocol.models.torch_model import to_torch
from protocol.tasks import RANCH, Record
from tests.forge.calling import called
from tests.forge.teaching_server import TeachingServer
from tests.forge.tiny_folder import tiny_folder
from tests.tiny import tiny_checkpoint, tiny_vocabulary

pytestmark = [pytest.mark.torch, pytest.mark.llama]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def llama_gguf(path: Path, *, words: list[str] | None = None) -> Path:
    """A model of the Llama architecture with the tiny model's vocabulary, or one of other words: what we cannot compute in torch."""
    chance, made = np.random.default_rng(5), tiny_checkpoint()
    vocabulary = tiny_vocabulary(words)
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in {"context_length": 512, "embedding_length": 64, "block_count": 1, "feed_forward_length": 128}.items():
        writer.add_uint32(f"llama.{name}", value)
    writer.add_uint32("llama.attention.head_count", 2)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-6)
    for name, entry in made.metadata.items():
        if name.startswith("tokenizer."):
            writer.add_key_value(name, entry.value, entry.kind)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_scores(vocabulary.scores.tolist())
    writer.add_token_types(vocabulary.types.tolist())
    shapes = {
        "token_embd": (len(vocabulary.tokens), 64),
        "blk.0.ffn_gate": (128, 64),
        "blk.0.ffn_up": (128, 64),
        "blk.0.ffn_down": (64, 128),
    }
    shapes |= {f"blk.0.attn_{name}": (64, 64) for name in ("q", "k", "v", "output")}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", chance.standard_normal(shape, dtype=np.float32) * 0.1)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(64, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_gguf(tmp_path_factory.mktemp("llama") / "llama.gguf")


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tiny, tmp_path_factory.mktemp("folder"))


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[TeachingServer]:
    with TeachingServer(tiny) as running:
        yield running


@pytest.fixture
def task(records: Callable[[int], list[Record]], tmp_path: Path) -> list[str]:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"".join(msgspec.json.encode(record) + b"\n" for record in records(5)))
    return ["--task", "ranch", "--records", str(path), "--out", str(tmp_path / "cache"), "--k", "20"]


def run(*arguments: object) -> dict[str, Any]:
    return called(command, *arguments)


def test_any_gguf_fills_a_cache_through_llama_cpp_and_goes_on(llama: Path, task: list[str], tmp_path: Path) -> None:
    first = run("--teacher", llama, *task, "--limit", 3)
    second = run("--teacher", llama, *task)

    assert (first["records"], second["records"], second["given"], second["again"]) == (3, 5, 1.0, 0)
    teacher = open_teacher(str(llama))
    with TargetCache.open(tmp_path / "cache") as cache, Tokenizer(llama) as text:
        assert (cache.header.teacher, cache.header.tokenizer, cache.header.mode) == (digest_file(llama), text.digest, "topk")
        examples = examples_of(captured_in(tmp_path / "cache"))
        assert len(examples) == len(cache) == 5
        for example, expected in zip(examples, teacher.score(examples, k=20), strict=True):
            found = cache.get(example)
            assert isinstance(found, Targets)
            assert np.abs(found.log_probs - expected.log_probs).max() < 2e-2
    teacher.close()


@pytest.mark.parametrize("which", ["folder", "server"])
def test_a_folder_and_a_server_fill_a_cache_in_the_students_ids(
    which: str, tiny: Path, folder: Path, server: TeachingServer, task: list[str], tmp_path: Path, records: Callable[[int], list[Record]]
) -> None:
    run("--teacher", f"hf:{folder}" if which == "folder" else server.address, "--vocabulary", tiny, *task)

    checkpoint = Checkpoint.read(tiny)
    with Tokenizer(tiny) as tokenizer, TargetCache.open(tmp_path / "cache") as cache:
        examples = [make_example(tokenizer, RANCH, record) for record in records(5)]
        assert (cache.header.tokenizer, cache.header.vocabulary) == (tokenizer.digest, tokenizer.size)
        for example, expected in zip(examples, score(to_torch(checkpoint), examples, k=20), strict=True):
            found = cache.get(example)
            assert isinstance(found, Targets)
            assert np.abs(found.log_probs - expected.log_probs).max() < (0.2 if which == "folder" else 1e-2)  # the folder's is bfloat16


def test_a_table_padded_by_rows_that_nobody_says_is_the_same_vocabulary(folder: Path, tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(model.config.vocab_size + 64)
    model.save_pretrained(tmp_path / "padded")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "padded")

    teacher = open_teacher(f"hf:{tmp_path / 'padded'}", vocabulary=tiny)
    with Tokenizer(tiny) as tokenizer:
        example = make_example(tokenizer, RANCH, Record(id="a", task="ranch", source="soil low", target="leak: the tank", verdict="leak"))
        size = tokenizer.size
        assert (teacher.tokenizer, teacher.vocabulary) == (tokenizer.digest, size)

    (found,) = teacher.score([example], k=size)
    assert found.ids.max() < size
    assert np.exp(found.log_probs).sum(-1) == pytest.approx(1.0, abs=1e-3)
    teacher.close()


def test_answers_of_an_open_teacher_are_those_of_the_torch_model_and_pass_the_same_gate(taught: Path, tmp_path: Path) -> None:
    asked = [
        Record(id="a", task="ranch", source="soil low", target="leak: seen", verdict="leak"),
        Record(id="b", task="ranch", source="soil low", target="normal: all is well", verdict="normal"),
        Record(id="c", task="ranch", source="soil low"),
    ]
    checkpoint, teacher = Checkpoint.read(taught), open_teacher(str(taught))
    caches = TargetCache(tmp_path / "llama.cpp", header_from(teacher, k=20)), TargetCache(tmp_path / "torch", header_of(checkpoint, k=20))

    with Tokenizer(taught) as tokenizer:
        told = [
            capture(one, tokenizer, RANCH, asked, cache=cache, log=cache.folder / "log.jsonl")[0]
            for one, cache in zip((teacher, to_torch(checkpoint)), caches, strict=True)
        ]

    assert caches[0].header == caches[1].header
    assert told[0] == told[1]
    assert [one.kind for one in told[0]] == ["teacher", "own", "teacher"]
    for example in examples_of(told[0]):
        views = [cache.get(example) for cache in caches]
        assert (views[0] is None) == (views[1] is None)
        if isinstance(views[0], Targets) and isinstance(views[1], Targets):
            np.testing.assert_allclose(views[0].log_probs, views[1].log_probs, rtol=2e-2, atol=2e-2)
    teacher.close()


@pytest.mark.parametrize("more", [["--mode", "sampled"], ["--mode", "hidden8"], ["--temperature", "2"]], ids=lambda more: more[-1])
def test_what_only_a_whole_distribution_gives_is_refused_of_others(llama: Path, task: list[str], more: list[str], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="take --mode topk without --temperature, or a Gemma 3 GGUF"):
        run("--teacher", llama, *task, *more)
    assert not (tmp_path / "cache").exists()


def test_a_teacher_that_tells_text_only_is_refused_with_what_that_costs(task: list[str]) -> None:
    with pytest.raises(NoLogits, match=r"no sparse KL.*It can still write targets"):
        run("--teacher", "command:tr a-z A-Z", *task)


def test_a_folder_or_a_server_without_the_students_vocabulary_is_refused(folder: Path, server: TeachingServer, task: list[str]) -> None:
    for spec in (f"hf:{folder}", server.address):
        with pytest.raises(BadInput, match=r"say --vocabulary STUDENT\.gguf"):
            run("--teacher", spec, *task)


def test_a_teacher_of_another_vocabulary_is_refused_with_what_to_do(
    tiny: Path, llama: Path, folder: Path, server: TeachingServer, task: list[str], tmp_path: Path
) -> None:
    student = llama_gguf(tmp_path / "student.gguf", words=["other", "words", "make", "other", "pieces", "here"])

    for spec in (str(tiny), str(llama)):
        with pytest.raises(BadInput, match=r"student\.gguf has another vocabulary than .*milpa-coordinator synthesise"):
            run("--teacher", spec, "--vocabulary", student, *task)
    with pytest.raises(BadInput, match=r"means '.*' by id \d+, student\.gguf '.*synthesise"):
        run("--teacher", f"hf:{folder}", "--vocabulary", student, *task)
    with pytest.raises(NoLogits, match=r"it does not tokenise as student\.gguf does"):
        run("--teacher", server.address, "--vocabulary", student, *task)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("spec", "file"),
    [
        ("a/b.gguf", "a/b.gguf"), ("hf:a/b.gguf", "a/b.gguf"), ("hf:a", None), ("http://host/v1#b.gguf", None),
        ("command:run b.gguf", None), ("file:b.gguf", None),
    ],
)  # fmt: skip
def test_only_a_gguf_brings_its_own_vocabulary(spec: str, file: str | None) -> None:
    assert model_file(spec) == (None if file is None else Path(file))
