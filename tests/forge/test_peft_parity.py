"""Our LoRA is PEFT's: the same factors on the same model give the same logits. PEFT is the oracle here and needed nowhere else."""

from pathlib import Path

import numpy as np
import pytest

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore::FutureWarning")]  # transformers about itself


def test_the_same_factors_give_the_same_logits_as_peft(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="pip install -e '.[train]'")
    peft = pytest.importorskip("peft", reason="pip install -e '.[dev]'")
    from protocol.adapters import pack, unpack
    from protocol.models.checkpoint import Checkpoint
    from protocol.models.lora import attach, initial_adapter
    from protocol.models.torch_model import to_torch, torch_name
    from tests.tiny import tiny_gguf

    checkpoint = Checkpoint.read(tiny_gguf(tmp_path / "tiny.gguf"))
    flat, header = initial_adapter(checkpoint, rank=4, alpha=8.0, seed=1, modules=("attn_q", "attn_v", "ffn_down"))
    random = np.random.default_rng(2)
    factors = {name: (a, random.standard_normal(b.shape).astype(np.float32)) for name, (a, b) in unpack(flat, header).items()}
    ours, base = to_torch(checkpoint), to_torch(checkpoint)
    attach(ours, pack(factors, header.modules), header)
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"]))
    state = theirs.state_dict()
    for name, (a, b) in factors.items():
        stem = f"base_model.model.{torch_name(name).removesuffix('.weight')}"
        state[f"{stem}.lora_A.default.weight"].copy_(torch.from_numpy(a.copy()))
        state[f"{stem}.lora_B.default.weight"].copy_(torch.from_numpy(b))
    ids = torch.arange(5, 25)[None]

    with torch.no_grad():
        bare, mine, its = (model(input_ids=ids).logits for model in (to_torch(checkpoint), ours, theirs))

    assert not torch.allclose(bare, mine, atol=1e-3)
    assert torch.allclose(mine, its, atol=1e-4)
