"""The whole loop once: distil, prove, release, answer, escalate, learn, merge, release again. `milpa-fleet demo` is this file.

Seasons and records (all from the simulator, no window twice):
    train of "general"       the distillation corpus          dev of "general"   calibration
    test of "general"        evidence                          train of a site    season 1: answered, partly corrected, learned from
    dev of a site            first part: scale of the merge; second part: the gate of the round
    test of a site           season 2: asked under release 1 after learning ended, and again under the next release, on the same records
Season 2 is asked only after the site has trained, so nothing asked in it can have been learned from.

The distilled models are kept in `work` by the digest of what made them: a second run skips what is already true. A run's own
folder has its fleet, its report and result.json.
"""

import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from deploy import loop
from deploy.fleet import PEER, SITES, LocalFleet
from deploy.processes import Processes
from deploy.season import EQUAL_BUDGET, Asked, Site, figures
from protocol.blobs import write_atomically
from protocol.console import progress_bar, stderr
from protocol.errors import BadInput, NotEnough
from protocol.tasks import RANCH, Record

NEED_FREE_MB = 4_096  # of disk: models, checkpoints and a fleet take about 2.5 GB
DISTIL_DEADLINE_S = 3_600.0
RELEASE_DEADLINE_S = 120.0


class Size(msgspec.Struct, frozen=True):
    """How much of everything: the default fits 15 minutes on two cores."""

    train: int = 4_000  # general records offered to the distillation; its budget of seconds decides how many are seen
    dev: int = 200  # for calibration
    test: int = 200  # for evidence
    general: int = 400  # of test, to see that a merge loses nothing general: 200 refuse one good merge in ten (docs/log.md)
    general_scale: int = 75  # of dev, to choose the merge's scale
    season: int = 200  # records a site, in each season
    scale: int = 48  # a site, to choose the merge's scale
    gate: int = 120  # a site, to judge the merge
    corrected: float = 0.5  # share of season 1 that an operator looks at
    budget: str = "demo"  # of the distillation


SIZES = {
    "default": Size(),
    "tiny": Size(
        train=200, dev=40, test=40, general=40, general_scale=10, season=40, scale=20, gate=20, budget="60"
    ),  # the same path in a few minutes: shows nothing
}


class Stage(msgspec.Struct):
    """One line of the timeline."""

    name: str
    seconds: float = 0.0
    cached: bool = False


class Demo:
    """One run in `run`, with models cached in `work`."""

    def __init__(
        self, run: Path, *, work: Path, seed: int, size: Size, keep: bool, web_port: int = 0, sites: Sequence[str] = SITES
    ) -> None:
        self.run_dir, self.work, self.seed, self.size, self.sites = run.resolve(), work.resolve(), seed, size, tuple(sites)
        self.web_port, self.keep = web_port, keep
        self.processes = Processes(self.run_dir / "fleet", outlive=keep)
        self.fleet = LocalFleet(self.run_dir / "fleet", self.processes)
        self.stages: list[Stage] = []
        self.begun = time.monotonic()

    def run(self) -> dict[str, Any]:
        """Run the loop; the result of `milpa-fleet demo --json`, also in result.json and report.html.

        Raises:
            MilpaError: a part failed; every process this run started has been stopped.
        """
        self._need_space()
        try:
            result = self._loop()
        except BaseException:
            self.fleet.stop()
            raise
        if not self.keep:
            self.fleet.stop()
        return result

    def _loop(self) -> dict[str, Any]:
        records = self._records()
        made = self._distil(records)
        proof = self._prove(records, made)
        self._release(records, made, proof)
        self._bring_up()
        nodes = {name: Site(name, self.fleet.node_url(name)) for name in self.sites}
        self._first_season(nodes, records)
        learned = self._learn()
        before = self._second_season(nodes, records, "season 2, release 1")
        merged = self._round()
        after = before
        if merged["release"]:
            with self._stage("activate the next release"):
                self.fleet.wait_for_release(int(merged["release"]), deadline_s=RELEASE_DEADLINE_S)
            after = self._second_season(nodes, records, f"season 2, release {merged['release']}")
        return self._report(records, made, proof, learned, before, after, merged)

    # --- the stages ---------------------------------------------------------------------------------------------------

    def _records(self) -> dict[str, list[Record]]:
        from coordinator.ranch import generate, site_named

        with self._stage("simulate the sites"):
            general, found = site_named("general"), {}
            for split, count in (("train", self.size.train), ("dev", self.size.dev), ("test", max(self.size.test, self.size.general))):
                found[split] = generate(general, seed=self.seed, count=count, split=split)
            for name in self.sites:
                site = site_named(name)
                found[f"{name} season 1"] = generate(site, seed=self.seed, count=self.size.season, split="train")
                held = generate(site, seed=self.seed, count=self.size.scale + self.size.gate, split="dev")
                found[f"{name} scale"], found[f"{name} gate"] = held[: self.size.scale], held[self.size.scale :]
                found[f"{name} season 2"] = generate(site, seed=self.seed, count=self.size.season, split="test")
            found["general gate"], found["general scale"] = found["test"][: self.size.general], found["dev"][: self.size.general_scale]
            found["test"] = found["test"][: self.size.test]
            for name, rows in found.items():
                loop.write_records(self._record_file(name), rows)
        return found

    def _distil(self, records: Mapping[str, list[Record]]) -> dict[str, Any]:
        with self._stage("distil: teacher, student, GGUF") as stage:
            command = [
                sys.executable, "-m", "coordinator.cli", "distill", "--task", "ranch", "--records", str(self._record_file("train")),
                "--work", str(self.work), "--out", str(self.run_dir / "models"), "--budget", self.size.budget, "--seed", str(self.seed),
                "--json",
            ]  # fmt: skip
            begun = time.monotonic()
            made = loop.json_of(command, deadline_s=DISTIL_DEADLINE_S)
            stage.cached = stage_is_old(made["lineage"], time.monotonic() - begun)
        return made

    def _prove(self, records: Mapping[str, list[Record]], made: Mapping[str, Any]) -> dict[str, Any]:
        from coordinator.forge.judging import calibrate, evidence
        from coordinator.forge.judging.evaluation import evaluate
        from coordinator.ranch import baselines

        teacher, student = Path(made["teacher"]), Path(made["student"])
        with self._stage("evidence"), progress_bar() as bar:

            def judged(name: str, model: Path, rows: Sequence[Record]) -> Any:
                line = bar.add_task(f"  {name}", total=len(rows))
                return evaluate(model, rows, RANCH, name=name, seed=self.seed, progress=lambda done, _: bar.update(line, completed=done))

            models = {
                "teacher": judged("teacher (GGUF)", teacher, records["test"]),
                "student": judged("student (GGUF)", student, records["test"]),
                "student_float": judged("student (float)", Path(made["student_float"]), records["test"]),
            }
            dev = judged("calibration", student, records["dev"])
            calibration = calibrate.fit(dev, seed=self.seed)
            line = bar.add_task("  baselines", total=None)
            simple = baselines(records["train"], records["test"])
            bar.update(line, total=1, completed=1)
        bundle = evidence.bundle(
            release=1, task="ranch", sets={"general": models}, records={"general": records["test"]}, baselines={"general": simple},
            calibration=calibration, seed=self.seed,
            command=f"milpa-fleet demo --seed {self.seed}", lineage=made["lineage"], machine=evidence.machine(),
            commit=evidence.commit(), code=evidence.code(),
            not_tested=NOT_TESTED, created=int(time.time()),
        )  # fmt: skip
        return {"bundle": bundle, "models": models, "calibration": calibration, "baselines": simple, "dev": dev}

    def _release(self, records: Mapping[str, list[Record]], made: Mapping[str, Any], proof: Mapping[str, Any]) -> None:
        with self._stage("sign and publish release 1"):
            self.fleet.prepare(sites=self.sites, peer=PEER, web_port=self.web_port)
            loop.publish_student(
                self.fleet, RANCH, made, self.run_dir / "models", judged=proof["models"]["student"], dev=proof["dev"],
                dev_records=records["dev"], calibration=proof["calibration"], evidence=proof["bundle"], general=records["train"],
            )  # fmt: skip

    def _bring_up(self) -> None:
        with self._stage("bring up the fleet"):
            self.fleet.start()
            stderr.print(f"  dashboard: {self.fleet.dashboard} (set-up token in {self.fleet.store}/setup-token)", highlight=False)
            self.fleet.wait_for_release(1, deadline_s=RELEASE_DEADLINE_S)

    def _first_season(self, nodes: Mapping[str, Site], records: Mapping[str, list[Record]]) -> None:
        with self._stage("season 1: answer, escalate, correct"):
            asked = loop.answer(nodes, {name: records[f"{name} season 1"] for name in self.sites})
            for name, node in nodes.items():
                node.correct(asked[name], share=self.size.corrected, seed=self.seed)

    def _second_season(self, nodes: Mapping[str, Site], records: Mapping[str, list[Record]], title: str) -> dict[str, list[Asked]]:
        with self._stage(title):
            return loop.answer(nodes, {name: records[f"{name} season 2"] for name in self.sites})

    def _learn(self) -> dict[str, Any]:
        with self._stage("learn on site (LoRA)"):
            return loop.learn(self.fleet)

    def _round(self) -> dict[str, Any]:
        with self._stage("round: collect, admit, merge, judge"):
            return loop.run_round(
                self.fleet, seed=self.seed,
                heldout={"general": self._record_file("general gate")} | {name: self._record_file(f"{name} gate") for name in self.sites},
                dev={"general": self._record_file("general scale")} | {name: self._record_file(f"{name} scale") for name in self.sites},
            )  # fmt: skip

    def _report(
        self, records: Mapping[str, list[Record]], made: Mapping[str, Any], proof: Mapping[str, Any], learned: Mapping[str, Any],
        before: Mapping[str, list[Asked]], after: Mapping[str, list[Asked]], merged: Mapping[str, Any],
    ) -> dict[str, Any]:  # fmt: skip
        from coordinator.forge.judging.metrics import paired_difference
        from coordinator.forge.judging.report import run_page

        sites = {}
        for name in self.sites:
            first, second = ([float(item.verdict == item.record.verdict) for item in rows[name]] for rows in (before, after))
            sites[name] = {
                "before": figures(before[name]),
                "after": figures(after[name]),
                "paired": paired_difference(first, second, seed=self.seed),
                "learned": learned.get(name, {}),
            }
        joined = [[float(item.verdict == item.record.verdict) for name in self.sites for item in rows[name]] for rows in (before, after)]
        paired = paired_difference(joined[0], joined[1], seed=self.seed)
        improved = bool(merged["release"]) and paired["low"] > 0
        result: dict[str, Any] = {
            "seconds": round(time.monotonic() - self.begun, 1),
            "seed": self.seed,
            "releases": [1, int(merged["release"])] if merged["release"] else [1],
            "improved": improved,
            "verdict": verdict_in_words(merged, paired),
            "teacher": proof["models"]["teacher"].figures(),
            "student": proof["models"]["student"].figures(),
            "student_float": proof["models"]["student_float"].figures() if "student_float" in proof["models"] else None,
            "baselines": proof["baselines"],
            "sites": sites,
            "paired": paired,
            "round": merged,
            "stages": [msgspec.to_builtins(stage) for stage in self.stages],
            "evidence": proof["bundle"],
            "lineage": made["lineage"],
            "machine": proof["bundle"]["machine"],
            "commit": proof["bundle"]["commit"],
            "dashboard_url": self.fleet.dashboard if self.keep else "",
            "gate": {"release": bool(merged["release"]), "reasons": list(merged["reasons"])},
            "budget": EQUAL_BUDGET,
            "created": int(time.time()),
            "command": f"milpa-fleet demo --seed {self.seed}",
            "not_tested": list(NOT_TESTED),
        }
        write_atomically(self.run_dir / "report.html", run_page(result).encode())
        result["report"] = str(self.run_dir / "report.html")
        write_atomically(self.run_dir / "result.json", msgspec.json.format(msgspec.json.encode(result)))
        return result

    # --- helpers ------------------------------------------------------------------------------------------------------

    def _record_file(self, name: str) -> Path:
        return self.run_dir / "records" / f"{name.replace(' ', '-')}.jsonl"

    def _need_space(self) -> None:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.run_dir).free >> 20
        if free < NEED_FREE_MB:
            raise NotEnough(
                f"{self.run_dir} has {free} MiB free, the demo needs {NEED_FREE_MB}; free some space or give another folder with --run"
            )

    @contextmanager
    def _stage(self, name: str) -> Iterator[Stage]:
        stage, begun = Stage(name), time.monotonic()
        stderr.print(f"[bold]{len(self.stages) + 1}. {name}[/bold]", highlight=False)
        self.stages.append(stage)
        yield stage
        stage.seconds = round(time.monotonic() - begun, 1)
        stderr.print(f"  {stage.seconds:.0f} s{' (taken from an earlier run)' if stage.cached else ''}", style="dim", highlight=False)


NOT_TESTED = (
    "Real sites: records come from a simulator with real weather series, and the operator who corrects is simulated too.",
    "Real distance: all processes ran on one machine, over the loopback interface.",
    "Time: the loop was run once; seasons follow each other within minutes.",
)


def stage_is_old(lineage: Mapping[str, Any], seconds: float) -> bool:
    """Whether training was taken from an earlier run: its stages tell of more seconds than this run took."""
    return sum(float(lineage.get(stage, {}).get("seconds", 0.0)) for stage in ("correct", "capture", "distil")) > seconds


def verdict_in_words(merged: Mapping[str, Any], paired: Mapping[str, float]) -> str:
    """What the run showed, in one sentence that claims no more than the interval."""
    low, high = 100 * paired["low"], 100 * paired["high"]
    span = f"{100 * paired['diff']:+.1f} points (95% interval {low:+.1f} to {high:+.1f}, {paired['n']:.0f} records)"
    if not merged.get("release"):
        return "Nothing got better: the round's gate refused the merge, and release 1 stays."
    if paired["low"] > 0:
        return f"Release {merged['release']} is better at the sites: {span}."
    return f"Release {merged['release']} passed the gate, but season 2 does not show that it is better: {span}."


def table(result: Mapping[str, Any]) -> Table:
    """The table a person sees at the end."""
    found = Table(title=str(result["verdict"]), title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in ("site", "release", "accuracy (95%)", "escalated", "with escalation", f"at {EQUAL_BUDGET:.0%} budget", "p50 ms"):
        found.add_column(column, justify="left" if column in ("site", "release") else "right")
    for name, site in result["sites"].items():
        for when, release in (("before", result["releases"][0]), ("after", result["releases"][-1])):
            row = site[when]
            low, high = row["accuracy_ci"]
            found.add_row(
                name if when == "before" else "", str(release), f"{100 * row['accuracy']:.1f}% ({100 * low:.0f}-{100 * high:.0f})",
                f"{100 * row['escalated']:.0f}%", f"{100 * row['accuracy_with_escalation']:.1f}%",
                f"{100 * row['accuracy_at_budget']:.1f}%", f"{row['latency_p50_ms']:.0f}",
            )  # fmt: skip
    return found


def new_run_dir(root: Path) -> Path:
    """`runs/<time>`, a folder that does not exist yet."""
    path = root / datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    if path.exists():
        raise BadInput(f"{path} exists already; wait a second and run again")
    return path


def show(result: Mapping[str, Any], *, keep: bool) -> None:
    """Print the result for a person."""
    out = Console()
    out.print(table(result))
    for name in ("teacher", "student"):
        row = result[name]
        low, high = row["accuracy_ci"]
        out.print(
            f"{name}: {100 * row['accuracy']:.1f}% ({100 * low:.0f}-{100 * high:.0f}) on {row['n']} general records,"
            f" {row['file_mb']:.0f} MiB,"
            f" {row['tokens_per_second']:.0f} tokens/s a thread, {row['latency_p50_ms']:.0f} ms",
            highlight=False,
        )  # fmt: skip
    out.print(f"whole loop: {result['seconds'] / 60:.1f} minutes; report: {result['report']}", highlight=False)
    if keep:
        out.print(f"the fleet is up: {result['dashboard_url']}  (end it with: milpa-fleet down)", highlight=False)
