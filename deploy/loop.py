"""The fleet's part of the loop, the same for every task: release a student, let sites answer and learn, run a round.

`deploy/demo.py` walks it for the ranch, `bench/tatoeba.py` for a translation split into sites by topic.
"""

import json
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import Progress, TaskID

from coordinator.federation.round import known_answers
from coordinator.fleet.publishing import build_release
from coordinator.forge.judging.evaluation import Evaluation
from deploy.fleet import LocalFleet
from deploy.season import Asked, Site
from protocol import codec
from protocol.blobs import write_atomically
from protocol.confidence import Calibration
from protocol.console import progress_bar, stderr
from protocol.errors import MilpaError, Unavailable
from protocol.releases import Kind, Role
from protocol.tasks import Record, Task

LEARN_DEADLINE_S = 900.0
ROUND_DEADLINE_S = 900.0
COLLECT_DEADLINE_S = 120.0
SETTLE_DEADLINE_S = 300.0
REHEARSAL = 100  # records, 30 kB: enough for 233 examples of a site's own at its share


def publish_student(
    fleet: LocalFleet,
    task: Task,
    made: Mapping[str, Any],
    folder: Path,
    *,
    judged: Evaluation,
    dev: Evaluation,
    dev_records: Sequence[Record],
    calibration: Calibration,
    evidence: Mapping[str, Any],
    general: Sequence[Record],
) -> None:
    """Sign and publish release 1: the student for the sites, the teacher for the base station.

    Args:
        made: what `milpa-coordinator distill --json` printed.
        folder: gets calibration and evidence.
        general: training records that sites learn among their own, the first REHEARSAL of them.
        judged: the student's evaluation on held-out records; `dev`: on `dev_records`, from which known answers are taken.
    """
    write_atomically(folder / "calibration.json", codec.encode(calibration))
    write_atomically(folder / "evidence.json", codec.encode(evidence))
    files: list[tuple[Role, Kind, Path, str]] = [
        ("student", "model", Path(made["student"]), ""),
        ("student", "initial-adapter", Path(made["initial_adapter"]), judged.model_digest),
        ("student", "calibration", folder / "calibration.json", judged.model_digest),
        ("student", "rehearsal", write_records(folder / "rehearsal.jsonl", general[:REHEARSAL]), ""),
        ("student", "evidence", folder / "evidence.json", ""),
        ("teacher", "model", Path(made["teacher"]), ""),
    ]
    release, paths = build_release(
        1, task.name, files, note="distilled on the general corpus", min_memory_mb=int(judged.peak_rss_mb) + 1,
        known_answers=known_answers(task, dev_records, dev),
    )  # fmt: skip
    fleet.publisher().publish(release, paths)


def answer(nodes: Mapping[str, Site], rows: Mapping[str, Sequence[Record]]) -> dict[str, list[Asked]]:
    """Ask every site its records, all sites at once, and wait for the peers' replies."""
    with progress_bar() as bar, ThreadPoolExecutor(len(nodes)) as pool:
        lines = {name: bar.add_task(f"  {name}", total=len(rows[name])) for name in nodes}
        jobs = {name: pool.submit(node.ask, rows[name], progress=partial(_advance, bar, lines[name])) for name, node in nodes.items()}
        asked = {name: job.result() for name, job in jobs.items()}
        for name, node in nodes.items():
            node.settle(asked[name], deadline_s=SETTLE_DEADLINE_S)
    return asked


def learn(fleet: LocalFleet) -> dict[str, Any]:
    """Let every site train on what was confirmed; what each said of it, by site."""
    return on_every_site(fleet, ["learn", "--json"], deadline_s=LEARN_DEADLINE_S)


def run_round(fleet: LocalFleet, *, heldout: Mapping[str, Path], dev: Mapping[str, Path], seed: int) -> dict[str, Any]:
    """Open every site's sync window and run one round; the round's result as `milpa-coordinator round --json` prints it.

    Args:
        heldout, dev: "general" and sites -> files of records.
    """
    window = threading.Thread(target=_sync_windows, args=(fleet,), name="sync windows")
    window.start()
    command = [
        sys.executable, "-m", "coordinator.cli", "round", "--store", str(fleet.store),
        "--superlink", f"127.0.0.1:{fleet.plan.superlink_port}", "--superlink-keys", str(fleet.folder / "superlink"),
        "--deadline", str(COLLECT_DEADLINE_S), "--eta", f"1,{len(fleet.plan.sites)}", "--seed", str(seed), "--json",
    ]  # fmt: skip
    for option, sets in (("--heldout", heldout), ("--dev", dev)):
        command += [part for name, path in sets.items() for part in (option, f"{name}={path}")]
    try:
        return json_of(command, deadline_s=ROUND_DEADLINE_S)
    finally:
        window.join(timeout=60.0)


def on_every_site(fleet: LocalFleet, arguments: Sequence[str], *, deadline_s: float) -> dict[str, Any]:
    """Run a `milpa-node` command at every site at once; what each printed, by site."""
    with ThreadPoolExecutor(len(fleet.plan.sites)) as pool:
        jobs = {
            name: pool.submit(
                json_of, [sys.executable, "-m", "node.cli", *arguments, "--config", str(fleet.node_config(name))], deadline_s=deadline_s
            )
            for name in fleet.plan.sites
        }
        return {name: job.result() for name, job in jobs.items()}


def json_of(command: Sequence[str], *, deadline_s: float) -> dict[str, Any]:
    """Run one of our commands, its progress on our stderr, and read the JSON object it prints.

    Raises:
        Unavailable: it failed or did not end in time; it does not run any more.
    """
    process = subprocess.Popen(list(command), stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    try:
        output, _ = process.communicate(timeout=deadline_s)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{' '.join(command[2:4])} did not end within {deadline_s:.0f} s") from error
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(20)
    if process.returncode:
        raise Unavailable(f"`{command[2]} {command[3]}` failed with exit code {process.returncode}; its error is above")
    return dict(json.loads(output))


def write_records(path: Path, records: Sequence[Record]) -> Path:
    """Write records as JSON lines, whole or not at all; returns the path."""
    write_atomically(path, b"".join(codec.encode(record) + b"\n" for record in records))
    return path


def _sync_windows(fleet: LocalFleet) -> None:
    try:
        on_every_site(fleet, ["sync", "--window", "200", "--json"], deadline_s=260.0)
    except MilpaError as error:
        stderr.print(f"  sync: {error}", style="yellow", markup=False)


def _advance(bar: Progress, line: TaskID, done: int) -> None:
    bar.update(line, completed=done)
