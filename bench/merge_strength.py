"""How strongly a merge should be applied: what each server scale eta gives the sites and takes from general records.

    python -m bench.merge_strength RUN... [--etas 0.25,0.5,0.75,1,1.5,2] [--general N]

RUN is the folder of a demo that has run (runs/TIME). Its sites' adapters are merged again at every eta and judged on records that chose
and trained nothing: fresh general ones of another seed, and both parts the run held out at each site.
Writes bench/results/merge_strength.json.
"""

import argparse
from pathlib import Path
from typing import Any

import msgspec

from bench.result import write
from coordinator.federation import merge
from coordinator.federation.collect import load
from coordinator.federation.round import GENERAL, compared, pooled
from coordinator.forge.judging.evaluation import Evaluation, evaluate
from coordinator.ranch import generate, site_named
from protocol.models.lora import write_adapter_gguf
from protocol.tasks import RANCH, Record

SEED = 20_000  # of the fresh general records: no run uses it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--etas", default="0.25,0.5,0.75,1,1.5,2")
    parser.add_argument("--general", type=int, default=600, help="fresh general records")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    etas = [float(eta) for eta in options.etas.split(",")]
    general = generate(site_named(GENERAL), seed=SEED, count=options.general, split="test")
    found = {run.name: of_run(run, etas, general, options.threads) for run in options.runs}
    write(
        "merge_strength",
        {"general": options.general, "runs": found},
        command="python -m bench.merge_strength " + " ".join(found),
        rows=rows(found),
    )


def of_run(run: Path, etas: list[float], general: list[Record], threads: int) -> dict[str, Any]:
    """eta -> the comparison with release 1 on general records and on the sites' together."""
    replies = [(reply.header, flat) for reply, flat in load(run / "fleet/store/rounds/1") if reply.header is not None and flat is not None]
    sites = [header.site for header, _ in replies]
    sets = {GENERAL: general} | {site: records_of(run, site) for site in sites}
    before = judge(run, None, sets, threads)
    found: dict[str, Any] = {}
    for eta in etas:
        flat, header = merge.merge([merge.Contribution(one, numbers, merge.weight_of(one, release=1)) for one, numbers in replies], eta=eta)
        path = run / f"merged-again-{eta:g}.gguf"
        write_adapter_gguf(path, flat, header)
        after = judge(run, path, sets, threads)
        path.unlink()
        told = {name: msgspec.to_builtins(compared(name, before[name], after[name], seed=1)) for name in sets}
        found[f"{eta:g}"] = told | {"sites together": msgspec.to_builtins(pooled(before, after, seed=1))}
        print(run.name, eta, {name: round(100 * (one["after"] - one["before"]), 1) for name, one in found[f"{eta:g}"].items()}, flush=True)
    return found


def records_of(run: Path, site: str) -> list[Record]:
    return [
        msgspec.json.decode(line, type=Record)
        for part in ("gate", "season-2")
        for line in (run / "records" / f"{site}-{part}.jsonl").read_bytes().splitlines()
    ]


def judge(run: Path, adapter: Path | None, sets: dict[str, list[Record]], threads: int) -> dict[str, Evaluation]:
    return {name: evaluate(run / "models/student.gguf", records, RANCH, adapter=adapter, threads=threads) for name, records in sets.items()}


def rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    table: list[tuple[str, ...]] = [("run", "eta", "sites together", "general")]
    for run, etas in found.items():
        table += [(run, eta, *(points(told[name]) for name in ("sites together", GENERAL))) for eta, told in etas.items()]
    return table


def points(told: dict[str, Any]) -> str:
    return f"{100 * (told['after'] - told['before']):+.1f} [{100 * told['low']:+.1f}, {100 * told['high']:+.1f}]"


if __name__ == "__main__":
    main()
