"""From trained weights to the file a node loads: F16 GGUF by our own writer, then quantised by llama.cpp."""

from pathlib import Path

from protocol.models.checkpoint import Checkpoint, quantise

KINDS = ("Q8_0", "Q5_0", "Q4_0")  # rows of 640 do not fit blocks of 256, so K types fall back there; measured in docs/log.md
DEFAULT_KIND = "Q8_0"


def export(checkpoint: Checkpoint, folder: Path, *, name: str, kind: str = DEFAULT_KIND) -> tuple[Path, Path]:
    """Write `folder/NAME-f16.gguf` and `folder/NAME.gguf` of `kind`; returns both, in that order.

    Raises:
        UnknownName: llama.cpp has no such type.
    """
    whole, small = folder / f"{name}-f16.gguf", folder / f"{name}.gguf"
    checkpoint.write(whole)
    quantise(whole, small, kind)
    return whole, small
