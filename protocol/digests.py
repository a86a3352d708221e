"""SHA-256 of bytes, files and values: how Milpa names what must not change."""

import hashlib
from pathlib import Path

import msgspec

READ_BYTES = 1 << 20


def digest_bytes(data: bytes) -> str:
    """SHA-256 of `data`, lower-case hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> str:
    """SHA-256 of the file's bytes, lower-case hexadecimal, read 1 MiB at a time."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            found.update(block)
    return found.hexdigest()


def digest_value(value: object) -> str:
    """SHA-256 of a value's canonical JSON (keys sorted): the cache key of a pipeline stage."""
    return digest_bytes(msgspec.json.encode(value, order="deterministic"))
