"""Commands as a user calls them."""

from collections.abc import Callable
from typing import Any

import msgspec
import typer
from typer.testing import CliRunner

from protocol.errors import MilpaError


def called(command: Callable[..., None], *arguments: object) -> dict[str, Any]:
    """What the command prints with --json, on one thread; its error as it was raised."""
    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, [*map(str, arguments), "--json", "--threads", "1"])
    if isinstance(result.exception, MilpaError):
        raise result.exception
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = msgspec.json.decode(result.stdout)
    return found
