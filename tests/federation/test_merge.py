"""The merge is the weighted sum of products, and nothing else."""

import itertools

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.federation.merge import Contribution, clip, merge, norm, truncate, weight_of
from protocol.adapters import AdapterHeader, Module, unpack
from protocol.errors import BadInput, DoesNotFit
from tests.federation.adapters import MODULES, dense, make


def contribution(site: str, *, seed: int, rank: int = 4, alpha: float = 8.0, weight: float = 1.0, **more: object) -> Contribution:
    header, flat = make(site, seed=seed, rank=rank, alpha=alpha, **more)  # type: ignore[arg-type]
    return Contribution(header, flat, weight)


def wanted(contributions: list[Contribution], eta: float) -> dict[str, np.ndarray]:
    total = sum(one.weight for one in contributions)
    found: dict[str, np.ndarray] = {}
    for one in contributions:
        for name, delta in dense(one.header, one.flat).items():
            found[name] = found.get(name, 0.0) + eta * one.weight / total * delta
    return found


def distance(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """Relative Frobenius distance over all modules."""
    assert one.keys() == other.keys()
    apart = sum(float(np.sum((one[name] - other[name]) ** 2)) for name in one)
    return float(np.sqrt(apart / sum(float(np.sum(other[name] ** 2)) for name in other)))


sites = st.lists(
    st.tuples(st.integers(0, 2**32 - 1), st.integers(1, 6), st.floats(0.5, 64.0), st.floats(0.1, 1000.0)), min_size=1, max_size=5
)


@settings(deadline=None, max_examples=40)
@given(sites=sites, eta=st.floats(0.25, 4.0))
def test_a_merge_equals_the_dense_sum_for_any_ranks_weights_and_scale(sites: list[tuple[int, int, float, float]], eta: float) -> None:
    given_in = [
        contribution(f"site-{n}", seed=seed, rank=rank, alpha=alpha, weight=weight) for n, (seed, rank, alpha, weight) in enumerate(sites)
    ]

    flat, header = merge(given_in, eta=eta)

    assert header.rank == sum(rank for _, rank, _, _ in sites)
    assert distance(dense(header, flat), wanted(given_in, eta)) < 1e-5


def test_averaging_the_factors_apart_is_another_thing() -> None:
    """The guard of the guard: were `merge` the mean of A and the mean of B, the test above would see it."""
    pair = [contribution("esteli", seed=1), contribution("malacatoya", seed=2)]
    averaged = {
        name: tuple(np.mean([unpack(one.flat, one.header)[name][side] for one in pair], axis=0) for side in (0, 1))
        for name in dense(*make("x"))
    }
    naive = {name: 2.0 * b @ a for name, (a, b) in averaged.items()}

    assert distance(naive, wanted(pair, 1.0)) > 0.3


def test_the_order_of_arrival_changes_no_bit() -> None:
    three = [contribution(site, seed=n, rank=n + 1, weight=n + 1.0) for n, site in enumerate(("a", "b", "c"))]

    merged = [merge(list(order)) for order in itertools.permutations(three)]

    assert all(header == merged[0][1] and np.array_equal(flat, merged[0][0]) for flat, header in merged)


def test_a_module_that_only_one_site_adapts_comes_from_that_site_alone() -> None:
    both = contribution("esteli", seed=1, weight=3.0)
    one = contribution("malacatoya", seed=2, weight=1.0, modules=MODULES[:1])

    flat, header = merge([both, one])

    assert distance(dense(header, flat), wanted([both, one], 1.0)) < 1e-5


def test_alpha_over_rank_is_each_sites_own() -> None:
    """FLoRA's issue 16: server and clients once scaled differently."""
    quiet, loud = contribution("a", seed=3, alpha=1.0), contribution("b", seed=3, alpha=32.0)

    flat, header = merge([quiet, loud])

    alone = dense(quiet.header, quiet.flat)
    assert distance(dense(header, flat), {name: (1 + 32) / 2 * delta for name, delta in alone.items()}) < 1e-5


@pytest.mark.parametrize("change", [{"base_digest": "d" * 64}, {"initial_digest": "d" * 64}])
def test_adapters_of_other_bases_or_starts_do_not_merge(change: dict[str, str]) -> None:
    first, second = contribution("a", seed=1), contribution("b", seed=2)
    second = msgspec.structs.replace(second, header=msgspec.structs.replace(second.header, **change))

    with pytest.raises(DoesNotFit, match="cannot be merged"):
        merge([first, second])


def test_one_tensor_with_two_shapes_does_not_merge() -> None:
    with pytest.raises(DoesNotFit, match="another shape"):
        merge([contribution("a", seed=1), contribution("b", seed=2, modules=(Module("blk.0.attn_q.weight", 8, 12),))])


@pytest.mark.parametrize(("contributions", "eta"), [([], 1.0), (["one"], 0.0), (["one"], float("nan")), (["weightless"], 1.0)])
def test_a_merge_of_nothing_or_with_no_weight_is_refused(contributions: list[str], eta: float) -> None:
    given_in = [contribution("a", seed=1, weight=0.0 if name == "weightless" else 1.0) for name in contributions]

    with pytest.raises(BadInput):
        merge(given_in, eta=eta)


def test_the_norm_is_that_of_the_full_matrix() -> None:
    header, flat = make("a", seed=5, rank=3)

    whole = np.sqrt(sum(float(np.sum(delta**2)) for delta in dense(header, flat).values()))

    assert norm(header, flat) == pytest.approx(whole, rel=1e-6)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), rank=st.integers(1, 8))
def test_truncation_is_the_best_of_its_rank_and_tells_what_it_lost(seed: int, rank: int) -> None:
    flat, header = merge([contribution("a", seed=seed, rank=5), contribution("b", seed=seed + 1, rank=3)])
    full = dense(header, flat)

    smaller, small_header, lost = truncate(flat, header, rank=rank)

    assert small_header.rank == rank
    assert distance(dense(small_header, smaller), full) == pytest.approx(lost, abs=1e-5)
    best = sum(float(np.sum(np.linalg.svd(delta, compute_uv=False)[rank:] ** 2)) for delta in full.values())
    assert lost == pytest.approx(np.sqrt(best / sum(float(np.sum(delta**2)) for delta in full.values())), abs=1e-5)


def test_a_rank_larger_than_the_adapters_changes_nothing() -> None:
    header, flat = make("a")

    assert truncate(flat, header, rank=99) == (flat, header, 0.0)


def test_clipping_shrinks_only_what_is_too_large_and_keeps_its_direction() -> None:
    small, large = contribution("a", seed=1), contribution("b", seed=2, scale=1.0)
    bound = 2 * norm(small.header, small.flat)

    kept, shrunk = clip([small, large], bound=bound)

    assert kept is small
    assert norm(shrunk.header, shrunk.flat) == pytest.approx(bound, rel=1e-5)
    factor = bound / norm(large.header, large.flat)
    assert distance(dense(shrunk.header, shrunk.flat), {n: factor * d for n, d in dense(large.header, large.flat).items()}) < 1e-5


def test_an_adapter_one_release_old_counts_half() -> None:
    def header_of(release: int) -> AdapterHeader:
        return make("a", release=release, examples=40)[0]

    assert weight_of(header_of(5), release=5) == 40
    assert weight_of(header_of(4), release=5) == 20
    assert weight_of(header_of(3), release=5) == 10


def test_the_merged_adapter_says_what_it_is() -> None:
    flat, header = merge([contribution("a", seed=1, examples=30), contribution("b", seed=2, examples=50)])

    assert (header.site, header.examples, header.alpha / header.rank) == ("fleet", 80, 1.0)
    assert flat.dtype == np.float32
