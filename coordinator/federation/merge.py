"""Adapters of many sites -> one adapter: the weighted sum of their products, exactly, never forming a full matrix. No I/O.

    delta W = eta * sum_k p_k * (alpha_k / r_k) * B_k @ A_k          p_k = weight_k / sum(weights)

is a product again, of stacked factors and of rank R = sum r_k (`protocol.adapters.stacked`), so sites may have different ranks and
different modules. Averaging A and B apart is another thing and wrong: the mean of products is not the product of means. If R is too much
for a node, `truncate` cuts it to the best rank r' (QR, then an SVD of the R x R core: Eckart-Young) and reports what that lost.

All arithmetic is in float64, results are float32; contributions are taken in order of site name, so arrival order changes no bit.
"""

import math
from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from protocol.adapters import AdapterHeader, Flat, Module, pack, stacked, unpack
from protocol.errors import BadInput, DoesNotFit

Wide = NDArray[np.float64]
MERGED_SITE = "fleet"  # the merged adapter belongs to no site
HALF_LIFE_RELEASES = 1  # an adapter one release old counts half: it answers yesterday's question, but a sleeping site is still heard


class Contribution(msgspec.Struct, frozen=True):
    """One site's adapter and what it weighs."""

    header: AdapterHeader
    flat: Flat
    weight: float  # > 0; `weight_of` gives the usual one


def weight_of(header: AdapterHeader, *, release: int) -> float:
    """Confirmed examples, halved for every HALF_LIFE_RELEASES that the adapter is behind `release`."""
    behind = max(0, release - header.release)
    return header.examples * 0.5 ** (behind / HALF_LIFE_RELEASES)


def norm(header: AdapterHeader, flat: Flat) -> float:
    """Frobenius norm of delta W over all modules.

    ||B A||^2 = tr((B^T B)(A A^T)): two (rank, rank) matrices instead of one (out, in).
    """
    total = 0.0
    for a, b in unpack(flat, header).values():
        wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
        total += float(np.sum((wide_b.T @ wide_b) * (wide_a @ wide_a.T)))
    return header.alpha / header.rank * math.sqrt(max(total, 0.0))


def clip(contributions: Sequence[Contribution], *, bound: float) -> list[Contribution]:
    """Scale down, never up, every adapter whose norm is over `bound`: no site moves the fleet further than the others may."""
    clipped = []
    for one in contributions:
        size = norm(one.header, one.flat)
        if size > bound:
            factors = {t: (a, (b * (bound / size)).astype(np.float32)) for t, (a, b) in unpack(one.flat, one.header).items()}
            one = msgspec.structs.replace(one, flat=pack(factors, one.header.modules))
        clipped.append(one)
    return clipped


def merge(contributions: Sequence[Contribution], *, eta: float = 1.0) -> tuple[Flat, AdapterHeader]:
    """The weighted sum of products as one adapter of rank sum(r_k), with alpha = rank (its scale is inside B).

    Args:
        eta: server scale. 1 is the weighted mean; N adds the sites' changes up instead of averaging them, which helps when they
            touch different things (each site alone moved the model by its own share only).

    A module that a site does not adapt counts as a zero product.

    Raises:
        BadInput: nothing to merge, a weight that is not positive, or eta not positive and finite.
        DoesNotFit: two adapters of different bases, or of different starts, or a module with two shapes.
    """
    if not contributions:
        raise BadInput("there is no adapter to merge")
    if not (math.isfinite(eta) and eta > 0):
        raise BadInput(f"eta is {eta}; it must be a positive number")
    if any(not (math.isfinite(one.weight) and one.weight > 0) for one in contributions):
        raise BadInput("every adapter needs a positive weight")
    ordered = sorted(contributions, key=lambda one: (one.header.site, one.header.trained_at))
    first = ordered[0].header
    for one in ordered:
        if (one.header.base_digest, one.header.initial_digest) != (first.base_digest, first.initial_digest):
            raise DoesNotFit(f"adapters of {first.site!r} and {one.header.site!r} have other bases or starts: they cannot be merged")
    modules = _all_modules([one.header for one in ordered])
    total = sum(one.weight for one in ordered)
    rank = sum(one.header.rank for one in ordered)
    factors = stacked(
        [(unpack(one.flat, one.header), eta * one.weight / total * one.header.alpha / one.header.rank) for one in ordered]
    )  # fmt: skip
    header = msgspec.structs.replace(
        first,
        site=MERGED_SITE,
        release=max(one.header.release for one in ordered),
        rank=rank,
        alpha=float(rank),
        modules=modules,
        examples=sum(one.header.examples for one in ordered),
        held_out=sum(one.header.held_out for one in ordered),
        loss_before=0.0,  # the sites' losses are of other texts each; the merged model gets its own evidence
        loss_after=0.0,
        trained_at=max(one.header.trained_at for one in ordered),
    )
    return pack(factors, modules), header


def truncate(flat: Flat, header: AdapterHeader, *, rank: int) -> tuple[Flat, AdapterHeader, float]:
    """The best adapter of that rank, and ||lost|| / ||delta W|| over all modules together (0 where nothing was lost).

    B = Q_B R_B, A^T = Q_A R_A, so B A = Q_B (R_B R_A^T) Q_A^T and the SVD of the small core is the SVD of the whole.

    Raises:
        BadInput: `rank` under 1.
    """
    if rank < 1:
        raise BadInput(f"rank is {rank}; it must be at least 1")
    if rank >= header.rank:
        return flat, header, 0.0
    scale = header.alpha / header.rank
    lost = whole = 0.0
    factors: dict[str, tuple[Flat, Flat]] = {}
    for tensor, (a, b) in unpack(flat, header).items():
        q_b, r_b = np.linalg.qr(b.astype(np.float64) * scale)  # (out, k), (k, R)
        q_a, r_a = np.linalg.qr(a.astype(np.float64).T)  # (in, k), (k, R)
        u, s, vt = np.linalg.svd(r_b @ r_a.T)  # (k, k) core
        kept = min(rank, s.size)
        root = np.sqrt(s[:kept])
        new_a = np.zeros((rank, a.shape[1]), dtype=np.float32)
        new_b = np.zeros((b.shape[0], rank), dtype=np.float32)
        new_a[:kept] = (root[:, None] * vt[:kept]) @ q_a.T
        new_b[:, :kept] = (q_b @ u[:, :kept]) * root
        factors[tensor] = (new_a, new_b)
        lost += float(np.sum(s[kept:] ** 2))
        whole += float(np.sum(s**2))
    smaller = msgspec.structs.replace(header, rank=rank, alpha=float(rank))
    return pack(factors, header.modules), smaller, math.sqrt(lost / whole) if whole else 0.0


def _all_modules(headers: Sequence[AdapterHeader]) -> tuple[Module, ...]:
    """Every module that any site adapts, in the order of first sight by site name.

    Raises:
        DoesNotFit: one tensor with two shapes.
    """
    found: dict[str, Module] = {}
    for header in headers:
        for module in header.modules:
            if found.setdefault(module.tensor, module) != module:
                raise DoesNotFit(f"{header.site!r} has another shape of {module.tensor!r} than the sites before it")
    return tuple(found.values())
