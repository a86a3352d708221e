"""Which adapters may enter a merge. No I/O: headers and numbers come in, decisions with named reasons come out.

Checks, in this order, cheap ones first: duplicate, base, initial, release, layout, length, too-few-examples, not-finite, untrained,
too-large, outlier. A refusal is a row in the ledger and the adapter's file is kept: somebody has to look at it.

Why norms and not Krum: Krum and its kin need 2f+3 sites, we have 2 to 8. A norm bound, the held-out gate and a signed, reversible
release are what holds at this size. Nothing here finds a small poisoned update; the gate sees it only if the held-out sets do.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec
import numpy as np

from coordinator.federation.merge import norm
from protocol.adapters import AdapterHeader, Flat

Reason = Literal[
    "accepted", "duplicate", "base", "initial", "release", "layout", "length", "too-few-examples", "not-finite", "untrained",
    "too-large", "outlier",
]  # fmt: skip

MINIMUM_EXAMPLES = 16  # fewer confirmed examples teach a site's accidents
RANK_LIMIT = 64  # eight sites of it still stack to a file llama.cpp loads in a blink
OUTLIER_FACTOR = 8.0  # times the median norm of the other sites


class Expected(msgspec.Struct, frozen=True):
    """What an adapter of this round must be."""

    release: int  # the active one; an adapter of an earlier release with the same base and start is late, not wrong
    base_digest: str
    initial_digest: str
    modules: Mapping[str, tuple[int, int]]  # tensor -> (outputs, inputs), of every weight the base lets us adapt
    norm_limit: float  # Frobenius norm of delta W; an update as large as the weights themselves is no update
    minimum_examples: int = MINIMUM_EXAMPLES
    rank_limit: int = RANK_LIMIT
    outlier_factor: float = OUTLIER_FACTOR


class Decision(msgspec.Struct, frozen=True):
    """Whether one adapter may enter the merge, and why."""

    site: str
    reason: Reason
    detail: str  # one sentence for the operator, with the figures
    norm: float = 0.0

    @property
    def accepted(self) -> bool:
        """Whether it may."""
        return self.reason == "accepted"


def admit_one(header: AdapterHeader, flat: Flat, expected: Expected, *, seen: Sequence[str] = ()) -> Decision:
    """All checks that need no other adapter. `seen`: sites already accepted in this round."""
    refusal = _refusal_by_header(header, expected, seen) or _refusal_by_numbers(header, flat, expected)
    if refusal is not None:
        return Decision(header.site, *refusal)
    size = norm(header, flat)
    if not math.isfinite(size):
        return Decision(header.site, "not-finite", "the product of its factors overflows")
    if size == 0.0:
        return Decision(header.site, "untrained", "its change is exactly zero: training did not move the weights")
    if size > expected.norm_limit:
        return Decision(header.site, "too-large", f"norm {size:.3g} is over the limit {expected.norm_limit:.3g}", size)
    return Decision(header.site, "accepted", f"norm {size:.3g}, {header.examples} examples", size)


def admit(adapters: Sequence[tuple[AdapterHeader, Flat]], expected: Expected) -> list[Decision]:
    """One decision an adapter, in the order given; the first of a site counts, a second one is a duplicate.

    Last, each accepted norm is compared with the median of the other sites' (so that one huge adapter cannot move its own yardstick).
    """
    decisions: list[Decision] = []
    for header, flat in adapters:
        seen = [decision.site for decision in decisions if decision.accepted]
        decisions.append(admit_one(header, flat, expected, seen=seen))
    norms = {decision.site: decision.norm for decision in decisions if decision.accepted}
    for at, decision in enumerate(decisions):
        others = [size for site, size in norms.items() if site != decision.site]
        if not decision.accepted or not others:
            continue
        usual = float(np.median(others))
        if decision.norm > expected.outlier_factor * usual:
            detail = f"norm {decision.norm:.3g} is over {expected.outlier_factor:g} times the other sites' median {usual:.3g}"
            decisions[at] = Decision(decision.site, "outlier", detail, decision.norm)
    return decisions


def _refusal_by_header(header: AdapterHeader, expected: Expected, seen: Sequence[str]) -> tuple[Reason, str] | None:
    if header.site in seen:
        return "duplicate", "this site's adapter is already in the round"
    if header.base_digest != expected.base_digest:
        return "base", f"trained on model {header.base_digest[:12]}, the release has {expected.base_digest[:12]}"
    if header.initial_digest != expected.initial_digest:
        return "initial", f"started from {header.initial_digest[:12]}, the release ships {expected.initial_digest[:12]}"
    if not 1 <= header.release <= expected.release:
        return "release", f"trained for release {header.release}, the active one is {expected.release}"
    if not 1 <= header.rank <= expected.rank_limit:
        return "layout", f"rank {header.rank} is not in 1..{expected.rank_limit}"
    if not (math.isfinite(header.alpha) and header.alpha > 0):
        return "layout", f"alpha {header.alpha} is not a positive number"
    if not header.modules:
        return "layout", "it adapts nothing"
    if len({module.tensor for module in header.modules}) != len(header.modules):
        return "layout", "a tensor is named twice"
    for module in header.modules:
        shape = expected.modules.get(module.tensor)
        if shape != (module.outputs, module.inputs):
            told = "the base has no such weight" if shape is None else f"the base has {shape[0]}x{shape[1]}"
            return "layout", f"module {module.tensor[:80]!r} {module.outputs}x{module.inputs}: {told}"
    if header.examples < expected.minimum_examples:
        return "too-few-examples", f"{header.examples} confirmed examples, {expected.minimum_examples} are needed"
    return None


def _refusal_by_numbers(header: AdapterHeader, flat: Flat, expected: Expected) -> tuple[Reason, str] | None:
    if flat.ndim != 1 or flat.dtype != np.float32 or flat.size != header.length:
        return "length", f"{flat.size} numbers, its header promises {header.length}"
    broken = int(flat.size - np.count_nonzero(np.isfinite(flat)))
    if broken:
        return "not-finite", f"{broken} of {flat.size} numbers are NaN or infinite"
    if not (math.isfinite(header.loss_before) and math.isfinite(header.loss_after)):
        return "not-finite", "its held-out loss is NaN or infinite"
    return None
