"""A damaged model file is one clear line, and llama.cpp never sees it."""

import struct
from pathlib import Path

import pytest
from gguf.constants import GGML_QUANT_SIZES

from protocol.errors import BadInput, MalformedMessage, MilpaError, TooLarge
from protocol.models.header import BLOCKS, check_file, read
from tests.node.conftest import write_adapter
from tests.tiny import tiny_gguf


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return tiny_gguf(tmp_path_factory.mktemp("header") / "tiny.gguf").read_bytes()


def number(model: bytes, key: str, value: int) -> bytes:
    """The model with another 32-bit figure."""
    at = model.index(key.encode()) + len(key) + 4
    return model[:at] + struct.pack("<I", value) + model[at + 4 :]


def test_a_whole_model_and_a_whole_adapter_are_told(model: bytes, tmp_path: Path) -> None:
    adapter = check_file(write_adapter(tmp_path / "a.gguf"))
    found = read(model, what="tiny")

    assert (found.architecture, found.kind, found.figures["gemma3.block_count"]) == ("gemma3", "model", 2)
    assert found.tensors["blk.0.ffn_down.weight"] == (128, 64)
    assert (adapter.kind, adapter.figures["adapter.type"]) == ("adapter", "lora")


def test_a_file_cut_anywhere_is_refused(model: bytes) -> None:
    for length in (*range(0, 4_000, 7), *range(4_000, len(model), 997), len(model) - 1):
        with pytest.raises(MilpaError):
            read(model[:length], what="cut")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda model: b"GGML" + model[4:], "not a GGUF"),
        (lambda model: model[:4] + struct.pack("<I", 99) + model[8:], "version 99"),
        (lambda model: model[:8] + struct.pack("<Q", 1 << 60) + model[16:], "limits"),
        (lambda model: model.replace("▁moisture".encode(), "▁moistur\0".encode(), 1), "a piece twice"),
        (lambda model: model.replace(b"<0xBA>", b"<0xBB>", 1), "a piece twice"),
        (lambda model: model.replace(b"blk.1.ffn_up.weight", b"blk.0.ffn_up.weight", 1), "'blk.0.ffn_up.weight' is there twice"),
        (lambda model: number(model, "gemma3.attention.head_count", 0), "head_count is 0"),
        (lambda model: number(model, "gemma3.block_count", 0xFFFFFFFF), "block_count"),
        (lambda model: number(model, "tokenizer.ggml.bos_token_id", 1 << 20), "bos token"),
        (lambda model: model.replace(b"general.architecture", b"general.Architecture", 1), "no architecture"),
    ],
)  # fmt: skip
def test_what_llama_cpp_takes_for_granted_is_looked_at(model: bytes, damage: object, says: str) -> None:
    spoiled = damage(model)  # type: ignore[operator]
    assert spoiled != model

    with pytest.raises((MalformedMessage, TooLarge), match=says):
        read(spoiled, what="spoiled")


@pytest.mark.llama
def test_a_spoiled_piece_that_ends_llama_cpp_is_an_error_of_ours(model: bytes, tmp_path: Path) -> None:
    from protocol.models.engine import Engine

    (tmp_path / "spoiled.gguf").write_bytes(model.replace(b"<0xBA>", b"<0xBB>", 1))

    with pytest.raises(BadInput, match="a piece twice; fetch the file again"):
        Engine(tmp_path / "spoiled.gguf")  # without the check this ends the process: GGML_ASSERT(id_to_token.size() == token_to_id.size())


def test_the_table_of_types_is_ggml_s() -> None:
    theirs = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}

    assert {kind: theirs[kind] for kind in BLOCKS} == BLOCKS
