"""What a node loads is what was trained, to a stated tolerance for each type."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from coordinator.forge.students.export import KINDS, Stored, export, stored
from coordinator.forge.students.importance import importance
from coordinator.forge.students.ternary import make_ternary, settle
from protocol.errors import BadInput, NotEnough, UnknownName
from protocol.models import lora
from protocol.models.checkpoint import TERNARY_KINDS, Checkpoint, quantise
from protocol.models.tokenizer import Example, Tokenizer, make_example
from protocol.models.torch_model import embed, from_torch, hidden_states, to_torch
from protocol.tasks import RANCH, Record
from tests.forge.test_parity import by_llama, by_torch, ids_of, kl
from tests.tiny import tiny_checkpoint

pytestmark = [pytest.mark.torch, pytest.mark.llama]

# Mean KL in nats of llama.cpp's logits from torch's, random weights of a tiny model. `packing`: from torch with the file's own weights, so
# all that is between them is 8-bit activations. `whole`: from torch with the weights before, so the type's rounding too.
# Three times what was measured.
TOLERANCES = {
    #          packing  whole
    "F16": (2e-6, 2e-6),
    "Q8_0": (2e-4, 5e-4),
    "Q6_K": (5e-4, 4e-3),
    "Q5_K_M": (5e-4, 8e-3),
    "Q5_0": (3e-4, 0.012),
    "Q4_K_M": (5e-4, 0.03),
    "IQ4_NL": (3e-4, 0.04),
    "Q4_0": (3e-4, 0.05),
    "Q3_K_M": (5e-4, 0.07),
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def examples(wide: Checkpoint, records: Callable[[int], list[Record]]) -> list[Example]:
    assert wide.path
    with Tokenizer(wide.path) as tokenizer:
        return [make_example(tokenizer, RANCH, record) for record in records(12)]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in TERNARY_KINDS])
def test_a_file_of_every_kind_computes_what_torch_computes(wide: Checkpoint, tmp_path: Path, kind: str) -> None:
    assert wide.path
    ids = ids_of(wide.path)

    _, small = export(wide, tmp_path, name="student", kind=kind)

    answered = by_llama(small, ids)
    packing, whole = TOLERANCES[kind]
    assert kl(by_torch(to_torch(Checkpoint.read(small)), ids), answered) < packing
    assert kl(by_torch(to_torch(wide), ids), answered) < whole


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K_M", "TQ2_0"])
def test_an_adapter_does_the_same_on_a_packed_base(wide: Checkpoint, tmp_path: Path, kind: str) -> None:
    assert wide.path
    ids, model = ids_of(wide.path), to_torch(wide)
    make_ternary(model)
    settle(model)
    _, base = export(from_torch(model, wide), tmp_path, name="student", kind=kind)
    packed = to_torch(Checkpoint.read(base))
    flat, header = lora.initial_adapter(Checkpoint.read(base), rank=4, alpha=8, seed=1)
    flat = (0.05 * np.random.default_rng(0).standard_normal(flat.size)).astype(np.float32)
    lora.write_adapter_gguf(tmp_path / "adapter.gguf", flat, header)
    lora.attach(packed, flat, header)

    answered = by_llama(base, ids, tmp_path / "adapter.gguf")

    assert kl(by_llama(base, ids), answered) > 0.01
    assert kl(by_torch(packed, ids), answered) < 1e-3


def test_importance_is_the_mean_square_of_what_a_matrix_reads(wide: Checkpoint, examples: list[Example]) -> None:
    model, reads = to_torch(wide), []
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _module, inputs: reads.append(inputs[0][0]))
    for prompt, target in examples:
        with torch.no_grad():
            hidden_states(model, embed(model, torch.tensor([[*prompt, *target[:-1]]])))

    found = importance(wide, examples, batch_tokens=100)

    np.testing.assert_allclose(found["blk.1.ffn_down.weight"], torch.cat(reads).square().mean(0).numpy(), rtol=1e-3)
    assert set(found) == {name for name, _ in wide.matrices()} | {"token_embd.weight"}
    np.testing.assert_array_equal(found["blk.0.attn_q.weight"], found["blk.0.attn_v.weight"])


@pytest.mark.parametrize("kind", ["Q6_K", "Q4_K_M", "Q4_0", "Q3_K_M", "IQ4_NL"])
def test_importance_makes_the_error_smaller_where_it_counts(wide: Checkpoint, tmp_path: Path, kind: str) -> None:
    random = np.random.default_rng(0)
    matters = {name: random.random(shape[1], dtype=np.float32) ** 4 for name, shape in wide.matrices()}

    def error(folder: str, given: dict[str, np.ndarray] | None) -> float:
        _, small = export(wide, tmp_path / folder, name="student", kind=kind, importance=given)
        found = Checkpoint.read(small)
        return sum(float((matters[name] * (found.array(name) - wide.array(name)) ** 2).sum()) for name in matters)

    assert error("with", matters) < 0.95 * error("without", None)


def test_importance_of_another_model_is_told_and_nothing_is_left(wide: Checkpoint, tmp_path: Path) -> None:
    assert wide.path
    strange = {"blk.0.attn_q.weight": np.ones(3, dtype=np.float32)}
    negative = {"blk.0.attn_q.weight": -np.ones(256, dtype=np.float32)}

    with pytest.raises(BadInput, match="imatrix size 3 is different"):
        quantise(wide.path, tmp_path / "small.gguf", "Q4_K_M", importance=strange)
    with pytest.raises(BadInput, match=r"importance of blk\.0\.attn_q\.weight"):
        quantise(wide.path, tmp_path / "small.gguf", "Q4_K_M", importance=negative)
    with pytest.raises(NotEnough, match="calibrate"):
        importance(wide, [])
    assert list(tmp_path.iterdir()) == []


def test_the_report_says_what_fell_back(wide: Checkpoint, tmp_path: Path) -> None:
    narrow = tiny_checkpoint(hidden=320, heads=2, feed_forward=512)  # rows of 320 fit blocks of 32 only, like Gemma's 640

    _, fits = export(wide, tmp_path, name="wide", kind="Q4_K_M")
    _, small = export(narrow, tmp_path, name="narrow", kind="Q4_K_M")

    assert not any(one.fell_back for one in stored(fits, "Q4_K_M"))
    assert {(one.kind, one.row) for one in stored(small, "Q4_K_M") if one.fell_back} == {("Q5_0", 320), ("Q8_0", 320)}
    assert Stored("Q6_K", row=512, tensors=1, bytes=320 * 2 * 210, fell_back=False) in stored(small, "Q4_K_M")


def test_a_kind_that_is_not_offered_is_refused_with_the_ones_that_are(wide: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="Q4_K_M"):
        export(wide, tmp_path, name="student", kind="Q4_K_N")
