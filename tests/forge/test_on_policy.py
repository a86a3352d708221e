"""The student writes, the teacher scores once: what that teaches, what survives, and what the teacher lets stand."""

import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Gemma3ForCausalLM

from coordinator.forge.targets.cache import CacheHeader, TargetCache
from coordinator.forge.targets.score import log_probs, predictions, score
from coordinator.forge.training.objective import distillation_loss
from coordinator.forge.training.on_policy import OnPolicy, OnPolicyPlan, Writer, alone, taught_on_policy, together
from coordinator.forge.training.recipe import Recipe
from coordinator.forge.training.speculative import Block, Speculated, speculate
from protocol.errors import BadInput, WrongDigest
from protocol.models.checkpoint import Checkpoint
from protocol.models.feed import Epochs, Feed
from protocol.models.tokenizer import Example, Tokenizer, make_example
from protocol.models.torch_model import generate, to_torch
from protocol.models.training import Loss, train
from protocol.tasks import RANCH
from tests.fleet import toy
from tests.forge import on_policy_run
from tests.forge.on_policy_run import FIXED, PROMPTS
from tests.tiny import tiny_checkpoint, tiny_gguf

pytestmark = pytest.mark.torch

ROOT = Path(__file__).parents[2]
EOS = 1
K = 20


class Toy:
    """A teacher that knows the toy task, and a student that has hardly begun."""

    def __init__(self, folder: Path) -> None:
        self.early = toy.trained(folder / "early.gguf", kinds=(0, 1, 2), seed=1, steps=12)
        path = toy.trained(folder / "teacher.gguf", kinds=(0, 1, 2))
        self.teacher = to_torch(Checkpoint.read(path))
        with Tokenizer(path) as tokenizer:
            self.fixed = [make_example(tokenizer, RANCH, one) for one in toy.records(90)]
            self.held = [make_example(tokenizer, RANCH, one).prompt for one in toy.records(60, start=500)]
        self.prompts = [one.prompt for one in self.fixed]

    def student(self) -> Gemma3ForCausalLM:
        return to_torch(Checkpoint.read(self.early))

    def score(self, examples: list[Example]) -> list:
        return score(self.teacher, examples, k=K)

    def writer(self, way: str, student: Gemma3ForCausalLM) -> Writer:
        if way == "alone":
            return alone(student, score=self.score, max_new_tokens=24, eos=EOS)
        return together(student, teacher=self.teacher, block=Block(), k=K, max_new_tokens=24, eos=EOS)

    def cache(self, folder: Path) -> TargetCache:
        return TargetCache(folder, CacheHeader(teacher="t", tokenizer="t", k=K, vocabulary=self.teacher.config.vocab_size))

    def distance(self, student: Gemma3ForCausalLM) -> float:
        """Mean log student - log teacher a token of what the student says: an estimate of KL(student || teacher), nats."""
        answers = generate(student, self.held, max_new_tokens=24, eos=EOS, temperature=1.0, seed=3)
        said = [Example(prompt, answer) for prompt, answer in zip(self.held, answers, strict=True)]
        return float((torch.cat(log_probs(student, said)) - torch.cat(log_probs(self.teacher, said))).mean())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return Toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def spoken(models: Toy) -> Speculated:
    """A token the teacher puts in is its likeliest: then every token is among its five likeliest."""
    block = Block(size=4, top=5, teacher_temperature=1e-3)
    return speculate(models.student(), models.teacher, models.held, block=block, k=K, max_new_tokens=16, eos=EOS, seed=1)


@pytest.mark.parametrize("way", ["alone", "together"])
def test_its_own_answers_bring_a_student_nearer_to_its_teacher_than_as_many_steps_on_fixed_ones(
    models: Toy, tmp_path: Path, way: str
) -> None:
    def distance_after(student: Gemma3ForCausalLM, feed: Feed, loss: Loss) -> float:
        parameters = [p for name, p in student.named_parameters() if "embed" not in name]
        train(student, feed, parameters=parameters, learning_rate=2e-3, loss=loss, steps=30)
        return models.distance(student)

    fixed = models.cache(tmp_path / "fixed")
    for example, targets in zip(models.fixed, models.score(models.fixed), strict=True):
        fixed.put(example, targets)
    off_policy = distance_after(
        models.student(), Epochs(models.fixed, batch_tokens=512), distillation_loss(models.fixed, cache=fixed, alpha=1.0)
    )

    student, cache = models.student(), models.cache(tmp_path / "own")
    plan = OnPolicyPlan(share=1.0, every=8, prompts=32, staleness=3)
    feed = OnPolicy(
        [], models.prompts, writer=models.writer(way, student), plan=plan, cache=cache, log=tmp_path / "log", batch_tokens=512, seed=0,
        origin="",
    )  # fmt: skip
    on_policy = distance_after(student, feed, distillation_loss(feed.examples, cache=cache, alpha=1.0))

    assert on_policy < off_policy < models.distance(models.student())


def test_what_the_teacher_let_stand_is_among_its_likeliest(models: Toy, spoken: Speculated) -> None:
    outside = [
        token
        for place, logits in predictions(models.teacher, spoken.examples, batch_tokens=2048)
        for token, likely in zip(spoken.examples[place].target, logits.topk(5).indices.tolist(), strict=True)
        if token not in likely
    ]

    assert not outside
    assert 0 < spoken.accepted < spoken.judged  # some stood, some were refused


def test_a_speculated_answer_brings_the_view_that_scoring_it_would_give(models: Toy, spoken: Speculated) -> None:
    for found, expected in zip(spoken.targets, models.score(spoken.examples), strict=True):
        np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=2e-4)
        np.testing.assert_allclose(np.exp(found.tail), np.exp(expected.tail), atol=1e-4)


def test_a_speculated_answer_ends_where_it_should(spoken: Speculated) -> None:
    for one in spoken.examples:
        assert EOS not in one.target[:-1]
        assert one.target[-1] == EOS or len(one.target) == 16


def test_a_teacher_that_refuses_nothing_leaves_the_students_own_answer(models: Toy) -> None:
    student = models.student()
    everything = Block(size=3, top=student.config.vocab_size)

    found = speculate(student, models.teacher, models.held[:8], block=everything, k=K, max_new_tokens=12, eos=EOS, seed=1)

    assert found.accepted == found.judged == sum(len(one.target) for one in found.examples)


def test_kill_nine_loses_and_doubles_nothing(tmp_path: Path) -> None:
    whole, weight = on_policy_run.main(tmp_path / "whole")
    command = [sys.executable, "-m", "tests.forge.on_policy_run", str(tmp_path / "killed"), "2"]
    died = subprocess.run(command, cwd=ROOT, timeout=240, check=False)

    resumed, same = on_policy_run.main(tmp_path / "killed")

    assert died.returncode == -9
    assert _without_times(resumed) == _without_times(whole)
    torch.testing.assert_close(same, weight, rtol=0, atol=0)


def _without_times(log: bytes) -> list[dict]:
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in log.splitlines()]


def feed_of(folder: Path, **changes: object) -> OnPolicy:
    student = to_torch(tiny_checkpoint(seed=1))
    cache = TargetCache(folder / "cache", CacheHeader(teacher="t", tokenizer="t", k=4, vocabulary=student.config.vocab_size))
    write = alone(student, score=lambda examples: score(student, examples, k=4), max_new_tokens=4, eos=EOS)
    plan = OnPolicyPlan(**{"share": 0.25, "every": 4, "prompts": 3, "staleness": 2, **changes})  # type: ignore[arg-type]
    return OnPolicy(FIXED, PROMPTS, writer=write, plan=plan, cache=cache, log=folder / "log", batch_tokens=24, seed=0, origin="")


def test_the_stated_share_of_batches_is_the_students_own(tmp_path: Path) -> None:
    feed = feed_of(tmp_path)

    own = [index[0] >= feed.fixed for index in islice(feed.batches(0), 40)]

    assert sum(own) == 10


def test_a_batch_is_of_one_kind(tmp_path: Path) -> None:
    feed = feed_of(tmp_path)

    kinds = [{place >= feed.fixed for place in index} for index in islice(feed.batches(0), 40)]

    assert all(len(kind) == 1 for kind in kinds)


def test_a_stale_answer_is_not_learned_from(tmp_path: Path) -> None:
    feed = feed_of(tmp_path, share=1.0)

    for number, index in enumerate(islice(feed.batches(0), 40)):
        oldest = feed.places(max(0, number // 4 - 1))[0]
        assert min(index) >= oldest


def test_an_answer_is_scored_once_however_often_it_is_learned_from(tmp_path: Path) -> None:
    feed = feed_of(tmp_path, share=1.0)

    list(islice(feed.batches(0), 40))
    result = feed.result(40)

    assert result.rows > result.examples == 30
    assert result.teacher_tokens < result.fresh_teacher_tokens


def test_the_log_of_another_plan_is_refused(tmp_path: Path) -> None:
    next(feed_of(tmp_path).batches(0))

    with pytest.raises(WrongDigest, match="another plan"):
        feed_of(tmp_path, every=5)


def test_a_training_that_has_seen_more_than_the_log_is_not_gone_on_with(tmp_path: Path) -> None:
    feed = feed_of(tmp_path)

    with pytest.raises(BadInput, match="delete its state"):
        next(feed.batches(9))


def test_an_impossible_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="share"):
        feed_of(tmp_path, share=0.0)


def test_a_checkpoint_is_taught_and_says_what_it_took(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "student.gguf", seed=1)
    teacher = to_torch(tiny_checkpoint(seed=2))
    cache = TargetCache(tmp_path / "cache", CacheHeader(teacher="t", tokenizer="t", k=4, vocabulary=teacher.config.vocab_size))

    _, trained, result = taught_on_policy(
        Checkpoint.read(path), FIXED, PROMPTS, Recipe(mode="full", steps=6, batch_tokens=24, learning_rate=1e-3),
        writer=lambda student: together(student, teacher=teacher, block=Block(size=2), k=4, max_new_tokens=4, eos=EOS),
        origin="teacher", cache=cache, log=tmp_path / "log", seed=0, plan=OnPolicyPlan(every=4, prompts=3),
    )  # fmt: skip

    assert (trained.steps, result.rounds, result.examples) == (6, 2, 6)
    assert result.acceptance is not None
