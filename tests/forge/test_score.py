"""What a model thinks of written answers, against its own dense forward pass."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Gemma3ForCausalLM

from coordinator.forge.targets.score import log_probs, score
from protocol.models.checkpoint import Checkpoint
from protocol.models.tokenizer import Example
from protocol.models.torch_model import begin, embed, hidden_states, logits_of, read_on, to_torch

pytestmark = pytest.mark.torch

EXAMPLES = [Example([2, 300, 310], [311, 312, 1]), Example([2], [320, 1]), Example([2, 305, 306, 307], [308])]


@pytest.fixture(scope="module")
def model(tiny: Path) -> Gemma3ForCausalLM:
    return to_torch(Checkpoint.read(tiny))


def dense(model: Gemma3ForCausalLM, example: Example) -> torch.Tensor:
    ids = torch.tensor([[*example.prompt, *example.target[:-1]]])
    return logits_of(model, hidden_states(model, embed(model, ids)))[0, len(example.prompt) - 1 :].log_softmax(-1)


def test_each_token_has_the_probability_of_the_dense_pass(model: Gemma3ForCausalLM) -> None:
    found = log_probs(model, EXAMPLES, batch_tokens=8)

    for example, values in zip(EXAMPLES, found, strict=True):
        expected = dense(model, example).gather(1, torch.tensor(example.target)[:, None]).squeeze(1)
        torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-4)


def test_the_score_is_the_top_of_the_dense_pass_and_the_mass_outside(model: Gemma3ForCausalLM) -> None:
    for example, targets in zip(EXAMPLES, score(model, EXAMPLES, k=5), strict=True):
        values, ids = dense(model, example).topk(5)
        assert (targets.ids == ids.numpy()).all()
        np.testing.assert_allclose(np.exp(targets.log_probs).sum(-1) + np.exp(targets.tail), 1.0, atol=1e-5)
        np.testing.assert_allclose(targets.log_probs, values.numpy(), atol=1e-4)


def test_a_cache_that_forgot_reads_on_as_if_it_had_never_read(model: Gemma3ForCausalLM) -> None:
    ids, positions, caches = begin(model, [[2, 300, 310, 311], [2, 305]], room=8)
    with torch.no_grad():
        read_on(model, ids, positions, caches)
        read_on(model, torch.tensor([[320, 321, 322], [330, 331, 332]]), positions[:, -1:] + torch.arange(1, 4), caches)

        for cache in caches:
            cache.rewind(torch.tensor([3, 1]))  # rows: 4 + 0 and 2 + 2 tokens
        after = read_on(model, torch.tensor([[340], [341]]), torch.tensor([[4], [4]]), caches)

        for row, text in enumerate(([2, 300, 310, 311, 340], [2, 305, 330, 331, 341])):
            expected = hidden_states(model, embed(model, torch.tensor([text])))[0, -1]
            torch.testing.assert_close(after[row, 0], expected, rtol=1e-4, atol=1e-4)
