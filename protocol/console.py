"""How a Milpa program talks to a terminal: errors in one line, JSON on stdout, progress on stderr."""

import errno
import sys
from collections.abc import Sequence
from typing import Any

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from protocol.errors import BadInput, MilpaError, NotEnough
from protocol.settings import Origin

stderr = Console(stderr=True)


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


def progress_bar() -> Progress:
    """A progress display on stderr, gone when done; plain lines where there is no terminal."""
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
