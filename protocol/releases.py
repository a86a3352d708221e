"""What a release is: an immutable numbered set of files by digest, with what each is for. No I/O.

The manifest travels as one TUF target, so whoever verified the target verified every digest in it. A node takes the files of
its own `role`: site nodes the student, base stations the teacher. Going back is a higher number that names old files.
"""

from typing import Literal

import msgspec

from protocol.errors import BadInput, DoesNotFit
from protocol.names import checked_digest

Role = Literal["student", "teacher"]
Kind = Literal["model", "adapter", "initial-adapter", "calibration", "evidence", "rehearsal"]  # the last: general records for learning

MANIFEST_LIMIT = 64 * 1024  # bytes; the largest real one is about 3 kB
MANIFEST_NAME = "releases/{number}.json"  # name of the TUF target
BLOB_NAME = "blobs/{digest}"  # name of the TUF target of each file
SIGNED_AT = "x-milpa-signed-at"  # field of the TUF timestamp, seconds since 1970: moves the clock floor of boards without a clock


class ReleaseFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of a release."""

    name: str  # for people: "student.gguf"
    role: Role
    kind: Kind
    digest: str  # SHA-256
    size: int  # bytes
    base_digest: str = ""  # adapters: the model file they were made for


class KnownAnswer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One prompt whose greedy answer must come out again on the node before the release goes live."""

    prompt: str
    text: str


class Release(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The manifest. Two releases with equal content and number are equal bytes."""

    number: int  # 1, 2, 3, ...; never reused
    task: str
    created: int  # seconds since 1970, UTC
    files: tuple[ReleaseFile, ...]
    note: str = ""  # one line for the operator: "round 3: +4.1 points at esteli"
    previous: int = 0  # the release this one was judged against; 0: the first
    min_memory_mb: int = 0  # of the student's engine, measured
    known_answers: tuple[KnownAnswer, ...] = ()

    def file(self, role: Role, kind: Kind) -> ReleaseFile | None:
        """The file of that role and kind, or None."""
        return next((file for file in self.files if file.role == role and file.kind == kind), None)

    def files_for(self, role: Role) -> tuple[ReleaseFile, ...]:
        """What a node of `role` must hold to serve this release (evidence stays on the coordinator)."""
        return tuple(file for file in self.files if file.role == role and file.kind != "evidence")


def checked_release(release: Release) -> Release:
    """The release, if its parts fit one another. Both sides ask this: the coordinator before it signs, the node after it verified.

    Raises:
        BadInput: a number below 1, no model, a role and kind twice, a size below 1, or a digest that is none.
        DoesNotFit: an adapter was made for another model than the one beside it.
    """
    if release.number < 1:
        raise BadInput(f"release number {release.number} is not usable: the first is 1")
    if not any(file.kind == "model" for file in release.files):
        raise BadInput(f"release {release.number} has no model")
    if len({(file.role, file.kind) for file in release.files}) != len(release.files):
        raise BadInput(f"release {release.number} has two files of one role and kind")
    for file in release.files:
        checked_digest(file.digest)
        if file.size < 1:
            raise BadInput(f"release {release.number}: {file.name!r} is empty")
        model = release.file(file.role, "model")
        if file.kind in ("adapter", "initial-adapter") and (model is None or file.base_digest != model.digest):
            base = model.digest[:12] if model else "none"
            raise DoesNotFit(f"release {release.number}: {file.name!r} was made for model {file.base_digest[:12]}, the release has {base}")
    return release
