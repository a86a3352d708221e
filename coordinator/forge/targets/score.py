"""What a torch model thinks of answers that are already written: one forward pass, logits at the answer's positions only.

`score` is the teacher's top k and tail, `views` its view as a cache of any mode keeps it; `log_probs` is the probability of each token,
for rewards and policy ratios.
Contexts are at most the sliding window (`protocol.models.torch_model.hidden_states`).
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from transformers import Gemma3ForCausalLM

from coordinator.forge.targets.cache import KINDS, Cached, CacheHeader, Targets, key_of
from coordinator.forge.training.losses import draw, top_k
from protocol.models.feed import collate, plan
from protocol.models.tokenizer import Example
from protocol.models.torch_model import embed, hidden_states, logits_of

BATCH_TOKENS = 2048  # with padding, a forward pass

Predictions = Iterable[tuple[int, torch.Tensor]]  # place of an example, its logits at the target positions (n, V)


def score(model: Gemma3ForCausalLM, examples: Sequence[Example], *, k: int, batch_tokens: int = BATCH_TOKENS) -> list[Targets]:
    """The model's top k and tail at every target token of each example, in their order."""
    return top_of(predictions(model, examples, batch_tokens=batch_tokens), k=k)


def log_probs(
    model: Gemma3ForCausalLM, examples: Sequence[Example], *, temperature: float = 1.0, batch_tokens: int = BATCH_TOKENS
) -> list[torch.Tensor]:
    """log softmax(logits / temperature) of each target token, (n,) an example, nats, in their order."""
    return likelihood_of(predictions(model, examples, batch_tokens=batch_tokens), examples, temperature=temperature)


def top_of(predicted: Predictions, *, k: int) -> list[Targets]:
    """The k likeliest tokens and the log of the mass outside, example by example."""
    found: dict[int, Targets] = {}
    for place, logits in predicted:
        ids, log_probs, tail = top_k(logits, k)
        found[place] = Targets(ids.numpy(), log_probs.numpy(), tail.numpy())
    return [found[place] for place in sorted(found)]


def likelihood_of(predicted: Predictions, examples: Sequence[Example], *, temperature: float = 1.0) -> list[torch.Tensor]:
    """log softmax(logits / temperature) of every target token, (n,) an example, example by example."""
    found: dict[int, torch.Tensor] = {}
    for place, logits in predicted:
        found[place] = -F.cross_entropy(logits.float() / temperature, torch.tensor(examples[place].target), reduction="none")
    return [found[place] for place in sorted(found)]


@torch.no_grad()
def views(model: Gemma3ForCausalLM, examples: Sequence[Example], header: CacheHeader, *, batch_tokens: int = BATCH_TOKENS) -> list[Cached]:
    """What a cache with that header keeps of each example, in their order; what is drawn depends on the example and on nothing else."""
    found: dict[int, Cached] = {}
    for index, x in outputs(model, examples, batch_tokens=batch_tokens):
        found |= zip(index, views_of(model, x, [examples[i] for i in index], header), strict=True)
    return [found[place] for place in range(len(examples))]


@torch.no_grad()
def views_of(model: Gemma3ForCausalLM, x: torch.Tensor, examples: Sequence[Example], header: CacheHeader) -> list[Cached]:
    """As `views`, from the last block's output (n, hidden) at all predicting positions of the examples, one after the other."""
    kept, sizes = _kept(model, x, header, examples), [len(one.target) for one in examples]
    return [KINDS[header.mode](*(array.numpy() for array in arrays)) for arrays in zip(*(part.split(sizes) for part in kept), strict=True)]


def _kept(model: Gemma3ForCausalLM, x: torch.Tensor, header: CacheHeader, examples: Sequence[Example]) -> tuple[torch.Tensor, ...]:
    """The arrays of the header's mode for a batch's predicting positions: x (n, hidden), each array (n, ...)."""
    if header.mode == "hidden8":
        return (model.model.norm(x).float(),)
    logits = logits_of(model, x).float()
    if header.mode == "topk":
        return top_k(logits, header.k, temperature=header.temperature)
    starts = [np.random.default_rng(int.from_bytes(key_of(one))).random(len(one.target)) for one in examples]
    return draw(logits, header.k, torch.from_numpy(np.concatenate(starts)), temperature=header.temperature)


@torch.no_grad()
def predictions(model: Gemma3ForCausalLM, examples: Sequence[Example], *, batch_tokens: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Place of each example and its logits (n, V), float32; those of like length together, so not in order."""
    for index, x in outputs(model, examples, batch_tokens=batch_tokens):
        yield from zip(index, logits_of(model, x).float().split([len(examples[i].target) for i in index]), strict=True)


@torch.no_grad()
def outputs(model: Gemma3ForCausalLM, examples: Sequence[Example], *, batch_tokens: int) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Places of each batch's examples and the last block's output (n, hidden) at all their predicting positions."""
    lengths = [len(one.prompt) + len(one.target) - 1 for one in examples]
    for index in plan(lengths, batch_tokens=batch_tokens, generator=None) if examples else []:
        batch = collate(examples, index)
        yield index, hidden_states(model, embed(model, batch.ids), at=(batch.rows, batch.columns))
