"""`milpa-coordinator superlink`: Flower's SuperLink, guarded."""

from pathlib import Path

import typer

from protocol.console import stderr


def superlink(
    state: Path = typer.Option(..., help="Folder for its keys and its SQLite file."),
    host: str = typer.Option(
        "127.0.0.1", help="Address to listen on. Traffic is plain HTTP: keep it on loopback, a VPN or behind a TLS proxy."
    ),
    port: int = typer.Option(8000, min=0, max=65535, help="0: any free one; see superlink.json in the state folder."),
    open_fleet: bool = typer.Option(False, "--open-fleet", help="Let nodes connect without the fleet token."),
) -> None:
    """Run the SuperLink that carries adapters from the nodes.

    At the first start it makes `control.token` (the coordinator's), `fleet.token` (give it to the nodes) and `superexec.secret`.

    Examples:

        milpa-coordinator superlink --state /var/lib/milpa/superlink

        milpa-coordinator superlink --state ./superlink --host 10.8.0.1 --port 18000
    """
    from coordinator.federation.superlink import serve

    serve(
        state.resolve(), host=host, port=port, open_fleet=open_fleet,
        ready=lambda address: stderr.print(f"superlink: http://{address} (keys in {state})", highlight=False),
    )  # fmt: skip
