"""Sampling from a torch model: seeded, independent of the batch, several answers a prompt for one reading of it."""

from pathlib import Path

import pytest
import torch
from transformers import Gemma3ForCausalLM

from protocol.models.checkpoint import Checkpoint
from protocol.models.torch_model import embed, generate, hidden_states, logits_of, to_torch

pytestmark = pytest.mark.torch

PROMPTS = [[2, 300, 310, 320], [2, 305], [2, 311, 312, 313, 314, 315]]
EOS = 1


@pytest.fixture(scope="module")
def model(tiny: Path) -> Gemma3ForCausalLM:
    return to_torch(Checkpoint.read(tiny))


def test_the_same_seed_repeats_the_answers_and_another_does_not(model: Gemma3ForCausalLM) -> None:
    first = generate(model, PROMPTS, max_new_tokens=8, eos=EOS, samples=2, temperature=1.0, seed=1)
    again = generate(model, PROMPTS, max_new_tokens=8, eos=EOS, samples=2, temperature=1.0, seed=1)
    other = generate(model, PROMPTS, max_new_tokens=8, eos=EOS, samples=2, temperature=1.0, seed=2)

    assert first == again != other


def test_a_prompts_samples_do_not_depend_on_what_shares_its_batch(model: Gemma3ForCausalLM) -> None:
    together = generate(model, PROMPTS, max_new_tokens=8, eos=EOS, samples=3, temperature=1.0)

    alone = [row for prompt in PROMPTS for row in generate(model, [prompt], max_new_tokens=8, eos=EOS, samples=3, temperature=1.0)]

    assert together == alone


def test_samples_of_greedy_are_the_greedy_answer(model: Gemma3ForCausalLM) -> None:
    once = generate(model, PROMPTS, max_new_tokens=6, eos=EOS)

    twice = generate(model, PROMPTS, max_new_tokens=6, eos=EOS, samples=2)

    assert twice == [row for row in once for _ in range(2)]


def test_tokens_are_drawn_as_often_as_the_model_says(model: Gemma3ForCausalLM) -> None:
    count = 4_000
    x = hidden_states(model, embed(model, torch.tensor([PROMPTS[0]])))
    expected = (logits_of(model, x[0, -1]) / 0.5).softmax(-1)

    drawn = generate(model, [PROMPTS[0]], max_new_tokens=1, eos=EOS, samples=count, temperature=0.5)
    share = torch.bincount(torch.tensor(drawn).squeeze(1), minlength=len(expected)) / count

    assert float((share - expected).abs().max()) < 4 * 0.5 / count**0.5  # four standard errors


def test_whoever_watches_is_told_the_states_their_logits_and_what_was_chosen_from_them(model: Gemma3ForCausalLM) -> None:
    seen: list[list[int]] = [[] for _ in range(2 * len(PROMPTS))]

    def watch(rows: list[int], x: torch.Tensor, logits: torch.Tensor, chosen: torch.Tensor) -> None:
        assert logits.shape[0] == len(rows)
        torch.testing.assert_close(logits_of(model, x), logits)
        for row, token in zip(rows, chosen.tolist(), strict=True):
            seen[row].append(token)

    answers = generate(model, PROMPTS, max_new_tokens=5, eos=EOS, samples=2, temperature=1.0, watch=watch)

    assert seen == answers
