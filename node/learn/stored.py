"""The trained adapter on disk: `learn/<release>/adapter-<digest>.npy` and `header.json`, the second naming the first by digest.

The header is written last, atomically, so an adapter is there whole or not at all; what no longer fits its digest is damaged and said so.
"""

from io import BytesIO
from pathlib import Path

import msgspec
import numpy as np

from protocol import codec
from protocol.adapters import AdapterHeader, AdapterQuestion, AdapterReply, Flat
from protocol.blobs import write_atomically
from protocol.digests import digest_bytes
from protocol.errors import BadInput, MilpaError, WrongDigest

HEADER_LIMIT = 256 * 1024  # bytes


class StoredHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """header.json: what the adapter is, and which bytes it is."""

    digest: str  # SHA-256 of the flat array's bytes
    header: AdapterHeader


def folder(state_dir: Path, release: int) -> Path:
    """Where a release's adapter lies."""
    return state_dir / "learn" / str(release)


def save(state_dir: Path, flat: Flat, header: AdapterHeader) -> str:
    """Store an adapter for its release, replacing an earlier one. Returns the digest of its numbers."""
    target = folder(state_dir, header.release)
    held = BytesIO()
    np.save(held, np.ascontiguousarray(flat, dtype="<f4"), allow_pickle=False)
    digest = digest_bytes(flat.astype("<f4").tobytes())
    name = f"adapter-{digest[:16]}.npy"
    write_atomically(target / name, held.getvalue())
    write_atomically(target / "header.json", codec.encode(StoredHeader(digest, header)))
    for old in target.glob("adapter-*.npy"):
        if old.name != name:
            old.unlink(missing_ok=True)
    return digest


def load(state_dir: Path, release: int) -> tuple[StoredHeader, Flat] | None:
    """The adapter trained on that release, or None.

    Raises:
        MalformedMessage: header.json does not decode.
        WrongDigest: the array is not the one the header names.
    """
    here = folder(state_dir, release)
    if not (here / "header.json").is_file():
        return None
    stored = codec.decode_as((here / "header.json").read_bytes(), StoredHeader, limit=HEADER_LIMIT, what=str(here / "header.json"))
    try:
        data = (here / f"adapter-{stored.digest[:16]}.npy").read_bytes()
    except (OSError, ValueError) as error:
        raise WrongDigest(f"the adapter in {here} cannot be read; run `milpa-node learn` again") from error
    numbers = data[max(0, len(data) - 4 * stored.header.length) :]  # the file ends with them; what stands before is for other readers
    if digest_bytes(numbers) != stored.digest:
        raise WrongDigest(f"the adapter in {here} is not the one its header names; run `milpa-node learn` again")
    return stored, np.frombuffer(numbers, dtype="<f4")


def digest(state_dir: Path, release: int) -> str:
    """Digest of the adapter trained on that release, without reading its numbers; "" when there is none, or its header is spoiled."""
    header = folder(state_dir, release) / "header.json"
    if not header.is_file():
        return ""
    try:
        return codec.decode_as(header.read_bytes(), StoredHeader, limit=HEADER_LIMIT, what=str(header)).digest
    except BadInput:
        return ""


def size(state_dir: Path, release: int) -> int:
    """Bytes of the adapter trained on that release, as it would travel."""
    return sum(path.stat().st_size for path in folder(state_dir, release).glob("adapter-*.npy"))


def delivered(state_dir: Path, release: int) -> bool:
    """Whether the coordinator has the adapter trained on that release."""
    file = folder(state_dir, release) / "delivered"
    return file.is_file() and file.read_text(encoding="ascii", errors="replace").strip() == digest(state_dir, release)


def undelivered(state_dir: Path) -> int | None:
    """The newest release with an adapter that the coordinator does not have; None: it has all."""
    return next((release for release in _releases(state_dir) if digest(state_dir, release) and not delivered(state_dir, release)), None)


def note_delivered(state_dir: Path, release: int) -> None:
    """The coordinator sent a receipt for the adapter trained on that release."""
    write_atomically(folder(state_dir, release) / "delivered", digest(state_dir, release).encode())


def answer(state_dir: Path, node: str, question: AdapterQuestion) -> tuple[AdapterReply, Flat | None]:
    """What this node has for that question: the newest adapter with the same base and start, not newer than the release asked for.

    Never raises: whatever goes wrong becomes a code, because a reply's text would leave the site.
    """
    try:
        for release in _releases(state_dir):
            found = load(state_dir, release) if release <= question.release else None
            if found is None:
                continue
            stored, flat = found
            if (stored.header.base_digest, stored.header.initial_digest) == (question.base_digest, question.initial_digest):
                return AdapterReply(node, "adapter", stored.digest, stored.header), flat
    except MilpaError:
        return AdapterReply(node, "damaged"), None
    except Exception:
        return AdapterReply(node, "failed"), None
    return AdapterReply(node, "nothing"), None


def _releases(state_dir: Path) -> list[int]:
    """Numbers of the releases with a folder here, the newest first."""
    return sorted((int(path.name) for path in (state_dir / "learn").glob("[0-9]*") if path.name.isdigit()), reverse=True)
