"""Does an ensemble of rewards polish better than one? `python -m bench.polish --student F16.gguf --train FILE --held FILE [--seconds 900]`.

Arms, each from the same student with the same wall-clock seconds, judged on the same held-out records by the engine that nodes use:

start      the student as it is
none       no reward: the seconds go into more supervised learning of the same records
single     polish by the task's own reward (verdict, or chrF against the reference)
ensemble   polish by task, consistency, language, naturalness under --teacher (or the student as it was) and length

FILE is pairs (TSV) or records (JSON lines), as `milpa-coordinator distill` reads them. Each arm is kept in --work and gone on with after a
kill. `--quick` makes a tiny student of a toy task in a minute, to see that it runs, and writes nothing. Writes bench/results/polish.json.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from bench.result import print_table, write
from coordinator.forge.judging.evaluation import Evaluation, evaluate, paired_bootstrap
from coordinator.forge.pairs import read_pairs, read_records
from coordinator.forge.synthesis.language import identify
from coordinator.forge.training.polish import ENSEMBLE, SINGLE, PolishPlan, naturalness, polished
from coordinator.forge.training.recipe import Recipe, trained
from coordinator.forge.training.rewards import ensemble
from protocol.blobs import write_atomically
from protocol.errors import BadInput
from protocol.models.checkpoint import Checkpoint
from protocol.models.tokenizer import Tokenizer, make_example
from protocol.models.torch_model import best_dtype, to_torch, use_threads
from protocol.tasks import Record, Task, task_named

REWARDS = {"single": SINGLE, "ensemble": ENSEMBLE}


class Setting(msgspec.Struct, frozen=True):
    """One run."""

    student: Path
    teacher: Path
    task: Task
    train: list[Record]
    held: list[Record]
    seconds: float
    rate: float
    work: Path
    seed: int
    threads: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", type=Path, help="F16 GGUF")
    parser.add_argument("--teacher", type=Path, help="F16 GGUF of the same vocabulary; by default the student as it was")
    parser.add_argument("--task", default="translate-english-spanish")
    parser.add_argument("--train", type=Path)
    parser.add_argument("--held", type=Path)
    parser.add_argument("--records", type=int, default=4_000, help="of --train")
    parser.add_argument("--judged", type=int, default=1_000, help="of --held")
    parser.add_argument("--seconds", type=float, default=900.0, help="of each arm")
    parser.add_argument("--rate", type=float, default=5e-5, help="learning rate")
    parser.add_argument("--work", type=Path, default=Path("var/polish"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    use_threads(1 if given.quick else given.threads)
    if not given.quick and not (given.student and given.train and given.held):
        raise BadInput("say --student, --train and --held, or --quick")
    setting = quick(given.work / "quick", given.seed) if given.quick else full(given)
    figures = measure(setting)
    if given.quick:
        print_table(rows(figures))
        return
    command = f"python -m bench.polish --student F16.gguf --train FILE --held FILE --task {given.task} --seconds {given.seconds:g}"
    write("polish", figures, command=f"{command} --rate {given.rate:g} --seed {given.seed}", rows=rows(figures))


def full(given: argparse.Namespace) -> Setting:
    task = task_named(given.task)
    read: Callable[..., list[Record]] = read_pairs if given.train.suffix == ".tsv" else read_records
    return Setting(
        given.student, given.teacher or given.student, task, read(given.train, task, limit=given.records),
        read(given.held, task, limit=given.judged), given.seconds, given.rate, given.work, given.seed, given.threads,
    )  # fmt: skip


def quick(work: Path, seed: int) -> Setting:
    from tests.fleet import toy

    work.mkdir(parents=True, exist_ok=True)
    student = work / "student.gguf"
    if not student.is_file():
        toy.trained(student, kinds=(0, 1, 2), seed=seed, steps=60)
    task = msgspec.structs.replace(task_named("ranch"), max_new_tokens=16)
    return Setting(student, student, task, toy.records(24), toy.records(12, start=500), 4.0, 1e-3, work, seed, 1)


def measure(setting: Setting) -> dict[str, Any]:
    """All arms, each against the start by paired bootstrap."""
    found = {arm: judged(setting, arm) for arm in ("start", "none", *REWARDS)}
    return {
        "seconds": setting.seconds,
        "records": len(setting.train),
        "n": len(setting.held),
        "arms": {
            arm: one.figures()
            | {"minus_start": paired_bootstrap(found["start"], one, seed=setting.seed), "training": trained_by(setting, arm)}
            for arm, one in found.items()
        },
        "ensemble_minus_single": paired_bootstrap(found["single"], found["ensemble"], seed=setting.seed),
        "ensemble_minus_none": paired_bootstrap(found["none"], found["ensemble"], seed=setting.seed),
    }


def judged(setting: Setting, arm: str) -> Evaluation:
    file = setting.work / arm / "evaluation.json"
    model = setting.student if arm == "start" else made(setting, arm)
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, msgspec.json.encode(evaluate(model, setting.held, setting.task, threads=setting.threads, name=arm)))
    return msgspec.json.decode(file.read_bytes(), type=Evaluation)


def made(setting: Setting, arm: str) -> Path:
    """The arm's model, trained once."""
    folder = setting.work / arm
    path = folder / "model-f16.gguf"
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    start, state = Checkpoint.read(setting.student), folder / "train.state"
    recipe = Recipe(mode="full", learning_rate=setting.rate, seconds=setting.seconds, batch_tokens=1024)
    report: Any
    if arm == "none":
        with Tokenizer(setting.student) as tokenizer:
            examples = [make_example(tokenizer, setting.task, record) for record in setting.train]
        model, report = trained(start, examples, recipe, seed=setting.seed, state=state)
    else:
        model, _, report = polished(
            start, setting.train, setting.task, recipe, rewards=ensemble(identify), plan=PolishPlan(weights=REWARDS[arm]),
            natural=naturalness(to_torch(Checkpoint.read(setting.teacher), dtype=best_dtype())), log=folder / "rounds.jsonl",
            seed=setting.seed, origin=str(setting.teacher), state=state,
        )  # fmt: skip
    write_atomically(folder / "training.json", msgspec.json.encode(report))
    model.write(path)
    state.unlink(missing_ok=True)
    return path


def trained_by(setting: Setting, arm: str) -> Any:
    """What the arm's training reported; nothing for the start."""
    file = setting.work / arm / "training.json"
    return msgspec.json.decode(file.read_bytes()) if file.is_file() else None


def rows(figures: dict[str, Any]) -> Sequence[Sequence[str]]:
    found = [("arm", "chrF", "verdicts right", "quality minus start (95%)")]
    for arm, one in figures["arms"].items():
        pair = one["minus_start"]
        right = one.get("accuracy")
        text = f"{pair['diff']:+.4f} ({pair['low']:+.4f} to {pair['high']:+.4f})"
        found.append((arm, f"{one['chrf']:.2f}", f"{right:.3f}" if right is not None else "", text))
    return found


if __name__ == "__main__":
    main()
