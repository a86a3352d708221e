"""Distillation losses: small functions on log-probabilities, shapes in the docstrings. No I/O."""

import torch
import torch.nn.functional as F


def sparse_kl(logits: torch.Tensor, ids: torch.Tensor, log_probs: torch.Tensor, tail: torch.Tensor) -> torch.Tensor:
    """Forward KL(teacher || student) on the teacher's top k and one bucket for all the rest.

    logits (n, V) of the student; ids (n, k) distinct, log_probs (n, k) and tail (n,) = log of the teacher's remaining mass.
    Returns (n,), nats. Without the bucket the student learns that the rest has no mass: the top 50 of a 262k vocabulary hold 93% on
    average (Anshumann et al. 2025 on the bias of plain top-k caching). With k = V it is the dense KL of Hinton et al. 2015 at T = 1.
    """
    student = F.log_softmax(logits.float(), dim=-1).gather(1, ids)  # (n, k)
    inside = (log_probs.exp() * (log_probs - student)).sum(-1)
    rest = torch.log1p(-student.exp().sum(-1).clamp(max=1 - 1e-6))  # (n,) log of the student's remaining mass
    mass = tail.exp()
    outside = torch.where(mass > 0, mass * (tail.clamp(min=-30.0) - rest), torch.zeros_like(rest))
    return inside + outside


def top_k(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Teacher logits (n, V) -> ids (n, k), log-probabilities (n, k), log of the mass outside (n,); k is cut to V."""
    log_probs = F.log_softmax(logits.float(), dim=-1)
    values, ids = log_probs.topk(min(k, logits.shape[-1]), dim=-1)
    outside = (1.0 - values.exp().sum(-1)).clamp(min=0.0)
    return ids, values, outside.log()  # log 0 = -inf: no mass outside
