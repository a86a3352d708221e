"""`milpa-coordinator`: the command line of the coordinator. Each command lives in `commands/`; heavy imports happen inside it."""

import functools
import importlib

import typer

from protocol.console import run

COMMANDS = ("ranch", "capture", "synthesise", "distill", "evaluate", "calibrate", "publish", "round", "superlink", "serve")

app = typer.Typer(
    pretty_exceptions_enable=False,  # a traceback with local values would show secrets in a log
    no_args_is_help=True,
    help="Distil, prove, sign and release models for a fleet, and merge what it learned.",
    rich_markup_mode="markdown",
)


@functools.cache
def complete() -> typer.Typer:
    """The program with all its commands."""
    for name in COMMANDS:
        module = importlib.import_module(f"coordinator.commands.{name}")
        app.command(name)(getattr(module, name))
    config = typer.Typer(no_args_is_help=True, help="Settings and where each comes from.")
    config.command("show")(importlib.import_module("coordinator.commands.config").show)
    app.add_typer(config, name="config")
    teacher = typer.Typer(no_args_is_help=True, help="Who teaches.")
    teacher.command("check")(importlib.import_module("coordinator.commands.teacher").check)
    app.add_typer(teacher, name="teacher")
    return app


def main() -> None:
    """Entry point: one clear line and an exit code for every error that a person can act on."""
    run(complete())


if __name__ == "__main__":
    main()
