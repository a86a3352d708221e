"""Losses against their definitions, against the dense versions' autograd, and against TRL's."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.forge.training import losses
from coordinator.forge.training.losses import (
    FLOOR,
    Divergence,
    buckets,
    draw,
    hidden_transfer,
    jsd,
    kl,
    relation_transfer,
    reverse_kl,
    sampled_kl,
    skew_kl,
    sparse_kl,
    top_k,
    total_variation,
)

pytestmark = pytest.mark.torch

DIVERGENCES: dict[str, Divergence] = {
    "kl": kl,
    "reverse_kl": reverse_kl,
    "skew_kl": skew_kl,
    "jsd": jsd,
    "jsd at 0.1": partial(jsd, beta=0.1),
    "total_variation": total_variation,
}
every = pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)


def logits(seed: int, rows: int = 5, size: int = 40) -> torch.Tensor:
    return 2.0 * torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))


def dense(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return F.kl_div(F.log_softmax(student, -1), F.log_softmax(teacher, -1), log_target=True, reduction="batchmean")


def gradient(loss: Callable[[torch.Tensor], torch.Tensor], student: torch.Tensor) -> torch.Tensor:
    student = student.clone().requires_grad_(True)
    loss(student).sum().backward()
    assert student.grad is not None
    return student.grad


def folded(divergence: Divergence, teacher: torch.Tensor, k: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda student: divergence(*buckets(student.log_softmax(-1), *top_k(teacher, k)))


@every
def test_with_k_equal_to_the_vocabulary_it_is_the_dense_one_and_so_is_its_gradient(divergence: Divergence) -> None:
    student, teacher = logits(1), logits(2)

    def whole(student: torch.Tensor) -> torch.Tensor:
        return divergence(teacher.log_softmax(-1), student.log_softmax(-1))

    torch.testing.assert_close(folded(divergence, teacher, 40)(student), whole(student), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(gradient(folded(divergence, teacher, 40), student), gradient(whole, student), rtol=1e-3, atol=1e-4)


@every
@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10_000), k=st.integers(1, 40), scale=st.floats(0.1, 1.5)
)  # log-probabilities stay above -30, where the divergences stop counting
def test_it_is_never_negative_and_folding_never_adds_to_it(divergence: Divergence, seed: int, k: int, scale: float) -> None:
    student, teacher = scale * logits(seed), scale * logits(seed + 1)

    found = folded(divergence, teacher, k)(student)

    assert (found >= 2 * FLOOR * math.log(FLOOR)).all()  # a bucket that is nearly empty is counted as FLOOR
    assert (found <= divergence(teacher.log_softmax(-1), student.log_softmax(-1)) + 1e-3).all()


@every
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 40))
def test_it_is_zero_where_student_and_teacher_agree_and_nothing_pulls_the_student_away(divergence: Divergence, seed: int, k: int) -> None:
    same = logits(seed)

    assert folded(divergence, same, k)(same).abs().max() < 1e-4
    assert gradient(folded(divergence, same, k), same).abs().max() < 1e-3 or divergence is total_variation


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000))
def test_without_the_tail_a_student_that_agrees_is_pulled_away(seed: int) -> None:
    same = logits(seed)
    ids, log_probs, tail = top_k(same, 10)

    def bare(student: torch.Tensor) -> torch.Tensor:
        return sparse_kl(student, ids, log_probs, torch.full_like(tail, -torch.inf))

    assert gradient(bare, same).abs().max() > 0.01


@pytest.mark.filterwarnings("ignore")  # TRL about its own plans
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_generalised_jsd_is_trls_on_whole_vocabularies(beta: float) -> None:
    from trl.experimental.gkd import GKDTrainer  # pip install -e '.[dev]'

    student, teacher = logits(1), logits(2)

    theirs = GKDTrainer.generalized_jsd_loss(student[None], teacher[None], beta=beta, reduction="none").sum(-1)[0]

    torch.testing.assert_close(jsd(teacher.log_softmax(-1), student.log_softmax(-1), beta=beta), theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(folded(partial(jsd, beta=beta), teacher, 40)(student), theirs, rtol=1e-3, atol=1e-4)


def test_with_k_equal_to_the_vocabulary_it_is_torchs_kl() -> None:
    student, teacher = logits(1), logits(2)

    torch.testing.assert_close(sparse_kl(student, *top_k(teacher, 40)).mean(), dense(student, teacher), rtol=1e-4, atol=1e-5)


def test_with_a_tail_it_is_the_kl_of_the_bucketed_distributions() -> None:
    student, teacher = logits(1), logits(2)
    ids, log_probs, tail = top_k(teacher, 10)
    p = torch.cat([log_probs, tail[:, None]], 1).exp()
    inside = F.softmax(student, -1).gather(1, ids)
    q = torch.cat([inside, 1 - inside.sum(1, keepdim=True)], 1)

    torch.testing.assert_close(sparse_kl(student, ids, log_probs, tail), (p * (p / q).log()).sum(1), rtol=1e-4, atol=1e-5)


def test_a_skew_of_nothing_is_the_kl_and_more_skew_is_less() -> None:
    p, q = logits(2).log_softmax(-1), logits(1).log_softmax(-1)

    torch.testing.assert_close(skew_kl(p, q, skew=0.0), kl(p, q))
    assert (skew_kl(p, q, skew=0.5) < skew_kl(p, q, skew=0.1)).all()


def test_some_rows_of_a_larger_batch_are_compared_as_if_they_were_alone() -> None:
    student, teacher, rows = logits(1, rows=7).log_softmax(-1), logits(2, rows=2), torch.tensor([5, 1])

    torch.testing.assert_close(kl(*buckets(student, *top_k(teacher, 9), rows)), kl(*buckets(student[rows], *top_k(teacher, 9))))


@every
def test_gradients_are_finite_even_when_the_teacher_is_certain(divergence: Divergence) -> None:
    teacher = torch.full((5, 40), -1e4)
    teacher[:, 3] = 1e4

    found = gradient(folded(divergence, teacher, 10), logits(1))

    assert torch.isfinite(found).all()
    assert (found[:, 3] < 0).all()


def test_at_another_temperature_the_top_is_that_of_the_softened_teacher() -> None:
    teacher = logits(2)

    for soft, plain in zip(top_k(teacher, 9, temperature=2.0), top_k(teacher / 2.0, 9), strict=True):
        torch.testing.assert_close(soft, plain)


def test_draws_are_each_within_one_of_their_share_and_add_up() -> None:
    teacher = logits(2)

    ids, weights, log_probs = draw(teacher, 50, torch.rand(5, generator=torch.Generator().manual_seed(1)))

    p = teacher.softmax(-1).gather(1, ids)
    torch.testing.assert_close(weights.sum(1), torch.ones(5))
    assert ((weights - torch.where(weights > 0, p, 0.0)).abs() <= 1 / 50 + 1e-6).all()
    torch.testing.assert_close(log_probs[weights > 0].exp(), p[weights > 0])
    assert all(len(set(row[there].tolist())) == int(there.sum()) for row, there in zip(ids, weights > 0, strict=True))


def test_the_sampled_kl_and_its_gradient_are_those_of_the_dense_one_on_average() -> None:
    student, teacher, times = logits(1, rows=1), logits(2, rows=1), 4000
    starts = (torch.arange(times) + 0.5) / times  # every start alike: the mean over them is the expectation
    ids, weights, log_probs = draw(teacher.expand(times, -1), 7, starts)

    def mean(student: torch.Tensor) -> torch.Tensor:
        return sampled_kl(student.log_softmax(-1).expand(times, -1), ids, weights, log_probs).mean()

    def whole(student: torch.Tensor) -> torch.Tensor:
        return kl(teacher.log_softmax(-1), student.log_softmax(-1))

    assert float(mean(student)) == pytest.approx(float(whole(student)), abs=2e-3)
    torch.testing.assert_close(gradient(mean, student), gradient(whole, student), atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("by", ["cosine", "mse"])
def test_hidden_transfer_is_zero_at_equality_and_positive_elsewhere(by: str) -> None:
    ours, theirs = logits(1), logits(2)

    torch.testing.assert_close(hidden_transfer(theirs, theirs, by=by), torch.zeros(5), atol=1e-5, rtol=0.0)
    assert (hidden_transfer(ours, theirs, by=by) > 0).all()
    assert gradient(lambda student: hidden_transfer(student, theirs, by=by), ours).abs().max() > 0


def test_relations_compare_models_of_different_widths_and_ignore_padding() -> None:
    chance = torch.Generator().manual_seed(3)
    ours, theirs = torch.randn(2, 6, 32, generator=chance), torch.randn(2, 6, 64, generator=chance)
    there = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    spoiled = ours.clone()
    spoiled[1, 4:] = 99.0

    found = relation_transfer(ours, theirs, there, heads=4)

    assert float(found) > 0
    torch.testing.assert_close(relation_transfer(spoiled, theirs, there, heads=4), found)
    torch.testing.assert_close(relation_transfer(ours, ours, there, heads=4), torch.tensor(0.0), atol=1e-6, rtol=0.0)


def test_a_relation_is_the_softmax_of_scaled_dot_products() -> None:
    vectors = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(1))

    found = losses.relation(vectors, torch.ones(1, 3, dtype=torch.bool), heads=2)

    second = vectors[0, :, 4:]
    torch.testing.assert_close(found[0, 1], (second @ second.T / 2.0).log_softmax(-1))
