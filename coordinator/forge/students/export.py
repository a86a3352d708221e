"""From trained weights to the file a node loads: F16 GGUF by our own writer, then quantised by llama.cpp.

* Ternary kinds are ours to the last bit: our writer packs the blocks, refuses weights that are not ternary, and the finished file is read
  again: no weight has changed. The embedding, which nobody trained for three values, is llama.cpp's Q6_K.
* Types with blocks of 256 weights do not fit rows of 640: llama.cpp then stores another type, `stored` says which.
"""

from collections import defaultdict
from pathlib import Path

import gguf
import msgspec
import numpy as np

from protocol.errors import BadInput, MalformedMessage
from protocol.models.checkpoint import TERNARY_KINDS, Checkpoint, Importance, encode_tensor, quantise
from protocol.names import known

KINDS = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_0", "Q4_K_M", "IQ4_NL", "Q4_0", "Q3_K_M", *TERNARY_KINDS)
DEFAULT_KIND = "Q8_0"
WIDE = 256  # weights in a block of the K types and the ternary ones


class Stored(msgspec.Struct, frozen=True):
    """The matrices of a file that share a type and a row length."""

    kind: str
    row: int  # weights
    tensors: int
    bytes: int
    fell_back: bool  # another type was asked for, and does not fit rows of this length


def export(
    checkpoint: Checkpoint, folder: Path, *, name: str, kind: str = DEFAULT_KIND, importance: Importance | None = None
) -> tuple[Path, Path]:
    """Write `folder/NAME-f16.gguf` and `folder/NAME.gguf` of `kind`; returns both, in that order.

    `importance` (see `students.importance`) makes types of 6 bits and fewer better for the same bytes.

    Raises:
        UnknownName: a kind we do not offer.
        BadInput: a ternary kind for a model that was not trained for it.
    """
    known(kind, KINDS, what="file type")
    whole, small = folder / f"{name}-f16.gguf", folder / f"{name}.gguf"
    checkpoint.write(whole)
    if kind in TERNARY_KINDS:
        export_ternary(checkpoint, small, kind, importance=importance)
    else:
        quantise(whole, small, kind, importance=importance)
    return whole, small


def export_ternary(
    checkpoint: Checkpoint, target: Path, kind: str, *, importance: Importance | None = None, embedding: str = "Q6_K"
) -> None:
    """Write a model that was trained ternary as `kind` ("TQ2_0" or "TQ1_0"), its embedding as another type.

    Raises:
        BadInput: a matrix is not ternary, or its rows are not multiples of 256.
    """
    tensors = dict(checkpoint.tensors)
    for name, _ in checkpoint.matrices():
        try:
            tensors[name] = encode_tensor(checkpoint.array(name), kind)
        except BadInput as error:
            raise BadInput(f"{name}: {error}; train the student with `ternary`, or export it as Q4_K_M") from error
    packed = target.with_name(target.name + ".packed")
    checkpoint.with_tensors(tensors).write(packed)
    try:
        quantise(packed, target, kind, importance=importance, embedding=embedding)
    finally:
        packed.unlink()
    written = Checkpoint.read(target).tensors
    changed = [name for name, _ in checkpoint.matrices() if not np.array_equal(written[name].data, tensors[name].data)]
    if changed:
        target.unlink()
        raise MalformedMessage(
            f"llama.cpp changed {changed[0]} and {len(changed) - 1} more while it packed the embedding; nothing was kept"
        )


def stored(path: Path, kind: str) -> list[Stored]:
    """What a file of `kind` really holds, matrix types with the most bytes first."""
    checkpoint = Checkpoint.read(path)
    groups: dict[tuple[str, int], list[int]] = defaultdict(list)
    for tensor in checkpoint.tensors.values():
        if tensor.data.ndim == 2:
            block, size = gguf.GGML_QUANT_SIZES[tensor.kind]
            groups[tensor.kind.name, tensor.data.nbytes // tensor.data.shape[0] // size * block].append(tensor.data.nbytes)
    found = [Stored(name, row, len(sizes), sum(sizes), row % WIDE != 0 and name != kind) for (name, row), sizes in groups.items()]
    return sorted(found, key=lambda one: -one.bytes)
