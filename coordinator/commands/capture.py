"""`milpa-coordinator capture`: what a teacher thinks of every target token, on disk, for any number of students and epochs."""

import contextlib
from pathlib import Path
from typing import Literal

import typer

from protocol.console import print_json, progress_bar, stderr
from protocol.errors import BadInput


def capture(
    teacher: str = typer.Option(
        ..., help="A Gemma 3 GGUF, for any mode; for mode topk any GGUF (by llama.cpp), hf:FOLDER or http://HOST:PORT/v1#MODEL too."
    ),
    out: Path = typer.Option(..., help="Folder of the cache; several processes may share it."),
    task: str | None = typer.Option(None, help="With --records: the task, such as 'ranch'."),
    records: Path | None = typer.Option(None, help="Training records, one JSON object a line."),
    pairs: Path | None = typer.Option(None, help="Training pairs: UTF-8, source, a tab, target, one a line."),
    source: str = typer.Option("English", help="With --pairs: language of the first column."),
    target: str = typer.Option("Spanish", help="With --pairs: language of the second column."),
    vocabulary: Path | None = typer.Option(
        None, help="A GGUF with the student's vocabulary: the cache has its ids. hf: and http: need it; a GGUF has its own, compared."
    ),
    answers: Literal["given", "teacher"] = typer.Option(
        "given", help="'given': score the records' own targets; 'teacher': let it answer first."
    ),
    mode: Literal["topk", "sampled", "hidden8"] = typer.Option(
        "topk", help="'topk' and a tail, 'sampled' (unbiased), or 'hidden8' (all of it; its reader needs the teacher's file)."
    ),
    k: int = typer.Option(50, min=1, help="Ids a token in mode topk, draws a token in mode sampled."),
    temperature: float = typer.Option(1.0, help="The distribution kept is softmax(logits / temperature); 1 but for a Gemma 3 GGUF."),
    shard: str = typer.Option("0/1", help="I/N: only the I-th of N shares of the records, by hash; one process each."),
    limit: int | None = typer.Option(None, min=1, help="Only the first so many records."),
    replace: bool = typer.Option(False, "--replace", help="Capture records again that changed since, in place of what is there of them."),
    threads: int = typer.Option(2, min=1, max=256, help="Processor threads."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object to stdout and nothing else there."),
) -> None:
    """Capture a teacher's view of every target token. Running it again goes on where it stopped, and makes anew what was damaged on disk.

    A teacher of another vocabulary, or one that tells text only, cannot fill a cache: `milpa-coordinator synthesise` has it write targets.
    How to train from the cache, here or in a loop of your own: docs/cached-teacher-logits.md.

    Examples:

        milpa-coordinator capture --teacher model/teacher.gguf --task ranch --records train.jsonl --out cache

        milpa-coordinator capture --teacher teacher.gguf --pairs train.tsv --answers teacher --shard 0/4 --out cache --json

        milpa-coordinator capture --teacher http://127.0.0.1:8000/v1#gemma --vocabulary student.gguf --pairs train.tsv --out cache
    """
    from coordinator.forge.pairs import read_either
    from coordinator.forge.sharing import Worker
    from coordinator.forge.targets.cache import TargetCache
    from coordinator.forge.targets.capture import capture as captured
    from coordinator.forge.targets.capture import header_from, header_of, log_of
    from coordinator.forge.teachers import OTHER_VOCABULARY, model_file, open_teacher
    from protocol.models.checkpoint import ARCHITECTURE, Checkpoint
    from protocol.models.header import check_file
    from protocol.models.tokenizer import Tokenizer
    from protocol.models.torch_model import best_dtype, to_torch, use_threads

    if out.exists() and not out.is_dir():
        raise BadInput(f"--out {out} is a file; name a folder")
    worker = Worker.named(shard)
    wanted, found = read_either(pairs, source, target, task, records, limit=limit, to="capture")
    use_threads(threads)
    file = model_file(teacher)
    gemma = file if file is not None and check_file(file).architecture == ARCHITECTURE else None
    if gemma is None and (mode != "topk" or temperature != 1.0):
        raise BadInput(
            f"{teacher} gives the top of its distribution at temperature 1: take --mode topk without --temperature, or a Gemma 3 GGUF"
        )
    if vocabulary is None and file is None and teacher.startswith(("hf:", "http:", "https:")):
        raise BadInput(
            f"say --vocabulary STUDENT.gguf with {teacher}: the ids in the cache are the student's, and are compared with its own"
        )
    with contextlib.ExitStack() as stack:
        if gemma is not None:
            checkpoint = Checkpoint.read(gemma)
            header, knows = header_of(checkpoint, mode=mode, k=k, temperature=temperature), to_torch(checkpoint, dtype=best_dtype())
        else:
            knows = stack.enter_context(contextlib.closing(open_teacher(teacher, threads=threads, vocabulary=vocabulary)))
            header = header_from(knows, k=k)
        ids = vocabulary or file
        assert ids is not None  # who has none tells text only, and was refused
        tokenizer = stack.enter_context(Tokenizer(ids))
        if tokenizer.digest != header.tokenizer:
            raise BadInput(f"{vocabulary} has another vocabulary than {teacher}: {OTHER_VOCABULARY}")
        cache = stack.enter_context(TargetCache(out, header, worker=worker))
        bar = stack.enter_context(progress_bar())
        line = bar.add_task("capture", total=100)
        _, result = captured(
            knows, tokenizer, wanted, found, cache=cache, log=log_of(out, worker), answers=answers, replace=replace,
            progress=lambda share, words: bar.update(line, completed=round(100 * share), description=words),
        )  # fmt: skip
    if as_json:
        print_json({"cache": str(out), "mode": mode, "shard": shard, **{name: getattr(result, name) for name in result.__struct_fields__}})
        return
    told = f"{result.records} records, {result.tokens} target tokens at {result.bytes_a_token:.0f} B; {result.tokens_a_second:.0f} tokens/s"
    if result.again:
        told += f"; {result.again} of them captured again, their view was lost or they were replaced"
    stderr.print(f"{out}: {told}", markup=False, highlight=False)
