"""Brings a signed release onto this node and makes it live, or leaves things as they are.

    idle -> metadata -> download -> self-test -> switch -> confirmed -> idle
               |            |           |          |
               `- waiting --'           `- refused-' (the previous release is live; this one is remembered and not tried again by itself)

A kill between any two steps is harmless. Up to the download everything is found anew: verified metadata, whole files and parts are on
disk. From the self-test on, a journal names the release, so that the work ends without a network. The switch is one rename (`slots.py`).

Files wait for sun where the node lives on it (`wait_for`); what has come stays. Every state has a deadline. `check` returns an Outcome in
every case a site can meet; it raises only on defects. It keeps no thread of its own: the daemon calls it on a notice, at start, and every
few hours with jitter. Nothing here is on the way of an answer.
"""

import errno
import functools
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar

import httpx
import msgspec

from node.update.download import DAILY_BYTES, Account, Budget, Downloader, http_client
from node.update.rules import Machine, checked_fit
from node.update.slots import ActiveRelease, Failure, Slots
from node.update.trust import Trust
from protocol import codec
from protocol.blobs import write_atomically
from protocol.digests import digest_file, digest_value
from protocol.errors import DoesNotFit, MalformedMessage, MilpaError, NotEnough, TrustError, Unavailable
from protocol.releases import MANIFEST_LIMIT, Release, Role

DOWNLOAD_DEADLINE_S = 6 * 3600.0  # seconds; the part stays and the next check goes on
SELF_TEST_DEADLINE_S = 300.0  # a few greedy answers on the slowest board take one minute
SWITCH_DEADLINE_S = 120.0  # loading a model from an SD card takes half a minute
TEST_LIMIT = 3  # self-tests of one release that ended with the process (out of memory, power cut)

Emit = Callable[[str, dict[str, float], dict[str, str]], None]  # kind, figures, detail: as messages.Event
T = TypeVar("T")
_log = logging.getLogger("milpa.update")


class FailedHere(DoesNotFit):
    """Signed, intact, and did not work on this node. It is remembered, and its event is sent with the memory."""


class Outcome(msgspec.Struct, frozen=True):
    """How a check ended.

    state      current      nothing newer is there, or nothing was ever published
               activated    a newer release is live and confirmed
               refused      the newest release, or the metadata, is not to be used; `reason` says why
               waiting      the network, the budget, the disk or time ran out; the next check goes on
               busy         another check is under way
    """

    state: Literal["current", "activated", "refused", "waiting", "busy"]
    number: int = 0  # of the release that is live now; 0: none
    reason: str = ""
    error: str = ""  # name of the error class behind `reason`
    fetched: int = 0  # bytes received by this check
    seconds: float = 0.0


class _Journal(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is under way since its files are complete."""

    release: Release
    stage: Literal["test", "switch"]
    tests: int = 0  # self-tests begun


class _Told(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The last refusal that was sent up, so that a standing one is not sent at every check."""

    reason: str = ""


class Updater:
    """The node's update state machine.

    Args:
        state_dir: the node's folder; `blobs/`, `trust/` and `slots/` below it are this class's own.
        url: base of the repository, such as "http://coordinator:8700/repository".
        root: root metadata given at enrolment.
        self_test: load the candidate beside the live release and make it answer; raise to refuse it. Runs in a thread of its own.
        activate: answer with this release from now on; raise if it does not work. Runs in a thread of its own.
        emit: hand an event to the outbox. At least once: a kill may repeat one.
        role, task: which files to take; what the node answers ("" for anything).
        daily_bytes: budget, 0 for none.
        link: what everything on this node's link shares, where that is limited too.
        machine: what this node runs on; measured when None.
        wait_for: why files are not to be fetched now (no sun), or ""; asked before each and while one comes. Metadata always comes.
        received: told how many seconds a fetch took the link.
        step: called with a name between steps, so that tests can end the process there.
    """

    def __init__(
        self,
        state_dir: Path,
        *,
        url: str,
        root: bytes,
        self_test: Callable[[ActiveRelease], None],
        activate: Callable[[ActiveRelease], None],
        emit: Emit = lambda kind, figures, detail: None,
        role: Role = "student",
        task: str = "",
        daily_bytes: int = DAILY_BYTES,
        link: Account | None = None,
        machine: Machine | None = None,
        slots: Slots | None = None,
        client: httpx.Client | None = None,
        downloader: Callable[..., Downloader] = Downloader,
        download_deadline_s: float = DOWNLOAD_DEADLINE_S,
        self_test_deadline_s: float = SELF_TEST_DEADLINE_S,
        switch_deadline_s: float = SWITCH_DEADLINE_S,
        wait_for: Callable[[], str] = lambda: "",
        received: Callable[[float], None] = lambda seconds: None,
        step: Callable[[str], None] = lambda name: None,
    ) -> None:
        self._wait_for, self._received = wait_for, received
        self.url = url.rstrip("/")
        self.slots = slots or Slots(state_dir, role=role)
        self.role = role
        self.task = task
        self.machine = machine or this_machine()
        self.budget = Budget(state_dir / "slots" / "budget.json", daily_bytes, link=link)
        self.client = client or http_client()
        self.trust = Trust(state_dir / "trust", root, self.client, self.budget)
        self.downloader = downloader(self.client, self.slots.blobs, self.budget)
        self.download_deadline_s = download_deadline_s
        self.self_test_deadline_s = self_test_deadline_s
        self.switch_deadline_s = switch_deadline_s
        self._self_test = self_test
        self._activate = activate
        self._emit = emit
        self._step = step
        self._folder = state_dir / "slots"
        self._lock = threading.Lock()

    def check(self, now: float) -> Outcome:
        """Look for a newer release and bring it in. Safe to call from any thread; a second call meanwhile returns "busy".

        Args:
            now: seconds since 1970 by the node's clock, right or wrong.
        """
        if not self._lock.acquire(blocking=False):
            return Outcome("busy")
        started = time.monotonic()
        before = self.budget.received
        try:
            self._tell_failures()
            outcome = self._guarded(now)
            self._tell_refusal(outcome)
            active = self.slots.active()
            return msgspec.structs.replace(
                outcome,
                number=active.number if active else 0,
                fetched=self.budget.received - before,
                seconds=round(time.monotonic() - started, 3),
            )
        finally:
            self.budget.settle()
            self._lock.release()

    def close(self) -> None:
        """Let the connections go."""
        self.client.close()

    def _guarded(self, now: float) -> Outcome:
        try:
            self.budget.open_day(self.trust.now(now))
            return self._advance(now)
        except (Unavailable, NotEnough) as error:
            return Outcome("waiting", reason=str(error), error=type(error).__name__)
        except MilpaError as error:
            return Outcome("refused", reason=str(error), error=type(error).__name__)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            return Outcome("waiting", reason="no space left on this disk; free some", error="NotEnough")

    def _advance(self, now: float) -> Outcome:
        journal = self._read_journal()
        if journal is None:
            release = self._newest(now)
            if release is None:
                return Outcome("current")
            self._download(release)
            journal = _Journal(release, "test")
        elif (failure := self.slots.failure(digest_value(journal.release))) is not None:
            self._finish()  # it went back by itself while we were away
            raise FailedHere(f"release {journal.release.number} went back: {failure.reason}")
        if journal.stage == "test":
            journal = self._test(journal)
        return self._switch(journal.release)

    def _newest(self, now: float) -> Release | None:
        """The release to bring in, or None when the live one is the newest."""
        self._step("metadata")
        news = self.trust.refresh(self.url, now)
        if news is None or news.digest == self.slots.active_digest():
            return None
        failure = self.slots.failure(news.digest)
        if failure is not None:
            raise FailedHere(f"release {news.number} failed here before: {failure.reason}")
        self._step("manifest")
        release = self.trust.manifest(news)
        checked_fit(release, self.role, self.machine, task=self.task)
        return release

    def _download(self, release: Release) -> None:
        files = release.files_for(self.role)
        self.slots.collect(keep=[file.digest for file in files])
        self._drop_damaged(release)
        missing = [file for file in files if not self.slots.blobs.has(file.digest)]
        here = sum(part.stat().st_size for file in missing if (part := self.slots.blobs.part(file.digest)).is_file())
        self.slots.blobs.need_space(max(0, sum(file.size for file in missing) - here))
        deadline = time.monotonic() + self.download_deadline_s
        for file in missing:
            self._step(f"download-{file.kind}")
            begun = time.monotonic()
            try:
                self.downloader.fetch(
                    f"{self.url}/blobs/{file.digest}", file.digest, file.size, deadline=deadline, wait_for=self._wait_for
                )  # fmt: skip
            finally:
                self._received(time.monotonic() - begun)
        self._step("downloaded")

    def _drop_damaged(self, release: Release) -> None:
        """Read the files that are here already and drop those that a failing disk changed; they are fetched again."""
        for file in release.files_for(self.role):
            path = self.slots.blobs.path(file.digest)
            if path.is_file() and (path.stat().st_size != file.size or digest_file(path) != file.digest):
                _log.error("%s on this disk is damaged and is fetched again", file.name)
                path.unlink()

    def _test(self, journal: _Journal) -> _Journal:
        release = journal.release
        if journal.tests >= TEST_LIMIT:
            raise self._condemned(release, f"{journal.tests} self-tests ended with the process")
        journal = msgspec.structs.replace(journal, tests=journal.tests + 1)
        self._write_journal(journal)
        self._step("self-test")
        try:
            candidate = self.slots.candidate(release)
            within(functools.partial(self._self_test, candidate), self.self_test_deadline_s, what="self-test")
        except NotEnough:
            self._finish(collect=False)
            raise  # no memory just now: not the release's fault
        except Exception as error:
            raise self._condemned(release, f"self-test: {_told(error)}") from error
        self._step("tested")
        journal = _Journal(release, "switch")
        self._write_journal(journal)
        return journal

    def _switch(self, release: Release) -> Outcome:
        started = time.monotonic()
        self._step("switch")
        live = self.slots.active()
        proven = live is not None and live.release == release and self.slots.confirmed()  # killed after the daemon confirmed it
        if not proven:
            candidate = self.slots.activate(release)
            self._step("switched")
            try:
                within(functools.partial(self._activate, candidate), self.switch_deadline_s, what="switch")
            except Exception as error:
                raise self._gone_back(release, f"switch: {_told(error)}") from error
            self._step("activated")
            self.slots.confirm()
        self._step("confirmed")
        figures = {"number": float(release.number), "seconds": round(time.monotonic() - started, 3)}
        self._emit("release-activated", figures, {"digest": digest_value(release)})
        self._step("told")
        self._finish()
        return Outcome("activated")

    def _condemned(self, release: Release, reason: str) -> FailedHere:
        """Remember that `release` does not hold here; return the error to raise."""
        self.slots.remember_failure(release, reason)
        self._step("condemned")
        self._finish()
        self._tell_failures()
        return FailedHere(f"release {release.number} is refused: {reason}")

    def _gone_back(self, release: Release, reason: str) -> FailedHere:
        """Put the previous release back to work; return the error to raise."""
        previous = self.slots.go_back(reason)
        self._step("went-back")
        if previous is not None:
            try:
                within(functools.partial(self._activate, previous), self.switch_deadline_s, what="going back")
            except Exception:  # the pointer is right, so a restart of the daemon loads it
                _log.exception("release %d is live again by its pointer, but did not load; restart the node", previous.number)
        self._finish()
        self._tell_failures()
        return FailedHere(f"release {release.number} is refused: {reason}")

    def _finish(self, *, collect: bool = True) -> None:
        (self._folder / "journal.json").unlink(missing_ok=True)
        self._step("finished")
        if collect:
            self.slots.collect()

    def _tell_failures(self) -> None:
        for failure in self.slots.failures():
            if not failure.told:
                self._emit("release-refused", {"number": float(failure.number)}, _refusal(failure))
                self.slots.mark_told(failure)

    def _tell_refusal(self, outcome: Outcome) -> None:
        """Send a refusal of metadata or files up, once for each new reason. Failed releases have their own row already."""
        path = self._folder / "told.json"
        last = _read(path, _Told) or _Told()
        if outcome.state != "refused":
            if outcome.state in ("current", "activated") and last.reason:
                write_atomically(path, codec.encode(_Told()))
            return
        if outcome.reason == last.reason or outcome.error == FailedHere.__name__:
            return
        self._emit("release-refused", {"number": float(self.trust.seen().number)}, {"reason": outcome.reason, "error": outcome.error})
        write_atomically(path, codec.encode(_Told(outcome.reason)))

    def _read_journal(self) -> _Journal | None:
        journal = _read(self._folder / "journal.json", _Journal)
        if journal is None:
            return None
        try:
            self.slots.candidate(journal.release)
        except MilpaError:
            self._finish(collect=False)  # its files are gone: begin again
            return None
        return journal

    def _write_journal(self, journal: _Journal) -> None:
        write_atomically(self._folder / "journal.json", codec.encode(journal))
        self._step(f"journal-{journal.stage}")


def within(work: Callable[[], None], deadline_s: float, *, what: str) -> None:
    """Run `work` in a thread and wait for it at most `deadline_s` seconds; its error is raised here.

    Raises:
        TrustError: past the deadline. The thread cannot be stopped; it is left behind, and does not keep the process alive.
    """
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # handed to the caller below
            errors.append(error)

    thread = threading.Thread(target=run, name=f"update-{what}", daemon=True)
    thread.start()
    thread.join(deadline_s)
    if thread.is_alive():
        raise TrustError(f"{what} was not done within {deadline_s:.0f} s")
    if errors:
        raise errors[0]


def this_machine(meminfo: Path = Path("/proc/meminfo"), limit: Path = Path("/sys/fs/cgroup/memory.max")) -> Machine:
    """Memory of this machine, or of the container it is in; very large where neither file says."""
    found = [1 << 40]
    if meminfo.is_file():
        found += [int(line.split()[1]) << 10 for line in meminfo.read_text().splitlines() if line.startswith("MemTotal:")]
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        found.append(int(text))
    return Machine(memory_mb=min(found) >> 20)


def _read(path: Path, kind: type[T]) -> T | None:
    try:
        return codec.decode_as(path.read_bytes(), kind, limit=2 * MANIFEST_LIMIT, what=str(path))
    except FileNotFoundError:
        return None
    except MalformedMessage as error:
        _log.warning("%s; beginning anew", error)
        path.unlink()
        return None


def _refusal(failure: Failure) -> dict[str, str]:
    return {"reason": failure.reason, "digest": failure.digest}


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, MilpaError) else f"{type(error).__name__}: {error}"
