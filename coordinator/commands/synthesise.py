"""`milpa-coordinator synthesise`: new training targets from a teacher, gated, scored, audited."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from protocol.console import print_json, progress_bar, stderr
from protocol.errors import BadInput

if TYPE_CHECKING:
    from coordinator.forge.synthesis.audit import Audit
    from coordinator.forge.synthesis.sampling import Summary
    from coordinator.forge.synthesis.scoring import Back
    from coordinator.forge.teachers import Teacher
    from protocol.models.tokenizer import Tokenizer
    from protocol.tasks import Task


def synthesise(
    teacher: str = typer.Option(
        ..., help="MODEL.gguf, hf:FOLDER, http://HOST:PORT/v1#MODEL, 'command:PROGRAM ARGUMENTS' or file:PAIRS.tsv."
    ),
    out: Path = typer.Option(..., help="File of rows, one a source; running the command again goes on with it."),
    pairs: Path | None = typer.Option(None, help="Sources: UTF-8, SOURCE<tab>TARGET, one a line; the target is the reference."),
    source: str = typer.Option("English", help="With --pairs: language of the first column."),
    target: str = typer.Option("Spanish", help="With --pairs: language of the second column."),
    task: str | None = typer.Option(None, help="With --records: the task, such as 'ranch'."),
    records: Path | None = typer.Option(None, help="Sources as records, one JSON object a line; the answers may be empty."),
    limit: int | None = typer.Option(None, min=1, help="Only the first so many records."),
    samples: int = typer.Option(
        6, min=1, max=128, help="Samples of a source at most; all get 2, the rest where it pays. 1: the greedy answer."
    ),
    keep: int = typer.Option(3, min=1, max=128, help="Texts kept of a source, the best first."),
    temperature: float = typer.Option(0.7, help="Of the samples."),
    back: str | None = typer.Option(None, help="Translator the other way round, as --teacher names one: scores by round trip too."),
    vocabulary: Path | None = typer.Option(None, help="A GGUF with the teacher's vocabulary, where the teacher is not itself a GGUF."),
    shard: str = typer.Option(
        "0/1", help="Which worker this is: I/N shares the sources out over N workers, each with an --out of its own; see --join."
    ),
    join: list[Path] = typer.Option(
        [],
        help="Take the rows of this worker's --out into ours; repeat. With the same command less --shard, which asks what is missing.",
    ),
    targets: Path | None = typer.Option(
        None,
        help="Also write what was kept as records that `distill --records` reads, and who wrote them beside it with the ending .made.json: "
        "keep the two together.",
    ),
    generic: Path | None = typer.Option(None, help="With --targets: pairs or records (*.jsonl) with answers, mixed in against forgetting."),
    generic_share: float = typer.Option(0.3, "--generic-share", help="With --generic: their share of all."),
    audit: str | None = typer.Option(
        None, help="A second teacher that audits a sample; writes OUT with the ending .audit.json, its figures also beside --targets."
    ),
    audit_sample: int = typer.Option(200, "--audit-sample", min=2, help="With --audit: targets audited."),
    seconds: float | None = typer.Option(None, min=1.0, help="Stop after so long; the same command goes on."),
    seed: int = typer.Option(0, help="Of everything random."),
    threads: int = typer.Option(2, min=1, max=256, help="Processor threads of a teacher that runs here."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object to stdout and nothing else there."),
) -> None:
    """Let a teacher answer sources several times, and keep the answers that pass every gate, the most consistent first.

    Every source becomes one row of --out: what was kept with its score and the signals behind it, what was refused with the reason.
    Rows are written 32 sources at a time. Killed at any moment it asks again only the sources that were not written yet, loses no row and
    doubles none; the same command goes on. Gates for numbers and names are between English and Spanish only.
    --targets, --generic and --audit are of all rows together: with --shard they wait for the command that joins.

    Examples:

        milpa-coordinator synthesise --teacher teacher.gguf --pairs train.tsv --out rows.jsonl --targets targets.jsonl

        milpa-coordinator synthesise --teacher t.gguf --pairs train.tsv --back 'command:apertium -u spa-eng' --shard 0/2 --out 0.jsonl

        milpa-coordinator synthesise --teacher t.gguf --pairs train.tsv --back 'command:apertium -u spa-eng' --join 0.jsonl --join 1.jsonl --out rows.jsonl --targets targets.jsonl

        milpa-coordinator synthesise --teacher teacher.gguf --task ranch --records new.jsonl --audit other.gguf --out rows.jsonl --json
    """  # noqa: E501
    from coordinator.forge.pairs import read_either
    from coordinator.forge.sharing import Worker
    from coordinator.forge.synthesis import sampling
    from coordinator.forge.synthesis.language import identify
    from coordinator.forge.synthesis.rows import RowLog
    from coordinator.forge.synthesis.scoring import Judge
    from coordinator.forge.teachers import open_teacher

    if generic is not None and targets is None:
        raise BadInput("--generic needs --targets FILE: that is the file they are mixed into")
    plan = sampling.Plan(samples=samples, temperature=temperature, keep=min(keep, samples), seed=seed).checked()
    worker = Worker.named(shard)
    if worker.of > 1 and (targets or audit or join):
        raise BadInput(
            f"--targets, --generic, --audit and --join are of all workers' rows together; leave them out with --shard {shard}, and once "
            "all are done run the command without --shard and with --join FILE for each worker's --out"
        )
    wanted, found = read_either(pairs, source, target, task, records, limit=limit, to="answer")
    with contextlib.ExitStack() as stack:
        asked = stack.enter_context(contextlib.closing(open_teacher(teacher, threads=threads, vocabulary=vocabulary)))
        text = tokenizer_of(stack, asked, teacher, vocabulary)
        turned, back_digest = way_back(stack, wanted, back, threads=threads) if back else (None, "")
        judge = Judge(log_probs=asked.log_probs if text else None, text=text, back=turned)
        signals = [name for name, known in (("log_prob", text is not None), ("round_trip", back is not None)) if known]
        log = stack.enter_context(RowLog(out, sampling.plan_of(asked, wanted, plan, worker=worker, signals=signals, back=back_digest)))
        for file in join:
            log.join(file)
        with progress_bar() as bar:
            line = bar.add_task(f"asking {asked.name}", total=len(found))
            made = sampling.synthesise(
                asked, wanted, found, log, plan=plan, judge=judge, identify=identify, worker=worker, seconds=seconds,
                progress=lambda done, total: bar.update(line, completed=done, total=total),
            )  # fmt: skip
    figures: dict[str, Any] = {"rows": str(out), "teacher": asked.name, "teacher_digest": asked.digest, "open": asked.open} | to_plain(made)
    audited = None
    if audit is not None:
        audited, file = write_audit(audit, wanted, out, vocabulary=vocabulary, sample=audit_sample, seed=seed, threads=threads)
        figures["audit"] = {name: value for name, value in audited.plain().items() if name != "verdicts"} | {"file": str(file)}
    if targets is not None:
        figures["targets"] = write_targets(
            targets, wanted, out, generic=generic, share=generic_share, seed=seed, teacher=asked, counts=made, audit=audited
        )
    if as_json:
        print_json(figures)
    else:
        show(figures, audited)


def tokenizer_of(stack: contextlib.ExitStack, teacher: "Teacher", spec: str, vocabulary: Path | None) -> "Tokenizer | None":
    """The tokeniser of an open teacher: its own file's, or the one given; None where there is none, and scores go without log p(end).

    Raises:
        BadInput: the vocabulary given is not the teacher's.
    """
    from protocol.models.tokenizer import Tokenizer

    file = vocabulary or (Path(spec.removeprefix("hf:")) if spec.endswith(".gguf") else None)
    if not teacher.open or file is None:
        return None
    text = stack.enter_context(Tokenizer(file))
    if text.digest != teacher.tokenizer:
        raise BadInput(f"{file} has another vocabulary than the teacher {teacher.name}; leave --vocabulary out or name the right file")
    return text


def way_back(stack: contextlib.ExitStack, task: "Task", spec: str, *, threads: int) -> tuple["Back", str]:
    """A translator from the task's target language to its source language, and its digest.

    Raises:
        BadInput: the task is no translation.
    """
    from coordinator.forge.teachers import asked, open_teacher
    from protocol.tasks import Record, translation

    parts = task.name.split("-")
    if task.kind != "text" or len(parts) != 3:
        raise BadInput(f"--back needs a translation task; {task.name!r} has no way back")
    turned = translation(parts[2].capitalize(), parts[1].capitalize())
    teacher = stack.enter_context(contextlib.closing(open_teacher(spec, threads=threads)))

    def back(texts: Sequence[str]) -> list[str]:
        prompts = asked(teacher, turned, [Record(id="back", task=turned.name, source=text) for text in texts])
        said = teacher.generate(prompts, n=1, temperature=0.0, seed=0, max_new_tokens=turned.max_new_tokens + 1)
        return [turned.parse(answers[0].text).text if answers else "" for answers in said]

    return back, teacher.digest


def write_targets(
    file: Path, task: "Task", rows: Path, *, generic: Path | None, share: float, seed: int, teacher: "Teacher", counts: "Summary",
    audit: "Audit | None",
) -> dict[str, Any]:  # fmt: skip
    """Write the kept texts, and generic records among them, as records, and beside them who made them; the file is whole or not there."""
    import msgspec

    from coordinator.forge.pairs import read_pairs, read_records
    from coordinator.forge.synthesis.made import Made, write_made
    from coordinator.forge.synthesis.mixing import mixed, training_records
    from coordinator.forge.synthesis.rows import read_header, read_rows
    from coordinator.forge.teachers.cost import cost_of_text_only
    from protocol.blobs import write_atomically
    from protocol.digests import digest_bytes, digest_file

    kept = training_records(task, read_rows(rows))
    others = [] if generic is None else (read_records if generic.suffix == ".jsonl" else read_pairs)(generic, task)
    found = mixed(kept, others, share=share if others else 0.0, seed=seed)
    data = b"".join(msgspec.json.encode(record) + b"\n" for record in found)
    generic_part = (len(found) - len(kept)) / max(1, len(found))
    made = Made(
        file_digest=digest_bytes(data), records=len(found), generic=generic_part, generic_digest=digest_file(generic) if generic else "",
        teacher=teacher.name, teacher_digest=teacher.digest, open=teacher.open,
        cost=None if teacher.open else cost_of_text_only(teacher.name), plan=read_header(rows).plan, counts=counts,
        audit=audit.without_texts() if audit else None,
    )  # fmt: skip
    write_made(file, made)
    write_atomically(file, data)
    return {"file": str(file), "records": len(found), "generic": generic_part}


def write_audit(
    spec: str, task: "Task", rows: Path, *, vocabulary: Path | None, sample: int, seed: int, threads: int
) -> tuple["Audit", Path]:
    """Audit the kept texts, and the file that holds every verdict."""
    import msgspec

    from coordinator.forge.synthesis.audit import audit
    from coordinator.forge.synthesis.rows import read_rows
    from coordinator.forge.teachers import open_teacher
    from protocol.blobs import write_atomically

    with contextlib.ExitStack() as stack:
        second = stack.enter_context(contextlib.closing(open_teacher(spec, threads=threads)))
        text = tokenizer_of(stack, second, spec, None if spec.endswith(".gguf") else vocabulary)
        found = audit(second, task, read_rows(rows), text=text, sample=sample, seed=seed)
    file = rows.with_suffix(".audit.json")
    write_atomically(file, msgspec.json.format(msgspec.json.encode(found)))
    return found, file


def to_plain(value: object) -> dict[str, Any]:
    """A struct as JSON would have it."""
    import msgspec

    found: dict[str, Any] = msgspec.to_builtins(value)
    return found


def show(figures: dict[str, Any], audited: "Audit | None") -> None:
    """A few lines for people."""
    refused = ", ".join(f"{gate} {count}" for gate, count in figures["refused"].items()) or "none"
    lines = [
        f"{figures['kept']} of {figures['sources']} sources have a target, {figures['texts']} texts in all; {figures['left']} sources left",
        f"{figures['samples']} samples asked for, {figures['saved']:.0%} saved where the first agreed; refused: {refused}",
    ]
    if "targets" in figures:
        lines.append(f"{figures['targets']['file']}: {figures['targets']['records']} records, {figures['targets']['generic']:.0%} generic")
    if audited:
        lines.append(f"{figures['audit']['file']}: {audited.sentence}")
    stderr.print("\n".join(lines), markup=False, highlight=False)
