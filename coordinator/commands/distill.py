"""`milpa-coordinator distill`: records in, a corrected teacher and a small student out."""

from pathlib import Path
from typing import Literal

import typer

from protocol.console import print_json, progress_bar, stderr
from protocol.errors import BadInput


def distill(
    out: Path = typer.Option(..., help="Folder for the files: teacher, student, the untrained student, initial adapter, lineage.json."),
    task: str | None = typer.Option(None, help="With --records: the task, such as 'ranch'."),
    records: Path | None = typer.Option(
        None, help="Training records, one JSON object a line. Of those of `synthesise` the lineage says who wrote them: RECORDS.made.json."
    ),
    pairs: Path | None = typer.Option(None, help="Training pairs: UTF-8, source, a tab, target, one a line."),
    source: str = typer.Option("English", help="With --pairs: language of the first column."),
    target: str = typer.Option("Spanish", help="With --pairs: language of the second column."),
    teacher: Path | None = typer.Option(None, help="A Gemma 3 GGUF to start from; by default the packaged 270M model."),
    cache: Path | None = typer.Option(
        None,
        help="What a teacher of --teacher's pieces thinks, captured before (`capture`). --teacher is then taken as it is: "
        "all of --budget is the student's.",
    ),
    work: Path | None = typer.Option(
        None, help="Where stages are kept, found again, resumed and shared by several students; by default OUT/work."
    ),
    budget: str = typer.Option("demo", help="'demo' (8 minutes), 'hour', seconds in all, or of teacher,capture,student: 4200,900,12300."),
    student: str | None = typer.Option(
        None,
        help="'small', 'tiny', 'nano', or a shape: 12x512x1024x2 is blocks, width, feed-forward, heads. By default --blocks at full width.",
    ),
    blocks: int = typer.Option(8, min=1, help="Transformer blocks the student keeps, without --student."),
    scratch: bool = typer.Option(False, "--scratch", help="Random weights in the shape of --student instead of a cut (bench.crossover)."),
    pieces: int | None = typer.Option(
        None,
        min=5000,
        show_default="30000",
        help="Of a translation: size of its vocabulary at most; more spells rare words in fewer tokens, in larger files.",
    ),
    mode: Literal["topk", "sampled", "hidden8"] | None = typer.Option(
        None, show_default="topk", help="What is captured of the teacher: see `capture --help`."
    ),
    loss: str = typer.Option("kl", help="How the student follows it: kl, reverse_kl, skew_kl, jsd, total_variation."),
    alpha: float = typer.Option(0.1, min=0.0, max=1.0, help="Weight of that loss; cross-entropy has the rest."),
    own: float = typer.Option(3.0, min=0.0, help="Records with their own targets, for each captured one."),
    ternary: bool = typer.Option(False, "--ternary", help="Train weights of three values; needs --student. The file is TQ2_0."),
    kind: str | None = typer.Option(None, help="Type of the student's file; by default Q8_0, Q4_K_M with --student, TQ2_0 with --ternary."),
    on_policy: float = typer.Option(0.0, min=0.0, help="Seconds more, in which the student writes and the teacher scores."),
    blockwise: bool = typer.Option(False, "--blockwise", help="With --on-policy: written in blocks, of which the teacher keeps a part."),
    polish: float = typer.Option(0.0, min=0.0, help="Seconds more of training by rewards (form, consistency, language, length)."),
    limit: int | None = typer.Option(None, min=1, help="Only the first so many records."),
    seed: int = typer.Option(0, help="Of everything random."),
    threads: int = typer.Option(2, min=1, max=256, help="Processor threads for training, of each process."),
    accumulate: int = typer.Option(1, min=1, max=4096, help="Batches a training step; under a launcher a multiple of its processes."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object to stdout and nothing else there."),
) -> None:
    """Correct a general model on a task, cut a student out of it, distil, and write both as GGUF.

    Running it again goes on where it stopped; finished stages with the same inputs are not computed again.

    Examples:

        milpa-coordinator ranch --site general --seed 1 --count 6000 --out train.jsonl

        milpa-coordinator distill --task ranch --records train.jsonl --out model

        milpa-coordinator distill --pairs train.tsv --source English --target Spanish --budget hour --out model --json

        milpa-coordinator distill --pairs train.tsv --student small --budget hour --out small --json

        milpa-coordinator distill --teacher teacher.gguf --cache cache --pairs train.tsv --student tiny --budget 3600 --out tiny

        accelerate launch --multi_gpu --num_processes 2 -m coordinator.cli distill --pairs train.tsv --out model --accumulate 2
    """
    from coordinator.forge.pairs import read_either
    from coordinator.forge.pipeline import forge
    from coordinator.forge.plan import Budget, Plan
    from coordinator.forge.students.cut import preset
    from coordinator.forge.students.export import DEFAULT_KIND, KINDS
    from coordinator.forge.students.trim import PIECES
    from coordinator.forge.synthesis.made import read_made
    from coordinator.forge.training import scale
    from coordinator.forge.training.objective import DIVERGENCES
    from coordinator.forge.training.recipe import Recipe
    from protocol.models.checkpoint import TERNARY_KINDS
    from protocol.names import known

    if student is not None:
        preset(student)
    if kind is not None:
        known(kind, KINDS, what="file type")
        if (kind in TERNARY_KINDS) != ternary:
            raise BadInput(f"--kind {kind} is {'' if kind in TERNARY_KINDS else 'not '}for weights of three values, which --ternary trains")
    if out.exists() and not out.is_dir():
        raise BadInput(f"--out {out} is a file; name a folder")
    if ternary and student is None:
        raise BadInput("--ternary needs --student small, tiny or nano: rows of the teacher's width do not fit its blocks of 256 weights")
    if scratch and student is None:
        raise BadInput("--scratch needs --student: a preset, or a shape such as 12x512x1024x2")
    if cache is not None and teacher is None:
        raise BadInput("--cache needs --teacher: the file that it was captured from, or one of the same pieces")
    for name, said in (("--pieces", pieces), ("--mode", mode)):
        if cache is not None and said is not None:
            raise BadInput(f"{name} {said} was decided when {cache} was captured: leave it out, or capture anew without --cache")
    known(loss, DIVERGENCES, what="loss")
    plan = Plan(
        budget=Budget.named(budget),
        seed=seed,
        preset=student or "",
        blocks=blocks,
        scratch=scratch,
        pieces=pieces or PIECES,
        mode=mode or "topk",
        loss=loss,
        alpha=alpha,
        own=own,
        blockwise=blockwise,
        threads=threads,
        accumulate=accumulate,
        on_policy=Recipe(mode="full", learning_rate=1e-4, seconds=on_policy) if on_policy else None,
        polish=Recipe(mode="full", learning_rate=5e-5, batch_tokens=1024, seconds=polish) if polish else None,
        student=Recipe(mode="full", learning_rate=5e-4, ternary=ternary),
        kind=kind or ("TQ2_0" if ternary else "Q4_K_M" if student else DEFAULT_KIND),
    )
    wanted, found = read_either(pairs, source, target, task, records, limit=limit, to="learn from")
    made_by = read_made(records) if records else None

    with progress_bar() as bar:
        lines = {}

        def told(stage: str, share: float, words: str) -> None:
            if stage not in lines:
                lines[stage] = bar.add_task(stage, total=100)
            bar.update(lines[stage], completed=round(100 * share), description=f"{stage:<8} {words}")

        world = scale.world()
        made = forge(
            wanted, found, work=work or out / "work", out=out, plan=plan, base=teacher, cache=cache,
            targets=made_by.plain() if made_by else None, progress=told, world=world,
        )  # fmt: skip
    world.close()
    if world.rank:
        return  # the first process speaks for all
    licence = made.lineage["licence"]
    stderr.print(f"weights derive from the teacher's, under its terms: {licence['name']} {licence['file']}", markup=False, highlight=False)
    if as_json:
        print_json(
            {
                "teacher": str(made.teacher),
                "student": str(made.student),
                "student_float": str(made.student_float),
                "initial_adapter": str(made.initial_adapter),
                "lineage": made.lineage,
            }
        )
        return
    stderr.print(
        f"teacher {made.teacher}\nstudent {made.student} ({made.student.stat().st_size / 1e6:.1f} MB)", markup=False, highlight=False
    )
