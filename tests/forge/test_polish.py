"""Polish by reward: what a round of it does to a toy verdict task, what it does without advantages, and what survives."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from coordinator.forge.synthesis.language import identify
from coordinator.forge.training.polish import ENSEMBLE, SINGLE, Polish, PolishPlan, clipped_policy_loss, naturalness, polished
from coordinator.forge.training.recipe import Recipe
from coordinator.forge.training.rewards import Sample, ensemble, task_reward
from protocol.errors import BadInput, NotEnough
from protocol.models.checkpoint import Checkpoint
from protocol.models.feed import Epochs
from protocol.models.tokenizer import Tokenizer, make_example
from protocol.models.torch_model import from_torch, generate, to_torch
from protocol.models.training import Step, train
from protocol.tasks import RANCH
from tests.fleet import toy
from tests.tiny import tiny_gguf

pytestmark = pytest.mark.torch

TASK = msgspec.structs.replace(RANCH, max_new_tokens=16)
RECIPE = Recipe(mode="full", learning_rate=1e-3, batch_tokens=2048, steps=25)
QUICK = msgspec.structs.replace(RECIPE, steps=4)
DRAWN_AT = 1.0  # temperature
RECORDS = toy.records(30, kinds=(0, 1))
HELD = toy.records(24, kinds=(0, 1), start=500)


@pytest.fixture(scope="module")
def torn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student that has learned the form, and for every record the right verdict as often as a wrong one."""
    path = tmp_path_factory.mktemp("polish") / "torn.gguf"
    tiny_gguf(path.with_suffix(".raw.gguf"), seed=1)
    checkpoint = Checkpoint.read(path.with_suffix(".raw.gguf"))
    model = to_torch(checkpoint)
    with Tokenizer(path.with_suffix(".raw.gguf")) as tokenizer:
        examples = [
            make_example(tokenizer, TASK, msgspec.structs.replace(one, verdict=verdict, target=target))
            for one in toy.records(120, kinds=(0, 1))
            for _, verdict, target in toy.KINDS[:2]
        ]
    parameters = [p for name, p in model.named_parameters() if "embed" not in name]
    train(model, Epochs(examples, batch_tokens=512), parameters=parameters, learning_rate=toy.RATE, steps=120)
    from_torch(model, checkpoint).write(path)
    return path


def plan(**changes: object) -> PolishPlan:
    return PolishPlan(**{"weights": SINGLE, "prompts": 8, "samples": 8, "kl": 0.0, "temperature": DRAWN_AT, **changes})  # type: ignore[arg-type]


def reward(checkpoint: Checkpoint, path: Path) -> float:
    """Mean task reward of answers drawn for records that were not polished on."""
    with Tokenizer(path) as tokenizer:
        prompts = [tokenizer.encode(TASK.prompt(one), bos=True) for one in HELD]
        answers = generate(to_torch(checkpoint), prompts, max_new_tokens=16, eos=tokenizer.eos, samples=4, temperature=DRAWN_AT, seed=9)
        texts = [tokenizer.decode(answer) for answer in answers]
    groups = [[Sample(text, True) for text in texts[at : at + 4]] for at in range(0, len(texts), 4)]
    return float(np.mean([task_reward(TASK, record, group) for record, group in zip(HELD, groups, strict=True)]))


def test_a_polish_raises_the_reward_on_records_it_has_not_seen(torn: Path, tmp_path: Path) -> None:
    start = Checkpoint.read(torn)

    after, _, _ = polished(start, RECORDS, TASK, RECIPE, rewards=ensemble(), plan=plan(), log=tmp_path / "log", seed=1)

    before, now = reward(start, torn), reward(after, torn)
    assert now > before + 0.1


def test_without_advantages_nothing_is_learned(torn: Path, tmp_path: Path) -> None:
    start = Checkpoint.read(torn)
    nothing = plan(weights={"task": 0.0}, penalty=0.0)

    after, _, _ = polished(start, RECORDS, TASK, QUICK, rewards=ensemble(), plan=nothing, log=tmp_path / "log", seed=1)

    assert reward(after, torn) == pytest.approx(reward(start, torn), abs=0.02)


def test_an_interrupted_polish_goes_on_to_the_same_student(torn: Path, tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    def stop(step: Step) -> None:
        if step.step == 2:
            raise Interrupted

    def run(folder: Path, progress: Callable[[Step], None] | None = None) -> tuple[np.ndarray, int]:
        after, _, result = polished(
            Checkpoint.read(torn), RECORDS, TASK, QUICK, rewards=ensemble(), plan=plan(), log=folder / "log", seed=1, progress=progress,
            state=folder / "train.state",
        )  # fmt: skip
        return after.array("blk.0.ffn_down.weight"), result.samples

    whole = run(tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(tmp_path / "cut", stop)
    written = (tmp_path / "cut" / "log").read_bytes()

    resumed = run(tmp_path / "cut")

    assert (tmp_path / "cut" / "log").read_bytes().startswith(written)
    np.testing.assert_array_equal(resumed[0], whole[0])
    assert resumed[1] == whole[1]


def test_a_round_keeps_what_the_loss_needs_for_every_token(torn: Path, tmp_path: Path) -> None:
    with Tokenizer(torn) as tokenizer:
        student, teacher = to_torch(Checkpoint.read(torn)), to_torch(Checkpoint.read(torn))
        feed = Polish(
            student, teacher, tokenizer, TASK, RECORDS, plan=plan(weights=ENSEMBLE, prompts=2, samples=3), rewards=ensemble(identify),
            natural=naturalness(teacher), log=tmp_path / "log", batch_tokens=256, seed=0, origin="",
        )  # fmt: skip
        index = next(feed.batches(0))
        one = feed.log[0]

    assert index
    assert {*one.rewards} == {*ENSEMBLE}
    for example, *rest in zip(one.examples, one.advantages, one.old, one.reference, strict=True):
        assert {len(values) for values in rest} == {len(example.target)}
    assert one.old == one.reference  # nothing is learned yet


def test_a_polish_without_records_is_refused(torn: Path, tmp_path: Path) -> None:
    with pytest.raises(NotEnough, match="0 records"):
        polished(Checkpoint.read(torn), [], TASK, QUICK, rewards=ensemble(), log=tmp_path / "log", seed=1)


def test_one_sample_a_prompt_is_no_group(torn: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="2 or more"):
        polished(Checkpoint.read(torn), RECORDS, TASK, QUICK, rewards=ensemble(), plan=plan(samples=1), log=tmp_path / "log", seed=1)


def loss_of(log_p: float, *, advantage: float, reference: float = -1.0, kl: float = 0.0) -> tuple[float, float]:
    """The loss of one token that was drawn at log p = -1, and its slope."""
    value = torch.tensor([log_p], requires_grad=True)
    found = clipped_policy_loss(value, torch.tensor([-1.0]), torch.tensor([reference]), torch.tensor([advantage]), clip=0.2, kl=kl).sum()
    found.backward()
    assert value.grad is not None
    return found.item(), value.grad.item()


def test_at_the_moment_of_drawing_the_slope_is_the_advantage() -> None:
    assert loss_of(-1.0, advantage=0.7) == (pytest.approx(-0.7), pytest.approx(-0.7))


@pytest.mark.parametrize(("log_p", "advantage"), [(-0.7, 1.0), (-1.3, -1.0)])
def test_a_token_that_has_moved_far_enough_is_left_alone(log_p: float, advantage: float) -> None:
    assert loss_of(log_p, advantage=advantage)[1] == 0.0


@pytest.mark.parametrize(("log_p", "advantage"), [(-0.7, -1.0), (-1.3, 1.0)])
def test_a_token_that_has_moved_the_wrong_way_is_brought_back(log_p: float, advantage: float) -> None:
    assert loss_of(log_p, advantage=advantage)[1] * advantage < 0


@pytest.mark.parametrize("log_p", [-1.5, -0.5])
def test_the_distance_is_positive_and_pulls_to_the_reference(log_p: float) -> None:
    value, slope = loss_of(log_p, advantage=0.0, kl=1.0)

    assert value > 0
    assert slope * (log_p + 1.0) > 0
