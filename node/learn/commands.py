"""`milpa-node learn` and `milpa-node sync`. Importing this loads neither torch nor flwr: each is a process of its own that ends."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from protocol.console import print_json, stderr
from protocol.errors import BadInput, Unavailable

AS_THE_SERVICE = "use: systemctl start milpa-learn"  # which trains, judges and syncs as the node's own user


def learn(
    config: Path | None = typer.Option(None, help="TOML file; default: MILPA_NODE_CONFIG, else /etc/milpa/node.toml."),
    state_dir: Path | None = typer.Option(None, help="The node's folder, instead of the one in the settings."),
    min_examples: int | None = typer.Option(None, min=1, help="Confirmed examples needed to train."),
    max_seconds: float | None = typer.Option(None, min=1.0, help="Budget of training time."),
    epochs: int | None = typer.Option(None, min=1, help="Passes over the examples."),
    rate: float | None = typer.Option(None, min=0.0, help="Learning rate; 0: the default."),
    threads: int | None = typer.Option(None, min=1, help="Processor threads."),
    max_memory_mb: int = typer.Option(0, min=0, help="MiB this training may need; 0: what the machine has free."),
    seed: int = typer.Option(0, help="Order of the examples."),
    if_new: bool = typer.Option(False, "--if-new", help="Only where learn.new_examples more are confirmed than at the last training."),
    judge: bool = typer.Option(False, "--judge", help="Then decide whether this site answers with it; a running node takes it up."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object to stdout and nothing else there."),
) -> None:
    """Train an adapter on this site's confirmed examples, within a budget. It stays here until a sync window.

    Ctrl-C and SIGTERM stop it; started again it goes on, with the examples it began with. A node that was installed as a service
    trains with `systemctl start milpa-learn`: root is refused on a folder that is not root's.

    Examples:

        milpa-node learn --config /etc/milpa/node.toml

        milpa-node learn --max-seconds 300 --threads 2 --json
    """
    from node import settings as node_settings
    from node.client import refuse_root
    from node.learn import needs, session

    flags: dict[str, Any] = {
        "node.state_dir": str(state_dir) if state_dir else None, "learn.min_examples": min_examples, "learn.max_seconds": max_seconds,
        "learn.epochs": epochs, "learn.rate": rate, "learn.threads": threads,
    }  # fmt: skip
    settings, _ = node_settings.read(config, flags=flags)
    refuse_root(settings, instead=AS_THE_SERVICE)
    if missing := needs.missing():
        raise BadInput(f"this node cannot train: {', '.join(missing)} is not installed; {needs.CURE}")
    stop = until_told()
    waits = session.nothing_new(settings) if if_new else ""
    result = None if waits else session.train(
        settings, max_memory_mb=max_memory_mb, seed=seed, told=lambda text: stderr.print(text, highlight=False), interrupted=stop,
        progress=lambda step: stderr.print(f"{step.share:4.0%}  loss {step.loss:.3f}", highlight=False) if step.step % 20 == 0 else None,
    )  # fmt: skip
    verdict = session.judge(settings, interrupted=stop) if judge and settings.learn.site_adapter else None
    if as_json:
        print_json({"trained": result, "judged": verdict} if judge else result)
        return
    if result is None:
        typer.echo(f"nothing to train: {waits}")
    else:
        told = "stored, waiting for a sync window" if result.stored else f"not stored: {result.reason}"
        typer.echo(f"held-out loss {result.loss_before:.4f} -> {result.loss_after:.4f} nats a token in {result.seconds:.0f} s; {told}")
    if verdict is not None:
        typer.echo(f"{'this site answers with it' if verdict.good else 'the release answers without it'}: {verdict.reason}")


def until_told() -> Callable[[], bool]:
    """True after SIGTERM or Ctrl-C: what runs ends at the next good place."""
    told_to_end = False

    def end(*_: Any) -> None:
        nonlocal told_to_end
        told_to_end = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    return lambda: told_to_end


def sync(
    superlink: str | None = typer.Option(None, help="HOST:PORT of the coordinator's SuperLink."),
    superlink_ca_file: Path | None = typer.Option(None, help="Who signs its certificate (PEM); without it no TLS."),
    window: float | None = typer.Option(None, min=1.0, help="Seconds the window stays open; it ends sooner once the adapter has arrived."),
    stay: bool = typer.Option(False, "--stay", help="Keep it open to the end, adapter or not."),
    fleet_token_file: Path | None = typer.Option(None, help="The SuperLink's fleet.token, brought here by hand."),
    config: Path | None = typer.Option(None, help="TOML file; default: MILPA_NODE_CONFIG, else /etc/milpa/node.toml."),
    state_dir: Path | None = typer.Option(None, help="The node's folder, instead of the one in the settings."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object to stdout and nothing else there."),
) -> None:
    """Open a sync window: for a while the coordinator may ask what this node has learned. Ctrl-C and SIGTERM close it.

    What may leave is the trained adapter, its header and a code; no text of any record.

    Examples:

        milpa-node sync --superlink 10.8.0.1:8000 --window 300 --fleet-token-file /etc/milpa/fleet.token

        milpa-node sync --config /etc/milpa/node.toml --json
    """
    from node import settings as node_settings
    from node.client import refuse_root
    from node.learn.sync import sync as open_window

    flags: dict[str, Any] = {
        "node.state_dir": str(state_dir) if state_dir else None, "learn.superlink": superlink, "learn.window_s": window,
        "learn.superlink_ca_file": str(superlink_ca_file) if superlink_ca_file else None,
        "learn.fleet_token_file": str(fleet_token_file) if fleet_token_file else None,
    }  # fmt: skip
    settings, _ = node_settings.read(config, flags=flags)
    refuse_root(settings, instead=AS_THE_SERVICE)
    address = settings.learn.superlink
    if not address:
        raise Unavailable("nobody to sync with: set learn.superlink to HOST:PORT, or give --superlink")
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise BadInput(f"--superlink is {address!r}; write HOST:PORT, such as 10.8.0.1:8000, or set learn.superlink")
    result = open_window(
        settings.state_dir, settings.site, address, window_s=settings.learn.window_s, stay=stay, stop=until_told(),
        fleet_token=node_settings.secret(settings.learn.fleet_token_file, what="learn.fleet_token_file"),
        ca=node_settings.named_file(settings.learn.superlink_ca_file), on_progress=lambda text: stderr.print(text, highlight=False),
    )  # fmt: skip
    if as_json:
        print_json(result)
    else:
        typer.echo("adapter delivered" if result.delivered else f"nothing delivered (answers: {', '.join(result.answered) or 'none'})")
