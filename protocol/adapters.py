"""A LoRA adapter as it travels: one flat float32 array and a header that says what it is. No I/O.

Flower's cost is per array and not per byte (25 s a round for 200 arrays, 1.7 s for one of the same 2 MB), so an adapter is packed:
for each module in the header's order, A (rank, in) then B (out, rank), row-major. delta W = (alpha / rank) * B @ A (Hu et al. 2021).
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from protocol.errors import DoesNotFit

Flat = NDArray[np.float32]


class Module(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One adapted weight, by its GGUF tensor name ("blk.3.attn_q.weight"). Its shape is (outputs, inputs)."""

    tensor: str
    outputs: int
    inputs: int


class AdapterHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an adapter is, without which its numbers mean nothing."""

    site: str
    release: int  # the release it was trained on
    base_digest: str  # the student model file it was trained on
    initial_digest: str  # the shipped initial adapter it started from: independent starts cannot be merged
    rank: int
    alpha: float
    modules: tuple[Module, ...]
    examples: int  # confirmed examples it learned from
    loss_before: float = 0.0  # mean negative log-likelihood a token on the site's held-out part, nats
    loss_after: float = 0.0
    held_out: int = 0  # examples in that part
    trained_at: int = 0  # seconds since 1970, UTC

    @property
    def length(self) -> int:
        """Number of floats in the flat array."""
        return sum(self.rank * (module.inputs + module.outputs) for module in self.modules)


class AdapterQuestion(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="question"):
    """The one question of a round: "what have you for release R?" Travels as JSON in a Flower message."""

    release: int
    base_digest: str
    initial_digest: str


class AdapterReceipt(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="receipt"):
    """ "Your answer is on the coordinator's disk": the node may end its window. Flower drops the reply of a node that left before."""

    digest: str  # of the adapter; empty when the node had none


AdapterCode = Literal[
    "adapter",  # the flat array is with this reply
    "nothing",  # nothing trained for that base and initial adapter
    "noted",  # answers a receipt
    "damaged",  # what was stored no longer matches its digest
    "failed",  # something else went wrong; the reason stays in the node's own log
]


class AdapterReply(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A node's answer to it. Codes, names and figures only: a site's text never travels, not even in an error."""

    node: str
    code: AdapterCode
    digest: str = ""  # SHA-256 of the flat array's bytes, little-endian float32
    header: AdapterHeader | None = None


def unpack(flat: Flat, header: AdapterHeader) -> dict[str, tuple[Flat, Flat]]:
    """Tensor name -> (A: (rank, in), B: (out, rank)), views into `flat`.

    Raises:
        DoesNotFit: `flat` has not the length the header promises.
    """
    if flat.ndim != 1 or flat.size != header.length:
        raise DoesNotFit(f"adapter of {header.site!r} has {flat.size} numbers, its header promises {header.length}")
    found: dict[str, tuple[Flat, Flat]] = {}
    at = 0
    for module in header.modules:
        a = flat[at : at + header.rank * module.inputs].reshape(header.rank, module.inputs)
        at += a.size
        b = flat[at : at + header.rank * module.outputs].reshape(module.outputs, header.rank)
        at += b.size
        found[module.tensor] = (a, b)
    return found


def pack(factors: Mapping[str, tuple[Flat, Flat]], modules: Sequence[Module]) -> Flat:
    """The inverse of `unpack`, in the order of `modules`."""
    parts = [part.astype(np.float32).ravel() for module in modules for part in factors[module.tensor]]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)


def stacked(parts: Sequence[tuple[Mapping[str, tuple[Flat, Flat]], float]]) -> dict[str, tuple[Flat, Flat]]:
    """sum_k scale_k * B_k @ A_k as one product whose own scale is 1, exactly, never forming a full matrix.

    A = [A_1; A_2; ...]  (R, in)      B = [scale_1 B_1, scale_2 B_2, ...]  (out, R)      R = sum of the ranks

    in float64, rounded once (FLoRA, Wang et al. 2024, arXiv:2409.05976). A module that a part lacks counts as a zero product.
    """
    ranks = [max((a.shape[0] for a, _ in factors.values()), default=0) for factors, _ in parts]
    found: dict[str, tuple[Flat, Flat]] = {}
    for tensor in dict.fromkeys(name for factors, _ in parts for name in factors):
        shapes = {(b.shape[0], a.shape[1]) for factors, _ in parts if tensor in factors for a, b in (factors[tensor],)}
        if len(shapes) != 1:
            raise DoesNotFit(f"{tensor} has shapes {sorted(shapes)} in adapters that were to be added up")
        outputs, inputs = shapes.pop()
        wide_a = np.zeros((sum(ranks), inputs), dtype=np.float32)
        wide_b = np.zeros((outputs, sum(ranks)), dtype=np.float32)
        at = 0
        for (factors, scale), rank in zip(parts, ranks, strict=True):
            if tensor in factors:
                a, b = factors[tensor]  # a: (r, in)  b: (out, r), r <= rank
                wide_a[at : at + a.shape[0]] = a
                wide_b[:, at : at + a.shape[0]] = b.astype(np.float64) * scale
            at += rank
        found[tensor] = (wide_a, wide_b)
    return found
