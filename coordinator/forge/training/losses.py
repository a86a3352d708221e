"""Distillation losses: small functions on log-probabilities, shapes in the docstrings. No I/O.

A divergence compares a teacher's p with a student's q, both log-probabilities (n, m) that add up to 1 along m, and returns (n,) nats:

kl                 sum p log p/q            Hinton et al. 2015, arXiv 1503.02531, at T = 1
reverse_kl         sum q log q/p            MiniLLM, Gu et al. 2024, arXiv 2306.08543
skew_kl            KL(p || a p + (1-a) q)   DistiLLM, Ko et al. 2024, arXiv 2402.03898
jsd                generalised JSD          GKD, Agarwal et al. 2024, arXiv 2306.13649, eq. 1
total_variation    half of sum |p - q|      f-distill, Wen et al. 2023, arXiv 2307.15190

m is the vocabulary where the teacher's whole distribution is known, or k + 1 where `buckets` folded both onto the teacher's top k and one
bucket for the rest. Folding can only lose divergence, never add any (data processing), and with k = V it loses nothing.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

FLOOR = 1e-6  # of a bucket's mass: float32 cannot tell 1 - sum from 0 below it

Divergence = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # p, q (n, m) -> (n,)


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student): the student covers all that the teacher may say."""
    return (p.exp() * (p.clamp(min=-30.0) - q)).sum(-1)


def reverse_kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(student || teacher): the student says nothing that the teacher would not. Over buckets it is the reverse KL on the support."""
    return (q.exp() * (q - p.clamp(min=-30.0))).sum(-1)


def skew_kl(p: torch.Tensor, q: torch.Tensor, *, skew: float = 0.1) -> torch.Tensor:
    """KL(p || skew p + (1 - skew) q): forward KL whose gradient stays bounded, as the student's share is never 0. skew 0 is `kl`."""
    return kl(p, _mixed(p, q, skew))


def jsd(p: torch.Tensor, q: torch.Tensor, *, beta: float = 0.5) -> torch.Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q; at 0 it is `kl`, at 1 `reverse_kl`, as TRL defines it."""
    if beta == 0.0:
        return kl(p, q)
    if beta == 1.0:
        return reverse_kl(p, q)
    mixed = _mixed(p, q, beta)
    return beta * kl(p, mixed) + (1.0 - beta) * kl(q, mixed)


def total_variation(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Half the sum of |p - q|, in [0, 1]: the share of answers that would differ."""
    return 0.5 * (p.exp() - q.exp()).abs().sum(-1)


def cross_entropy(q: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log q of the target: q (n, V) log-probabilities, targets (n,) ids. Returns (n,)."""
    return -q.gather(1, targets[:, None]).squeeze(1)


def buckets(
    q: torch.Tensor, ids: torch.Tensor, log_probs: torch.Tensor, tail: torch.Tensor, rows: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Teacher and student folded onto the teacher's top k and one bucket for all the rest: two tensors (n, k + 1).

    q (N, V) log-probabilities of the student, of which `rows` (n,) are meant (all by default); ids (n, k) distinct, log_probs (n, k) and
    tail (n,) = log of the teacher's mass outside, -inf for none. Without the bucket a student learns that the rest has no mass, and the
    top 50 of Gemma's 262k vocabulary hold 93% on average (Anshumann et al. 2025 on the bias of plain top-k caching).
    """
    inside = q.gather(1, ids) if rows is None else q[rows[:, None], ids]  # (n, k)
    rest = torch.log1p(-inside.exp().sum(-1, keepdim=True).clamp(max=1.0 - FLOOR))  # (n, 1) log of the student's remaining mass
    return torch.cat((log_probs, tail[:, None]), 1), torch.cat((inside, rest), 1)


def sparse_kl(logits: torch.Tensor, ids: torch.Tensor, log_probs: torch.Tensor, tail: torch.Tensor) -> torch.Tensor:
    """Forward KL on the teacher's top k and the tail: logits (n, V) of the student, the rest as in `buckets`. Returns (n,)."""
    return kl(*buckets(F.log_softmax(logits.float(), dim=-1), ids, log_probs, tail))


def sampled_kl(
    q: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, log_probs: torch.Tensor, rows: torch.Tensor | None = None
) -> torch.Tensor:
    """An unbiased estimate of KL(teacher || student) and of its gradient, from ids drawn from the teacher (Anshumann et al., ACL 2025).

    q (N, V) log-probabilities of the student, of which `rows` (n,) are meant; ids, weights, log_probs (n, m): what was drawn, its share of
    the draws, the teacher's log p. An estimate can be below 0. Returns (n,).
    """
    inside = q.gather(1, ids) if rows is None else q[rows[:, None], ids]
    return (weights * (log_probs - inside)).sum(-1)


def hidden_transfer(student: torch.Tensor, teacher: torch.Tensor, *, by: str = "cosine") -> torch.Tensor:
    """How far hidden states (n, width) are from the teacher's: 1 - cosine, or the mean square (FitNets, Romero et al. 2015, 1412.6550).

    Of another width, the student's go through a learned projection first. Returns (n,).
    """
    if by == "cosine":
        return 1.0 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)
    return F.mse_loss(student.float(), teacher.float(), reduction="none").mean(-1)


def relation(vectors: torch.Tensor, there: torch.Tensor, *, heads: int) -> torch.Tensor:
    """How every position of a row attends to every other: log softmax of scaled dot products, (B, heads, T, T).

    vectors (B, T, width): queries, keys or values of one block, split anew into `heads` relation heads, so that teacher and student need
    neither the same width nor the same number of attention heads; there (B, T): false at the padding, which nobody attends to.
    """
    batch, length, width = vectors.shape
    split = vectors.float().view(batch, length, heads, width // heads).transpose(1, 2)  # (B, heads, T, width / heads)
    scores = split @ split.transpose(2, 3) / (width // heads) ** 0.5
    return scores.masked_fill(~there[:, None, None], -1e4).log_softmax(-1)


def relation_transfer(student: torch.Tensor, teacher: torch.Tensor, there: torch.Tensor, *, heads: int) -> torch.Tensor:
    """KL(teacher || student) of their relations, a mean over heads and positions (MiniLMv2, Wang et al. 2021, arXiv 2012.15828).

    Both (B, T, width), each of its own width, which `heads` divides; there (B, T). Returns a scalar. MiniLMv2 adds up Q-Q, K-K and V-V.
    """
    each = kl(relation(teacher, there, heads=heads), relation(student, there, heads=heads))  # (B, heads, T)
    return each.transpose(1, 2)[there].mean()


def top_k(logits: torch.Tensor, k: int, *, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Teacher logits (n, V) -> ids (n, k), log-probabilities (n, k), log of the mass outside (n,); k is cut to V."""
    log_probs = F.log_softmax(logits.float() / temperature, dim=-1)
    values, ids = log_probs.topk(min(k, logits.shape[-1]), dim=-1)
    outside = log_probs.scatter(1, ids, -torch.inf).logsumexp(-1)  # not log(1 - sum): float32 would call all below 1e-7 nothing
    return ids, values, outside  # -inf: no mass outside


def draw(
    logits: torch.Tensor, draws: int, starts: torch.Tensor, *, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Teacher logits (n, V) -> ids, shares of the draws and log-probabilities, each (n, m), m the most ids that a row drew.

    Drawn from the teacher itself (the proposal that Anshumann et al. settle on), systematically: `draws` evenly spaced points through the
    cumulative distribution from one random start in [0, 1) a row. E[share] = p exactly, as with independent draws, but an id of
    probability p is drawn within one of p * draws times, so the estimate is much steadier.
    """
    log_probs = F.log_softmax(logits.float() / temperature, dim=-1)
    points = (torch.arange(draws) + starts.double()[:, None]) / draws  # (n, draws)
    cumulative = log_probs.exp().cumsum(-1, dtype=torch.float64)
    drawn = torch.searchsorted(cumulative / cumulative[:, -1:], points, right=True).clamp(max=logits.shape[-1] - 1)  # rising along a row
    fresh = torch.ones_like(drawn, dtype=torch.bool)
    fresh[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    place = fresh.cumsum(-1) - 1  # (n, draws) which of the row's ids a draw is
    shape = (len(logits), int(place.max()) + 1)
    ids = torch.zeros(shape, dtype=torch.long).scatter_(1, place, drawn)
    weights = torch.zeros(shape).scatter_add_(1, place, torch.full(drawn.shape, 1.0 / draws))
    return ids, weights, torch.where(weights > 0, log_probs.gather(1, ids), torch.zeros(()))


def _mixed(p: torch.Tensor, q: torch.Tensor, share: float) -> torch.Tensor:
    """log(share p + (1 - share) q)."""
    if share == 0.0:
        return q
    return torch.logaddexp(p.clamp(min=-30.0) + math.log(share), q + math.log1p(-share))
