"""Translation on real data: `python -m bench.tatoeba --data FOLDER [--budget 1800] [--only table|sites]`.

FOLDER has train.tsv, dev.tsv and test.tsv, English<TAB>Spanish a line (Tatoeba, CC BY 2.0 FR); nothing of it is kept in the project.

table    teacher few-shot, teacher corrected, student float, student GGUF, and Apertium, each on every line of test.tsv
sites    the training data split into two sites by topic, which the distillation never saw; a fleet of real processes answers, is corrected,
         learns and runs one round: the base student against the merged one, on each topic's held-out sentences and on general ones

Each part is kept in --work and not computed again; a killed run goes on where it was. Writes bench/results/tatoeba.json.
"""

import argparse
import json
import random
import re
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

from bench.kept import shown
from bench.result import write
from coordinator.forge.judging import calibrate, evidence, peers
from coordinator.forge.judging.evaluation import Evaluation, evaluate, evaluate_texts, few_shot, paired_bootstrap
from coordinator.forge.judging.metrics import paired_difference, sentence_chrf
from coordinator.forge.pairs import read_pairs
from deploy import loop
from deploy.fleet import LocalFleet
from deploy.processes import Processes
from deploy.season import Site
from protocol.blobs import write_atomically
from protocol.tasks import Record, Task, translation

TASK = translation("English", "Spanish")
SHOTS = 5
SHORTEST = 3  # words of an English side
TOPICS = {
    "kitchen": "eat|ate|eating|food|cook|cooks|cooked|cooking|dinner|lunch|breakfast|bread|meat|cake|coffee|tea|milk|soup|rice|fruit"
    "|apple|apples|egg|eggs|cheese|fish|hungry|delicious",
    "station": "train|trains|bus|buses|station|ticket|tickets|airport|plane|flight|hotel|taxi|car|cars|drive|drove|driving|travel|traveled"
    "|trip|passport|luggage|bicycle",
}
SEASON, SCALE, GATE = 240, 60, 160  # sentences of a site: to learn from, to choose the scale, to judge
GENERAL = 160


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--budget", default="1800", help="wall-clock seconds of training")
    parser.add_argument("--train", type=int, default=40_000, help="pairs offered to the training")
    parser.add_argument("--work", type=Path, default=Path("var/tatoeba"))
    parser.add_argument("--threads", type=int, default=2, help="of the training; 1 on a machine that is not yours alone")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=("table", "sites"))
    run = Run(**vars(parser.parse_args()))
    figures: dict[str, Any] = {
        "budget_s": run.budget,
        "seed": run.seed,
        "training": run.made["lineage"] | {"licence": run.made["lineage"]["licence"]["name"]},
    }
    if run.only != "sites":
        figures["table"] = run.table()
    if run.only != "table":
        figures["sites"] = run.sites()
    write(
        "tatoeba",
        figures,
        command=f"python -m bench.tatoeba --data FOLDER --budget {run.budget} --threads {run.threads} --seed {run.seed}",
        rows=rows(figures),
    )


class Run:
    """One run; `keep` remembers each part's result in the work folder."""

    def __init__(self, *, data: Path, budget: str, train: int, threads: int, work: Path, seed: int, only: str | None) -> None:
        self.data, self.budget, self.threads, self.seed, self.only = data, budget, threads, seed, only
        self.work = work / f"budget-{budget}-seed-{seed}"
        self.work.mkdir(parents=True, exist_ok=True)
        self.general, self.topics = split(data / "train.tsv", count=train, seed=seed)
        self.dev = read_pairs(data / "dev.tsv", TASK)
        self.made = self.distil()

    def distil(self) -> dict[str, Any]:
        file = self.work / "train.tsv"
        if not file.exists():
            write_atomically(file, "".join(f"{record.source}\t{record.target}\n" for record in self.general).encode())
        command = [
            sys.executable, "-m", "coordinator.cli", "distill", "--pairs", str(file), "--source", "English", "--target", "Spanish",
            "--budget", self.budget, "--work", str(self.work / "stages"), "--out", str(self.work / "model"), "--seed", str(self.seed),
            "--threads", str(self.threads), "--json",
        ]  # fmt: skip
        return self.keep("distil", lambda: loop.json_of(command, deadline_s=4 * 3600.0))

    def table(self) -> dict[str, Any]:
        test = read_pairs(self.data / "test.tsv", TASK)
        base = next(iter((self.work / "stages").glob("trim-*/trimmed.gguf")))
        shots = few_shot(TASK, self.dev[:SHOTS])
        found = {
            "apertium": self.scored("apertium", lambda: self.apertium(test)),
            "teacher few-shot": self.scored("teacher few-shot", lambda: self.few_shot(base, test, shots)),
            "teacher corrected": self.scored("teacher corrected", lambda: evaluate(Path(self.made["teacher"]), test, TASK, progress=tell)),
            "student float": self.scored("student float", lambda: evaluate(Path(self.made["student_float"]), test, TASK, progress=tell)),
            "student GGUF": self.scored("student GGUF", lambda: evaluate(Path(self.made["student"]), test, TASK, progress=tell)),
        }
        student = found["student GGUF"]
        return {name: one.figures() | {"student_minus_this": paired_bootstrap(one, student, seed=self.seed)} for name, one in found.items()}

    def apertium(self, records: Sequence[Record]) -> Evaluation:
        answers = peers.apertium(records, TASK)
        return evaluate_texts(answers.texts, records, TASK, name=f"{answers.name} {answers.version}")

    def few_shot(self, model: Path, test: Sequence[Record], shots: Task) -> Evaluation:
        texts = shown(model, shots, test, seed=self.seed, told=tell)
        return evaluate_texts(texts, test, TASK, name=f"{model.name}, {SHOTS} examples shown")

    def sites(self) -> dict[str, Any]:
        return self.keep("sites", self._sites)

    def _sites(self) -> dict[str, Any]:
        student, teacher = Path(self.made["student"]), Path(self.made["teacher"])
        files = {
            f"{name} {part}": loop.write_records(self.work / "records" / f"{name}-{part}.jsonl", rows)
            for name, parts in self.topics.items() for part, rows in parts.items()
        }  # fmt: skip
        dev, judged_on = self.dev[:GENERAL], self.dev[GENERAL : 2 * GENERAL]
        general = {
            part: loop.write_records(self.work / "records" / f"general-{part}.jsonl", rows)
            for part, rows in (("dev", dev), ("gate", judged_on))
        }
        on_dev, of_teacher = evaluate(student, dev, TASK), evaluate(teacher, dev, TASK)
        judged = evaluate(student, judged_on, TASK)
        calibration = calibrate.fit(on_dev, teacher=of_teacher, seed=self.seed)
        bundle = evidence.bundle(release=1, task=TASK.name, sets={"general": {"student": judged}}, seed=self.seed, command="bench.tatoeba")
        fleet = LocalFleet(self.work / "fleet", Processes(self.work / "fleet"))
        try:
            fleet.prepare(sites=tuple(self.topics), task=TASK.name)
            if fleet.publisher().latest() is None:
                loop.publish_student(
                    fleet, TASK, self.made, self.work / "model", judged=judged, dev=on_dev, dev_records=dev, calibration=calibration,
                    evidence=bundle, general=self.general,
                )  # fmt: skip
            fleet.start()
            fleet.wait_for_release(1, deadline_s=120)
            nodes = {name: Site(name, fleet.node_url(name)) for name in self.topics}
            asked = loop.answer(nodes, {name: parts["season"] for name, parts in self.topics.items()})
            seasons = {}
            for name, node in nodes.items():
                truth = [item.record.target for item in asked[name]]
                first, final = (sentence_chrf([getattr(item, field) for item in asked[name]], truth) for field in ("text", "final_text"))
                seasons[name] = {
                    "n": len(truth), "escalated": sum(item.escalated for item in asked[name]) / len(truth),
                    "chrf_first": sum(first) / len(first), "chrf_with_escalation": sum(final) / len(final),
                    "escalation_gain": paired_difference(first, final, seed=self.seed),
                }  # fmt: skip
                node.correct(asked[name], share=1.0, seed=self.seed)
            learned = loop.learn(fleet)
            merged = loop.run_round(
                fleet, seed=self.seed,
                heldout={"general": general["gate"]} | {name: files[f"{name} gate"] for name in self.topics},
                dev={"general": general["dev"]} | {name: files[f"{name} scale"] for name in self.topics},
            )  # fmt: skip
        finally:
            fleet.stop()
        return {"seasons": seasons, "learned": learned, "round": merged}

    def scored(self, name: str, make: Callable[[], Evaluation]) -> Evaluation:
        print(name, file=sys.stderr)
        return msgspec.convert(self.keep(name.replace(" ", "-"), lambda: msgspec.to_builtins(make())), Evaluation)

    def keep(self, name: str, make: Callable[[], Any]) -> Any:
        file = self.work / f"{name}.json"
        if not file.exists():
            write_atomically(file, json.dumps(make()).encode())
        return json.loads(file.read_text())


def split(file: Path, *, count: int, seed: int) -> tuple[list[Record], dict[str, dict[str, list[Record]]]]:
    """General training records, and per topic its parts; one record an English sentence, and no topic's sentence among the general ones."""
    records = [record for record in read_pairs(file, TASK) if len(record.source.split()) >= SHORTEST]
    random.Random(seed).shuffle(records)
    once = list({record.source: record for record in records}.values())
    patterns = {name: re.compile(rf"\b({words})\b", re.IGNORECASE) for name, words in TOPICS.items()}
    about = {name: [record for record in once if pattern.search(record.source)] for name, pattern in patterns.items()}
    elsewhere = [record for record in records if not any(pattern.search(record.source) for pattern in patterns.values())]
    parts = {}
    for name, rows in about.items():
        only = [record for record in rows if sum(bool(pattern.search(record.source)) for pattern in patterns.values()) == 1]
        at = (0, SEASON, SEASON + SCALE, SEASON + SCALE + GATE)
        parts[name] = dict(zip(("season", "scale", "gate"), (only[a:b] for a, b in pairwise(at)), strict=True))
    return elsewhere[:count], parts


def tell(done: int, total: int) -> None:
    if done % 100 == 0 or done == total:
        print(f"  {done} of {total}", file=sys.stderr)


def rows(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = [("system or site", "BLEU", "chrF (95%)", "MiB", "tokens/s")]
    for name, row in figures.get("table", {}).items():
        low, high = row["chrf_ci"]
        found.append((name, f"{row['bleu']:.1f}", f"{row['chrf']:.1f} ({low:.1f}-{high:.1f})", f"{row.get('file_mb', 0):.0f}",
                      f"{row.get('tokens_per_second', 0):.0f}"))  # fmt: skip
    for name, row in figures.get("sites", {}).get("round", {}).get("sets", {}).items():
        found.append(
            (f"{name}: before, after", "", f"{row['before']:.3f} -> {row['after']:.3f} ({row['low']:+.3f} to {row['high']:+.3f})", "", "")
        )
    return found


if __name__ == "__main__":
    main()
