"""`milpa-coordinator serve`: dashboard, release repository and the fleet's ledger in one process."""

from pathlib import Path

import typer

from protocol.console import stderr


def serve(
    config: Path | None = typer.Option(None, help="Settings in TOML; `milpa-coordinator config show` lists them."),
    store: Path | None = typer.Option(None, help="Folder for the ledger, the signed releases and the set-up token."),
    port: int | None = typer.Option(None, min=0, max=65535, help="0: any free one, printed at the start."),
    host: str | None = typer.Option(None, help="Address to listen on; loopback unless told otherwise."),
) -> None:
    """Run the coordinator until Ctrl-C.

    At the first start it prints a one-time token; open the dashboard and create the first account with it.

    Examples:

        milpa-coordinator serve

        milpa-coordinator serve --store /var/lib/milpa --port 8080

        MILPA_COORDINATOR_LEDGER_URL=postgresql://milpa@db/milpa milpa-coordinator serve --config /etc/milpa/coordinator.toml
    """
    import logging

    from coordinator.settings import load_settings

    flags = {"store.dir": str(store) if store is not None else None, "web.port": port, "web.host": host}
    settings, _ = load_settings(config, flags=flags)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)  # its plugins announce themselves at every start
    from coordinator.web import run

    run(settings, ready=lambda address: stderr.print(f"dashboard: {address}", highlight=False))
