"""Training throughput against the machine's limit: the same model's forward and backward in plain PyTorch.

The limit is transformers' own forward pass and autograd's backward over full batches without padding, each predicted token counted, no
optimiser, in the type that is fastest here. Ours is the whole step: reading examples, padding, forward, backward, clipping, AdamW and the
float32 masters. Tokens are real ones on both sides: padding is none. The two take turns, step by step, on the same idle or busy machine.
"""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import Gemma3ForCausalLM

from bench.settings import TRANSLATION, Settings
from protocol.models.checkpoint import Checkpoint
from protocol.models.feed import Batch, Epochs
from protocol.models.tokenizer import Example, Tokenizer, make_example
from protocol.models.torch_model import best_dtype, body, to_torch
from protocol.models.training import Step, View, cross_entropy, train

BATCH_TOKENS = 512  # a recipe's default
ACCUMULATE = 1
TURNS = 12
RECORDS = 2_000


def measure(settings: Settings) -> dict[str, Any]:
    path = settings.trimmed()
    turns = 3 if settings.quick else TURNS
    with Tokenizer(path) as tokenizer:
        records = settings.pairs("train", RECORDS)
        random.Random(settings.seed).shuffle(records)
        examples = [make_example(tokenizer, TRANSLATION, record) for record in records]
    checkpoint = Checkpoint.read(path)
    plain = Plain(to_torch(checkpoint, dtype=best_dtype()), examples, tokens=BATCH_TOKENS)
    rates: dict[str, list[float]] = {"ours": [], "limit": []}
    ours = ours_step_by_step(to_torch(checkpoint, dtype=best_dtype()), examples, steps=turns + 1, seed=settings.seed, between=plain.step)
    for ours_rate, limit_rate in ours[1:]:  # the first of each warms up
        rates["ours"].append(ours_rate)
        rates["limit"].append(limit_rate)
    share = [a / b for a, b in zip(rates["ours"], rates["limit"], strict=True)]
    return {
        "figure": statistics.median(share),
        "interval": quartiles(share),
        "interval_of": "middle half of the steps",
        "against": {"transformers forward and backward, tokens a CPU-second": statistics.median(rates["limit"])},
        "ours": {"tokens a CPU-second": statistics.median(rates["ours"])},
        "n": turns,
        "batch_tokens": BATCH_TOKENS * ACCUMULATE,
        "dtype": str(best_dtype()).removeprefix("torch."),
        "parameters": sum(p.numel() for p in plain.model.parameters()),
    }


def quartiles(values: Sequence[float]) -> list[float]:
    return [value for at, value in enumerate(statistics.quantiles(values, n=4)) if at != 1] if len(values) > 1 else [*values, *values]


class Plain:
    """Forward and backward over rows cut from one long line of tokens: nothing padded, nothing updated."""

    def __init__(self, model: Gemma3ForCausalLM, examples: Sequence[Example], *, tokens: int) -> None:
        self.model, self.tokens = model.train(), tokens
        for parameter in body(model):
            parameter.requires_grad_(True)
        line = [token for one in examples for token in (*one.prompt, *one.target)]
        length = max(2, round(sum(len(one.prompt) + len(one.target) for one in examples) / len(examples)))
        rows = max(1, tokens // length)
        self.ids = torch.tensor([(line * (1 + rows * length // len(line)))[: rows * length]]).view(rows, length)

    def step(self) -> float:
        """Tokens a CPU-second of one step."""
        began = time.process_time()
        self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss.backward()
        spent = time.process_time() - began
        self.model.zero_grad(set_to_none=True)
        return self.ids.numel() / spent


def ours_step_by_step(
    model: Gemma3ForCausalLM, examples: Sequence[Example], *, steps: int, seed: int, between: Callable[[], float]
) -> list[tuple[float, float]]:
    """(our tokens a CPU-second, what `between` gave) a step; the time between two of our progress calls is the whole step."""
    found: list[tuple[float, float]] = []
    real: list[int] = []
    mark = [time.process_time()]

    def loss(view: View, batch: Batch) -> torch.Tensor:
        real.append(sum(len(examples[i].prompt) + len(examples[i].target) - 1 for i in batch.index))
        return cross_entropy(view, batch)

    def progress(step: Step) -> None:
        spent = time.process_time() - mark[0]
        tokens = sum(real)
        real.clear()
        found.append((tokens / spent, between()))
        mark[0] = time.process_time()

    feed = Epochs(examples, batch_tokens=BATCH_TOKENS, seed=seed)
    train(model, feed, parameters=body(model), learning_rate=1e-4, loss=loss, steps=steps, accumulate=ACCUMULATE, progress=progress)
    return found
