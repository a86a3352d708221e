"""A cut student is its teacher with fewer parts: right shapes, the same mathematics in torch and in llama.cpp."""

from pathlib import Path

import numpy as np
import pytest

from coordinator.forge.students.cut import PRESETS, Preset, by_influence, by_loss, cut_student, preset
from coordinator.forge.students.scratch import from_scratch
from coordinator.forge.students.width import Widths, calibrate, choose, narrowed
from protocol.errors import BadInput, UnknownName
from protocol.models.checkpoint import Checkpoint, encode_tensor
from protocol.models.tokenizer import Example
from protocol.models.torch_model import from_torch, to_torch
from protocol.models.training import mean_loss
from tests.forge.test_parity import by_llama, by_torch, ids_of, kl
from tests.tiny import tiny_checkpoint

pytestmark = [pytest.mark.llama, pytest.mark.torch]
HALF = Preset("half", blocks=6, hidden=32, feed_forward=64, heads=1)


@pytest.fixture
def examples() -> list[Example]:
    random = np.random.default_rng(0)
    return [
        Example([2, *random.integers(260, 400, size=7 + i % 5).tolist()], [*random.integers(260, 400, size=4).tolist(), 1])
        for i in range(24)
    ]


def test_a_cut_student_has_its_presets_figures_and_agrees_with_llama(eight: Path, examples: list[Example], tmp_path: Path) -> None:
    student, report = cut_student(Checkpoint.read(eight), HALF, examples)
    student.write(tmp_path / "student.gguf")
    ids = ids_of(eight)

    assert (student.blocks, Widths.of(student)) == (6, HALF.widths)
    assert len(report["kept"]) == 6
    assert kl(by_torch(to_torch(student), ids), by_llama(tmp_path / "student.gguf", ids)) < 1e-5


def test_keeping_every_width_changes_nothing(eight: Path, examples: list[Example]) -> None:
    teacher = Checkpoint.read(eight)
    found = calibrate(to_torch(teacher), examples)

    same = narrowed(teacher, found, choose(found, Widths.of(teacher)))

    np.testing.assert_allclose(by_torch(to_torch(same), ids_of(eight)), by_torch(to_torch(teacher), ids_of(eight)), atol=1e-4)


def hollow() -> Checkpoint:
    """Every second channel, the first half of the neurons and the second head do nothing."""
    teacher = tiny_checkpoint(layers=2)
    tensors = dict(teacher.tensors)
    for name in tensors:
        weight = teacher.array(name).copy()
        if name == "token_embd.weight":
            weight[:, ::2] = 0
        elif name.endswith(("attn_output.weight", "ffn_down.weight")):
            weight[::2] = 0
        elif name.endswith("attn_norm.weight"):
            weight[::2] = 0  # as real models have it: a norm that blots a channel out
        if name.endswith("attn_output.weight"):
            weight[:, 32:] = 0
        if name.endswith("ffn_up.weight"):
            weight[:64] = 0
        tensors[name] = encode_tensor(weight, "F32")
    return teacher.with_tensors(tensors)


def test_parts_that_do_nothing_go_first(examples: list[Example]) -> None:
    found = calibrate(to_torch(hollow()), examples)

    kept = choose(found, Widths(hidden=32, feed_forward=64, heads=1))

    assert kept.channels.tolist() == list(range(1, 64, 2))
    assert all(block.tolist() == list(range(64, 128)) for block in kept.neurons)
    assert all(block.tolist() == [0] for block in kept.heads)


def test_parts_that_do_nothing_are_not_missed(examples: list[Example]) -> None:
    """Norms and embedding are corrected for the channels that went, so the logits are the same to half precision."""
    teacher, ids = hollow(), [*examples[0].prompt, *examples[0].target]
    found = calibrate(to_torch(teacher), examples)

    cut = narrowed(teacher, found, choose(found, Widths(hidden=32, feed_forward=64, heads=1)))

    np.testing.assert_allclose(by_torch(to_torch(cut), ids), by_torch(to_torch(teacher), ids), atol=2e-2)


def test_a_block_keeps_its_kind_where_it_can() -> None:
    influence = [0.9, 0.1, 0.1, 0.2, 0.8, 0.01, 0.7, 0.3, 0.3, 0.3, 0.1, 0.2]  # 5 and 11 are global

    assert by_influence(influence, 6, same_kind=False) == (0, 4, 6, 7, 8, 9)
    assert by_influence(influence, 6) == (0, 4, 6, 7, 8, 11)
    assert by_influence(influence, 12) == tuple(range(12))


def test_the_block_that_the_loss_misses_least_goes_first(tiny: Path, examples: list[Example]) -> None:
    teacher = Checkpoint.read(tiny)
    alone = [mean_loss(to_torch(teacher.keep_blocks([block])), examples) for block in (0, 1)]

    kept, losses = by_loss(to_torch(teacher), examples, 1)

    assert kept == (int(np.argmin(alone)),)
    assert losses == [pytest.approx(min(alone), abs=1e-5)]


def test_more_blocks_than_there_are_is_refused() -> None:
    with pytest.raises(BadInput, match="1 to 2 blocks"):
        by_influence([0.1, 0.2], 3)


def test_a_student_wider_than_its_teacher_is_refused(tiny: Path, examples: list[Example]) -> None:
    with pytest.raises(BadInput, match="1 to 64 residual channels"):
        cut_student(Checkpoint.read(tiny), Preset("wide", blocks=2, hidden=128, feed_forward=64, heads=1), examples)


def test_heads_that_do_not_divide_the_width_are_refused(tiny: Path, examples: list[Example]) -> None:
    with pytest.raises(BadInput, match="3 heads do not divide"):
        cut_student(Checkpoint.read(tiny), Preset("odd", blocks=2, hidden=64, feed_forward=64, heads=3), examples, blocks=(0, 1))


def test_a_cut_needs_examples_to_calibrate_on(tiny: Path) -> None:
    with pytest.raises(BadInput, match="needs examples"):
        cut_student(Checkpoint.read(tiny), HALF, [])


def test_an_unknown_preset_is_told_the_known_ones() -> None:
    with pytest.raises(UnknownName, match="nano, small, tiny"):
        preset("smal")


def test_a_shape_is_spelled_out_as_blocks_width_feed_forward_and_heads() -> None:
    assert preset("12x512x1024x2") == Preset("12x512x1024x2", blocks=12, hidden=512, feed_forward=1024, heads=2)


@pytest.mark.parametrize("shape", ["12x500x1024x2", "12x512x1000x2", "0x512x1024x2", "12x512x1024x0"])
def test_a_shape_whose_rows_no_file_type_takes_is_refused(shape: str) -> None:
    with pytest.raises(BadInput, match="multiples of 256"):
        preset(shape)


def test_the_same_examples_make_the_same_student(eight: Path, examples: list[Example], tmp_path: Path) -> None:
    for name in ("one", "two"):
        cut_student(Checkpoint.read(eight), HALF, examples)[0].write(tmp_path / name)

    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_student_from_scratch_has_its_presets_figures_and_agrees_with_llama(eight: Path, tmp_path: Path) -> None:
    student = from_scratch(Checkpoint.read(eight), HALF, seed=1)
    student.write(tmp_path / "student.gguf")
    ids = ids_of(eight)

    assert (student.blocks, Widths.of(student)) == (6, HALF.widths)
    assert kl(by_torch(to_torch(student), ids), by_llama(tmp_path / "student.gguf", ids)) < 1e-5


def test_a_student_from_scratch_is_sure_of_nothing(tiny: Path) -> None:
    student = from_scratch(Checkpoint.read(tiny), HALF, seed=1)

    logits = by_torch(to_torch(student), ids_of(tiny))

    assert logits.std() < 1.0


def test_a_trained_embedding_is_written_when_asked_for_and_kept_as_stored_otherwise(tiny: Path) -> None:
    teacher = Checkpoint.read(tiny)
    model = to_torch(teacher)
    model.model.embed_tokens.weight.mul_(2.0)

    kept, written = from_torch(model, teacher), from_torch(model, teacher, embedding="F32")

    np.testing.assert_array_equal(kept.array("token_embd.weight"), teacher.array("token_embd.weight"))
    np.testing.assert_allclose(written.array("token_embd.weight"), 2.0 * teacher.array("token_embd.weight"))


def test_the_presets_are_those_that_were_promised() -> None:
    assert {name: (one.blocks, one.hidden) for name, one in PRESETS.items()} == {"nano": (4, 256), "tiny": (6, 512), "small": (12, 512)}
