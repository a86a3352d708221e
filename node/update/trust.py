"""What the coordinator signed: TUF metadata, fetched, verified and kept. The rules beyond TUF are in `rules.py`, files in `download.py`.

    trust/metadata/   python-tuf's cache; root_history/ starts with the root given at enrolment
    trust/seen.json   highest release number verified, and the clock floor

python-tuf does the client workflow of the TUF specification 1.0.33, section 5.3. Two of its private names are used, here and nowhere else:
the reference time, because boards without a clock need a floor, and the set of verified metadata, because its public API cannot list
targets. `tests/update/test_trust.py` fails if either changes its meaning.

An expiry here stops updates. It never stops a node from answering.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
import msgspec
from tuf.api import exceptions as theirs
from tuf.api.metadata import TargetFile  # type: ignore[attr-defined]  # a documented name
from tuf.ngclient.config import UpdaterConfig
from tuf.ngclient.fetcher import FetcherInterface
from tuf.ngclient.updater import Updater as Client

from node.update.download import Budget
from node.update.rules import Seen, checked_number, judged_time
from protocol import codec
from protocol.blobs import sync_folder, write_atomically
from protocol.errors import (
    ExpiredRelease,
    MalformedMessage,
    MilpaError,
    NumberAlreadySeen,
    TooLarge,
    TrustError,
    Unavailable,
    WrongDigest,
)
from protocol.releases import BLOB_NAME, MANIFEST_LIMIT, SIGNED_AT, Release, checked_release

FILE_DEADLINE_S = 30.0  # seconds for one metadata file, the largest being some kilobytes
LIMITS = UpdaterConfig(
    max_root_rotations=16,
    max_delegations=4,
    root_max_length=64 * 1024,  # bytes; real ones are 2.5 kB
    timestamp_max_length=16 * 1024,  # 0.4 kB
    snapshot_max_length=64 * 1024,  # 0.4 kB
    targets_max_length=2 * 1024 * 1024,  # 0.2 kB a file, 1 kB a release: two thousand releases
)


class News(msgspec.Struct, frozen=True):
    """The newest release in verified metadata."""

    number: int
    digest: str  # of its manifest
    length: int  # bytes


class Trust:
    """The node's view of one repository.

    Args:
        folder: `trust/` of this node.
        root: root metadata given at enrolment; everything else is verified from it.
        budget: metadata is counted in it and never refused for it: without metadata a frozen clock could never thaw.
    """

    def __init__(self, folder: Path, root: bytes, client: httpx.Client, budget: Budget) -> None:
        self.folder = folder
        self._metadata = folder / "metadata"
        self._root = root
        self._fetcher = _Fetcher(client, budget)
        self._client: Client | None = None
        self._url = ""

    def seen(self) -> Seen:
        """What was verified before, here."""
        path = self.folder / "seen.json"
        try:
            return codec.decode_as(path.read_bytes(), Seen, what=str(path))
        except FileNotFoundError:
            return Seen()
        except MalformedMessage as error:
            raise TrustError(f"{error}: the memory of this node is damaged; delete {self.folder} and enrol again") from error

    def now(self, now: float) -> float:
        """`now`, or the clock floor when the clock is not set."""
        return judged_time(now, self.seen().floor)

    def refresh(self, url: str, now: float) -> News | None:
        """Fetch and verify metadata from `url`; return the newest release, None when there is none yet.

        Args:
            url: of the repository; below it lie metadata/, targets/ and blobs/.
            now: seconds since 1970 by the node's clock.

        Raises:
            NumberAlreadySeen: older metadata, or an older release, than seen before.
            ExpiredRelease: nothing signed recently: the coordinator is away, somebody holds news back, or the clock is wrong.
            WrongDigest, TooLarge, TrustError: not what was signed, too long, not signed by enough known keys.
            Unavailable: no answer.
        """
        self._tidy()
        seen = self.seen()
        self._url = url.rstrip("/")
        with _our_errors(self._url):
            client = Client(
                str(self._metadata), f"{self._url}/metadata/", fetcher=self._fetcher, config=LIMITS, bootstrap=self._root
            )  # fmt: skip
            verified = client._trusted_set
            verified.reference_time = datetime.fromtimestamp(judged_time(now, seen.floor), UTC)
            client.refresh()
        self._sync()
        self._client = client
        signed_at = verified.timestamp.unrecognized_fields.get(SIGNED_AT, 0)
        if isinstance(signed_at, int) and seen.floor < signed_at < verified.timestamp.expires.timestamp():
            self._remember(msgspec.structs.replace(seen, floor=signed_at))
        names = (name for name in verified.targets.targets if name.startswith("releases/"))
        newest = max(names, key=_number, default=None)
        if newest is None:
            return None
        target = verified.targets.targets[newest]
        news = News(_number(newest), target.hashes.get("sha256", ""), target.length)
        checked_number(news.number, news.digest, seen)
        return news

    def manifest(self, news: News) -> Release:
        """Fetch and verify the manifest of the release that `refresh` returned, and remember its number.

        Raises:
            as `refresh`; DoesNotFit: an adapter beside the wrong model.
        """
        if self._client is None:
            raise AssertionError("manifest() before refresh()")
        name = f"releases/{news.number}.json"
        if news.length > MANIFEST_LIMIT:
            raise TooLarge(f"{name} is {news.length} bytes, the limit is {MANIFEST_LIMIT}")
        with _our_errors(self._url):
            target = self._target(name)
            data = self._fetcher.download_bytes(f"{self._url}/targets/releases/{news.digest}.{news.number}.json", news.length)
            target.verify_length_and_hashes(data)
        release = checked_release(codec.decode_as(data, Release, limit=MANIFEST_LIMIT, what=name))
        if release.number != news.number or codec.encode(release) != data:
            raise TrustError(f"{name} is signed but says it is release {release.number}, or is not in canonical form")
        for file in release.files:
            with _our_errors(self._url):
                target = self._target(BLOB_NAME.format(digest=file.digest))
            if target.length != file.size or target.hashes.get("sha256") != file.digest:
                raise TrustError(f"{name} and the signed list of files disagree on {file.name!r}")
        seen = self.seen()
        if seen.number != news.number:
            self._remember(msgspec.structs.replace(seen, number=news.number, digest=news.digest))
        return release

    def _target(self, name: str) -> TargetFile:
        target = self._client.get_targetinfo(name) if self._client else None
        if target is None:
            raise TrustError(f"{name} is not in the signed list of files")
        return target

    def _remember(self, seen: Seen) -> None:
        write_atomically(self.folder / "seen.json", codec.encode(seen))

    def _tidy(self) -> None:
        """Make the folder, and remove what a kill left of python-tuf's temporary files."""
        self._metadata.mkdir(parents=True, exist_ok=True)
        for path in self._metadata.glob("tmp*"):
            path.unlink()

    def _sync(self) -> None:
        """python-tuf renames but does not sync: after a power cut the memory against rollback could be gone."""
        for path in self._metadata.rglob("*.json"):
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        sync_folder(self._metadata / "root_history")
        sync_folder(self._metadata)


class _Fetcher(FetcherInterface):
    """python-tuf's way out to the network, over our client, with a deadline a file. Length limits are enforced by its caller."""

    def __init__(self, client: httpx.Client, budget: Budget) -> None:
        self._client = client
        self._budget = budget

    def _fetch(self, url: str) -> Iterator[bytes]:
        deadline = time.monotonic() + FILE_DEADLINE_S
        try:
            with self._client.stream("GET", url) as response:
                if response.status_code != 200:
                    raise theirs.DownloadHTTPError(f"{url} answered {response.status_code}", response.status_code)
                for chunk in response.iter_raw():
                    self._budget.spend(len(chunk))
                    if time.monotonic() > deadline:
                        raise theirs.SlowRetrievalError(f"{url} took longer than {FILE_DEADLINE_S:.0f} s")
                    yield chunk
        except httpx.HTTPError as error:
            raise theirs.DownloadError(f"{url}: {type(error).__name__} {error}".rstrip()) from error


@contextlib.contextmanager
def _our_errors(url: str) -> Iterator[None]:
    """Theirs to ours. The order matters: theirs are a tree."""
    try:
        yield
    except MilpaError:
        raise
    except theirs.ExpiredMetadataError as error:
        raise ExpiredRelease(f"{url}: {error}; check this node's clock, then the coordinator's refresh") from error
    except theirs.BadVersionNumberError as error:
        raise NumberAlreadySeen(f"{url} shows an old or mixed copy: {error}") from error
    except theirs.LengthOrHashMismatchError as error:
        raise WrongDigest(f"{url}: {error}") from error
    except theirs.UnsignedMetadataError as error:
        raise TrustError(f"{url}: not signed by enough known keys: {error}") from error
    except theirs.RepositoryError as error:
        raise TrustError(f"{url}: {error}") from error
    except theirs.DownloadLengthMismatchError as error:
        raise TooLarge(f"{url}: {error}") from error
    except theirs.DownloadError as error:
        raise Unavailable(f"no answer from the repository: {error}") from error


def _number(name: str) -> int:
    """The number in "releases/7.json"; 0 for any other name, which then never wins."""
    digits = name.removeprefix("releases/").removesuffix(".json")
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 10 else 0
