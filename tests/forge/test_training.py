"""The one loop: repeats by seed, goes on after a crash, touches only what it was given."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from protocol.errors import BadInput, NotEnough
from protocol.models import training
from protocol.models.checkpoint import Checkpoint
from protocol.models.feed import Epochs, collate, plan
from protocol.models.tokenizer import Example, Tokenizer, make_example
from protocol.models.torch_model import embed, hidden_states, logits_of, to_torch
from protocol.models.training import Diverged, View, mean_loss, train
from protocol.tasks import RANCH, Record

pytestmark = [pytest.mark.torch, pytest.mark.llama]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def examples(tiny: Path, records: Callable[[int], list[Record]]) -> list[Example]:
    with Tokenizer(tiny) as tokenizer:
        return [make_example(tokenizer, RANCH, record) for record in records(24)]


def body(model: Any) -> list[torch.nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if "embed" not in name]


def trained(tiny: Path, examples: list[Example], **options: Any) -> tuple[Any, training.TrainResult]:
    model = to_torch(Checkpoint.read(tiny), dtype=options.pop("dtype", torch.float32))
    free = body(model)[options.pop("skip", 0) :]
    feed = Epochs(examples, batch_tokens=options.pop("batch_tokens", 256), seed=options.pop("seed", 0))
    return model, train(model, feed, parameters=free, learning_rate=options.pop("rate", 3e-3), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_learns(tiny: Path, examples: list[Example], dtype: torch.dtype) -> None:
    before = mean_loss(to_torch(Checkpoint.read(tiny)), examples)

    model, result = trained(tiny, examples, steps=40, dtype=dtype)

    assert mean_loss(model, examples) < before / 3
    assert result.last_loss < result.first_loss / 2
    assert result.steps == 40


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tiny: Path, examples: list[Example]) -> None:
    one, two, other = (trained(tiny, examples, steps=4, seed=seed)[0] for seed in (1, 1, 2))

    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_after_a_crash_it_goes_on_and_ends_where_an_undisturbed_run_ends(tiny: Path, examples: list[Example], tmp_path: Path) -> None:
    class PowerCut(Exception):
        pass

    def cut(step: training.Step) -> None:
        if step.step == 5:
            raise PowerCut

    undisturbed, _ = trained(tiny, examples, steps=9)
    with pytest.raises(PowerCut):
        trained(tiny, examples, steps=9, state=tmp_path / "state", save_every_s=-1.0, progress=cut)
    seen: list[int] = []

    resumed, result = trained(tiny, examples, steps=9, state=tmp_path / "state", progress=lambda step: seen.append(step.step))

    assert seen[0] == 5
    assert result.steps == 9
    assert all(torch.equal(a, b) for a, b in zip(undisturbed.parameters(), resumed.parameters(), strict=True))


class Pair(training.Alone):
    """The first of two processes."""

    size = 2


def test_a_step_of_several_batches_is_their_mean(tiny: Path, examples: list[Example]) -> None:
    """One batch of equal rows, or the same rows as two batches: the same gradients."""
    rows = [Example([2, 5, 6, 7 + i], [8, 9, 10 + i, 1]) for i in range(8)]

    whole, _ = trained(tiny, rows, steps=3, batch_tokens=56, dtype=torch.float32)
    halves, _ = trained(tiny, rows, steps=3, batch_tokens=28, accumulate=2, dtype=torch.float32)

    for a, b in zip(whole.parameters(), halves.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5)


def test_a_loss_may_read_the_output_of_a_block(tiny: Path, examples: list[Example]) -> None:
    shapes: list[tuple[int, ...]] = []

    def still(view: View, batch: Any) -> torch.Tensor:
        shapes.append(tuple(view.states[0].shape))
        return view.states[0].square().mean() + training.cross_entropy(view, batch)

    trained(tiny, examples[:2], steps=2, loss=still, taps=(0,))

    assert all(len(shape) == 3 and shape[2] == 64 for shape in shapes)


def test_an_embedding_that_is_trained_learns_from_what_is_read_too(tiny: Path, examples: list[Example]) -> None:
    model = to_torch(Checkpoint.read(tiny))
    before = model.model.embed_tokens.weight.clone()

    train(model, Epochs([Example([2, 300], [301, 1])]), parameters=[model.model.embed_tokens.weight], learning_rate=1e-3, steps=1,
          loss=lambda view, batch: view.hidden.square().mean())  # fmt: skip

    assert not torch.equal(before[300], model.model.embed_tokens.weight[300])
    assert torch.equal(before[302], model.model.embed_tokens.weight[302])


def test_a_spoiled_or_foreign_state_means_a_fresh_start(tiny: Path, examples: list[Example], tmp_path: Path) -> None:
    undisturbed, _ = trained(tiny, examples, steps=3)
    (tmp_path / "spoiled").write_bytes(b"half a file")
    trained(tiny, examples, steps=8, state=tmp_path / "foreign", save_every_s=-1.0)

    for name in ("spoiled", "foreign"):
        model, result = trained(tiny, examples, steps=3, state=tmp_path / name)

        assert result.steps == 3
        assert all(torch.equal(a, b) for a, b in zip(undisturbed.parameters(), model.parameters(), strict=True))


def test_frozen_blocks_stay_and_their_memory_changes_nothing(tiny: Path, examples: list[Example], monkeypatch: pytest.MonkeyPatch) -> None:
    upper = len(list(to_torch(Checkpoint.read(tiny)).model.layers[0].parameters()))
    kept, _ = trained(tiny, examples, steps=8, skip=upper)
    monkeypatch.setattr(training, "KEPT_BYTES", 0)

    computed, _ = trained(tiny, examples, steps=8, skip=upper)

    original = to_torch(Checkpoint.read(tiny))
    assert all(torch.equal(a, b) for a, b in zip(original.model.layers[0].parameters(), kept.model.layers[0].parameters(), strict=True))
    assert not torch.equal(original.model.layers[1].mlp.up_proj.weight, kept.model.layers[1].mlp.up_proj.weight)
    for a, b in zip(kept.parameters(), computed.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_loss_is_that_of_target_tokens_alone(tiny: Path, examples: list[Example]) -> None:
    model = to_torch(Checkpoint.read(tiny))
    total, count = 0.0, 0
    with torch.no_grad():
        for prompt, target in examples:
            log_probs = logits_of(model, hidden_states(model, embed(model, torch.tensor([prompt + target])))).log_softmax(-1)[0]
            for at, token in enumerate(target):
                total -= float(log_probs[len(prompt) - 1 + at, token])
                count += 1

    assert mean_loss(model, examples, batch_tokens=200) == pytest.approx(total / count, rel=1e-4)


def test_batches_hold_every_row_once_within_the_budget() -> None:
    lengths = [5 + (i * 7) % 40 for i in range(200)]

    batches = plan(lengths, batch_tokens=120, generator=torch.Generator().manual_seed(1))

    assert sorted(i for batch in batches for i in batch) == list(range(200))
    assert all(len(batch) * max(lengths[i] for i in batch) <= 120 for batch in batches)


def test_predicting_positions_end_where_the_target_does() -> None:
    batch = collate([Example([2, 5, 6], [7, 8, 1]), Example([2], [9, 1])], [0, 1])

    assert batch.ids.tolist() == [[2, 5, 6, 7, 8], [2, 9, 0, 0, 0]]
    assert list(zip(batch.rows.tolist(), batch.columns.tolist(), batch.targets.tolist(), strict=True)) == [
        (0, 2, 7), (0, 3, 8), (0, 4, 1), (1, 0, 9), (1, 1, 1),
    ]  # fmt: skip


def test_seconds_are_a_limit_and_the_rate_falls_with_them(tiny: Path, examples: list[Example]) -> None:
    shares: list[float] = []

    _, result = trained(tiny, examples, seconds=0.5, progress=lambda step: shares.append(step.share))

    assert result.seconds >= 0.5
    assert shares == sorted(shares)
    assert shares[-1] < 1.0 or math.isclose(shares[-1], 1.0)


def test_what_cannot_be_trained_is_refused(tiny: Path, examples: list[Example]) -> None:
    model = to_torch(Checkpoint.read(tiny))

    with pytest.raises(NotEnough, match="0 examples"):
        Epochs([])
    with pytest.raises(BadInput, match="limit"):
        train(model, Epochs(examples), parameters=body(model), learning_rate=1e-3)
    with pytest.raises(Diverged, match="use a learning rate"):
        train(
            model,
            Epochs(examples),
            parameters=body(model),
            learning_rate=1e-3,
            steps=3,
            loss=lambda view, batch: view.logits.sum() * math.nan,
        )
    with pytest.raises(BadInput, match="multiple of 2"):
        train(model, Epochs(examples), parameters=body(model), learning_rate=1e-3, steps=1, accumulate=3, world=Pair())


def test_after_training_a_backward_pass_of_others_finds_its_gradients(tiny: Path, examples: list[Example]) -> None:
    model, _ = trained(tiny, examples, steps=1, dtype=torch.bfloat16)
    batch = collate(examples, [0])

    logits_of(model, hidden_states(model, embed(model, batch.ids))).float().sum().backward()

    assert model.model.layers[0].mlp.up_proj.weight.grad is not None


def test_a_gradient_above_the_clip_is_cut_down_to_it(tiny: Path, examples: list[Example]) -> None:
    """AdamW forgets the size of a gradient that never changes, so the optimiser is looked at, not the weights."""
    norms = []
    for clip in (1e-3, 1e9):
        model = to_torch(Checkpoint.read(tiny))
        work = training._Work(model, Epochs(examples), body(model), training.cross_entropy, (), 1e-3, 0.0, clip, 1, training.Alone())
        work.step([collate(examples, [0])], rate=1.0)
        first = [state["exp_avg"] / 0.1 for state in work.optimizer.state.values()]
        norms.append(float(torch.nn.utils.get_total_norm(first)))

    assert norms[0] == pytest.approx(1e-3, rel=1e-2)
    assert norms[1] > 0.1
