"""The spool folder: a file with records dropped into `in/` becomes a file of the same name with their answers in `out/`.

    in/     NAME.json (one record) or NAME.jsonl (one a line), in the form of POST /v1/records
    work/   the file being answered                    out/      the answers, one JSON object for each record, in order
    done/   files answered                             refused/  files of which nothing was usable, and NAME.reason beside

Rules:
 * A file is read when it has not changed for `quiet_s`; names with a leading dot or ending in .part or .tmp are never read. Whoever writes
   under such a name and renames at the end is safe at any speed.
 * An answer file appears whole or not at all, and once. The order makes it so: answers are written and synced under a hidden name, the
   original leaves `work/`, the hidden file gets its name. Killed between any two steps, the next start goes on from there; records that
   were answered are found in the database and not answered again.
 * A line that is not usable gets an error object in its place. A file without one usable line, too large, or with too many lines, is
   refused; its reasons are in `out/` too, so that whoever wrote it learns of them.
 * Without a model, or with a full queue, files wait.
Limits: `file_limit_bytes` a file, `records` lines, `waiting` uncollected answers (then nothing is taken), `kept` files in done and refused.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy.exc import DBAPIError

from node.answering import Answering
from node.engine.worker import Busy, Late
from node.entrances.taking import refusal, take
from node.parts import Figure, Part, dead
from node.settings import NodeSettings, Spool
from protocol.blobs import sync_folder, write_atomically
from protocol.codec import UNREADABLE
from protocol.errors import BadInput, TooLarge, Unavailable

LOOK_S = 1.0  # seconds between looks into the folder
BUSY_S = 0.5  # seconds to wait when the queue is full: HTTP goes first
TROUBLE_S = 10.0  # seconds to wait when the disk or the model is not there
LATE_LIMIT = 3  # tries of a record that does not get its answer in time
SCAN = 1_000  # files looked at in one round
FOLDERS = ("in", "work", "out", "done", "refused")
PRUNE_ROUNDS = 100  # looks between prunings

log = logging.getLogger("milpa.node")


class _Ended(Exception):
    """The node stops; the file stays in `work/`."""


class SpoolFolder(Part):
    """Owns the folder and one thread.

    Raises:
        BadInput: the folder cannot be made.
    """

    name = "spool"

    def __init__(self, settings: NodeSettings, answering: Answering, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings: Spool = settings.spool
        self._deadline_s = settings.api.deadline_s
        self._answering, self._clock = answering, clock
        self.root = Path(settings.spool.folder).expanduser() if settings.spool.folder else settings.state_dir / "spool"
        try:
            for name in FOLDERS:
                (self.root / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"cannot make the spool folder {self.root}: {error.strerror}") from error
        self._seen: dict[str, tuple[tuple[int, int, int], float]] = {}  # name -> inode, size, change; since when
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="milpa-spool", daemon=True)
        self._problem = ""
        self._files = {"done": 0, "refused": 0}  # since this process began

    def start(self) -> None:
        """Look for files from now on."""
        self._thread.start()

    def stop(self) -> None:
        """End after the record under way."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(self._deadline_s + 5)

    def reload(self, settings: NodeSettings) -> None:
        """Limits; the folder stays."""
        self._settings = settings.spool

    def status(self) -> dict[str, Any]:
        """Files by folder, and what keeps them."""
        counted = {name: sum(1 for _ in _files(self.root / name)) for name in ("in", "work", "out")}
        return {"folder": str(self.root), **counted, **self._files, "problem": self._problem}

    def figures(self) -> tuple[Figure, ...]:
        """Files that wait, in and out."""
        return (
            ("spool_in_files", "Files that wait for their answers", lambda: float(sum(1 for _ in _files(self.root / "in")))),
            ("spool_out_files", "Answer files nobody collected yet", lambda: float(sum(1 for _ in _files(self.root / "out")))),
        )

    def trouble(self) -> str:
        """A dead thread."""
        return dead(self._thread, self._stop)

    # ---- the thread

    def _run(self) -> None:
        rounds, recovered, problem = 0, False, ""
        while not self._stop.is_set():
            pause = LOOK_S
            try:
                if not recovered:
                    self.recover()
                    recovered = True
                self.look()
                rounds += 1
                if rounds % PRUNE_ROUNDS == 1:
                    self._prune()
            except _Ended:
                return
            except (Unavailable, OSError, DBAPIError) as error:  # no model, a full disk: the file stays and the next round tries again
                self._problem = f"{type(error).__name__}: {error.orig if isinstance(error, DBAPIError) else error}"
                pause = BUSY_S if isinstance(error, Busy) else TROUBLE_S
            except Exception:  # a defect with one file must not end the entrance
                log.exception("the spool could not go on with a file")
                self._problem, pause = "a defect; see the log", TROUBLE_S
            if self._problem != problem:
                problem = self._problem
                log.log(logging.WARNING if problem else logging.INFO, "spool: %s", problem or "goes on")
            self._stop.wait(pause)

    def recover(self) -> None:
        """Finish what the last process left: answers whose original is done get their name, the others are made again."""
        for hidden in sorted((self.root / "out").glob(".*.ready")):
            name = hidden.name[1 : -len(".ready")]
            if (self.root / "work" / name).exists():
                hidden.unlink()
            else:
                hidden.replace(self.root / "out" / name)
        for half in (self.root / "out").glob(".*.part"):
            half.unlink()
        sync_folder(self.root / "out")

    def look(self) -> None:
        """One round: what is in `work/` first, then every quiet file in `in/`, oldest first."""
        for path in sorted(_files(self.root / "work")):
            self._answer(path)
        quiet = self._quiet()
        self._problem = self._too_full() if quiet else ""  # counted only when there is something to take: 10,000 names are 10 ms
        for path in quiet:
            if self._stop.is_set() or self._problem:
                return
            claimed = self.root / "work" / path.name
            path.replace(claimed)
            self._answer(claimed)
            self._problem = self._too_full()

    def _quiet(self) -> list[Path]:
        """Files in `in/` that have not changed for a moment, oldest first."""
        now, seen, quiet = self._clock(), dict[str, tuple[tuple[int, int, int], float]](), list[tuple[int, Path]]()
        for path in _files(self.root / "in"):
            try:
                about = path.stat()
            except FileNotFoundError:
                continue  # its writer renamed it just now
            mark = (about.st_ino, about.st_size, about.st_mtime_ns)
            before, since = self._seen.get(path.name, (mark, now))
            seen[path.name] = (mark, since if before == mark else now)
            if now - seen[path.name][1] >= self._settings.quiet_s:
                quiet.append((about.st_mtime_ns, path))
            if len(seen) >= SCAN:
                break
        self._seen = seen
        return [path for _, path in sorted(quiet)]

    def _answer(self, path: Path) -> None:
        """Answer a file in `work/`. What it raises leaves it there."""
        try:
            lines = self._lines(path)
            answers = [self._patiently(line) for line in lines]
        except BadInput as error:
            self._answering.refuse(shown(path), reason=str(error), origin="spool")
            self._finish(path, [refusal(error)], refused=str(error))
            return
        except (_Ended, Unavailable, OSError, DBAPIError):
            raise
        except Exception as error:  # a defect of ours with one file must not keep the others waiting for ever
            log.exception("the spool could not go on with a file; it is refused")
            self._finish(path, [refusal(BadInput("a defect of the node; see its log"))], refused=f"a defect: {type(error).__name__}")
            return
        reasons = [f"line {number}: {one['error']['message']}" for number, one in enumerate(answers, start=1) if "error" in one]
        self._finish(path, answers, refused="\n".join(reasons) if len(reasons) == len(answers) else "")

    def _lines(self, path: Path) -> list[bytes]:
        """The records of a file, as JSON.

        Raises:
            BadInput: there is none, or too much.
        """
        size, limit, name = path.stat().st_size, self._settings.file_limit_bytes, shown(path)
        if size > limit:
            raise TooLarge(f"{name} is {size} bytes, the limit is {limit} (spool.file_limit_bytes)")
        try:
            data = path.read_bytes()
        except PermissionError as error:
            raise BadInput(f"{name} cannot be read by the node's user") from error
        try:
            msgspec.json.decode(data)
            return [data]  # one record, over as many lines as it likes
        except UNREADABLE:
            lines = [line for line in data.splitlines() if line.strip()]
        if not lines:
            raise BadInput(f"{name} is empty")
        if len(lines) > self._settings.records:
            raise TooLarge(f"{name} has {len(lines)} lines, the limit is {self._settings.records} (spool.records)")
        return lines

    def _patiently(self, line: bytes) -> dict[str, Any]:
        """What to say about a record; waits while the queue is full, and gives up after some tries that took too long."""
        late = 0
        while not self._stop.is_set():
            try:
                return take(self._answering, line, origin="spool", deadline_s=self._deadline_s)
            except Busy:
                self._stop.wait(BUSY_S)
            except Late as error:
                late += 1
                if late == LATE_LIMIT:
                    return refusal(error)
        raise _Ended

    def _finish(self, path: Path, answers: list[dict[str, Any]], *, refused: str) -> None:
        """The three steps whose order lets answers appear once; see the module."""
        out, target = self.root / "out", self.root / ("refused" if refused else "done")
        hidden = out / f".{path.name}.ready"
        write_atomically(hidden, b"".join(msgspec.json.encode(answer) + b"\n" for answer in answers))
        if refused:
            write_atomically(target / f"{path.name}.reason", refused.encode() + b"\n")
        path.replace(target / path.name)
        sync_folder(target)
        sync_folder(path.parent)
        hidden.replace(out / path.name)
        sync_folder(out)
        self._files["refused" if refused else "done"] += 1

    def _too_full(self) -> str:
        count = sum(1 for _ in _files(self.root / "out"))
        limit = self._settings.waiting
        return f"{count} answers wait in {self.root / 'out'}: collect them, then files are taken again" if count >= limit else ""

    def _prune(self) -> None:
        for name in ("done", "refused"):
            files = sorted(_files(self.root / name), key=lambda path: path.stat().st_mtime_ns, reverse=True)
            keep = self._settings.kept * (2 if name == "refused" else 1)  # a refused file has its reason beside it
            for old in files[keep:]:
                old.unlink(missing_ok=True)


def shown(path: Path) -> str:
    """The file's name as text; it may be any bytes."""
    return os.fsencode(path.name).decode("utf-8", "replace")


def _files(folder: Path) -> Iterator[Path]:
    """Plain files with a name that may be read; links are nobody's records."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith(".") and not entry.name.endswith((".part", ".tmp")) and entry.is_file(follow_symlinks=False):
                yield Path(entry.path)
