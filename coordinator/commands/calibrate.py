"""`milpa-coordinator calibrate`: how sure a model is against how right it is; the file that ships with a release."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from protocol.console import print_json, progress_bar, stderr
from protocol.errors import BadInput

if TYPE_CHECKING:
    from collections.abc import Callable

    from coordinator.forge.judging.evaluation import Evaluation
    from protocol.tasks import Record, Task


def calibrate(
    model: Path = typer.Option(..., help="The students' GGUF."),
    out: Path = typer.Option(..., help="The calibration, for `publish --calibration` (JSON)."),
    pairs: Path | None = typer.Option(None, help="Sentence pairs: UTF-8, SOURCE<tab>TARGET, one a line."),
    source: str = typer.Option("English", help="With --pairs: language of the first column."),
    target: str = typer.Option("Spanish", help="With --pairs: language of the second column."),
    task: str | None = typer.Option(None, help="With --records: the task, such as 'ranch'."),
    records: Path | None = typer.Option(None, help="Records, one JSON object a line; never those that the evidence is measured on."),
    adapter: Path | None = typer.Option(None, help="The LoRA adapter (GGUF) that is released with the model."),
    teacher: Path | None = typer.Option(
        None, help="The peers' GGUF: what asking buys is then known, and a translation is judged against it."
    ),
    samples: int = typer.Option(0, min=0, max=16, help="Also fit what the agreement of so many of the student's own samples tells."),
    temperature: float = typer.Option(0.7, min=0.05, max=2.0, help="Of the samples."),
    limit: int | None = typer.Option(None, min=1, help="Only the first so many records."),
    threads: int = typer.Option(2, min=1, max=256, help="Engines side by side, one thread each."),
    seed: int = typer.Option(0, help="Of the folds, the trees and the samples."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object to stdout and nothing else there."),
) -> None:
    """Fit the calibration of a student: from the signals of its answers to the probability that they are right.

    Some hundred records are good, twenty the least. A node asks for samples only with `confidence.agree` on and energy to spare.

    Examples:

        milpa-coordinator calibrate --model student.gguf --task ranch --records dev.jsonl --teacher teacher.gguf --out calibration.json

        milpa-coordinator calibrate --model student.gguf --pairs dev.tsv --teacher teacher.gguf --samples 4 --out calibration.json
    """
    from coordinator.commands.evaluate import read_sets
    from coordinator.forge.judging import calibrate as judging
    from coordinator.forge.judging.evaluation import evaluate
    from coordinator.forge.judging.evidence import described
    from protocol.blobs import write_atomically
    from protocol.codec import encode

    if not out.parent.is_dir():
        raise BadInput(f"--out {out}: there is no folder {out.parent}; make it first")
    named_pairs, named_records = [str(pairs)] if pairs else [], [str(records)] if records else []
    wanted, _, sets = read_sets(named_pairs, source, target, task, named_records, limit)
    rows = next(iter(sets.values()))
    with progress_bar() as bar:

        def judged(file: Path, lora: Path | None, name: str) -> "Evaluation":
            line = bar.add_task(name, total=len(rows))
            return evaluate(
                file, rows, wanted, adapter=lora, threads=threads, name=name, progress=lambda done, _: bar.update(line, completed=done)
            )

        student = judged(model, adapter, "student")
        its = judged(teacher, None, "teacher") if teacher else None
        alike: list[float] = []
        if samples:
            line = bar.add_task("samples", total=len(rows))
            alike = agreements(
                model, adapter, rows, wanted, [answer.text for answer in student.answers], count=samples, temperature=temperature,
                seed=seed, progress=lambda done: bar.update(line, completed=done),
            )  # fmt: skip
    made = judging.fit(student, teacher=its, seed=seed, agreement=alike, samples=samples, temperature=temperature)
    write_atomically(out, encode(made))
    if as_json:
        print_json(described(made) | {"out": str(out), "bytes": out.stat().st_size, "samples": samples})
    else:
        stderr.print(f"{out}: {made.method}, {made.right} of {made.count} {made.target!r}; {out.stat().st_size / 1e3:.1f} kB")


def agreements(
    model: Path,
    adapter: Path | None,
    records: "Sequence[Record]",
    task: "Task",
    texts: Sequence[str],
    *,
    count: int,
    temperature: float,
    seed: int,
    progress: "Callable[[int], None]",
) -> list[float]:
    """Per record, how far `count` samples of the model say what its greedy answer says; as a node takes them."""
    from protocol.confidence import agreement, sample_tokens
    from protocol.models.engine import Engine

    found = []
    with Engine(model, adapter=adapter) as engine:
        for done, (record, text) in enumerate(zip(records, texts, strict=True), start=1):
            said = engine.sample(
                task.prompt(record), n=count, temperature=temperature, seed=seed, max_new_tokens=sample_tokens(task), form=task.form
            )
            found.append(agreement(text, [one.text for one in said], task))
            progress(done)
    return found
