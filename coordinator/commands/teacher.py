"""`milpa-coordinator teacher`: what a teacher is and can do, before hours are spent on it."""

import time
from pathlib import Path
from typing import Any

import typer

from protocol.console import print_json, stderr

PROMPTS = ("English: The pump is dry.\nSpanish:", "English: Where is the water?\nSpanish:", "English: The tank is low again.\nSpanish:")
SOURCES = ("The pump is dry.", "Where is the water?", "The tank is low again.")
NEW_TOKENS = 24


def check(
    spec: str = typer.Argument(help="MODEL.gguf, hf:FOLDER, http://HOST:PORT/v1#MODEL, command:PROGRAM ARGUMENTS or file:PAIRS.tsv."),
    vocabulary: Path | None = typer.Option(None, help="With a server: a GGUF with the student's vocabulary, to compare token ids with."),
    threads: int = typer.Option(1, min=1, max=256, help="Processor threads, for a model that runs here."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object to stdout and nothing else there."),
) -> None:
    """Open a teacher, ask it three short prompts and say what it is: its digest, open or text only and what that costs, its speed.

    Examples:

        milpa-coordinator teacher check model/teacher.gguf

        milpa-coordinator teacher check http://127.0.0.1:8000/v1#gemma --json

        milpa-coordinator teacher check "command:apertium -u eng-spa"
    """
    from coordinator.forge.teachers import open_teacher

    teacher = open_teacher(spec, threads=threads, vocabulary=vocabulary)
    try:
        found = described(teacher)
    finally:
        teacher.close()
    if as_json:
        print_json(found)
    else:
        show(found)


def described(teacher: Any) -> dict[str, Any]:
    """Name, digest, kind, costs, answers and speed of an open `Teacher`."""
    from coordinator.forge.teachers.cost import cost_of_text_only

    began = time.perf_counter()
    asked = SOURCES if teacher.reads == "source" else PROMPTS
    answers = [said for said, *_ in filter(None, teacher.generate(asked, n=1, temperature=0.0, seed=0, max_new_tokens=NEW_TOKENS))]
    seconds = time.perf_counter() - began
    tokens = sum(len(said.tokens) for said in answers) if teacher.open else None
    return {
        "name": teacher.name,
        "digest": teacher.digest,
        "open": teacher.open,
        "reads": teacher.reads,
        "tokenizer": teacher.tokenizer,
        "vocabulary": teacher.vocabulary,
        "costs": None if teacher.open else cost_of_text_only(teacher.name),
        "answers": [said.text for said in answers],
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if tokens else None,
        "answers_per_second": len(answers) / seconds,
    }


def show(found: dict[str, Any]) -> None:
    """A few lines for people."""
    speed = f"{found['tokens_per_second']:.1f} tokens/s" if found["tokens_per_second"] else f"{found['answers_per_second']:.1f} answers/s"
    lines = [f"{found['name']}  SHA-256 {found['digest'][:16]}", f"{speed} on {len(found['answers'])} short prompts together"]
    if found["open"]:
        lines.append(f"open: log-probabilities over {found['vocabulary']} tokens (vocabulary {found['tokenizer'][:16]})")
    else:
        lines.append(f"text only: {found['costs'].sentence}")
    lines += [f"  {text.strip()}" for text in found["answers"]]
    stderr.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
