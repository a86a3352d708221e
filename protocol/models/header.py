"""Whether a file is a whole GGUF, decided before llama.cpp reads it. Bytes come in, a decision comes out; no numpy, no llama.cpp.

llama.cpp checks much and asserts the rest, and an assertion ends the process: a node whose disk spoiled one piece of the vocabulary would
end at every start. So everything it takes for granted is looked at here, and a damaged file is one clear line:
 * every length, count and offset lies within the file, before anything of that size is made or read;
 * keys, tensors and pieces are there once; pieces, scores and types are as many; special tokens are among them;
 * what every part of the model must have is above zero.
Limits: one-file models; the figures of the weights are not looked at (the digest is for that).
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from protocol.errors import BadInput, MalformedMessage, TooLarge

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ENTRIES_LIMIT = 4_096  # metadata entries; real models have about 40
TENSORS_LIMIT = 65_536  # the students have 200, the largest models some thousand
PIECES_LIMIT = 1 << 20  # the largest vocabulary in use is 262,144
NAME_LIMIT = 63  # bytes of a tensor's name, as in ggml
KEY_LIMIT = 65_535  # bytes, as in the format
TOLD_LIMIT = 200  # bytes of a text that is told; chat templates are long
DIMENSIONS = 4
NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
UINT32, BOOL, STRING, ARRAY = 4, 7, 8, 9
BLOCKS = {  # ggml type: weights a block, bytes a block; tests hold it to the `gguf` library's table
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 40), 10: (256, 84), 11: (256, 110),
    12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292), 16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50),
    20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8),
    29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66), 39: (32, 17),
}  # fmt: skip
POSITIVE = ("block_count", "embedding_length", "feed_forward_length", "context_length", "attention.head_count")
WIDTH_LIMIT = 1 << 20  # of any of these figures
SPECIAL = ("bos", "eos", "unknown", "padding", "eot", "separator", "mask")


class Header(msgspec.Struct, frozen=True):
    """What the front of a GGUF says."""

    architecture: str
    kind: str  # "model", or "adapter"
    figures: Mapping[str, Any]  # numbers, flags and short texts of the metadata; of lists their length
    tensors: Mapping[str, tuple[int, ...]]  # name -> shape, in ggml's order (inputs first)


def check_file(path: Path) -> Header:
    """The header of the file at `path`.

    Raises:
        BadInput: it cannot be read.
        MalformedMessage, TooLarge: as `read`.
    """
    try:
        with path.open("rb") as file:
            if not (size := file.seek(0, 2)):
                raise MalformedMessage(f"{path} is not a GGUF file: it is empty")
            with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as data:
                return read(data, what=str(path))
    except OSError as error:
        raise BadInput(f"cannot read the model file {path}: {error.strerror}") from error


def read(data: bytes | mmap.mmap, *, what: str) -> Header:
    """The header in `data`, the whole file.

    Raises:
        MalformedMessage: not a GGUF, or one that was damaged.
        TooLarge: more entries, tensors or pieces than any model has.
    """
    at = _Reader(data, what)
    if at.take(4) != MAGIC:
        raise MalformedMessage(f"{what} is not a GGUF file")
    if (version := at.number("<I")) not in VERSIONS:
        raise at.damaged(f"it says it is GGUF version {version}, known are {VERSIONS}")
    tensors, entries = at.number("<Q"), at.number("<Q")
    if tensors > TENSORS_LIMIT or entries > ENTRIES_LIMIT:
        raise TooLarge(f"{what} says it has {tensors} tensors and {entries} entries; the limits are {TENSORS_LIMIT} and {ENTRIES_LIMIT}")
    figures: dict[str, Any] = {}
    for _ in range(entries):
        key = at.text(KEY_LIMIT)
        if key in figures:
            raise at.damaged(f"{key!r} is there twice")
        figures[key] = at.value(key, at.number("<I"))
    shapes = _tensors(at, tensors, figures)
    architecture, kind = str(figures.get("general.architecture", "")), str(figures.get("general.type", "model"))
    if not architecture:
        raise at.damaged("it names no architecture")
    _check_figures(at, architecture, figures, whole=kind != "adapter")
    return Header(architecture, kind, figures, shapes)


class _Reader:
    """Reads on from a position, never past the end."""

    def __init__(self, data: bytes | mmap.mmap, what: str) -> None:
        self._data, self.size, self._what, self.position = data, len(data), what, 0

    def damaged(self, why: str) -> MalformedMessage:
        return MalformedMessage(f"{self._what} is damaged: {why}; fetch the file again")

    def skip(self, count: int) -> int:
        """Go on by `count` bytes; the position before."""
        if count > self.size - self.position:
            raise self.damaged(f"it ends at byte {self.size}, in the middle of its header")
        self.position += count
        return self.position - count

    def take(self, count: int) -> bytes:
        at = self.skip(count)
        return self._data[at : self.position]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self, limit: int) -> str:
        length = self.number("<Q")
        if length > limit:
            raise self.damaged(f"a name of {length} bytes at byte {self.position}")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged(f"a name at byte {self.position} is not text") from error

    def value(self, key: str, kind: int) -> Any:
        """One metadata value; a list is walked and told by its length."""
        if kind == STRING:
            at = self.skip(self.number("<Q"))
            return self._data[at : min(self.position, at + TOLD_LIMIT)].decode("utf-8", "replace")
        if kind == ARRAY:
            return self._list(key)
        if kind not in NUMBERS:
            raise self.damaged(f"{key!r} is of an unknown type {kind}")
        found = self.number(NUMBERS[kind])
        if kind == BOOL and found > 1:
            raise self.damaged(f"{key!r} is neither true nor false")
        return found

    def _list(self, key: str) -> int:
        kind, count = self.number("<I"), self.number("<Q")
        if kind == STRING:
            self._texts(key, count, once=key == "tokenizer.ggml.tokens")
        elif kind in NUMBERS:
            self.skip(count * struct.calcsize(NUMBERS[kind]))
        else:
            raise self.damaged(f"{key!r} is a list of an unknown type {kind}")
        return int(count)

    def _texts(self, key: str, count: int, *, once: bool) -> None:
        if count > PIECES_LIMIT:
            raise TooLarge(f"{self._what}: {key!r} says it has {count} texts, the limit is {PIECES_LIMIT}")
        length_of: Callable[..., tuple[int]] = struct.Struct("<Q").unpack_from  # a vocabulary has 262,144: no call too many here
        data, size, at, seen = self._data, self.size, self.position, set[bytes]()
        for _ in range(count):
            if at + 8 > size or (end := at + 8 + length_of(data, at)[0]) > size:
                raise self.damaged(f"{key!r} runs over the end of the file")
            if once:
                seen.add(data[at + 8 : end])
            at = end
        self.position = at
        if once and (len(seen) != count or any(b"\0" in piece for piece in seen)):
            raise self.damaged(f"{key!r} has a piece twice")  # llama.cpp reads a piece up to its first zero


def _tensors(at: _Reader, count: int, figures: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes; each tensor's bytes lie whole within the file, where they may lie."""
    alignment = figures.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 8 <= alignment <= 65_536 or alignment & (alignment - 1):
        raise at.damaged(f"general.alignment is {alignment!r}")
    shapes: dict[str, tuple[int, ...]] = {}
    ends: list[tuple[str, int, int]] = []
    for _ in range(count):
        name, dimensions = at.text(NAME_LIMIT), at.number("<I")
        if name in shapes:
            raise at.damaged(f"tensor {name!r} is there twice")
        if not 1 <= dimensions <= DIMENSIONS:
            raise at.damaged(f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(at.number("<Q") for _ in range(dimensions))
        kind, offset = at.number("<I"), at.number("<Q")
        if kind not in BLOCKS:
            raise at.damaged(f"tensor {name!r} is of an unknown type {kind}")
        block, size = BLOCKS[kind]
        weights = 1
        for length in shape:
            weights *= length  # Python's numbers do not overflow
        if not weights or shape[0] % block or offset % alignment:
            raise at.damaged(f"tensor {name!r} has the shape {shape} at {offset}")
        shapes[name] = shape
        ends.append((name, offset, weights // block * size))
    room = at.size - -(-at.position // alignment) * alignment
    for name, offset, size in ends:
        if offset + size > room:
            raise at.damaged(f"tensor {name!r} lies beyond the end of the file")
    return shapes


def _check_figures(at: _Reader, architecture: str, figures: Mapping[str, Any], *, whole: bool) -> None:
    for name in POSITIVE:
        figure = figures.get(f"{architecture}.{name}")
        if figure is not None and not (isinstance(figure, int) and 0 < figure <= WIDTH_LIMIT):
            raise at.damaged(f"{architecture}.{name} is {figure!r}")
    if not whole:
        return
    pieces = figures.get("tokenizer.ggml.tokens")
    if not isinstance(pieces, int) or pieces < 1:
        raise at.damaged("it has no vocabulary")
    for name in ("scores", "token_type"):
        count = figures.get(f"tokenizer.ggml.{name}", pieces)
        if count != pieces:
            raise at.damaged(f"its vocabulary has {pieces} pieces and {count} {name}")
    for name in SPECIAL:
        token = figures.get(f"tokenizer.ggml.{name}_token_id", 0)
        if not isinstance(token, int) or not 0 <= token < pieces:
            raise at.damaged(f"its {name} token is number {token!r} of {pieces}")
