"""Every reason for which an adapter is refused, by its name."""

import msgspec
import numpy as np
import pytest

from coordinator.federation.admission import Expected, admit, admit_one
from protocol.adapters import AdapterHeader, Flat, Module
from tests.federation.adapters import BASE, MODULES, START, make

EXPECTED = Expected(
    release=2, base_digest=BASE, initial_digest=START, norm_limit=10.0, minimum_examples=16,
    modules={module.tensor: (module.outputs, module.inputs) for module in MODULES},
)  # fmt: skip


def changed(header: AdapterHeader, **changes: object) -> AdapterHeader:
    return msgspec.structs.replace(header, **changes)


def test_a_good_adapter_is_accepted() -> None:
    assert admit_one(*make("esteli"), EXPECTED).accepted


def test_a_late_adapter_of_the_same_base_and_start_is_accepted() -> None:
    assert admit_one(*make("esteli", release=1), EXPECTED).accepted


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"base_digest": "c" * 64}, "base"),
        ({"initial_digest": "c" * 64}, "initial"),
        ({"release": 3}, "release"),
        ({"release": 0}, "release"),
        ({"rank": 0}, "layout"),
        ({"rank": 65}, "layout"),
        ({"alpha": 0.0}, "layout"),
        ({"alpha": float("inf")}, "layout"),
        ({"modules": ()}, "layout"),
        ({"modules": (Module("blk.9.attn_q.weight", 12, 8),)}, "layout"),
        ({"modules": (Module("blk.0.attn_q.weight", 8, 12),)}, "layout"),
        ({"modules": (MODULES[0], MODULES[0])}, "layout"),
        ({"rank": 5}, "length"),
        ({"examples": 15}, "too-few-examples"),
        ({"loss_after": float("nan")}, "not-finite"),
    ],
)
def test_a_header_that_does_not_fit_is_refused_by_name(changes: dict[str, object], reason: str) -> None:
    header, flat = make("esteli")

    decision = admit_one(changed(header, **changes), flat, EXPECTED)

    assert decision.reason == reason
    assert not decision.accepted
    assert decision.detail


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_one_number_that_is_not_finite_is_enough(poison: float) -> None:
    header, flat = make("esteli")
    flat[7] = poison

    assert admit_one(header, flat, EXPECTED).reason == "not-finite"


def test_factors_whose_product_overflows_are_refused() -> None:
    header, flat = make("esteli")

    assert admit_one(header, np.full_like(flat, 3e38), EXPECTED).reason in ("not-finite", "too-large")


def test_an_array_of_another_type_is_refused() -> None:
    header, flat = make("esteli")

    assert admit_one(header, flat.astype(np.float64), EXPECTED).reason == "length"  # type: ignore[arg-type]


def test_an_adapter_that_changes_nothing_is_refused() -> None:
    header, flat = make("esteli")

    assert admit_one(header, np.zeros_like(flat), EXPECTED).reason == "untrained"


def test_an_adapter_over_the_norm_limit_is_refused() -> None:
    assert admit_one(*make("esteli", scale=5.0), EXPECTED).reason == "too-large"


def test_the_first_adapter_of_a_site_counts_and_the_second_is_a_duplicate() -> None:
    decisions = admit([make("esteli", seed=1), make("esteli", seed=2), make("malacatoya", seed=3)], EXPECTED)

    assert [decision.reason for decision in decisions] == ["accepted", "duplicate", "accepted"]


def test_a_refused_adapter_does_not_keep_its_sites_next_one_out() -> None:
    header, flat = make("esteli")

    decisions = admit([(header, np.full_like(flat, np.nan)), (header, flat)], EXPECTED)

    assert [decision.reason for decision in decisions] == ["not-finite", "accepted"]


def scaled(site: str, factor: float) -> tuple[AdapterHeader, Flat]:
    return make(site, seed=len(site), scale=0.05 * factor)


def test_an_adapter_many_times_larger_than_the_others_is_an_outlier_even_of_two() -> None:
    generous = msgspec.structs.replace(EXPECTED, norm_limit=1e9)

    decisions = admit([scaled("esteli", 1.0), scaled("malacatoya", 10.0)], generous)

    assert [decision.reason for decision in decisions] == ["accepted", "outlier"]


def test_a_huge_adapter_does_not_make_the_others_outliers() -> None:
    generous = msgspec.structs.replace(EXPECTED, norm_limit=1e9)

    decisions = admit([scaled("a", 1.0), scaled("bb", 1.1), scaled("ccc", 30.0)], generous)

    assert [decision.reason for decision in decisions] == ["accepted", "accepted", "outlier"]
