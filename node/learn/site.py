"""The adapter a site answers with: which file, why, and the one before. No torch.

    learn/<release>/site.json            what was judged, what answers now, what answered before
    learn/<release>/site-<digest>.gguf   the release's adapter and the site's own in one file (docs/adr/0027)

A release has its own folder, so the next release drops the adapter by itself, and going back finds it again. The names in site.json are
promises about bytes: a file that does not keep its own is not used.
"""

import logging
from pathlib import Path

import msgspec

from node.learn import stored
from protocol import codec
from protocol.blobs import write_atomically
from protocol.digests import digest_file
from protocol.errors import BadInput

LIMIT = 64 * 1024  # bytes

log = logging.getLogger("milpa.node")


class Judged(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One adapter and what its judgement said."""

    learned: str  # digest of the trained factors it was made of
    good: bool
    reason: str
    at: float  # seconds since 1970
    adapter: str = ""  # SHA-256 of the GGUF; empty: there is none
    base: str = ""  # the model file it was made for
    mixture: tuple[float, float] = (0.0, 1.0)  # shares of the release's adapter and of the site's own in it
    before: float = 0.0  # mean score on the held-out examples, in [0, 1]
    after: float = 0.0
    held_out: int = 0
    general_before: float = 0.0
    general_after: float = 0.0
    general: int = 0


class SiteFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """site.json."""

    last: Judged | None = None  # the latest judgement, good or not
    current: Judged | None = None  # what answers
    previous: Judged | None = None  # what answered before, until `current` has shown that it speaks
    proven: bool = True  # `current` has answered here


def path_of(state_dir: Path, release: int, judged: Judged) -> Path:
    """Where the adapter's file is."""
    return stored.folder(state_dir, release) / f"site-{judged.adapter[:16]}.gguf"


def read(state_dir: Path, release: int) -> SiteFile:
    """What is known; nothing when the file is missing or spoiled."""
    path = stored.folder(state_dir, release) / "site.json"
    if not path.is_file():
        return SiteFile()
    try:
        return codec.decode_as(path.read_bytes(), SiteFile, limit=LIMIT, what=str(path))
    except BadInput as error:
        log.warning("%s; the release answers without a site's adapter", error)
        return SiteFile()


def write(state_dir: Path, release: int, file: SiteFile) -> None:
    """Replace site.json, then delete adapters that it does not name."""
    write_atomically(stored.folder(state_dir, release) / "site.json", codec.encode(file))
    named = {path_of(state_dir, release, one).name for one in (file.current, file.previous) if one is not None}
    for path in stored.folder(state_dir, release).glob("site-*.gguf"):
        if path.name not in named:
            path.unlink()


def judged(state_dir: Path, release: int, verdict: Judged) -> None:
    """A judgement is in: a good one answers from now on, a bad one changes nothing."""
    before = read(state_dir, release)
    if not verdict.good:
        write(state_dir, release, msgspec.structs.replace(before, last=verdict))
        return
    good = before.current if before.proven else before.previous
    write(state_dir, release, SiteFile(last=verdict, current=verdict, previous=good, proven=False))


def proven(state_dir: Path, release: int) -> None:
    """What answers has shown that it speaks."""
    file = read(state_dir, release)
    if not file.proven:
        write(state_dir, release, msgspec.structs.replace(file, proven=True, previous=None))


def put_back(state_dir: Path, release: int, reason: str) -> SiteFile:
    """What should answer does not speak: the one before it answers again, or the release alone."""
    file = read(state_dir, release)
    last = msgspec.structs.replace(file.current, good=False, reason=reason) if file.current else file.last
    file = SiteFile(last=last, current=file.previous)
    write(state_dir, release, file)
    return file


def usable(state_dir: Path, release: int, base: str) -> tuple[Judged, Path] | None:
    """What should answer on this model file, if its bytes are what was judged."""
    file = read(state_dir, release)
    if file.current is None or file.current.base != base:
        return None
    path = path_of(state_dir, release, file.current)
    if not path.is_file() or digest_file(path) != file.current.adapter:
        log.error("the site's adapter %s is missing or damaged; the release answers without it", path)
        return None
    return file.current, path
