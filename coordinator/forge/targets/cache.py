"""The target cache: what the teacher thought of every target token, on disk, so that a student's epochs never run the teacher again.

One record an example, named by its token ids' digest; what it holds depends on the mode (`packing`).
Rules:
 * Append only, in shards of at most SHARD_BYTES; each record carries a CRC. After kill -9 the record in flight is cut off, no other is
   lost, none is doubled.
 * Damaged bytes cost the records that they are of and no other: the next sound one is found by its beginning. Who reads a damaged cache
   with `open` is refused; the family's next writer takes the damage out, and what it held is to be put anew.
 * The header names teacher, tokeniser, temperature and mode; a cache of another teacher is refused, never mixed.
 * Any number of processes may write into one folder, each a shard family of its own (shard-WORKER-of-N-NUMBER.bin) under a lock; a reader
   sees all families. Opening changes nothing: a torn end is cut off by the family's next writer.
 * At most 200 B a token in mode topk with k = 50, up to a vocabulary of 32,768, where targets have 8 tokens and more.
 * Reading is through mmap: memory holds the index only, about 150 B a record.
"""

import fcntl
import mmap
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import msgspec
import numpy as np

from coordinator.forge.sharing import Worker
from coordinator.forge.targets import packing
from coordinator.forge.targets.packing import Cached, Samples, States, Targets
from protocol.blobs import write_atomically
from protocol.codec import decode_as
from protocol.digests import digest_value
from protocol.errors import BadInput, NotEnough, WrongDigest
from protocol.models.tokenizer import Example

__all__ = ["KINDS", "CacheHeader", "Cached", "Samples", "States", "TargetCache", "Targets", "key_of"]

SHARD_BYTES = 64 << 20
KINDS: dict[str, type[Targets] | type[Samples] | type[States]] = {"topk": Targets, "sampled": Samples, "hidden8": States}
MAGIC = 0x32494C4D  # "MLI2"
_MAGIC = struct.pack("<I", MAGIC)
_HEAD = struct.Struct("<I16sHHI")  # magic, key, tokens, k, payload bytes
_CRC = struct.Struct("<I")  # of head and payload
_START = _HEAD.size + _CRC.size


class CacheHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the numbers in the cache mean."""

    teacher: str  # `Teacher.digest`, of a GGUF the file's SHA-256; in mode hidden8 its output matrix is needed to read the states
    tokenizer: str  # SHA-256 of the vocabulary's pieces
    k: int  # topk: ids a token; sampled: draws a token; hidden8: 0
    vocabulary: int  # its size
    temperature: float = 1.0  # the distribution is softmax(logits / temperature)
    mode: Literal["topk", "sampled", "hidden8"] = "topk"
    width: int = 0  # hidden8: numbers of a state


class TargetCache:
    """A folder of shards: many readers, one writer a family."""

    def __init__(self, folder: Path, header: CacheHeader, *, worker: Worker | None = None) -> None:
        """Open or create; `worker` says which shard family `put` writes to. Damaged records are passed over: the writer's family loses them
        when it is claimed. To learn from a cache, `open` it.

        Raises:
            WrongDigest: the folder holds the targets of another teacher, tokeniser, mode, k or temperature.
            BadInput: a header that fits no mode.
        """
        _check(header)
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.header, self.worker = folder, header, worker or Worker()
        self._family = f"shard-{self.worker.number}-of-{self.worker.of}"
        self._bits = max(1, (header.vocabulary - 1).bit_length())
        if not (folder / "header.json").is_file():
            _begin(folder, header)
        if read_header(folder) != header:
            raise WrongDigest(f"{folder} holds the targets of another teacher or setting; use another folder or delete it")
        self._places: dict[bytes, tuple[Path, int]] = {}  # key -> shard, offset
        self._damaged: dict[Path, list[_Stretch]] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        self._lock: BinaryIO | None = None
        self._file: BinaryIO | None = None  # the shard that `put` appends to
        for shard in sorted(folder.glob("shard-*-of-*-*.bin")):
            self._index(shard)

    @classmethod
    def open(cls, folder: Path) -> "TargetCache":
        """Open a cache that is there, whatever its mode, to read it.

        Raises:
            BadInput: the folder holds no cache.
            WrongDigest: some of it is damaged: what is lost would be learned without the teacher and nobody would know.
        """
        cache = cls(folder, read_header(folder))
        for shard, damaged in cache._damaged.items():
            lost = sum(one.end - one.start for one in damaged)
            raise WrongDigest(
                f"{shard} is damaged at byte {damaged[0].start} ({lost} bytes of {shard.stat().st_size} are no records): "
                f"run the same capture into {folder} again, which makes anew what they held and keeps the rest, or delete the folder"
            )
        return cache

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, example: Example) -> bool:
        return key_of(example) in self._places

    def put(self, example: Example, targets: Cached) -> None:
        """Append one record, in the order written; an example that is there already stays as it is.

        Raises:
            BadInput: arrays that do not fit example and header, numbers that are not finite, or a family that another process writes.
            NotEnough: the disk is full; nothing was put.
        """
        key = key_of(example)
        self.claim()
        if key in self._places:
            return
        payload = self._packed(example, targets)
        head = _HEAD.pack(MAGIC, key, len(example.target), self.header.k, len(payload))
        record = head + _CRC.pack(zlib.crc32(payload, zlib.crc32(head))) + payload
        file = self._room(len(record))
        offset = file.tell()
        if file.write(record) != len(record):
            os.ftruncate(file.fileno(), offset)
            raise NotEnough(f"no space left for {self.folder}; free some and run again: what was put before is whole")
        self._places[key] = (Path(file.name), offset)

    def get(self, example: Example) -> Cached | None:
        """The teacher's view of that example, or None when it was never captured.

        Raises:
            WrongDigest: the record's bytes were altered on disk.
        """
        key = key_of(example)
        place = self._places.get(key)
        if place is None:
            return None
        shard, offset = place
        found = _record_at(self._map(shard, offset), offset)
        if found is None or found[0] != key:
            raise WrongDigest(f"{shard} was altered at byte {offset} while it was read; run the same capture again, it mends {self.folder}")
        _, n, payload = found
        if self.header.mode == "topk":
            return packing.unpack_targets(payload, n, self.header.k, self._bits)
        if self.header.mode == "sampled":
            return packing.unpack_samples(payload, n, self.header.k, self._bits)
        return packing.unpack_states(payload, n, self.header.width)

    def claim(self) -> None:
        """Become the family's writer, as the first `put` does: lock it, see what its last writer left, take out what is damaged or torn.

        Raises:
            BadInput: another process writes this family.
        """
        if self._file is not None:
            return
        family = self._family
        lock = (self.folder / f"{family}.lock").open("ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            raise BadInput(f"another process is writing {family} of {self.folder}; wait for it or use another shard number") from error
        self._lock = lock
        shards = sorted(self.folder.glob(f"{family}-*.bin"))
        for shard in shards:
            whole = self._index(shard)
            if shard in self._damaged:
                self._take_out(shard)
            elif whole < shard.stat().st_size:
                os.truncate(shard, whole)
        self._append_to(shards[-1] if shards else self.folder / f"{family}-{0:04d}.bin")

    def sync(self) -> None:
        """Force what was put to the disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(shard.stat().st_size for shard in self.folder.glob("shard-*-of-*-*.bin"))

    @property
    def family_size(self) -> int:
        """Bytes of the shards that this worker's family has."""
        return sum(shard.stat().st_size for shard in self.folder.glob(f"{self._family}-*.bin"))

    def close(self) -> None:
        """Unmap the shards and let the next writer in; closing twice does nothing."""
        for view in self._maps.values():
            view.close()
        self._maps.clear()
        for file in (self._file, self._lock):
            if file is not None:
                file.close()
        self._file = self._lock = None

    def __enter__(self) -> "TargetCache":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _packed(self, example: Example, targets: Cached) -> bytes:
        """The record's payload, checked against example and header."""
        n, header = len(example.target), self.header
        kind = KINDS[header.mode]
        if not isinstance(targets, kind):
            raise BadInput(f"this cache is of mode {header.mode!r}: it takes {kind.__name__}, not {type(targets).__name__}")
        if not all(np.isfinite(part).all() for part in targets if part is not getattr(targets, "tail", None)):
            raise BadInput("the teacher's log-probabilities are not finite; they were not cached")
        if isinstance(targets, Targets):
            shapes = {targets.ids.shape, targets.log_probs.shape, (*targets.tail.shape, header.k)}
            if shapes != {(n, header.k)} or np.isnan(targets.tail).any():
                raise BadInput(f"targets of shape {targets.ids.shape} do not fit {n} tokens of top {header.k}")
            return packing.pack_targets(targets, self._bits)
        if isinstance(targets, Samples):
            shapes = {part.shape for part in targets}
            if len(shapes) != 1 or len(targets.ids) != n or not np.allclose(targets.weights.sum(1), 1.0, atol=1e-4):
                raise BadInput(f"samples of shape {targets.ids.shape} do not fit {n} tokens of {header.k} draws")
            return packing.pack_samples(targets, header.k, self._bits)
        if targets.states.shape != (n, header.width):
            raise BadInput(f"states of shape {targets.states.shape} do not fit {n} tokens of width {header.width}")
        return packing.pack_states(targets)

    def _take_out(self, shard: Path) -> None:
        """Write the shard anew from its sound records; who has it mapped keeps the old one."""
        with shard.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            sound = [view[one.start : one.end] for one in _stretches(view) if one.key is not None]
        write_atomically(shard, b"".join(sound))
        self._places = {key: place for key, place in self._places.items() if place[0] != shard}
        if (old := self._maps.pop(shard, None)) is not None:
            old.close()
        self._index(shard)

    def _append_to(self, shard: Path) -> None:
        if self._file is not None:
            self.sync()
            self._file.close()
        self._file = shard.open("ab", buffering=0)  # a record is one write: whole in the file, or torn at its end

    def _room(self, size: int) -> BinaryIO:
        """The shard to append `size` bytes to."""
        assert self._file is not None
        if self._file.tell() and self._file.tell() + size > SHARD_BYTES:
            family, _, number = Path(self._file.name).stem.rpartition("-")
            self._append_to(self.folder / f"{family}-{int(number) + 1:04d}.bin")
        return self._file

    def _map(self, shard: Path, offset: int) -> mmap.mmap:
        """The shard mapped far enough to hold the record at `offset`, which is the last one put or an earlier one."""
        view = self._maps.get(shard)
        if view is None or offset >= len(view):
            with shard.open("rb") as file:
                view = self._maps[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return view

    def _index(self, shard: Path) -> int:
        """Find the shard's records and its damage; returns where what is torn at its end begins."""
        self._damaged.pop(shard, None)
        if not shard.stat().st_size:
            return 0
        whole = 0
        with shard.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            for one in _stretches(view):
                if one.key is None:
                    self._damaged.setdefault(shard, []).append(one)
                else:
                    self._places.setdefault(one.key, (shard, one.start))
                whole = one.end
        return whole


def key_of(example: Example) -> bytes:
    """16 bytes that name an example: prompt and target ids."""
    return bytes.fromhex(digest_value([example.prompt, example.target])[:32])


def read_header(folder: Path) -> CacheHeader:
    """The header of the cache in `folder`.

    Raises:
        BadInput: there is none.
    """
    named = folder / "header.json"
    if not named.is_file():
        raise BadInput(f"{folder} holds no target cache; make one with `milpa-coordinator capture`")
    return decode_as(named.read_bytes(), CacheHeader, what="target cache header")


def _begin(folder: Path, header: CacheHeader) -> None:
    """Write the header, once, whoever of several processes comes first."""
    with (folder / "header.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "header.json").is_file():
            write_atomically(folder / "header.json", msgspec.json.encode(header))


def _check(header: CacheHeader) -> None:
    most = packing.MOST_DRAWS if header.mode == "sampled" else header.vocabulary
    if header.mode == "hidden8":
        if header.k or header.width <= 0 or header.width % packing.BLOCK:
            raise BadInput(f"mode hidden8 wants k 0 and a width that {packing.BLOCK} divides, not k {header.k}, width {header.width}")
    elif not 1 <= header.k <= most:
        raise BadInput(f"mode {header.mode} wants a k from 1 to {most}, not {header.k}")
    if not header.temperature > 0:
        raise BadInput(f"a temperature above 0 is needed, not {header.temperature}")


def _record_at(view: mmap.mmap, offset: int) -> tuple[bytes, int, memoryview] | None:
    """Key, tokens and payload of the record at `offset`; None when it is not whole."""
    if offset + _START > len(view):
        return None
    magic, key, n, _, size = _HEAD.unpack_from(view, offset)
    if magic != MAGIC or offset + _START + size > len(view):
        return None
    payload = memoryview(view[offset + _START : offset + _START + size])
    (crc,) = _CRC.unpack_from(view, offset + _HEAD.size)
    return (key, n, payload) if zlib.crc32(payload, zlib.crc32(view[offset : offset + _HEAD.size])) == crc else None


class _Stretch(NamedTuple):
    """Bytes of a shard: a sound record, or what is damaged up to the next one."""

    start: int
    end: int
    key: bytes | None  # None: damaged


def _stretches(view: mmap.mmap) -> Iterator[_Stretch]:
    """The shard from its beginning on, without the record that is torn at its end."""
    start = 0
    while start < len(view):
        found = _record_at(view, start)
        end = start + _START + len(found[2]) if found else _next_sound(view, start)
        if found is None and end == len(view) and _torn(view, start):
            return
        yield _Stretch(start, end, found[0] if found else None)
        start = end


def _next_sound(view: mmap.mmap, start: int) -> int:
    """Where the first sound record after the broken one at `start` begins; the end of the shard where there is none."""
    at = view.find(_MAGIC, start + 1)
    while at >= 0 and _record_at(view, at) is None:
        at = view.find(_MAGIC, at + 1)
    return at if at >= 0 else len(view)


def _torn(view: mmap.mmap, start: int) -> bool:
    """Whether the last record was not written to its end: its writer was killed, or is writing it now."""
    left = len(view) - start
    if left < _START:
        return True
    magic, *_, size = _HEAD.unpack_from(view, start)
    return bool(magic == MAGIC and left < _START + size)
