"""Which input channels of each matrix matter: the importance matrix that llama.cpp rounds by, computed in torch without its own tool.

A matrix's error in channel i is multiplied by what comes in there, so it weighs mean(x_i^2) over calibration text (llama.cpp's `imatrix`).
Every real position counts, prompts too: they feed the attention. The embedding is the output matrix as well; for it, the predicting
positions count.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from protocol.errors import NotEnough
from protocol.models.checkpoint import Checkpoint
from protocol.models.feed import collate, plan
from protocol.models.tokenizer import Example
from protocol.models.torch_model import embed, hidden_states, logits_of, module_of, to_torch

ENOUGH = 64  # examples: more of them change a mean of squares little (docs/log.md)


@torch.no_grad()
def importance(checkpoint: Checkpoint, examples: Sequence[Example], *, batch_tokens: int = 2048) -> dict[str, NDArray[np.float32]]:
    """Mean square of each input channel, by GGUF tensor name: of every matrix of the blocks, and of the embedding as output matrix.

    Raises:
        NotEnough: no examples.
    """
    if not examples:
        raise NotEnough("there are 0 examples to calibrate on; at least 1 is needed")
    model = to_torch(checkpoint)
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}
    real = torch.zeros(0, dtype=torch.bool)

    def listen(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def heard(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0][real] if inputs[0].ndim == 3 else inputs[0]  # (n, inputs)
            sums[name] = sums.get(name, torch.zeros(x.shape[-1], dtype=torch.float64)) + x.double().square().sum(0)
            counts[name] = counts.get(name, 0) + len(x)

        return heard

    for name, _ in checkpoint.matrices():
        module_of(model, name).register_forward_pre_hook(listen(name))
    model.lm_head.register_forward_pre_hook(listen("token_embd.weight"))
    lengths = [len(one.prompt) + len(one.target) - 1 for one in examples]
    for index in plan(lengths, batch_tokens=batch_tokens, generator=None):
        batch = collate(examples, index)
        real = torch.arange(batch.ids.shape[1])[None] < torch.tensor([lengths[i] for i in index])[:, None]  # (B, T)
        states = hidden_states(model, embed(model, batch.ids))
        logits_of(model, states[batch.rows, batch.columns])
    return {name: (total / counts[name]).float().numpy() for name, total in sums.items()}
