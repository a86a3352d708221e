"""`milpa-coordinator evaluate`: how good a model file is, on records with known answers."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from protocol.console import print_json, progress_bar, stderr
from protocol.errors import BadInput

if TYPE_CHECKING:
    from coordinator.forge.judging.evaluation import Evaluation
    from protocol.tasks import Record, Task


def evaluate(
    model: Path = typer.Option(..., help="The GGUF to evaluate."),
    pairs: Path | None = typer.Option(None, help="Sentence pairs: UTF-8, SOURCE<tab>TARGET, one a line."),
    source: str = typer.Option("English", help="With --pairs: language of the first column."),
    target: str = typer.Option("Spanish", help="With --pairs: language of the second column."),
    task: str | None = typer.Option(None, help="With --records: the task, such as 'ranch'."),
    records: Path | None = typer.Option(None, help="Records, one JSON object a line."),
    adapter: Path | None = typer.Option(None, help="A LoRA adapter (GGUF) to put on the model."),
    limit: int | None = typer.Option(None, min=1, help="Only the first so many records."),
    few_shot: int = typer.Option(0, "--few-shot", min=0, max=32, help="Show so many solved examples before each record."),
    examples: Path | None = typer.Option(None, help="With --few-shot: where they come from; never the file evaluated on."),
    peer: str | None = typer.Option(None, help="Also ask this system for the same records: 'apertium'."),
    threads: int = typer.Option(2, min=1, max=256, help="Engines side by side, one thread each."),
    seed: int = typer.Option(12345, help="Of the bootstrap intervals."),
    out: Path | None = typer.Option(None, help="Also write figures and every answer to this JSON file."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object to stdout and nothing else there."),
) -> None:
    """Answer records with a GGUF through the engine that nodes use, and judge the answers.

    Prints verdict accuracy (verdict tasks), BLEU and chrF with sacreBLEU signatures, 95% intervals, speed and latency of one thread, and
    the peak memory of one engine.

    Examples:

        milpa-coordinator evaluate --model student.gguf --pairs test.tsv --source English --target Spanish --peer apertium

        milpa-coordinator evaluate --model student.gguf --task ranch --records test.jsonl --json

        milpa-coordinator evaluate --model teacher.gguf --pairs test.tsv --few-shot 5 --examples dev.tsv --limit 200
    """
    from coordinator.forge.judging import evaluation, peers
    from protocol.names import known

    if peer is not None:
        known(peer, peers.NAMES, what="peer")
    if out is not None and not out.parent.is_dir():
        raise BadInput(f"--out {out}: there is no folder {out.parent}; make it first")
    wanted, found = read(pairs, source, target, task, records, limit)
    asked, context = wanted, evaluation.CONTEXT
    if few_shot:
        asked, context = with_examples(wanted, examples, few_shot, avoid=pairs or records), evaluation.FEW_SHOT_CONTEXT
    # before the long work, and judged after it
    answers = peers.apertium(found, wanted) if peer else None
    with progress_bar() as bar:
        line = bar.add_task(f"evaluating {model.name}", total=len(found))
        result = evaluation.evaluate(
            model, found, asked, adapter=adapter, threads=threads, context=context, seed=seed,
            progress=lambda done, _: bar.update(line, completed=done),
        )  # fmt: skip
    figures = result.figures() | {"task": wanted.name, "model": model.name, "few_shot": few_shot, "seed": seed}
    if answers is not None:
        other = evaluation.evaluate_texts(answers.texts, found, wanted, name=answers.name, seed=seed)
        paired = evaluation.paired_bootstrap(other, result, seed=seed)
        figures["peers"] = {peer: other.figures() | {"version": answers.version, "seconds": answers.seconds, "paired": paired}}
    if out is not None:
        write(out, figures, result)
    if as_json:
        print_json(figures)
    else:
        show(figures)


def read(
    pairs: Path | None, source: str, target: str, task: str | None, records: Path | None, limit: int | None
) -> tuple["Task", list["Record"]]:
    """The task and its records, from either kind of file.

    Raises:
        BadInput: neither file, both, or a line that is broken.
    """
    from coordinator.forge.pairs import read_pairs, read_records
    from protocol.tasks import task_named, translation

    if (pairs is None) == (records is None):
        raise BadInput("give --pairs FILE.tsv, or --task NAME --records FILE.jsonl")
    if pairs is not None:
        wanted = translation(source, target) if task is None else task_named(task)
        return wanted, read_pairs(pairs, wanted, limit=limit)
    if task is None or records is None:
        raise BadInput("--records needs --task, for example: --task ranch")
    wanted = task_named(task)
    return wanted, read_records(records, wanted, limit=limit)


def with_examples(task: "Task", examples: Path | None, count: int, *, avoid: Path | None) -> "Task":
    """The task with `count` solved examples before each record.

    Raises:
        BadInput: no file, too few examples in it, or the very file that is evaluated on.
    """
    from coordinator.forge.judging.evaluation import few_shot
    from coordinator.forge.pairs import read_pairs, read_records

    if examples is None:
        raise BadInput("--few-shot needs --examples FILE: solved records that are not among those evaluated")
    if avoid is not None and examples.exists() and avoid.exists() and examples.samefile(avoid):
        raise BadInput(f"{examples} is also evaluated on; take the examples from another file, such as the dev set")
    read_file = read_records if task.codes else read_pairs
    found = read_file(examples, task, limit=count)
    if len(found) < count:
        raise BadInput(f"{examples} has {len(found)} records, --few-shot asks for {count}")
    return few_shot(task, found)


def write(out: Path, figures: dict[str, Any], result: "Evaluation") -> None:
    """Figures and answers as JSON; the file is whole or not there."""
    import msgspec

    from protocol.blobs import write_atomically

    write_atomically(out, msgspec.json.format(msgspec.json.encode(figures | {"answers": result.answers})))


def show(figures: dict[str, Any]) -> None:
    """A few lines for people."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for name, justify in (("", "left"), ("verdict", "right"), ("BLEU", "right"), ("chrF", "right"), ("n", "right")):
        table.add_column(name, justify="right" if justify == "right" else "left")
    for name, row in ((figures["model"], figures), *figures.get("peers", {}).items()):
        verdict = f"{row['accuracy']:.1%} [{row['accuracy_ci'][0]:.1%}, {row['accuracy_ci'][1]:.1%}]" if "accuracy" in row else "-"
        table.add_row(
            name, verdict, f"{row['bleu']:.1f}", f"{row['chrf']:.1f} [{row['chrf_ci'][0]:.1f}, {row['chrf_ci'][1]:.1f}]", str(row["n"])
        )
    out = Console(highlight=False, soft_wrap=True)
    out.print(table)
    out.print(
        f"{figures['tokens_per_second']:.1f} tokens/s, {figures['latency_p50_ms']:.0f} ms a record (median, one thread), "
        f"{figures['peak_rss_mb']:.0f} MiB at most, file {figures['file_mb']:.1f} MiB"
    )
    for name, row in figures.get("peers", {}).items():
        paired = row["paired"]
        out.print(f"against {name}: {paired['diff']:+.2f} [{paired['low']:+.2f}, {paired['high']:+.2f}], p = {paired['p']:.4f} (paired)")
    out.print(f"BLEU {figures['bleu_signature']}\nchrF {figures['chrf_signature']}", style="dim")
    if figures["n"] < 1000:
        stderr.print(f"{figures['n']} records: small differences mean nothing here; read the intervals", style="dim")
