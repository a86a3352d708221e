"""Files by digest: a folder where a name is a promise about the bytes.

A file appears whole or not at all: written to `.part`, synced, renamed, folder synced. What is there was verified when it came.
"""

import os
import shutil
from pathlib import Path

from protocol.digests import digest_bytes, digest_file
from protocol.errors import NotEnough, WrongDigest
from protocol.names import checked_digest

SPARE_BYTES = 64 << 20  # keep this much of the disk free: SQLite and logs live there too


class BlobFolder:
    """A content-addressed folder: `root/ab/abcdef...`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)

    def path(self, digest: str) -> Path:
        """Where that file is, or would be."""
        checked_digest(digest)
        return self.root / digest[:2] / digest

    def part(self, digest: str) -> Path:
        """Where a download of that file grows; survives a restart."""
        target = self.path(digest)
        target.parent.mkdir(exist_ok=True)
        return target.with_suffix(".part")

    def has(self, digest: str) -> bool:
        """Whether that file is here, whole."""
        return self.path(digest).is_file()

    def need_space(self, size: int) -> None:
        """Check that `size` more bytes fit.

        Raises:
            NotEnough: they do not; nothing was written.
        """
        free = shutil.disk_usage(self.root).free
        if free < size + SPARE_BYTES:
            raise NotEnough(
                f"{self.root} has {free >> 20} MiB free, {(size + SPARE_BYTES) >> 20} MiB are needed; free some space and try again"
            )

    def adopt(self, part: Path, digest: str) -> Path:
        """Verify a finished `.part` file and give it its name.

        Raises:
            WrongDigest: the bytes are others; the part is deleted so that a retry starts clean.
        """
        found = digest_file(part)
        if found != digest:
            part.unlink()
            raise WrongDigest(f"expected {digest[:12]}, got {found[:12]}; the file was thrown away")
        target = self.path(digest)
        target.parent.mkdir(exist_ok=True)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(target)
        sync_folder(target.parent)
        return target

    def put_bytes(self, data: bytes) -> str:
        """Store `data`; return its digest."""
        digest = digest_bytes(data)
        if not self.has(digest):
            self.need_space(len(data))
            part = self.part(digest)
            part.write_bytes(data)
            self.adopt(part, digest)
        return digest

    def put_file(self, source: Path) -> str:
        """Store a copy of `source`; return its digest."""
        digest = digest_file(source)
        if not self.has(digest):
            self.need_space(source.stat().st_size)
            part = self.part(digest)
            shutil.copyfile(source, part)
            self.adopt(part, digest)
        return digest


def whole_lines(path: Path) -> list[bytes]:
    """Lines of an append-only file that end in a line break; what a power failure left behind the last one is cut off the file."""
    if not path.is_file():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return whole.splitlines()


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, so that a reader or a power cut sees the old bytes or the new, never a mix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
