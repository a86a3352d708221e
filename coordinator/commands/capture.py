"""`milpa-coordinator capture`: what a teacher thinks of every target token, on disk, for any number of students and epochs."""

from pathlib import Path
from typing import Literal

import typer

from protocol.console import print_json, progress_bar, stderr
from protocol.errors import BadInput


def capture(
    teacher: Path = typer.Option(..., help="The teacher, a Gemma 3 GGUF; its vocabulary must be the student's."),
    out: Path = typer.Option(..., help="Folder of the cache; several processes may share it."),
    task: str | None = typer.Option(None, help="With --records: the task, such as 'ranch'."),
    records: Path | None = typer.Option(None, help="Training records, one JSON object a line."),
    pairs: Path | None = typer.Option(None, help="Training pairs: UTF-8, source, a tab, target, one a line."),
    source: str = typer.Option("English", help="With --pairs: language of the first column."),
    target: str = typer.Option("Spanish", help="With --pairs: language of the second column."),
    answers: Literal["given", "teacher"] = typer.Option(
        "given", help="'given': score the records' own targets; 'teacher': let it answer first."
    ),
    mode: Literal["topk", "sampled", "hidden8"] = typer.Option(
        "topk", help="'topk' and a tail, 'sampled' (unbiased), or 'hidden8' (all of it; its reader needs the teacher's file)."
    ),
    k: int = typer.Option(50, min=1, help="Ids a token in mode topk, draws a token in mode sampled."),
    temperature: float = typer.Option(1.0, help="The distribution kept is softmax(logits / temperature)."),
    shard: str = typer.Option("0/1", help="I/N: only the I-th of N shares of the records, by hash; one process each."),
    limit: int | None = typer.Option(None, min=1, help="Only the first so many records."),
    threads: int = typer.Option(2, min=1, max=256, help="Processor threads."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object to stdout and nothing else there."),
) -> None:
    """Capture a teacher's view of every target token. Running it again goes on where it stopped.

    How to train from the cache, here or in a loop of your own: docs/cached-teacher-logits.md.

    Examples:

        milpa-coordinator capture --teacher model/teacher.gguf --task ranch --records train.jsonl --out cache

        milpa-coordinator capture --teacher teacher.gguf --pairs train.tsv --answers teacher --shard 0/4 --out cache --json
    """
    from coordinator.forge.pairs import read_either
    from coordinator.forge.sharing import Worker
    from coordinator.forge.targets.cache import TargetCache
    from coordinator.forge.targets.capture import capture as captured
    from coordinator.forge.targets.capture import header_of, log_of
    from protocol.models.checkpoint import Checkpoint
    from protocol.models.tokenizer import Tokenizer
    from protocol.models.torch_model import best_dtype, to_torch, use_threads

    if out.exists() and not out.is_dir():
        raise BadInput(f"--out {out} is a file; name a folder")
    worker = Worker.named(shard)
    wanted, found = read_either(pairs, source, target, task, records, limit=limit, to="capture")
    use_threads(threads)
    checkpoint = Checkpoint.read(teacher)
    header = header_of(checkpoint, mode=mode, k=k, temperature=temperature)
    with progress_bar() as bar, Tokenizer(teacher) as tokenizer, TargetCache(out, header, worker=worker) as cache:
        line = bar.add_task("capture", total=100)
        _, result = captured(
            to_torch(checkpoint, dtype=best_dtype()), tokenizer, wanted, found, cache=cache, log=log_of(out, worker),
            answers=answers, progress=lambda share, words: bar.update(line, completed=round(100 * share), description=words),
        )  # fmt: skip
    if as_json:
        print_json({"cache": str(out), "mode": mode, "shard": shard, **{name: getattr(result, name) for name in result.__struct_fields__}})
        return
    told = f"{result.records} records, {result.tokens} target tokens at {result.bytes_a_token:.0f} B; {result.tokens_a_second:.0f} tokens/s"
    stderr.print(f"{out}: {told}", markup=False, highlight=False)
