"""`milpa-coordinator evaluate`: how good a model file is, on records with known answers, alone or beside others."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from protocol.console import print_json, progress_bar, stderr
from protocol.errors import BadInput

if TYPE_CHECKING:
    from coordinator.forge.judging.evaluation import Evaluation
    from coordinator.forge.judging.peers import PeerAnswers
    from protocol.tasks import Record, Task

    Judge = Callable[[str, Path, Path | None, str, Sequence[Record]], Evaluation]  # name, model, adapter, set, its records


def evaluate(
    model: Path = typer.Option(..., help="The GGUF to evaluate."),
    pairs: list[str] = typer.Option(
        [],
        help="Sentence pairs: UTF-8, SOURCE<tab>TARGET, one a line. Repeat as NAME=FILE for several held-out sets, the model's own first.",
    ),
    source: str = typer.Option("English", help="With --pairs: language of the first column."),
    target: str = typer.Option("Spanish", help="With --pairs: language of the second column."),
    task: str | None = typer.Option(None, help="With --records: the task, such as 'ranch'."),
    records: list[str] = typer.Option([], help="Records, one JSON object a line. Repeat as NAME=FILE for several held-out sets."),
    adapter: Path | None = typer.Option(None, help="A LoRA adapter (GGUF) to put on the model."),
    against: list[str] = typer.Option(
        [],
        help="Compare with this GGUF on the same records, as NAME=MODEL.gguf or NAME=MODEL.gguf+ADAPTER.gguf; repeat. Names with a "
        "meaning: teacher, student_float, previous, untrained.",
    ),
    limit: int | None = typer.Option(None, min=1, help="Only the first so many records of each set."),
    few_shot: int = typer.Option(0, "--few-shot", min=0, max=32, help="Show --model so many solved examples before each record."),
    examples: Path | None = typer.Option(
        None, help="With --few-shot: where they come from, in the form of --pairs or --records; never a file evaluated on."
    ),
    peer: str | None = typer.Option(None, help="Also ask this system for the same records: 'apertium'."),
    train: Path | None = typer.Option(None, help="Verdict tasks: training records, for the baselines (majority, nearest, trees)."),
    categories: bool = typer.Option(
        False, "--categories", help="Also by category: numbers, names, negation, length, language, verdicts, site."
    ),
    watts: float | None = typer.Option(
        None, help="Watts of one busy core, for joules; without it an assumption that is printed with them."
    ),
    threads: int = typer.Option(2, min=1, max=256, help="Engines side by side, one thread each."),
    seed: int = typer.Option(12345, help="Of the bootstrap intervals."),
    out: Path | None = typer.Option(None, help="Also write figures and every answer to this JSON file."),
    report: Path | None = typer.Option(None, help="Also write the evidence as a page to this HTML file."),
    evidence: Path | None = typer.Option(None, help="Also write the evidence to this JSON file (docs/evidence.md)."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object to stdout and nothing else there."),
) -> None:
    """Answer records with a GGUF through the engine that nodes use, and judge the answers.

    Prints verdict accuracy (verdict tasks), BLEU and chrF with sacreBLEU signatures, 95% intervals, speed and latency of one thread, and
    the peak memory of one engine. With several held-out sets or models, also what the figures allow to say of them together.

    Examples:

        milpa-coordinator evaluate --model student.gguf --pairs test.tsv --source English --target Spanish --peer apertium

        milpa-coordinator evaluate --model student.gguf --task ranch --records test.jsonl --json

        milpa-coordinator evaluate --model student.gguf --against teacher=teacher.gguf --against previous=old.gguf --pairs own=test.tsv --pairs news=ntrex.tsv --report evidence.html --evidence evidence.json

        milpa-coordinator evaluate --model teacher.gguf --pairs test.tsv --few-shot 5 --examples dev.tsv --limit 200
    """  # noqa: E501
    from coordinator.forge.judging import economics, evaluation, peers
    from coordinator.forge.judging.evidence import repeat_line
    from coordinator.forge.pairs import read_records
    from protocol.names import known

    if peer is not None:
        known(peer, peers.NAMES, what="peer")
    for option, file in (("--out", out), ("--report", report), ("--evidence", evidence)):
        if file is not None and not file.parent.is_dir():
            raise BadInput(f"{option} {file}: there is no folder {file.parent}; make it first")
    power = economics.given(watts)
    wanted, files, found = read_sets(pairs, source, target, task, records, limit)
    others = opponents(against)
    lineage = lineage_of(model, adapter)
    if train is not None and not wanted.codes:
        raise BadInput("--train is for verdict tasks: their baselines learn from it; a translation has --peer")
    learned_from = read_records(train, wanted) if train is not None else []
    asked, context = wanted, evaluation.CONTEXT
    if few_shot:
        shown = read_examples(wanted, examples, few_shot, pairs=bool(pairs), avoid=list(files.values()))
        asked, context = evaluation.few_shot(wanted, shown), evaluation.FEW_SHOT_CONTEXT
    # before the long work, and judged after it
    answers = {name: peers.apertium(rows, wanted) for name, rows in found.items()} if peer else {}
    with progress_bar() as bar:

        def judge(name: str, file: Path, lora: Path | None, where: str, rows: Sequence["Record"]) -> "Evaluation":
            line = bar.add_task(f"evaluating {file.name}" + (f" on {where}" if len(found) > 1 else ""), total=len(rows))
            own = name == STUDENT
            return evaluation.evaluate(
                file, rows, asked if own else wanted, adapter=lora, threads=threads, context=context if own else evaluation.CONTEXT,
                name=file.name, seed=seed, progress=lambda done, _: bar.update(line, completed=done),
            )  # fmt: skip

        judged = judge_all(found, {STUDENT: (model, adapter), **others}, judge)
    first = next(iter(found))
    result = judged[first][STUDENT]
    figures = result.figures() | {"task": wanted.name, "model": model.name, "few_shot": few_shot, "seed": seed}
    for name, answer in answers.items():
        judged[name][peer or ""] = evaluation.evaluate_texts(answer.texts, found[name], wanted, name=answer.name, seed=seed)
    if peer and answers:
        figures["peers"] = {peer: peer_figures(answers[first], judged[first][peer], result, seed)}
    proof: dict[str, Any] = {}
    if others or categories or report or evidence or len(found) > 1 or learned_from:
        flags: dict[str, object] = {"--source": source, "--target": target} if task is None else {"--task": task}
        flags |= {"--adapter": adapter, "--limit": limit, "--few-shot": few_shot or None, "--examples": examples}
        flags |= {"--peer": peer, "--train": train, "--watts": watts}
        proof = proven(
            wanted,
            judged,
            found if categories or report or evidence or learned_from else None,
            learned_from,
            power,
            lineage,
            seed=seed,
            command=repeat_line(model, flags, "--pairs" if pairs else "--records", files, others, seed=seed),
        )
        figures |= {key: proof[key] for key in ("sets", "statements", "regressions", "not_tested")}
        figures["economics"] = proof["sets"][first]["economics"]
    if out is not None:
        write(out, figures | {"answers": result.answers})
    if evidence is not None:
        write(evidence, proof)
    if report is not None:
        from coordinator.forge.judging.report import evidence_page, write_page

        write_page(report, evidence_page(proof))
    if as_json:
        print_json(figures)
    else:
        show(figures)


STUDENT = "student"  # the name of --model among the others


def read_sets(
    pairs: Sequence[str], source: str, target: str, task: str | None, records: Sequence[str], limit: int | None
) -> tuple["Task", dict[str, Path], dict[str, list["Record"]]]:
    """The task, and each held-out set's file and records by its name; a file without a name has its stem's.

    Raises:
        BadInput: neither kind of file, both, a name twice, or a line that is broken.
    """
    from coordinator.forge.pairs import read_pairs, read_records
    from protocol.tasks import task_named, translation

    if bool(pairs) == bool(records):
        raise BadInput("give --pairs FILE.tsv, or --task NAME --records FILE.jsonl")
    if task is None and records:
        raise BadInput("--records needs --task, for example: --task ranch")
    wanted = translation(source, target) if task is None else task_named(task)
    files = {name: Path(file) for name, file in named(pairs or records, "--pairs" if pairs else "--records").items()}
    reader = read_pairs if pairs else read_records
    return wanted, files, {name: reader(file, wanted, limit=limit) for name, file in files.items()}


def named(values: Sequence[str], option: str) -> dict[str, str]:
    """NAME=VALUE, or VALUE alone, named by its file's stem; an existing file whose own name has a "=" is a file.

    Raises:
        BadInput: a name twice, or an empty one.
    """
    found: dict[str, str] = {}
    for value in values:
        name, equals, rest = value.partition("=")
        if not equals or "/" in name or Path(value).exists():
            name, rest = Path(value).stem, value
        if not name or not rest or name in found:
            raise BadInput(f"{option} {value}: every one needs a name of its own, as in {option} NAME=FILE")
        found[name] = rest
    return found


def opponents(against: Sequence[str]) -> dict[str, tuple[Path, Path | None]]:
    """Name -> model file and adapter of every --against.

    Raises:
        BadInput: a file that is not there, a name twice, or the name of --model itself.
    """
    found: dict[str, tuple[Path, Path | None]] = {}
    for name, value in named(against, "--against").items():
        base, plus, lora = value.partition("+")
        files = (Path(value), None) if Path(value).is_file() or not plus else (Path(base), Path(lora))
        if name == STUDENT:
            raise BadInput(f"--against {name}=...: {STUDENT} is what --model is called; choose another name")
        for file in files:
            if file is not None and not file.is_file():
                raise BadInput(f"--against {name}: there is no file {file}")
        found[name] = files
    return found


def judge_all(
    sets: Mapping[str, Sequence["Record"]], models: Mapping[str, tuple[Path, Path | None]], judge: "Judge"
) -> dict[str, dict[str, "Evaluation"]]:
    """Held-out set -> model -> evaluation."""
    return {where: {name: judge(name, file, lora, where, rows) for name, (file, lora) in models.items()} for where, rows in sets.items()}


def proven(
    task: "Task",
    judged: Mapping[str, Mapping[str, "Evaluation"]],
    records: Mapping[str, Sequence["Record"]] | None,
    learned_from: Sequence["Record"],
    power: Any,
    lineage: Sequence[Mapping[str, Any]],
    *,
    seed: int,
    command: str,
) -> dict[str, Any]:
    """The evidence of an evaluation; its release number is 0, none."""
    from coordinator.forge.judging import evidence

    simple: dict[str, Any] = {}
    if learned_from and records is not None:
        from coordinator.ranch import baselines

        simple = {name: baselines(learned_from, rows) for name, rows in records.items()}
    return evidence.bundle(
        release=0, task=task.name, sets=judged, records=records, baselines=simple, seed=seed, command=command, power=power,
        lineage=lineage, machine=evidence.machine(), commit=evidence.commit(), code=evidence.code(), created=int(time.time()),
    )  # fmt: skip


def lineage_of(model: Path, adapter: Path | None) -> list[dict[str, Any]]:
    """The steps to a student, from the lineage.json that `distill` wrote beside it; none where it names no such file.

    Raises:
        BadInput: a lineage.json that names it, and is damaged.
    """
    import msgspec

    from coordinator.forge.judging.evidence import lineage_steps
    from protocol.digests import digest_file

    path = model.with_name("lineage.json")
    if not path.is_file() or not model.is_file():
        return []
    written, digest = path.read_bytes(), digest_file(model)
    if digest.encode() not in written:
        return []
    try:
        told = msgspec.json.decode(written, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise BadInput(f"{path} is not what `milpa-coordinator distill` wrote ({error}); move it away from the model") from error
    students = [file["digest"] for name, file in told.get("export", {}).get("files", {}).items() if name.startswith(STUDENT)]
    if digest not in students:  # the teacher, or the base: none of these steps made it
        return []
    return [*lineage_steps(told), *([{"name": adapter.name, "digest": digest_file(adapter), "note": "adapter"}] if adapter else [])]


def peer_figures(answers: "PeerAnswers", other: "Evaluation", result: "Evaluation", seed: int) -> dict[str, Any]:
    """A peer's figures, its version and time, and the paired difference of the model to it."""
    from coordinator.forge.judging.evaluation import paired_bootstrap

    paired = paired_bootstrap(other, result, seed=seed)
    return other.figures() | {"version": answers.version, "seconds": answers.seconds, "paired": paired}


def read_examples(task: "Task", examples: Path | None, count: int, *, pairs: bool, avoid: Sequence[Path]) -> list["Record"]:
    """`count` solved examples, from a file of pairs or of records.

    Raises:
        BadInput: no file, too few examples in it, or a file that is evaluated on.
    """
    from coordinator.forge.pairs import read_pairs, read_records

    if examples is None:
        raise BadInput("--few-shot needs --examples FILE: solved records that are not among those evaluated")
    if any(examples.exists() and file.exists() and examples.samefile(file) for file in avoid):
        raise BadInput(f"{examples} is also evaluated on; take the examples from another file, such as the dev set")
    found = (read_pairs if pairs else read_records)(examples, task, limit=count)
    if len(found) < count:
        raise BadInput(f"{examples} has {len(found)} records, --few-shot asks for {count}")
    return found


def write(out: Path, value: dict[str, Any]) -> None:
    """A value as JSON; the file is whole or not there."""
    import msgspec

    from protocol.blobs import write_atomically

    write_atomically(out, msgspec.json.format(msgspec.json.encode(value)))


def show(figures: dict[str, Any]) -> None:
    """A few lines for people."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for name, justify in (("", "left"), ("verdict", "right"), ("BLEU", "right"), ("chrF", "right"), ("n", "right")):
        table.add_column(name, justify="right" if justify == "right" else "left")
    for name, row in rows_of(figures):
        verdict = f"{row['accuracy']:.1%} [{row['accuracy_ci'][0]:.1%}, {row['accuracy_ci'][1]:.1%}]" if "accuracy" in row else "-"
        table.add_row(
            name, verdict, f"{row['bleu']:.1f}", f"{row['chrf']:.1f} [{row['chrf_ci'][0]:.1f}, {row['chrf_ci'][1]:.1f}]", str(row["n"])
        )
    out = Console(highlight=False, soft_wrap=True)
    out.print(table)
    out.print(
        f"{figures['tokens_per_second']:.1f} tokens/s, {figures['latency_p50_ms']:.0f} ms a record (median, one thread), "
        f"{figures['peak_rss_mb']:.0f} MiB at most, file {figures['file_mb']:.1f} MiB, "
        f"{figures['cpu_seconds_per_1000']:.3g} CPU-seconds for 1,000 answers"
    )
    for name, row in figures.get("peers", {}).items():
        paired = row["paired"]
        out.print(f"against {name}: {paired['diff']:+.2f} [{paired['low']:+.2f}, {paired['high']:+.2f}], p = {paired['p']:.4f} (paired)")
    for sentence in figures.get("statements", ()):
        out.print(f"- {sentence}", markup=False)
    out.print(f"BLEU {figures['bleu_signature']}\nchrF {figures['chrf_signature']}", style="dim")
    if figures["n"] < 1000:
        stderr.print(f"{figures['n']} records: small differences mean nothing here; read the intervals", style="dim")


def rows_of(figures: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """(name, figures) of every model, on every held-out set where there are several."""
    if "sets" not in figures:
        return [(figures["model"], figures), *figures.get("peers", {}).items()]
    several = len(figures["sets"]) > 1
    return [
        ((f"{where}: " if several else "") + (figures["model"] if name == STUDENT else name), row)
        for where, found in figures["sets"].items()
        for name, row in found["models"].items()
    ]
