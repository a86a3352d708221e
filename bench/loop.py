"""The whole loop, once, as a benchmark: `make bench-loop`, or `python -m bench.loop [--seed N]`.

Runs `milpa-fleet demo` in a fresh models folder, so that nothing is taken from an earlier run, and writes bench/results/loop.json.
"""

import argparse
import json
import subprocess
import sys
import tempfile

from bench.result import write

LIMIT_S = 3_600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    seed = parser.parse_args().seed
    with tempfile.TemporaryDirectory(prefix="milpa-bench-") as models:
        command = [sys.executable, "-m", "deploy.cli", "demo", "--seed", str(seed), "--work", models, "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, timeout=LIMIT_S, check=True)
    result = json.loads(done.stdout)
    figures = {
        key: result[key] for key in ("seconds", "releases", "improved", "verdict", "teacher", "student", "baselines", "paired", "sites")
    }
    for site in figures["sites"].values():
        for when in ("before", "after"):
            site[when] = {key: value for key, value in site[when].items() if key not in ("curve", "reliability")}
    figures["stages"] = result["stages"]
    write("loop", figures, command=f"python -m bench.loop --seed {seed}", rows=rows(result))


def rows(result: dict) -> list[tuple[str, ...]]:
    found = [("site", "before", "after", "paired difference, points")]
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
