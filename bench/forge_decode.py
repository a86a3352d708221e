"""Decode speed a thread: the `small` student in Q4_K_M against the teacher's own packaged Q4_K_M file, in the same run."""

from typing import Any

from bench.settings import Settings
from bench.speed import decode_speed, ratio, unfinished
from bench.student import small
from protocol.models.checkpoint import quantise
from protocol.models.engine import Engine

PROMPTS, TURNS = 8, 5


def measure(settings: Settings) -> dict[str, Any]:
    folder = settings.folder("decode")
    student = folder / "small.gguf"
    if not student.is_file():
        quantise(small(settings), student, "F16" if settings.quick else "Q4_K_M", threads=settings.threads)
    files = {"student": student, "teacher": settings.base(), "teacher, trimmed vocabulary": settings.trimmed()}
    prompts = unfinished([record.source for record in settings.pairs("dev")], 2 if settings.quick else PROMPTS)
    engines = {name: Engine(path, threads=1) for name, path in files.items()}
    try:
        speeds = decode_speed(engines, prompts, turns=2 if settings.quick else TURNS)
    finally:
        for engine in engines.values():
            engine.close()
    return ratio(speeds, "student", "teacher") | {
        "against": {"teacher's Q4_K_M, tokens a CPU-second": speeds["teacher"]["tokens_per_cpu_s"]},
        "over_trimmed_teacher": ratio(speeds, "student", "teacher, trimmed vocabulary"),
        "speeds": speeds,
        "megabytes": {name: path.stat().st_size / 1e6 for name, path in files.items()},
        "n": speeds["student"]["tokens"],
        "trained": False,
    }
