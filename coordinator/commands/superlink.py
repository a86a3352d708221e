"""`milpa-coordinator superlink`: Flower's SuperLink, guarded."""

from pathlib import Path

import typer

from protocol.console import stderr
from protocol.errors import BadInput
from protocol.ports import is_loopback


def superlink(
    state: Path = typer.Option(..., help="Folder for its keys and its SQLite file."),
    host: str = typer.Option("127.0.0.1", help="Address to listen on. Others than loopback want a certificate, or a VPN."),
    port: int = typer.Option(8000, min=0, max=65535, help="0: any free one; see superlink.json in the state folder."),
    cert_file: Path | None = typer.Option(
        None, help="Its certificate (PEM), for the address or name that nodes are told; then it speaks TLS."
    ),
    key_file: Path | None = typer.Option(None, help="The certificate's key (PEM)."),
    ca_file: Path | None = typer.Option(None, help="Who signed it (PEM), for rounds on this machine; by default it signed itself."),
    open_fleet: bool = typer.Option(False, "--open-fleet", help="Let nodes connect without the fleet token."),
) -> None:
    """Run the SuperLink that carries adapters from the nodes.

    At the first start it makes `control.token` (the coordinator's), `fleet.token` (give it to the nodes) and `superexec.secret`.

    Examples:

        milpa-coordinator superlink --state /var/lib/milpa/superlink

        milpa-coordinator superlink --state ./superlink --host 10.8.0.1 --port 18000

        milpa-coordinator superlink --state ./superlink --host 203.0.113.7 --cert-file link.pem --key-file link.key --ca-file ca.pem
    """
    from coordinator.federation.superlink import Certificate, serve

    if (cert_file is None) != (key_file is None):
        raise BadInput("--cert-file and --key-file belong together: give both, or neither for plain HTTP")
    if ca_file is not None and cert_file is None:
        raise BadInput("--ca-file says who signed --cert-file: give that too, with --key-file")
    certificate = Certificate(cert_file, key_file, ca_file or cert_file) if cert_file and key_file else None
    if certificate is None and not is_loopback(host):
        stderr.print(
            f"listening on {host} without TLS: for a VPN; elsewhere give --cert-file and --key-file", markup=False, highlight=False
        )
    scheme = "https" if certificate else "http"
    serve(
        state.resolve(), host=host, port=port, open_fleet=open_fleet, certificate=certificate,
        ready=lambda address: stderr.print(f"superlink: {scheme}://{address} (keys in {state})", highlight=False),
    )  # fmt: skip
