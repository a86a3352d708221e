"""GGUF files as values: metadata, vocabulary and tensors, read and written.

Rules:
 * A tensor keeps its quantised bytes until somebody asks for numbers, so cutting rows or layers never requantises.
 * The same content is the same bytes (no time stamps): a file's digest is a cache key.
 * A file appears whole or not at all (`.part`, sync, rename).

Limits: one-file models. Encoding to F32, F16, BF16, Q8_0, Q5_0, Q4_0 and of ternary numbers is `gguf`'s; K types go through `quantise`
(llama.cpp).
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import ctypes
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray

from protocol.blobs import sync_folder
from protocol.digests import digest_file
from protocol.errors import BadInput, MalformedMessage
from protocol.names import known

ARCHITECTURE = "gemma3"
GLOBAL_EVERY = 6  # llama.cpp counts by block index: blocks 5, 11, 17 of gemma3 are global, the others local
LOCAL_ROPE_BASE = 10_000.0  # of local blocks; llama.cpp's constant for gemma3

TERNARY_KINDS = ("TQ2_0", "TQ1_0")  # 2.06 and 1.69 bits a weight

Importance = Mapping[str, NDArray[np.float32]]  # tensor -> (inputs,), mean square of what it multiplies

TOKEN_NORMAL, TOKEN_UNKNOWN, TOKEN_CONTROL, TOKEN_USER, TOKEN_UNUSED, TOKEN_BYTE = 1, 2, 3, 4, 5, 6

_SKIPPED = ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", "general.architecture")
_VOCABULARY = ("tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type")


@dataclass(frozen=True)
class Value:
    """One metadata value with its GGUF type, so that it is written as it was read."""

    value: Any
    kind: gguf.GGUFValueType
    item_kind: gguf.GGUFValueType | None = None  # of arrays


@dataclass(frozen=True)
class Tensor:
    """A tensor as stored: `data` has the row's bytes (quantised types) or numbers in its last axis."""

    data: NDArray[Any]
    kind: gguf.GGMLQuantizationType

    def numbers(self) -> NDArray[np.float32]:
        """As float32, shape (outputs, inputs) or (n,)."""
        return np.asarray(dequantize(self.data, self.kind), dtype=np.float32)

    def rows(self, keep: NDArray[np.int64]) -> "Tensor":
        """Only those rows; quantised rows are independent, so nothing is requantised."""
        return Tensor(np.ascontiguousarray(self.data[keep]), self.kind)


@dataclass(frozen=True)
class Vocabulary:
    """Pieces by id, with SentencePiece scores and llama.cpp's token types."""

    tokens: list[str]
    scores: NDArray[np.float32]
    types: NDArray[np.int32]


@dataclass
class Checkpoint:
    """A model file in memory."""

    metadata: dict[str, Value]
    vocabulary: Vocabulary
    tensors: dict[str, Tensor]
    path: Path | None = field(default=None, compare=False)

    @classmethod
    def read(cls, path: Path) -> "Checkpoint":
        """Read a GGUF. Tensor bytes stay mapped from the file until they are used.

        Raises:
            BadInput: there is no such file.
            MalformedMessage: it is not a GGUF, or not one of the architecture we train.
        """
        if not path.is_file():
            raise BadInput(f"model file {path} does not exist")
        try:
            reader = _Reader(path)
            architecture = reader.fields["general.architecture"].contents()
        except (ValueError, KeyError, IndexError, struct.error) as error:
            raise MalformedMessage(f"{path} is not a GGUF model file: {error}") from error
        if architecture != ARCHITECTURE:
            raise MalformedMessage(f"{path} is a {architecture!r} model; this build trains {ARCHITECTURE!r} only")
        metadata = {
            name: Value(reader.value(name), entry.types[0], entry.types[-1] if entry.types[0] == gguf.GGUFValueType.ARRAY else None)
            for name, entry in reader.fields.items()
            if name not in _SKIPPED and name not in _VOCABULARY
        }
        missing = [name for name in _VOCABULARY if name not in reader.fields]
        if missing:
            raise MalformedMessage(f"{path} has no {missing[0]}: it is not a whole model file")
        tokens, scores, types = (reader.value(name) for name in _VOCABULARY)
        vocabulary = Vocabulary(tokens, np.array(scores, dtype=np.float32), np.array(types, dtype=np.int32))
        tensors = {tensor.name: Tensor(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
        return cls(metadata, vocabulary, tensors, path)

    def write(self, path: Path) -> None:
        """Write the GGUF; the file appears whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        writer = gguf.GGUFWriter(part, ARCHITECTURE)
        for name, entry in self.metadata.items():
            writer.add_key_value(name, entry.value, entry.kind, sub_type=entry.item_kind)
        writer.add_token_list(self.vocabulary.tokens)
        writer.add_token_scores(self.vocabulary.scores.tolist())
        writer.add_token_types(self.vocabulary.types.tolist())
        for name, tensor in self.tensors.items():
            writer.add_tensor(name, tensor.data, raw_dtype=tensor.kind)
        _finish(writer, part, path)
        self.path = path
        self.__dict__.pop("digest", None)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file this checkpoint was read from or last written to.

        Raises:
            BadInput: it was never a file.
        """
        if self.path is None:
            raise BadInput("this checkpoint was never written: it has no digest")
        return digest_file(self.path)

    @property
    def blocks(self) -> int:
        """Number of transformer blocks."""
        return int(self.number("block_count"))

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return int(self.number("embedding_length"))

    def number(self, name: str, default: float | None = None) -> float:
        """The architecture's figure called `name` ("block_count", "attention.head_count")."""
        entry = self.metadata.get(f"{ARCHITECTURE}.{name}")
        if entry is None:
            if default is None:
                raise MalformedMessage(f"model file has no {ARCHITECTURE}.{name}")
            return default
        return float(entry.value)

    def array(self, name: str) -> NDArray[np.float32]:
        """The tensor's numbers, dequantised."""
        return self.tensors[name].numbers()

    def with_tensors(self, tensors: Mapping[str, Tensor], **figures: int) -> "Checkpoint":
        """A copy with other tensors and, where given, other integer figures (`block_count=8`)."""
        metadata = dict(self.metadata)
        for name, figure in figures.items():
            metadata[f"{ARCHITECTURE}.{name}"] = Value(figure, gguf.GGUFValueType.UINT32)
        return Checkpoint(metadata, self.vocabulary, dict(tensors))

    def keep_blocks(self, keep: Sequence[int]) -> "Checkpoint":
        """Only those blocks, renumbered from 0.

        llama.cpp takes local or global attention from the new number, and so does `to_torch`: a kept block may change its rope base.
        """
        if sorted(set(keep)) != list(keep) or not keep or keep[-1] >= self.blocks or keep[0] < 0:
            raise BadInput(f"blocks to keep must be rising numbers from 0 to {self.blocks - 1}, not {list(keep)}")
        renumbered = {old: new for new, old in enumerate(keep)}
        tensors: dict[str, Tensor] = {}
        for name, tensor in self.tensors.items():
            if not name.startswith("blk."):
                tensors[name] = tensor
            elif (old := int(name.split(".")[1])) in renumbered:
                tensors[f"blk.{renumbered[old]}.{name.split('.', 2)[2]}"] = tensor
        return self.with_tensors(tensors, block_count=len(keep))

    def matrices(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Names and (outputs, inputs) of the blocks' weight matrices, in the file's order."""
        for name, tensor in self.tensors.items():
            if name.startswith("blk.") and tensor.data.ndim == 2:
                inputs = (
                    gguf.quants.quant_shape_from_byte_shape(tensor.data.shape, tensor.kind)[-1]
                    if _packed(tensor.kind)
                    else tensor.data.shape[-1]
                )
                yield name, (int(tensor.data.shape[0]), int(inputs))


class _Reader(gguf.GGUFReader):
    """gguf's reader, but a list of 262,144 pieces takes a fifth of a second and not ten."""

    def __init__(self, path: Path) -> None:
        self._lists: dict[int, list[Any]] = {}  # offset of a list's type -> its items
        super().__init__(path)

    def value(self, name: str) -> Any:
        """A metadata value as Python knows it."""
        entry = self.fields[name]
        at = entry.offset + 8 + len(name.encode()) + 4  # length of the name, the name, its type
        return self._lists[at] if at in self._lists else entry.contents()

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if gguf.GGUFValueType(raw_type) != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind, count = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
        item, size, offset = gguf.GGUFValueType(kind[0]), int(count[0]), int(orig_offs) + 12
        if size > len(self.data):
            raise ValueError(f"a list of {size} items in {len(self.data)} bytes")
        if item == gguf.GGUFValueType.STRING:
            data, items = memoryview(self.data), []
            for _ in range(size):
                (length,) = struct.unpack_from("<Q", data, offset)
                items.append(bytes(data[offset + 8 : offset + 8 + length]).decode())
                offset += 8 + length
        else:
            numbers = self._get(offset, self.gguf_scalar_to_np[item], size)
            items, offset = numbers.tolist(), offset + int(numbers.nbytes)
        self._lists[int(orig_offs)] = items
        return offset - int(orig_offs), [kind, count], [], [gguf.GGUFValueType.ARRAY, item]


def _packed(kind: gguf.GGMLQuantizationType) -> bool:
    return kind not in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)


def encode_tensor(numbers: NDArray[np.float32], kind: str) -> Tensor:
    """Encode float numbers as `kind` ("F32", "F16", "Q8_0", "Q5_0", "Q4_0", "TQ2_0", "TQ1_0"); vectors always stay F32, as llama.cpp wants
    its norms.

    The ternary kinds keep numbers or refuse them: of a model that was not trained for three values nothing would be left.

    Raises:
        UnknownName: another kind.
        BadInput: rows that the kind's block size does not divide, or a ternary kind for numbers that are not -s, 0, s in each block.
    """
    known(kind, ("F32", "F16", "BF16", "Q8_0", "Q5_0", "Q4_0", *TERNARY_KINDS), what="tensor type")
    wanted = gguf.GGMLQuantizationType[kind if numbers.ndim > 1 else "F32"]
    block = gguf.GGML_QUANT_SIZES[wanted][0]
    if numbers.shape[-1] % block:
        raise BadInput(f"rows of {numbers.shape[-1]} numbers do not fit {kind} blocks of {block}")
    tensor = Tensor(quantize(np.ascontiguousarray(numbers, dtype=np.float32), wanted), wanted)
    if kind in TERNARY_KINDS and (change := float(np.abs(tensor.numbers() - numbers).max(initial=0.0))):
        raise BadInput(f"{kind} would change these numbers by up to {change:.2g}: they were not trained as ternary")
    return tensor


def quantise(
    source: Path, target: Path, kind: str, *, importance: Importance | None = None, embedding: str | None = None, threads: int = 2
) -> None:
    """Quantise a GGUF with llama.cpp (`llama_model_quantize`), from any type, to `kind` ("Q8_0", "Q5_0", "Q4_0", "Q4_K_M", ...).

    Args:
        importance: how much an error in each input channel matters; types of 6 bits and fewer round with it.
        embedding: the embedding's tensor type, where llama.cpp's own choice for `kind` is not wanted.

    Raises:
        UnknownName: llama.cpp has no such file type.
        BadInput: llama.cpp refused the file, or the importance is not this model's.
    """
    import llama_cpp

    from protocol.models.llama_log import forget, said  # importing it keeps llama.cpp off stderr

    prefix = "LLAMA_FTYPE_MOSTLY_"
    kinds = {name.removeprefix(prefix): value for name, value in vars(llama_cpp).items() if name.startswith(prefix)}
    known(kind, kinds, what="file type")
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread, parameters.allow_requantize = kinds[kind], threads, True
    if embedding is not None:
        known(embedding, gguf.GGMLQuantizationType.__members__, what="tensor type")
        parameters.token_embedding_type = gguf.GGMLQuantizationType[embedding].value
    rows = _importance_rows(importance) if importance else None  # lives until llama.cpp has read it
    if rows is not None:
        parameters.imatrix = rows
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    forget()
    if llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(part), ctypes.byref(parameters)):
        part.unlink(missing_ok=True)
        raise BadInput(f"llama.cpp cannot quantise {source} to {kind}; is it a whole GGUF file?{said()}")
    _settle(part, target)


def _importance_rows(importance: Importance) -> Any:
    """As llama.cpp reads it: an array of (name, numbers, how many) that ends in one without a name. The array keeps the numbers alive."""
    import llama_cpp

    rows = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()
    for row, (name, values) in zip(rows, importance.items(), strict=False):
        if not np.isfinite(values).all() or (values < 0).any():
            raise BadInput(f"the importance of {name} has numbers that are negative or not finite")
        numbers = np.ascontiguousarray(values, dtype=np.float32)
        row.name, row.size = name.encode(), numbers.size
        row.data = numbers.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    return rows


def _finish(writer: gguf.GGUFWriter, part: Path, path: Path) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _settle(part, path)


def _settle(part: Path, path: Path) -> None:
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path)
    sync_folder(path.parent)
