"""What a torch model thinks of answers that are already written: one forward pass, logits at the answer's positions only.

`score` is the teacher's view as the cache keeps it; `log_probs` is the probability of each token, for rewards and policy ratios.
Contexts are at most the sliding window (`protocol.models.torch_model.hidden_states`).
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from transformers import Gemma3ForCausalLM

from coordinator.forge.targets.cache import Targets
from coordinator.forge.training.losses import top_k
from protocol.models.feed import collate, plan
from protocol.models.tokenizer import Example
from protocol.models.torch_model import embed, hidden_states, logits_of

BATCH_TOKENS = 2048  # with padding, a forward pass


def score(model: Gemma3ForCausalLM, examples: Sequence[Example], *, k: int, batch_tokens: int = BATCH_TOKENS) -> list[Targets]:
    """The model's top k and tail at every target token of each example, in their order."""
    found: dict[int, Targets] = {}
    for place, logits in predictions(model, examples, batch_tokens=batch_tokens):
        ids, log_probs, tail = top_k(logits, k)
        found[place] = Targets(ids.numpy(), log_probs.numpy(), tail.numpy())
    return [found[place] for place in range(len(examples))]


def log_probs(
    model: Gemma3ForCausalLM, examples: Sequence[Example], *, temperature: float = 1.0, batch_tokens: int = BATCH_TOKENS
) -> list[torch.Tensor]:
    """log softmax(logits / temperature) of each target token, (n,) an example, nats, in their order."""
    found: dict[int, torch.Tensor] = {}
    for place, logits in predictions(model, examples, batch_tokens=batch_tokens):
        found[place] = -F.cross_entropy(logits / temperature, torch.tensor(examples[place].target), reduction="none")
    return [found[place] for place in range(len(examples))]


@torch.no_grad()
def predictions(model: Gemma3ForCausalLM, examples: Sequence[Example], *, batch_tokens: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Place of each example and its logits (n, V), float32; those of like length together, so not in order."""
    lengths = [len(one.prompt) + len(one.target) - 1 for one in examples]
    for index in plan(lengths, batch_tokens=batch_tokens, generator=None) if examples else []:
        batch = collate(examples, index)
        logits = logits_of(model, hidden_states(model, embed(model, batch.ids), at=(batch.rows, batch.columns))).float()
        yield from zip(index, logits.split([len(examples[i].target) for i in index]), strict=True)
