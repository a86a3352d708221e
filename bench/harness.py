"""A promise's figures, one command: what `bench.forge` and `bench.node` are, but for their rows.

Every row is measured by bench/TABLE_KEY.py (see `bench.settings`) in a process of its own; a key without that module is skipped.
Rules:
 * A measured key is kept in WORK/KEY.json and taken from there by the next run; `--only KEY` measures again what was finished (its folder
   is put aside as WORK/KEY.before) and goes on with what was not.
 * bench/results/TABLE.json holds one entry a figure, each with the machine, command, commit, day and seconds of its own measurement. Where
   that was gone on with, they are of all its parts (`bench.stamps`): the seconds together, commit and day from the oldest to the newest.
   TABLE.md beside it is the same to read.
 * `interval` is of 95%, unless `interval_of` says what else it is; a figure that is `at_least_so` may be larger.
 * `--quick` runs tiny models in seconds, to see that it runs, and writes nothing to bench/results.
"""

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from bench import stamps
from bench.result import RESULTS, print_table
from bench.settings import LIMIT_S, Settings
from coordinator.forge.judging.evidence import machine
from protocol.blobs import write_atomically
from protocol.errors import BadInput, MilpaError

DEADLINE_S = 24 * 3600  # of one measure


class Row(msgspec.Struct, frozen=True):
    """A row of the table that was promised."""

    what: tuple[str, ...]  # a name for each figure, in order: KEY, KEY_2, ...
    at_least: tuple[float, ...]
    at_most: bool = False  # the smaller the better

    def names(self, key: str) -> list[str]:
        """KEY, KEY_2, ... as far as the row goes."""
        return [key, *(f"{key}_{number}" for number in range(2, len(self.what) + 1))]


class Table(msgspec.Struct, frozen=True):
    """All rows of one promise. `name` is the module's (bench.NAME), the results' and the make target's (bench-NAME)."""

    name: str
    rows: dict[str, Row]

    def main(self, about: str) -> None:
        """Measure what is missing, write the results, print the table; 1 when a measure failed."""
        said = self._said(about)
        work = said.work or Path("var") / self.name
        settings = Settings(said.data, work / "quick" if said.quick else work, said.threads, said.seed, said.quick, said.limit)
        try:
            if said.one:
                self.keep(said.one, settings)
                return
            keys = self.chosen(said.only)
            failed = [key for key in keys if not self.measured(key, settings, again=bool(said.only))]
        except MilpaError as error:
            sys.exit(f"bench.{self.name}: {error}")
        print_table(self.table(self.figures(settings)))
        if failed:
            sys.exit(f"bench.{self.name}: {', '.join(failed)} failed; what was done is kept in {settings.work}, the same command goes on")

    def _said(self, about: str) -> argparse.Namespace:
        parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--data", type=Path, default=Path("var/data"), help="folder with tatoeba-en-es/ and ntrex-en-es/")
        parser.add_argument("--work", type=Path, help=f"kept between runs; by default var/{self.name}")
        parser.add_argument("--threads", type=int, default=1)
        parser.add_argument("--seed", type=int, default=1)
        parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds after which a slow baseline is stopped")
        parser.add_argument("--only", default="", help="one key, or several with commas")
        parser.add_argument("--quick", action="store_true", help="tiny models, seconds; nothing is written to bench/results")
        parser.add_argument("--one", help=argparse.SUPPRESS)  # the process of one measure
        return parser.parse_args()

    def chosen(self, only: str) -> list[str]:
        """The keys to measure.

        Raises:
            BadInput: a key that is not in the table.
        """
        keys = [key for key in only.split(",") if key] or list(self.rows)
        if unknown := [key for key in keys if key not in self.rows]:
            raise BadInput(f"no figure is called {', '.join(unknown)}; there are {', '.join(self.rows)}")
        return keys

    def measured(self, key: str, settings: Settings, *, again: bool) -> bool:
        """Have the key's figures in WORK/KEY.json and, unless quick, in bench/results; False when its measure failed."""
        result = settings.work / f"{key}.json"
        if result.is_file() and not again:
            print(f"{key}: measured before, in {result}; ONLY={key} measures it again", file=sys.stderr)
        elif importlib.util.find_spec(f"bench.{self.name}_{key}") is None:
            print(f"{key}: skipped, there is no bench/{self.name}_{key}.py", file=sys.stderr)
            return True
        else:
            if result.is_file():
                _put_aside(settings.work / key)
                result.unlink()
            options = ["--data", settings.data, "--work", settings.work.parent if settings.quick else settings.work]
            options += ["--threads", settings.threads, "--seed", settings.seed, "--limit", settings.limit_s]
            quick = ["--quick"] if settings.quick else []
            command = [sys.executable, "-m", f"bench.{self.name}", "--one", key, *map(str, options), *quick]
            done = subprocess.run(command, timeout=DEADLINE_S, check=False)
            if done.returncode or not result.is_file():
                return False
        if not settings.quick:
            self.merge(msgspec.json.decode(result.read_bytes()), RESULTS / f"{self.name}.json")
        return True

    def keep(self, key: str, settings: Settings) -> None:
        """Measure one key in this process and leave WORK/KEY.json."""
        import torch

        torch.set_num_threads(settings.threads)
        settings.work.mkdir(parents=True, exist_ok=True)
        began, run = time.monotonic(), stamps.run()
        found = importlib.import_module(f"bench.{self.name}_{key}").measure(settings)
        limit = "" if settings.limit_s == LIMIT_S else f" LIMIT={settings.limit_s:g}"
        about = {
            "threads": settings.threads,
            "seed": settings.seed,
            **stamps.summary(settings.parts, run, seconds=time.monotonic() - began),
            "machine": machine(),
            "command": f"make bench-{self.name} ONLY={key} DATA=FOLDER THREADS={settings.threads} SEED={settings.seed}{limit}",
        }
        entries = {name: entry | about for name, entry in self.judged(key, found).items()}
        write_atomically(settings.work / f"{key}.json", msgspec.json.format(msgspec.json.encode(entries)))

    def judged(self, key: str, found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """A measure's answer as entries KEY, KEY_2, ... with `what`, `at_least` (or `at_most`) and `met`.

        Raises:
            BadInput: more or other figures than the row has.
        """
        row = self.rows[key]
        several: dict[str, Any] = {key: found} if "figure" in found else dict(found)
        names = row.names(key)
        if strange := [name for name in several if name not in names]:
            raise BadInput(f"bench/{self.name}_{key}.py gave {', '.join(strange)}; this row has {', '.join(names)}")
        entries = {}
        for name, what, target in zip(names, row.what, row.at_least, strict=True):
            if name not in several:
                continue
            figure = several[name]["figure"]
            met = figure is not None and (figure <= target if row.at_most else figure >= target)
            bound = {"at_most" if row.at_most else "at_least": target}
            entries[name] = {"what": what, **several[name], **bound, "met": met}
        return entries

    def merge(self, entries: Mapping[str, Any], file: Path) -> None:
        """Put the entries into the results, keep the others, in the order of the table."""
        kept: dict[str, Any] = msgspec.json.decode(file.read_bytes())["figures"] if file.is_file() else {}
        kept.update(entries)
        order = [name for key, row in self.rows.items() for name in row.names(key)]
        file.parent.mkdir(parents=True, exist_ok=True)
        figures = {name: kept[name] for name in order if name in kept}
        found = {"figures": figures, "command": f"make bench-{self.name} DATA=FOLDER"}
        write_atomically(file, msgspec.json.format(msgspec.json.encode(found)) + b"\n")
        write_atomically(file.with_suffix(".md"), self.page(figures).encode())

    def figures(self, settings: Settings) -> dict[str, Any]:
        """What is measured: the results that are kept in the tree, or those of a quick run."""
        if not settings.quick:
            file = RESULTS / f"{self.name}.json"
            return dict(msgspec.json.decode(file.read_bytes())["figures"]) if file.is_file() else {}
        files = [settings.work / f"{key}.json" for key in self.rows]
        return {name: entry for file in files if file.is_file() for name, entry in msgspec.json.decode(file.read_bytes()).items()}

    def table(self, figures: Mapping[str, Any]) -> list[Sequence[str]]:
        """Every row of the promise, measured or not."""
        rows: list[Sequence[str]] = [("key", "figure", "goal", "met", "what")]
        for key, row in self.rows.items():
            for name, what, target in zip(row.names(key), row.what, row.at_least, strict=True):
                entry = figures.get(name)
                figure = "" if entry is None else _shown(entry)
                met = "-" if entry is None else "yes" if entry.get("met") else "no"
                rows.append((name, figure, f"{'<=' if row.at_most else '>='} {target:g}", met, what))
        return rows

    def page(self, figures: Mapping[str, Any]) -> str:
        """The table as Markdown, each figure with its interval, n, and the day and commit of its measurement."""
        lines = [f"# What was promised and what was measured: `make bench-{self.name}`", ""]
        lines += ["| key | what | figure | goal | met | interval | n | measured |", "|---|---|--:|--:|---|---|--:|---|"]
        for name, figure, goal, met, what in self.table(figures)[1:]:
            entry = figures.get(name, {})
            interval = " to ".join(f"{edge:.4g}" for edge in entry.get("interval") or ())
            if "interval_of" in entry:
                interval += f", {entry['interval_of']}"
            when = f"{entry['day']}, {_brief(entry['commit'])}, {entry['threads']} thread(s)" if "commit" in entry else ""
            lines.append(f"| `{name}` | {what} | {figure} | {goal} | {met} | {interval} | {entry.get('n', '')} | {when} |")
        lines += ["", "An interval is of 95%, unless it says what else it is."]
        return "\n".join(lines) + f" More of each, and what stood beside it: `{self.name}.json`. How it came about: `docs/log.md`.\n"


def _shown(entry: Mapping[str, Any]) -> str:
    if entry["figure"] is None:
        return "none"
    return f"{'at least ' if entry.get('at_least_so') else ''}{entry['figure']:.4g}"


def _brief(commits: str) -> str:
    """Seven digits of each; "+changes" stays."""
    return re.sub(r"\b([0-9a-f]{7})[0-9a-f]{33}\b", r"\1", commits)


def _put_aside(folder: Path) -> None:
    if folder.is_dir():
        before = folder.with_name(folder.name + ".before")
        shutil.rmtree(before, ignore_errors=True)
        folder.replace(before)
