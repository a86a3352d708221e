"""The target cache: what the teacher thought of every target token, on disk, so that a student's epochs never run the teacher again.

One record an example: its token ids' digest, top-k ids (bit-packed), log-probabilities (float16) and the log of the mass outside.
Rules:
 * Append only, in shards; each record carries a CRC. After kill -9 the record in flight is cut off, no other is lost, none is doubled.
 * The header names teacher, tokeniser, temperature and k; a cache of another teacher is refused, never mixed.
 * Size: k * (2 + ceil(log2 V) / 8) + 2 bytes a token: 184 B for k = 50 and V = 8,192; no more than 200 B up to V = 32,768.
 * Reading is through mmap: memory holds the index only.
"""

import mmap
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from protocol.blobs import write_atomically
from protocol.codec import decode_as
from protocol.digests import digest_value
from protocol.errors import BadInput, WrongDigest
from protocol.models.tokenizer import Example

SHARD_BYTES = 64 << 20
MAGIC = 0x4D41495A  # "MAIZ"
_HEAD = struct.Struct("<I16sHHII")  # magic, key, tokens, k, payload bytes, CRC-32 of key and payload


class CacheHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the log-probabilities in the cache mean."""

    teacher: str  # SHA-256 of the teacher's model file
    tokenizer: str  # SHA-256 of its vocabulary
    k: int
    vocabulary: int  # its size
    temperature: float = 1.0


class Targets(NamedTuple):
    """The teacher's view of one example: n target tokens."""

    ids: NDArray[np.int64]  # (n, k)
    log_probs: NDArray[np.float32]  # (n, k), nats
    tail: NDArray[np.float32]  # (n,), log of the mass outside the top k


class TargetCache:
    """A folder of shards. One writer at a time."""

    def __init__(self, folder: Path, header: CacheHeader) -> None:
        """Open or create; a record that was being written when the power went is cut off.

        Raises:
            WrongDigest: the folder holds the targets of another teacher, tokeniser, k or temperature.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.header = folder, header
        self._bits = max(1, (header.vocabulary - 1).bit_length())
        named = folder / "header.json"
        if named.is_file():
            found = decode_as(named.read_bytes(), CacheHeader, what="target cache header")
            if found != header:
                raise WrongDigest(f"{folder} holds the targets of another teacher or setting; use another folder or delete it")
        else:
            write_atomically(named, msgspec.json.encode(header))
        self._places: dict[bytes, tuple[int, int]] = {}  # key -> shard, offset
        self._maps: dict[int, mmap.mmap] = {}
        self._shards = sorted(folder.glob("shard-*.bin"))
        for number, shard in enumerate(self._shards):
            self._index(number, shard)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, example: Example) -> bool:
        return key_of(example) in self._places

    def put(self, example: Example, targets: Targets) -> None:
        """Append one record and make it durable in the order written; an example that is there already stays as it is.

        Raises:
            BadInput: shapes other than (target tokens, k), or numbers that are not finite.
        """
        key = key_of(example)
        if key in self._places:
            return
        n, k = targets.ids.shape
        if n != len(example.target) or targets.log_probs.shape != (n, k) or targets.tail.shape != (n,) or k != self.header.k:
            raise BadInput(f"targets of shape {targets.ids.shape} do not fit {len(example.target)} tokens of top {self.header.k}")
        if not np.isfinite(targets.log_probs).all() or np.isnan(targets.tail).any():
            raise BadInput("the teacher's log-probabilities are not finite; they were not cached")
        payload = _pack_ids(targets.ids, self._bits) + targets.log_probs.astype("<f2").tobytes() + targets.tail.astype("<f2").tobytes()
        record = _HEAD.pack(MAGIC, key, n, k, len(payload), zlib.crc32(key + payload)) + payload
        if not self._shards or self._shards[-1].stat().st_size + len(record) > SHARD_BYTES:
            self._shards.append(self.folder / f"shard-{len(self._shards):04d}.bin")
        with self._shards[-1].open("ab") as file:
            offset = file.tell()
            file.write(record)
        self._places[key] = (len(self._shards) - 1, offset)

    def get(self, example: Example) -> Targets | None:
        """The teacher's view of that example, or None when it was never captured.

        Raises:
            WrongDigest: the record's bytes were altered on disk.
        """
        key = key_of(example)
        place = self._places.get(key)
        if place is None:
            return None
        shard, offset = place
        view = self._view(shard, offset)
        magic, found, n, k, size, crc = _HEAD.unpack_from(view, offset)
        payload = bytes(view[offset + _HEAD.size : offset + _HEAD.size + size])
        if magic != MAGIC or found != key or zlib.crc32(key + payload) != crc:
            raise WrongDigest(f"{self._shards[shard]} was altered at byte {offset}; delete the folder {self.folder} to capture again")
        packed = (n * k * self._bits + 7) // 8
        ids = _unpack_ids(payload[:packed], n * k, self._bits).reshape(n, k)
        numbers = np.frombuffer(payload, dtype="<f2", offset=packed).astype(np.float32)
        return Targets(ids, numbers[: n * k].reshape(n, k), numbers[n * k :])

    def sync(self) -> None:
        """Force the last shard to the disk."""
        if self._shards:
            with self._shards[-1].open("rb") as file:
                os.fsync(file.fileno())

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(shard.stat().st_size for shard in self._shards)

    def close(self) -> None:
        """Unmap the shards."""
        for view in self._maps.values():
            view.close()
        self._maps.clear()

    def _view(self, shard: int, offset: int) -> mmap.mmap:
        view = self._maps.get(shard)
        if view is None or offset + _HEAD.size > len(view) or self._shards[shard].stat().st_size > len(view):
            if view is not None:
                view.close()
            with self._shards[shard].open("rb") as file:
                view = self._maps[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return view

    def _index(self, number: int, shard: Path) -> None:
        """Find the shard's records; cut it after the last whole one."""
        whole = 0
        for key, offset, end in _records(shard):
            self._places.setdefault(key, (number, offset))
            whole = end
        if whole < shard.stat().st_size:
            with shard.open("r+b") as file:
                file.truncate(whole)


def key_of(example: Example) -> bytes:
    """16 bytes that name an example: prompt and target ids."""
    return bytes.fromhex(digest_value([example.prompt, example.target])[:32])


def _records(shard: Path) -> Iterator[tuple[bytes, int, int]]:
    """Key, offset and end of each whole record, up to the first broken one."""
    data = shard.read_bytes()
    offset = 0
    while offset + _HEAD.size <= len(data):
        magic, key, _, _, size, crc = _HEAD.unpack_from(data, offset)
        end = offset + _HEAD.size + size
        if magic != MAGIC or end > len(data) or zlib.crc32(key + data[offset + _HEAD.size : end]) != crc:
            return
        yield key, offset, end
        offset = end


def _pack_ids(ids: NDArray[np.int64], bits: int) -> bytes:
    """Each id in `bits` bits, highest first."""
    shifts = np.arange(bits - 1, -1, -1)
    return np.packbits(((ids.ravel()[:, None] >> shifts) & 1).astype(np.uint8).ravel()).tobytes()


def _unpack_ids(data: bytes, count: int, bits: int) -> NDArray[np.int64]:
    flags = np.unpackbits(np.frombuffer(data, dtype=np.uint8), count=count * bits).reshape(count, bits)
    return flags.astype(np.int64) @ (1 << np.arange(bits - 1, -1, -1, dtype=np.int64))
