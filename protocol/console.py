"""How a Milpa program talks to a terminal: errors in one line, JSON on stdout, progress on stderr."""

import errno
import sys
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from protocol.errors import BadInput, MilpaError, NotEnough
from protocol.settings import Origin

stderr = Console(stderr=True)
TOLD_EVERY_S = 15.0  # between two lines of progress in a log


def run(app: typer.Typer) -> None:
    """Run a command line; turn errors that a person can act on into one line and an exit code.

    Ctrl-C exits with 130. A full disk and a missing file are told in the same manner. Anything else is a defect and keeps its traceback.
    """
    try:
        app()
    except MilpaError as error:
        stderr.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            told: MilpaError = NotEnough(f"no space left on the disk of {error.filename or 'the state folder'}; free some and run again")
        elif error.errno in (errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ENOTDIR) and error.filename:
            told = BadInput(f"cannot use {error.filename}: {error.strerror}")
        else:
            raise
        stderr.print(f"error: {told}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(told.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(value)).decode() + "\n")


class _Lines(Progress):
    """Progress for a log: a line now and then instead of a moving bar."""

    def __init__(self) -> None:
        super().__init__(console=stderr, disable=True)
        self._told = time.monotonic()

    def update(self, task_id: TaskID, **fields: Any) -> None:
        """As Progress.update; tells at most every TOLD_EVERY_S seconds."""
        super().update(task_id, **fields)
        if time.monotonic() - self._told >= TOLD_EVERY_S:
            self._told = time.monotonic()
            task = self.tasks[self.task_ids.index(task_id)]
            share = f" {task.percentage:.0f}%" if task.total else ""
            stderr.print(f"  {task.description.strip()}{share}", markup=False, highlight=False, soft_wrap=True)


def progress_bar() -> Progress:
    """A progress display on stderr, gone when done; plain lines where there is no terminal."""
    if not stderr.is_terminal:
        return _Lines()
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=stderr, transient=True,
    )  # fmt: skip


def print_origins(origins: Sequence[Origin], *, as_json: bool) -> None:
    """`config show`: every setting, its value and who set it."""
    if as_json:
        print_json([{"name": o.name, "value": o.value, "origin": o.origin} for o in origins])
        return
    width = max(len(o.name) for o in origins)
    for o in origins:
        sys.stdout.write(f"{o.name:<{width}}  {o.value!r}  ({o.origin})\n")
