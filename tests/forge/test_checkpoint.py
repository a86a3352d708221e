"""GGUF files as values."""

from pathlib import Path

import gguf
import numpy as np
import pytest

from protocol.errors import BadInput, MalformedMessage, UnknownName
from protocol.models.checkpoint import Checkpoint, encode_tensor, quantise
from tests.tiny import tiny_checkpoint, tiny_gguf


def test_a_file_read_and_written_again_is_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    Checkpoint.read(tiny).write(tmp_path / "again.gguf")

    assert (tmp_path / "again.gguf").read_bytes() == tiny.read_bytes()


def test_the_tiny_model_depends_on_its_seed_and_on_nothing_else(tiny: Path, tmp_path: Path) -> None:
    same, other = tiny_gguf(tmp_path / "same.gguf"), tiny_gguf(tmp_path / "other.gguf", seed=1)

    assert same.read_bytes() == tiny.read_bytes()
    assert other.read_bytes() != tiny.read_bytes()


def test_kept_blocks_are_renumbered_and_the_count_follows() -> None:
    whole = tiny_checkpoint(layers=4)

    cut = whole.keep_blocks([0, 3])

    assert cut.blocks == 2
    np.testing.assert_array_equal(cut.array("blk.1.ffn_up.weight"), whole.array("blk.3.ffn_up.weight"))
    assert not any(name.startswith("blk.2.") for name in cut.tensors)


@pytest.mark.parametrize("keep", [[], [1, 0], [0, 0], [0, 4], [-1]])
def test_blocks_that_do_not_rise_within_the_model_are_refused(keep: list[int]) -> None:
    with pytest.raises(BadInput, match="0 to 3"):
        tiny_checkpoint(layers=4).keep_blocks(keep)


def test_a_matrix_keeps_its_shape_under_quantisation(tmp_path: Path) -> None:
    source = tiny_gguf(tmp_path / "half.gguf")

    quantise(source, tmp_path / "small.gguf", "Q8_0")

    small = Checkpoint.read(tmp_path / "small.gguf")
    assert small.tensors["blk.0.ffn_up.weight"].kind == gguf.GGMLQuantizationType.Q8_0
    assert dict(small.matrices()) == dict(Checkpoint.read(source).matrices())
    np.testing.assert_allclose(small.array("blk.0.ffn_up.weight"), Checkpoint.read(source).array("blk.0.ffn_up.weight"), atol=0.01)


def test_rows_that_no_block_divides_are_refused() -> None:
    with pytest.raises(BadInput, match="33"):
        encode_tensor(np.zeros((2, 33), dtype=np.float32), "Q8_0")


def test_what_is_no_model_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("hello, I am not a model at all, but long enough to be looked at")

    with pytest.raises(MalformedMessage, match=r"text\.gguf"):
        Checkpoint.read(tmp_path / "text.gguf")
    with pytest.raises(BadInput, match="does not exist"):
        Checkpoint.read(tmp_path / "none.gguf")
    with pytest.raises(UnknownName, match="Q9"):
        quantise(tmp_path / "text.gguf", tmp_path / "out.gguf", "Q9")
    with pytest.raises(BadInput, match="cannot quantise"):
        quantise(tmp_path / "text.gguf", tmp_path / "out.gguf", "Q8_0")
    assert [path.name for path in tmp_path.iterdir()] == ["text.gguf"]
