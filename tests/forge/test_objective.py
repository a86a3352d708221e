"""One objective: any named losses, any mode of cache, the same numbers as computed by hand."""

from pathlib import Path

import pytest
import torch
from transformers import Gemma3ForCausalLM

from coordinator.forge.targets.cache import CacheHeader, TargetCache
from coordinator.forge.targets.capture import header_of
from coordinator.forge.targets.score import views
from coordinator.forge.training import losses
from coordinator.forge.training.objective import DIVERGENCES, NAMES, Objective, Relations, read_head
from protocol.errors import BadInput, UnknownName, WrongDigest
from protocol.models.checkpoint import Checkpoint
from protocol.models.feed import Epochs, collate
from protocol.models.tokenizer import Example
from protocol.models.torch_model import embed, hidden_states, logits_of, to_torch
from protocol.models.training import View, train
from tests.tiny import tiny_checkpoint
from tests.views import seen

pytestmark = pytest.mark.torch

EXAMPLES = [Example([2, 300, 310], [311, 312, 1]), Example([2], [320, 1]), Example([2, 305, 306, 307], [308])]
SIZE = len(tiny_checkpoint().vocabulary.tokens)


@pytest.fixture(scope="module")
def model(tiny: Path) -> Gemma3ForCausalLM:
    return to_torch(Checkpoint.read(tiny))


def cached(model: Gemma3ForCausalLM, header: CacheHeader, folder: Path, examples: list[Example]) -> TargetCache:
    with TargetCache(folder, header) as cache:
        for example, view in zip(examples, views(model, examples, header), strict=True):
            cache.put(example, view)
    return TargetCache.open(folder)


def student_logits(positions: int = 6) -> torch.Tensor:
    return torch.randn(positions, SIZE, generator=torch.Generator().manual_seed(1))


def teacher_logits(model: Gemma3ForCausalLM, examples: list[Example]) -> torch.Tensor:
    batch = collate(examples, range(len(examples)))
    with torch.no_grad():
        return logits_of(model, hidden_states(model, embed(model, batch.ids), at=(batch.rows, batch.columns)))


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("mode", ["topk", "hidden8"])
def test_a_cache_of_everything_gives_the_divergence_of_a_live_teacher(
    name: str, mode: str, tiny: Path, model: Gemma3ForCausalLM, tmp_path: Path
) -> None:
    header = header_of(Checkpoint.read(tiny), mode="hidden8" if mode == "hidden8" else "topk", k=SIZE)
    cache, logits = cached(model, header, tmp_path, EXAMPLES), student_logits()
    expected = DIVERGENCES[name](teacher_logits(model, EXAMPLES).log_softmax(-1), logits.log_softmax(-1)).mean()

    objective = Objective({name: 1.0}, EXAMPLES, cache=cache, head=read_head(tiny, header) if mode == "hidden8" else None)

    assert float(objective(seen(logits), collate(EXAMPLES, [0, 1, 2]))) == pytest.approx(float(expected), rel=5e-3)


def test_the_sampled_estimate_is_near_the_live_kl(tiny: Path, model: Gemma3ForCausalLM, tmp_path: Path) -> None:
    header = header_of(Checkpoint.read(tiny), mode="sampled", k=255)
    cache, logits = cached(model, header, tmp_path, EXAMPLES), student_logits()
    expected = losses.kl(teacher_logits(model, EXAMPLES).log_softmax(-1), logits.log_softmax(-1)).mean()

    found = Objective({"kl": 1.0}, EXAMPLES, cache=cache)(seen(logits), collate(EXAMPLES, [0, 1, 2]))

    assert float(found) == pytest.approx(float(expected), rel=0.15)


def test_what_is_sampled_depends_on_the_example_and_not_on_its_batch(tiny: Path, model: Gemma3ForCausalLM) -> None:
    header = header_of(Checkpoint.read(tiny), mode="sampled", k=20)

    (alone,) = views(model, EXAMPLES[:1], header)
    among = views(model, EXAMPLES, header)[0]

    width = min(alone[0].shape[1], among[0].shape[1])
    assert (alone[0][:, :width] == among[0][:, :width]).all()


def test_named_losses_are_mixed_by_their_weights(tiny: Path, model: Gemma3ForCausalLM, tmp_path: Path) -> None:
    cache, batch = cached(model, header_of(Checkpoint.read(tiny), k=20), tmp_path, EXAMPLES), collate(EXAMPLES, [2, 0])
    logits = student_logits(4)

    def alone(name: str) -> float:
        return float(Objective({name: 1.0}, EXAMPLES, cache=cache)(seen(logits), batch))

    mixed = Objective({"cross_entropy": 0.5, "skew_kl": 0.3, "jsd": 0.2}, EXAMPLES, cache=cache)(seen(logits), batch)

    assert float(mixed) == pytest.approx(0.5 * alone("cross_entropy") + 0.3 * alone("skew_kl") + 0.2 * alone("jsd"), rel=1e-5)


def test_where_the_teacher_did_not_speak_cross_entropy_is_learned(tiny: Path, model: Gemma3ForCausalLM, tmp_path: Path) -> None:
    cache, batch = cached(model, header_of(Checkpoint.read(tiny), k=20), tmp_path, EXAMPLES[:1]), collate(EXAMPLES, [1, 0])
    logits = student_logits(5)
    each = losses.cross_entropy(logits.log_softmax(-1), batch.targets)
    theirs = Objective({"kl": 1.0}, EXAMPLES, cache=cache)(seen(logits[2:]), collate(EXAMPLES, [0]))

    found = Objective({"kl": 1.0}, EXAMPLES, cache=cache)(seen(logits), batch)

    assert float(found) == pytest.approx((float(each[:2].sum()) + 3 * float(theirs)) / 5, rel=1e-5)


def test_a_softened_teacher_is_met_by_a_softened_student_and_counts_its_temperature_squared(
    tiny: Path, model: Gemma3ForCausalLM, tmp_path: Path
) -> None:
    cache, logits = cached(model, header_of(Checkpoint.read(tiny), k=SIZE, temperature=2.0), tmp_path, EXAMPLES), student_logits()
    soft = losses.kl((teacher_logits(model, EXAMPLES) / 2).log_softmax(-1), (logits / 2).log_softmax(-1)).mean()

    found = Objective({"kl": 1.0}, EXAMPLES, cache=cache)(seen(logits), collate(EXAMPLES, [0, 1, 2]))

    assert float(found) == pytest.approx(4 * float(soft), rel=5e-3)


def test_hidden_states_of_another_width_are_met_through_a_projection(tiny: Path, model: Gemma3ForCausalLM, tmp_path: Path) -> None:
    header = header_of(Checkpoint.read(tiny), mode="hidden8")
    cache, student = cached(model, header, tmp_path, EXAMPLES), to_torch(tiny_checkpoint(hidden=32, seed=5))
    projection = torch.nn.Linear(32, header.width)
    objective = Objective({"cross_entropy": 0.1, "hidden_cosine": 1.0}, EXAMPLES, cache=cache, projection=projection)

    result = train(
        student,
        Epochs(EXAMPLES, batch_tokens=64),
        parameters=[*student.model.layers.parameters(), *projection.parameters()],
        learning_rate=1e-2,
        loss=objective,
        steps=40,
    )

    assert result.last_loss < 0.5 * result.first_loss


def test_attention_relations_of_a_live_teacher_are_learned(model: Gemma3ForCausalLM) -> None:
    student = to_torch(tiny_checkpoint(layers=2, hidden=32, seed=5))
    among = Relations(teacher=model, teacher_block=1, student_block=1, heads=4)
    batch = collate(EXAMPLES, [0, 1, 2])

    def distance() -> float:
        states = {0: torch.zeros(())}
        x = hidden_states(student, embed(student, batch.ids), at=(batch.rows, batch.columns), taps=states)
        return float(Objective({"relations": 1.0}, EXAMPLES, relations=among)(View(student, x, states), batch)) - plain(x)

    def plain(x: torch.Tensor) -> float:
        return float(losses.cross_entropy(logits_of(student, x).log_softmax(-1), batch.targets).mean())

    with torch.no_grad():
        before = distance()
    objective = Objective({"relations": 30.0}, EXAMPLES, relations=among)
    train(
        student,
        Epochs(EXAMPLES),
        parameters=list(student.model.layers.parameters()),
        learning_rate=1e-2,
        loss=objective,
        taps=[0],
        steps=30,
    )

    with torch.no_grad():
        assert distance() < 0.7 * before


def test_a_loop_with_labels_gets_the_same_loss_as_ours(tiny: Path, model: Gemma3ForCausalLM, tmp_path: Path) -> None:
    cache = cached(model, header_of(Checkpoint.read(tiny), k=20), tmp_path, EXAMPLES)
    objective = Objective({"cross_entropy": 0.5, "kl": 0.5}, EXAMPLES, cache=cache)
    ids, labels = torch.zeros(3, 6, dtype=torch.long), torch.full((3, 6), -100)
    for row, one in enumerate(EXAMPLES):
        text = [*one.prompt, *one.target]
        ids[row, : len(text)] = torch.tensor(text)
        labels[row, len(one.prompt) : len(text)] = torch.tensor(one.target)
    with torch.no_grad():
        logits = model(input_ids=ids).logits + torch.randn(SIZE, generator=torch.Generator().manual_seed(2))
    batch = collate(EXAMPLES, [0, 1, 2])

    found = objective.on_labels(logits, ids, labels)

    assert float(found) == pytest.approx(float(objective(seen(logits[batch.rows, batch.columns]), batch)), rel=1e-5)


def test_a_loss_that_a_cache_cannot_serve_is_refused_before_training(tiny: Path, model: Gemma3ForCausalLM, tmp_path: Path) -> None:
    sampled = cached(model, header_of(Checkpoint.read(tiny), mode="sampled", k=20), tmp_path / "s", EXAMPLES)
    hidden = cached(model, header_of(Checkpoint.read(tiny), mode="hidden8"), tmp_path / "h", EXAMPLES)

    with pytest.raises(BadInput, match="cache of mode sampled: it needs a cache of mode topk or hidden8"):
        Objective({"jsd": 1.0}, EXAMPLES, cache=sampled)
    with pytest.raises(BadInput, match="pass head=read_head"):
        Objective({"kl": 1.0}, EXAMPLES, cache=hidden)
    with pytest.raises(BadInput, match="from no cache"):
        Objective({"kl": 1.0}, EXAMPLES)
    with pytest.raises(BadInput, match="live teacher"):
        Objective({"relations": 1.0}, EXAMPLES)
    with pytest.raises(UnknownName, match="kl"):
        Objective({"kll": 1.0}, EXAMPLES, cache=sampled)
    assert set(DIVERGENCES) < set(NAMES)


def test_hidden_states_are_not_read_through_the_head_of_another_teacher(tiny: Path, eight: Path) -> None:
    with pytest.raises(WrongDigest, match="not the teacher"):
        read_head(eight, header_of(Checkpoint.read(tiny), mode="hidden8"))
