"""Losses against their definitions."""

import pytest
import torch
import torch.nn.functional as F

from coordinator.forge.training.losses import sparse_kl, top_k

pytestmark = pytest.mark.torch


def logits(seed: int, rows: int = 5, size: int = 40) -> torch.Tensor:
    return 2.0 * torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))


def dense(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return F.kl_div(F.log_softmax(student, -1), F.log_softmax(teacher, -1), log_target=True, reduction="batchmean")


def test_with_k_equal_to_the_vocabulary_it_is_the_dense_kl() -> None:
    student, teacher = logits(1).double().float(), logits(2)

    torch.testing.assert_close(sparse_kl(student, *top_k(teacher, 40)).mean(), dense(student, teacher), rtol=1e-4, atol=1e-5)


def test_with_a_tail_it_is_the_kl_of_the_bucketed_distributions() -> None:
    student, teacher = logits(1), logits(2)
    ids, log_probs, tail = top_k(teacher, 10)
    p = torch.cat([log_probs, tail[:, None]], 1).exp()
    inside = F.softmax(student, -1).gather(1, ids)
    q = torch.cat([inside, 1 - inside.sum(1, keepdim=True)], 1)

    torch.testing.assert_close(sparse_kl(student, ids, log_probs, tail), (p * (p / q).log()).sum(1), rtol=1e-4, atol=1e-5)


def test_the_tail_keeps_a_student_that_agrees_at_zero() -> None:
    same = logits(3)

    assert float(sparse_kl(same, *top_k(same, 10)).mean()) == pytest.approx(0.0, abs=1e-5)


def test_gradients_are_finite_even_when_the_teacher_is_certain() -> None:
    student = logits(1).requires_grad_(True)
    teacher = torch.full((5, 40), -1e4)
    teacher[:, 3] = 1e4

    sparse_kl(student, *top_k(teacher, 10)).mean().backward()

    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    assert (student.grad[:, 3] < 0).all()
