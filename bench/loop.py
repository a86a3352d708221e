"""The whole loop, once, as a benchmark: `make bench-loop`, or `python -m bench.loop [--seed N] [--finished RESULT.json]`.

Runs `milpa-fleet demo` in a fresh models folder, so that nothing is taken from an earlier run, and writes bench/results/loop.json.
With --finished it takes the figures of a demo that has run (runs/TIME/result.json); what that one found in its models folder shows in
`stages`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.result import write

LIMIT_S = 3_600
KEYS = ("seconds", "releases", "improved", "verdict", "teacher", "student", "baselines", "paired", "sites", "stages", "machine", "commit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--finished", type=Path, help="result.json of a demo that has run")
    options = parser.parse_args()
    if options.finished:
        result, command = json.loads(options.finished.read_text(encoding="utf-8")), "make demo"
    else:
        result, command = ran(options.seed), f"python -m bench.loop --seed {options.seed}"
    figures = {key: result[key] for key in KEYS}
    for site in figures["sites"].values():
        for when in ("before", "after"):
            site[when] = {key: value for key, value in site[when].items() if key not in ("curve", "reliability")}
    write("loop", figures, command=command, rows=rows(result))


def ran(seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="milpa-bench-") as models:
        command = [sys.executable, "-m", "deploy.cli", "demo", "--seed", str(seed), "--work", models, "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, timeout=LIMIT_S, check=True)
    return json.loads(done.stdout)


def rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = [("site", "before", "after", "paired difference, points")]
    for name, site in result["sites"].items():
        pair = site["paired"]
        found.append(
            (
                name,
                *(f"{100 * site[when]['accuracy']:.1f}%" for when in ("before", "after")),
                f"{100 * pair['diff']:+.1f} ({100 * pair['low']:+.1f} to {100 * pair['high']:+.1f})",
            )
        )
    found.append(("whole loop", "", f"{result['seconds']:.0f} s", ""))
    return found


if __name__ == "__main__":
    main()
