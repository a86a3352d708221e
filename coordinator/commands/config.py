"""`milpa-coordinator config show`: every setting, its value and who set it."""

from pathlib import Path

import typer


def show(
    config: Path | None = typer.Option(None, help="Settings in TOML."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON list."),
) -> None:
    """Show every setting of the coordinator with its origin: default, file, environment or flag.

    Examples:

        milpa-coordinator config show

        milpa-coordinator config show --config /etc/milpa/coordinator.toml --json
    """
    from coordinator.settings import load_settings
    from protocol.console import print_origins

    _, origins = load_settings(config)
    print_origins(origins, as_json=as_json)
