"""Which release is live, and which to go back to.

One JSON file, `slots/pointer.json`, replaced atomically: that rename *is* the switch. The files themselves lie in `blobs/`, verified when
they came, and stay there as long as a slot names them.

    empty -> activate -> on probation -> confirm -> confirmed
                              |  start_limit starts without a confirm, or go_back
                              `-> the previous release is live again, the other is remembered as failed and not tried again by itself

No network, no clock: a node starts from here with nothing but its disk.
"""

import logging
from collections.abc import Iterable
from pathlib import Path

import msgspec

from protocol import codec
from protocol.blobs import BlobFolder, write_atomically
from protocol.digests import digest_value
from protocol.errors import BadInput, MalformedMessage, TooLarge
from protocol.releases import MANIFEST_LIMIT, Release, Role

START_LIMIT = 3  # starts without a confirm; one may be a power cut, two bad luck
POINTER_LIMIT = 4 * MANIFEST_LIMIT  # bytes: two manifests and the failures
REASON_LIMIT = 300  # characters
FAILURES_KEPT = 32  # the newest; numbers only rise, so older ones cannot come back

_log = logging.getLogger("milpa.update")


class ActiveRelease(msgspec.Struct, frozen=True):
    """A release and where its files are on this node."""

    release: Release
    role: Role
    model: Path
    adapter: Path | None = None
    calibration: Path | None = None
    initial_adapter: Path | None = None
    rehearsal: Path | None = None  # general records as JSON lines, to be learned among the site's own

    @property
    def number(self) -> int:
        """The release's number."""
        return self.release.number


class Failure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A release that did not hold here."""

    number: int
    digest: str  # of the manifest's value: another release under this number is not this one
    reason: str
    told: bool = False  # the coordinator's event has been handed over


class _Pointer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    active: Release | None = None
    previous: Release | None = None
    confirmed: bool = True
    starts: int = 0  # since the switch
    failures: tuple[Failure, ...] = ()


class Slots:
    """The node's two slots. One process at a time; calls within it come from one thread at a time (the updater's lock sees to it).

    Args:
        state_dir: the node's folder; `blobs/` and `slots/` lie below it.
        role: whose files this node takes.
    """

    def __init__(self, state_dir: Path, *, role: Role = "student", start_limit: int = START_LIMIT) -> None:
        self.blobs = BlobFolder(state_dir / "blobs")
        self.folder = state_dir / "slots"
        self.role = role
        self.start_limit = start_limit
        self._path = self.folder / "pointer.json"

    def active(self) -> ActiveRelease | None:
        """The live release, or None on a node that never had one."""
        return self._located(self._read().active)

    def previous(self) -> ActiveRelease | None:
        """The release to go back to."""
        return self._located(self._read().previous)

    def active_digest(self) -> str:
        """Digest of the live release's manifest, "" on a node that never had one or lost a file of it."""
        active = self.active()
        return digest_value(active.release) if active else ""

    def confirmed(self) -> bool:
        """Whether the live release has proven itself."""
        return self._read().confirmed

    def candidate(self, release: Release) -> ActiveRelease:
        """Where the files of `release` are, before it is live.

        Raises:
            BadInput: one of them is not here.
        """
        found = self._located(release)
        if found is None:
            raise BadInput(f"release {release.number} is not complete on this node")
        return found

    def activate(self, release: Release) -> ActiveRelease:
        """Make `release` live, on probation. The last confirmed one becomes the previous.

        Raises:
            BadInput: one of its files is not here; nothing changed.
        """
        found = self.candidate(release)
        old = self._read()
        if old.active != release:
            previous = old.active if old.confirmed else old.previous
            self._write(_Pointer(active=release, previous=previous, confirmed=False, failures=old.failures))
        return found

    def starting(self) -> ActiveRelease | None:
        """What to load at process start. Counts the starts of a release on probation, and goes back when there were too many."""
        pointer = self._read()
        if pointer.active is not None and not pointer.confirmed:
            if pointer.starts >= self.start_limit:
                return self.go_back(f"started {pointer.starts} times and was never confirmed")
            self._write(msgspec.structs.replace(pointer, starts=pointer.starts + 1))
        return self.active() or self.previous()  # a lost file is fetched again by the next check

    def confirm(self) -> None:
        """The live release works: it loaded and answered."""
        pointer = self._read()
        if not pointer.confirmed:
            self._write(msgspec.structs.replace(pointer, confirmed=True, starts=0))

    def go_back(self, reason: str) -> ActiveRelease | None:
        """Make the previous release live again and remember why; returns it, or None when there was none.

        With no previous release the node has no model: it says so and waits for a better one.
        """
        pointer = self._read()
        if pointer.active is None:
            return None
        _log.error("release %d goes back: %s", pointer.active.number, reason)
        failures = _with(pointer.failures, Failure(pointer.active.number, digest_value(pointer.active), reason[:REASON_LIMIT]))
        self._write(_Pointer(active=pointer.previous, failures=failures))
        return self.active()

    def remember_failure(self, release: Release, reason: str) -> None:
        """Do not try `release` again by itself."""
        pointer = self._read()
        failures = _with(pointer.failures, Failure(release.number, digest_value(release), reason[:REASON_LIMIT]))
        self._write(msgspec.structs.replace(pointer, failures=failures))

    def failure(self, digest: str) -> Failure | None:
        """Why the release with that manifest digest is not to be tried, or None."""
        return next((failure for failure in self._read().failures if failure.digest == digest), None)

    def failures(self) -> tuple[Failure, ...]:
        """All remembered ones, oldest first."""
        return self._read().failures

    def mark_told(self, told: Failure) -> None:
        """The event about this failure is in the outbox."""
        pointer = self._read()
        failures = tuple(msgspec.structs.replace(f, told=True) if f.digest == told.digest else f for f in pointer.failures)
        self._write(msgspec.structs.replace(pointer, failures=failures))

    def forgive(self, number: int) -> None:
        """Forget that release `number` failed, so that the next check tries it again: an operator's decision."""
        pointer = self._read()
        self._write(msgspec.structs.replace(pointer, failures=tuple(f for f in pointer.failures if f.number != number)))

    def collect(self, *, keep: Iterable[str] = ()) -> int:
        """Delete files that no slot and no digest in `keep` names, part files too; return how many bytes came free."""
        pointer = self._read()
        wanted = set(keep)
        for release in (pointer.active, pointer.previous):
            if release is not None:
                wanted.update(file.digest for file in release.files_for(self.role))
        freed = 0
        for path in self.blobs.root.glob("??/*"):
            if path.name.removesuffix(".part") not in wanted:
                freed += path.stat().st_size
                path.unlink()
        return freed

    def _located(self, release: Release | None) -> ActiveRelease | None:
        if release is None:
            return None
        paths = {file.kind: self.blobs.path(file.digest) for file in release.files_for(self.role)}
        if "model" not in paths or not all(path.is_file() for path in paths.values()):
            return None
        return ActiveRelease(
            release=release,
            role=self.role,
            model=paths["model"],
            adapter=paths.get("adapter"),
            calibration=paths.get("calibration"),
            initial_adapter=paths.get("initial-adapter"),
            rehearsal=paths.get("rehearsal"),
        )

    def _read(self) -> _Pointer:
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return _Pointer()
        try:
            return codec.decode_as(data, _Pointer, limit=POINTER_LIMIT, what=str(self._path))
        except (MalformedMessage, TooLarge) as error:
            # only a failing disk does this (the file is replaced whole); a node that starts without a model beats one that does not start
            _log.error("%s; it is set aside and the node asks for a release anew", error)
            self._path.replace(self._path.with_suffix(".bad"))
            return _Pointer()

    def _write(self, pointer: _Pointer) -> None:
        write_atomically(self._path, codec.encode(pointer))


def _with(failures: tuple[Failure, ...], new: Failure) -> tuple[Failure, ...]:
    return (*(failure for failure in failures if failure.digest != new.digest), new)[-FAILURES_KEPT:]
