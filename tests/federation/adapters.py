"""Adapters for tests: small, seeded, of any rank and layout."""

import numpy as np

from protocol.adapters import AdapterHeader, Flat, Module, unpack

BASE = "a" * 64
START = "b" * 64
MODULES = (Module("blk.0.attn_q.weight", 12, 8), Module("blk.0.ffn_down.weight", 8, 20))


def make(
    site: str,
    *,
    seed: int = 0,
    rank: int = 4,
    alpha: float = 8.0,
    modules: tuple[Module, ...] = MODULES,
    examples: int = 40,
    release: int = 1,
    scale: float = 0.1,
) -> tuple[AdapterHeader, Flat]:
    random = np.random.default_rng(seed)
    header = AdapterHeader(
        site=site, release=release, base_digest=BASE, initial_digest=START, rank=rank, alpha=alpha, modules=modules, examples=examples
    )
    return header, (scale * random.standard_normal(header.length)).astype(np.float32)


def dense(header: AdapterHeader, flat: Flat) -> dict[str, np.ndarray]:
    """Tensor name -> delta W (out, in), formed in full and in float64: what a merge must equal."""
    factors = unpack(flat, header)
    return {name: header.alpha / header.rank * b.astype(np.float64) @ a.astype(np.float64) for name, (a, b) in factors.items()}
