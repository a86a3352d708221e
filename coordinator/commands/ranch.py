"""`milpa-coordinator ranch`: records of the ranch task, from a site's simulator to a file."""

import sys
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer


def ranch(
    site: Annotated[str, typer.Option(help="A site that ships; --list-sites shows them.")] = "general",
    site_file: Annotated[Path | None, typer.Option(help="A TOML file that describes a site of yours (docs/ranch.md).")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same records.", min=0)] = 0,
    count: Annotated[int, typer.Option(help="How many records.", min=1)] = 1000,
    split: Annotated[str, typer.Option(help="train, dev or test: no window is in two of them.")] = "train",
    out: Annotated[Path | None, typer.Option(help="JSON Lines file to write; replaced only when all is done.")] = None,
    show: Annotated[int, typer.Option(help="Print this many records for reading.", min=0)] = 0,
    list_sites: Annotated[bool, typer.Option("--list-sites", help="Name the sites that ship, and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object: what was written and how it is made up.")] = False,
) -> None:
    """Simulate a ranch and write what its sensor nodes saw, with the true cause of each window.

    Examples:

        milpa-coordinator ranch --site general --seed 1 --count 1500 --out train.jsonl

        milpa-coordinator ranch --site esteli --split test --seed 1 --count 400 --out esteli.jsonl --json

        milpa-coordinator ranch --site-file mine.toml --show 5 --count 5
    """
    from coordinator.ranch import SITES, generate, read_site, site_named
    from protocol.blobs import write_atomically
    from protocol.codec import encode
    from protocol.console import print_json, progress_bar
    from protocol.digests import digest_bytes
    from protocol.errors import BadInput

    if list_sites:
        found = {name: site_named(name).about for name in SITES}
        if as_json:
            print_json({"sites": found})
        else:
            sys.stdout.write("".join(f"{name:<12} {about}\n" for name, about in found.items()))
        return
    if out is None and not show:
        raise BadInput("nothing to do: give --out FILE.jsonl, or --show N to read some records")
    if out is not None and not out.parent.is_dir():
        raise BadInput(f"the folder {out.parent} does not exist: create it first")
    place = read_site(site_file) if site_file else site_named(site)
    with progress_bar() as bar:
        job = bar.add_task(f"{place.name}, {split}", total=count)
        records = generate(place, seed=seed, count=count, split=split, progress=lambda done: bar.update(job, completed=done))
    data = b"".join(encode(record) + b"\n" for record in records)
    if out is not None:
        write_atomically(out, data)
    shown = records[:show]
    if as_json:
        made = {"site": place.name, "split": split, "seed": seed, "count": len(records), "out": str(out) if out else None}
        print_json({**made, "sha256": digest_bytes(data), "verdicts": Counter(record.verdict for record in records), "shown": shown})
        return
    sys.stdout.write("".join(f"{record.source}\n{record.lang}: {record.target}\n\n" for record in shown))
    if out is not None:
        sys.stdout.write(f"{len(records)} records of {place.name} ({split}) in {out}\n")
