"""What a student's shape costs and what it buys: quality after equal CPU time, beside the time that an answer takes.

    python -m bench.shapes --task ranch --stages FOLDER --correct 1872 --capture 540 --own 14 --cpu 900 small 12x512x1024x2
    python -m bench.shapes --task translate-english-spanish --data FOLDER --stages FOLDER --correct 936 --capture 270 --cpu 900 small ...

FOLDER is where a distillation of that task keeps its stages: its corrected teacher and what was captured of it are taken from there, so all
shapes have the same teacher and the same lesson. How many steps a shape gets is told by what a step costs it (processor time, measured in
turns before); so a cheaper one learns from more. Each is exported as Q4_K_M, and the file itself answers records of dev. The others are
compared with the first shape, paired. What is finished is kept in --stages. Writes bench/results/shapes.json, one entry a task.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from bench.kept import answered
from bench.result import RESULTS, write
from bench.settings import TRANSLATION, Settings
from coordinator.forge.judging.evaluation import Evaluation
from coordinator.forge.judging.metrics import paired_difference
from coordinator.forge.pairs import read_pairs
from coordinator.forge.pipeline import Forged, forge
from coordinator.forge.plan import Budget, Plan
from coordinator.forge.training.recipe import Recipe, trained
from coordinator.ranch import generate, site_named
from protocol.models.checkpoint import Checkpoint
from protocol.models.engine import Engine
from protocol.models.tokenizer import Tokenizer, make_example
from protocol.tasks import RANCH, Record, task_named

RATE = 5e-4
PROBED, PROBED_ON, TURNS = 10, 400, 3  # steps that tell what one costs, of so many examples, how often


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="+", help="presets or shapes: small, 12x512x1024x2")
    parser.add_argument("--task", default="ranch")
    parser.add_argument("--data", type=Path, default=Path("var/data"), help="folder with tatoeba-en-es/")
    parser.add_argument("--train", type=Path, help="the pairs that the distillation was given (TSV); by default Tatoeba's train.tsv")
    parser.add_argument("--records", type=int, default=24_000, help="that the distillation of the ranch was given")
    parser.add_argument("--stages", type=Path, required=True)
    parser.add_argument("--correct", type=float, required=True, help="seconds of the distillation's first budget; names its stage")
    parser.add_argument("--capture", type=float, required=True, help="seconds of its second")
    parser.add_argument("--own", type=float, default=3.0)
    parser.add_argument("--cpu", type=float, default=900.0, help="CPU-seconds of each student")
    parser.add_argument("--judged", type=int, default=500, help="records of dev")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    said = parser.parse_args()
    found = Shapes(said).figures()
    results = RESULTS / "shapes.json"
    kept = json.loads(results.read_text(encoding="utf-8"))["figures"] if results.is_file() else {}
    lines: list[tuple[str, ...]] = [("shape", "quality", "against the first", "ms a record", "file, MB", "steps")]
    lines += [(name, *row(one)) for name, one in found.items()]
    write(
        "shapes", kept | {said.task: found}, rows=lines,
        command=f"python -m bench.shapes --task {said.task} --stages FOLDER --cpu {said.cpu:g} {' '.join(said.shapes)}",
    )  # fmt: skip


def row(one: dict[str, Any]) -> tuple[str, ...]:
    against = one["against_the_first"]
    return (
        f"{one['quality']:.3f}", f"{against['diff']:+.3f} [{against['low']:+.3f}, {against['high']:+.3f}]",
        f"{one['cpu_ms']:.1f}", f"{one['megabytes']:.1f}", str(one["steps"]),
    )  # fmt: skip


class Shapes:
    """Students of one teacher and one lesson."""

    def __init__(self, said: argparse.Namespace, *, base: Path | None = None) -> None:
        self.said, self.task, self.base = said, task_named(said.task), base
        self.settings = Settings(said.data, said.stages, said.threads, said.seed)
        self.train, self.judged = self.records("train"), self.records("dev")[: said.judged]

    def records(self, part: str) -> list[Record]:
        if self.task.name == RANCH.name:
            count = self.said.records if part == "train" else self.said.judged
            return generate(site_named("general"), seed=self.said.seed, count=count, split=part)
        if part == "train" and self.said.train:
            return read_pairs(self.said.train, TRANSLATION)
        return self.settings.pairs(part)

    def figures(self) -> dict[str, Any]:
        found, judged = {}, {}
        costs = self.settings.kept("shapes", "costs " + " ".join(self.said.shapes), self.costs)
        for shape in self.said.shapes:
            steps = max(1, round(self.said.cpu / costs[shape]))
            made = self.distilled(shape, steps)
            judged[shape] = answered(
                self.settings, "shapes", f"{shape}-{steps}-answers-{len(self.judged)}", made.student, self.judged, self.task
            )  # fmt: skip
            found[shape] = {
                "steps": steps, "megabytes": made.student.stat().st_size / 1e6, "parameters": parameters(made.student),
                "training": made.lineage["distil"]["training"], **self.brief(judged[shape]),
            }  # fmt: skip
            print(shape, {key: round(found[shape][key], 4) for key in ("quality", "cpu_ms", "megabytes", "steps")}, flush=True)
        first = judged[self.said.shapes[0]].quality()
        for shape, one in judged.items():
            found[shape]["against_the_first"] = paired_difference(first, one.quality(), seed=self.said.seed)
        return found

    def brief(self, evaluation: Evaluation) -> dict[str, Any]:
        quality, figures = evaluation.quality(), evaluation.figures()
        mean = sum(quality) / len(quality)
        return {"quality": mean, "n": len(quality), "chrf": figures["chrf"], "cpu_ms": figures["cpu_seconds_per_1000"]}

    def costs(self) -> dict[str, float]:
        """CPU-seconds a step of every shape, measured in turns; the least of each, since a busy machine only adds."""
        files = {}
        for shape in self.said.shapes:
            digest = self.distilled(shape, 1).lineage["cut"]["digest"]  # the stage before the training
            files[shape] = self.said.stages / f"cut-{digest[:12]}" / "cut-f16.gguf"
        cuts = {shape: Checkpoint.read(path) for shape, path in files.items()}
        with Tokenizer(files[self.said.shapes[0]]) as tokenizer:
            examples = [make_example(tokenizer, self.task, record) for record in self.train[:PROBED_ON]]
        took: dict[str, list[float]] = {shape: [] for shape in cuts}
        for _ in range(TURNS):
            for shape, cut in cuts.items():
                began = time.process_time()
                trained(cut, examples, Recipe(mode="full", learning_rate=RATE, steps=PROBED), seed=self.said.seed)
                took[shape].append((time.process_time() - began) / PROBED)
        return {shape: min(each) for shape, each in took.items()}

    def distilled(self, shape: str, steps: int) -> Forged:
        budget = Budget("shapes", self.said.correct, self.said.capture, 0.0)
        plan = Plan(
            budget=budget, seed=self.said.seed, preset=shape, own=self.said.own, kind="Q4_K_M", threads=self.said.threads,
            student=Recipe(mode="full", learning_rate=RATE, steps=steps),
        )  # fmt: skip
        out = self.said.stages / "shapes" / f"{shape}-{steps}"
        return forge(self.task, self.train, work=self.said.stages, out=out, plan=plan, base=self.base)


def parameters(model: Path) -> int:
    with Engine(model, threads=1) as engine:
        return engine.parameters


if __name__ == "__main__":
    main()
