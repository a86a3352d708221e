"""Signs releases and lays them out as a TUF repository. Serving it is `repository.py`.

    root/metadata/   1.root.json, N.targets.json, N.snapshot.json, timestamp.json      (consistent snapshots)
    root/targets/    releases/<sha256>.<number>.json                                   the manifests
    root/blobs/      ab/<sha256>                                                       the files
    root/keys/       root-1.pem ... timestamp.pem, mode 0600                           may live elsewhere: `keys=`

Keys. Publishing needs the keys of targets, snapshot and timestamp; refreshing needs the timestamp's alone. The root keys are used by `init`
only: carry `root-*.pem` to safe places after it (two of three are enough to replace every other key). `targets.pem` may also be kept on
a stick and named with `keys=` for the minute of a publish.

Crash safety. `timestamp.json` is the only name that points at a state; it is replaced last, and everything before it goes to names that
nobody reads yet. So a kill at any point leaves the old state whole, and the next call writes over what was left. A lock file keeps two
writers apart.

After the TUF specification 1.0.33, sections 3 to 6. Delegations, key rotation and removal of old releases are not done here.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import CryptoSigner
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp  # type: ignore[attr-defined]  # documented names
from tuf.api.serialization.json import JSONSerializer

from protocol import codec
from protocol.blobs import BlobFolder, sync_folder, write_atomically
from protocol.digests import digest_bytes, digest_file
from protocol.errors import BadInput, NumberAlreadySeen, TooLarge, TrustError, Unavailable, WrongDigest
from protocol.releases import (
    BLOB_NAME,
    MANIFEST_LIMIT,
    MANIFEST_NAME,
    SIGNED_AT,
    Kind,
    KnownAnswer,
    Release,
    ReleaseFile,
    Role,
    checked_release,
)

TIMESTAMP_DAYS = 30  # a node that sleeps through a rainy month must still find fresh metadata (fleet.md 1.4: 14 to 30 for solar and LoRa)
SIGNED_DAYS = 365  # targets and snapshot; re-signed by `refresh_timestamp` when fewer than TIMESTAMP_DAYS are left
ROOT_DAYS = 3650  # replaced by hand, from the offline keys
LOCK_WAIT_S = 60.0  # seconds; signing takes milliseconds, copying a model some seconds

_online = ("targets", "snapshot", "timestamp")


class _State(msgspec.Struct, frozen=True):
    """What `timestamp.json` points at."""

    root: Metadata[Root]
    targets: Metadata[Targets]
    snapshot: Metadata[Snapshot]
    timestamp: Metadata[Timestamp]


def build_release(
    number: int,
    task: str,
    files: Sequence[tuple[Role, Kind, Path, str]],
    *,
    previous: int = 0,
    note: str = "",
    known_answers: Sequence[KnownAnswer] = (),
    min_memory_mb: int = 0,
    created: int | None = None,
) -> tuple[Release, dict[str, Path]]:
    """A manifest for files on disk, and where each of them is by digest.

    Args:
        files: (role, kind, path, base digest); the base digest is the model an adapter was made for, "" for other kinds.
        created: seconds since 1970; now, when None.

    Raises:
        BadInput, DoesNotFit: as `checked_release`, or a file is missing.
    """
    described: list[ReleaseFile] = []
    paths: dict[str, Path] = {}
    for role, kind, path, base in files:
        if not path.is_file():
            raise BadInput(f"{path} is not a file; the release needs it as {role} {kind}")
        digest = digest_file(path)
        paths[digest] = path
        described.append(ReleaseFile(name=path.name, role=role, kind=kind, digest=digest, size=path.stat().st_size, base_digest=base))
    release = Release(
        number=number,
        task=task,
        created=int(time.time()) if created is None else created,
        files=tuple(described),
        note=note,
        previous=previous,
        min_memory_mb=min_memory_mb,
        known_answers=tuple(known_answers),
    )
    return checked_release(release), paths


class Publisher:
    """A signed, append-only store of releases.

    Args:
        root: the repository's folder.
        keys: folder of the private keys; `root/keys` when None.
        timestamp_days: how long a node may be out of reach and still accept what it finds.
        clock: seconds since 1970, UTC.
        step: called with a name before each write, so that tests can end the process there.
    """

    def __init__(
        self,
        root: Path,
        *,
        keys: Path | None = None,
        timestamp_days: float = TIMESTAMP_DAYS,
        clock: Callable[[], float] = time.time,
        step: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.root = root
        self.metadata = root / "metadata"
        self.targets = root / "targets"
        self.keys = root / "keys" if keys is None else keys
        self.timestamp_days = timestamp_days
        self._clock = clock
        self._step = step

    @property
    def blobs(self) -> BlobFolder:
        """The files of all releases."""
        return BlobFolder(self.root / "blobs")

    @property
    def exists(self) -> bool:
        """Whether `init` was finished here."""
        return (self.metadata / "timestamp.json").is_file()

    def init(self, *, root_keys: int = 3, threshold: int = 2) -> None:
        """Make keys and an empty signed repository; does nothing where there is one, and finishes one that was half made.

        Args:
            root_keys, threshold: that many root keys, that many of which must sign a new root.

        Raises:
            BadInput: `threshold` is not within 1 to `root_keys`.
        """
        if not 1 <= threshold <= root_keys:
            raise BadInput(f"a threshold of {threshold} of {root_keys} root keys is not possible")
        with self._locked():
            if self.exists:
                return
            root_names = [f"root-{n}" for n in range(1, root_keys + 1)]
            signers = {name: self._make_key(name) for name in (*root_names, *_online)}
            if not (self.metadata / "1.root.json").is_file():
                root = Root(version=1, expires=self._expiry(ROOT_DAYS), consistent_snapshot=True)
                for name in root_names:
                    root.add_key(signers[name].public_key, Root.type)
                for name in _online:
                    root.add_key(signers[name].public_key, name)
                root.roles[Root.type].threshold = threshold
                self._step("root")
                self._write("1.root.json", Metadata(root), *(signers[name] for name in root_names))
            self._commit(Targets(version=1, expires=self._expiry(SIGNED_DAYS)), Snapshot(version=1), Timestamp(version=1))

    def publish(self, release: Release, files: Mapping[str, Path]) -> None:
        """Copy the files, sign the manifest, make it the latest release.

        The same release again is no error: a caller that died after its publish may repeat it.

        Args:
            files: by digest or by name; a file that is in the store already may be left out.

        Raises:
            BadInput, DoesNotFit: as `checked_release`; a file is missing; a number left out; or no repository here.
            NumberAlreadySeen: the number is taken by another release.
            WrongDigest: a file has other bytes than the manifest says.
            NotEnough: the disk is too small.
        """
        manifest = codec.encode(checked_release(release))
        if len(manifest) > MANIFEST_LIMIT:
            raise TooLarge(f"manifest is {len(manifest)} bytes, the limit is {MANIFEST_LIMIT}; give fewer known answers")
        with self._locked():
            state = self._read()
            if self._already_there(state, release, manifest):
                return
            for file in release.files:
                self._step(f"blob-{file.kind}")
                self._store(file, files.get(file.digest) or files.get(file.name))
            targets = state.targets.signed
            for file in release.files:
                name = BLOB_NAME.format(digest=file.digest)
                targets.targets[name] = TargetFile(file.size, {"sha256": file.digest}, name)
            name = MANIFEST_NAME.format(number=release.number)
            digest = digest_bytes(manifest)
            targets.targets[name] = TargetFile(len(manifest), {"sha256": digest}, name)
            targets.version += 1
            targets.expires = self._expiry(SIGNED_DAYS)
            self._step("manifest")
            write_atomically(self.targets / "releases" / f"{digest}.{release.number}.json", manifest)
            state.snapshot.signed.version += 1
            state.timestamp.signed.version += 1
            self._commit(targets, state.snapshot.signed, state.timestamp.signed)

    def refresh_timestamp(self) -> None:
        """Sign the present state anew, so that nodes go on accepting it. Call it at a tenth of `timestamp_days`.

        Targets and snapshot are signed anew too when they have fewer than TIMESTAMP_DAYS left; only then are their keys needed.
        """
        with self._locked():
            state = self._read()
            soon = self._expiry(TIMESTAMP_DAYS)
            targets = None
            if min(state.targets.signed.expires, state.snapshot.signed.expires) < soon:
                targets = state.targets.signed
                targets.version += 1
                targets.expires = self._expiry(SIGNED_DAYS)
                state.snapshot.signed.version += 1
            state.timestamp.signed.version += 1
            self._commit(targets, state.snapshot.signed, state.timestamp.signed)

    def numbers(self) -> tuple[int, ...]:
        """All release numbers, ascending."""
        return _numbers(self._read())

    def latest(self) -> Release | None:
        """The newest release, or None before the first."""
        state = self._read()
        numbers = _numbers(state)
        return self._release(state, numbers[-1]) if numbers else None

    def release(self, number: int) -> Release:
        """The release of that number.

        Raises:
            BadInput: there is none.
        """
        return self._release(self._read(), number)

    def root_bytes(self) -> bytes:
        """The newest root metadata: what a node is given at enrolment and trusts from then on."""
        self._read()
        return self._newest_root().read_bytes()

    def verify(self) -> int:
        """Check every signature, every expiry and every byte of every release; return the number of files read.

        Raises:
            TrustError: something is not as signed; the message names it.
        """
        state = self._read()
        now = self._now()
        for role in (state.root, state.targets, state.snapshot, state.timestamp):
            if role.signed.is_expired(now):
                raise TrustError(f"{role.signed.type} metadata expired on {role.signed.expires:%Y-%m-%d}; run refresh_timestamp")
        for target in state.targets.signed.targets.values():
            path = self._target_path(target)
            if not path.is_file():
                raise TrustError(f"{target.path} is signed but not in the store")
            if path.stat().st_size != target.length or digest_file(path) != target.hashes["sha256"]:
                raise WrongDigest(f"{target.path} is not what was signed")
        for number in _numbers(state):
            checked_release(self._release(state, number))
        return len(state.targets.signed.targets)

    def _already_there(self, state: _State, release: Release, manifest: bytes) -> bool:
        numbers = _numbers(state)
        last = numbers[-1] if numbers else 0
        if release.number == last + 1:
            return False
        if release.number > last:
            raise BadInput(f"release {release.number} leaves numbers out; the next is {last + 1}")
        there = state.targets.signed.targets[MANIFEST_NAME.format(number=release.number)]
        if there.hashes["sha256"] == digest_bytes(manifest):
            return True
        raise NumberAlreadySeen(f"release {release.number} is already published; the next number is {last + 1}")

    def _store(self, file: ReleaseFile, source: Path | None) -> None:
        if self.blobs.has(file.digest):
            return
        if source is None:
            raise BadInput(f"{file.name!r} ({file.digest[:12]}) is neither given nor in the store")
        if source.stat().st_size != file.size or digest_file(source) != file.digest:
            raise WrongDigest(f"{source} is not the file that the manifest names ({file.digest[:12]}, {file.size} bytes)")
        self.blobs.put_file(source)

    def _commit(self, targets: Targets | None, snapshot: Snapshot, timestamp: Timestamp) -> None:
        """Write the given roles, each naming the one before it, the timestamp last."""
        if targets is not None:
            self._step("targets")
            self._write(f"{targets.version}.targets.json", Metadata(targets), self._signer("targets"))
            snapshot.meta["targets.json"] = MetaFile(version=targets.version)
            snapshot.expires = self._expiry(SIGNED_DAYS)
            self._step("snapshot")
            self._write(f"{snapshot.version}.snapshot.json", Metadata(snapshot), self._signer("snapshot"))
        timestamp.snapshot_meta = MetaFile(version=snapshot.version)
        timestamp.expires = self._expiry(self.timestamp_days)
        timestamp.unrecognized_fields[SIGNED_AT] = int(self._clock())
        self._step("timestamp")
        self._write("timestamp.json", Metadata(timestamp), self._signer("timestamp"))
        self._step("done")

    def _write(self, name: str, metadata: Metadata, *signers: CryptoSigner) -> None:  # type: ignore[type-arg]
        for signer in signers:
            metadata.sign(signer, append=True)
        write_atomically(self.metadata / name, metadata.to_bytes(JSONSerializer(compact=True)))

    def _read(self) -> _State:
        if not self.exists:
            raise BadInput(f"{self.root} is not a release store yet; make one with `milpa-coordinator publish --init`")
        try:
            root = Metadata[Root].from_file(str(self._newest_root()))
            timestamp = Metadata[Timestamp].from_file(str(self.metadata / "timestamp.json"))
            snapshot = Metadata[Snapshot].from_file(str(self.metadata / f"{timestamp.signed.snapshot_meta.version}.snapshot.json"))
            version = snapshot.signed.meta["targets.json"].version
            targets = Metadata[Targets].from_file(str(self.metadata / f"{version}.targets.json"))
            for metadata in (root, timestamp, snapshot, targets):
                root.signed.verify_delegate(metadata.signed.type, metadata.signed_bytes, metadata.signatures)
        except (RepositoryError, OSError) as error:
            raise TrustError(f"the release store {self.root} is damaged: {error}; restore it from a copy") from error
        return _State(root, targets, snapshot, timestamp)

    def _release(self, state: _State, number: int) -> Release:
        target = state.targets.signed.targets.get(MANIFEST_NAME.format(number=number))
        if target is None:
            raise BadInput(f"there is no release {number}")
        return codec.decode_as(self._target_path(target).read_bytes(), Release, limit=MANIFEST_LIMIT, what=f"release {number}")

    def _target_path(self, target: TargetFile) -> Path:
        digest = target.hashes["sha256"]
        if target.path.startswith("blobs/"):
            return self.blobs.path(digest)
        folder, _, name = target.path.rpartition("/")
        return self.targets / folder / f"{digest}.{name}"

    def _newest_root(self) -> Path:
        return max(self.metadata.glob("*.root.json"), key=lambda path: int(path.name.split(".")[0]))

    def _make_key(self, name: str) -> CryptoSigner:
        path = self.keys / f"{name}.pem"
        if not path.is_file():
            self.keys.mkdir(parents=True, exist_ok=True, mode=0o700)
            part = path.with_suffix(".part")
            part.unlink(missing_ok=True)
            with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(CryptoSigner.generate_ed25519().private_bytes)
                file.flush()
                os.fsync(file.fileno())
            self._step("key")
            part.replace(path)
            sync_folder(self.keys)
        return self._signer(name)

    def _signer(self, name: str) -> CryptoSigner:
        path = self.keys / f"{name}.pem"
        try:
            key = load_pem_private_key(path.read_bytes(), password=None)
        except FileNotFoundError as error:
            raise BadInput(f"the signing key {path} is not here; bring it back, or name its folder with --keys") from error
        except (ValueError, OSError) as error:
            raise BadInput(f"the signing key {path} cannot be read: {error}") from error
        if not isinstance(key, Ed25519PrivateKey):
            raise BadInput(f"the signing key {path} is not an ed25519 key")
        return CryptoSigner(key)

    def _now(self) -> datetime:
        return datetime.fromtimestamp(int(self._clock()), UTC)

    def _expiry(self, days: float) -> datetime:
        return (self._now() + timedelta(days=days)).replace(microsecond=0)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self.root.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + LOCK_WAIT_S
        with (self.root / ".lock").open("w") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as error:
                    if time.monotonic() > deadline:
                        raise Unavailable(f"another program has been writing {self.root} for {LOCK_WAIT_S:.0f} s; try again") from error
                    time.sleep(0.05)
            yield


def _numbers(state: _State) -> tuple[int, ...]:
    names = (name.removeprefix("releases/").removesuffix(".json") for name in state.targets.signed.targets if name.startswith("releases/"))
    return tuple(sorted(int(name) for name in names))
