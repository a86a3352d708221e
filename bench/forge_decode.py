"""Decode speed a thread: the `small` student in Q4_K_M against the teacher's own packaged Q4_K_M file, in the same run.

The student has the vocabulary of `milpa-coordinator distill --student small` on all of Tatoeba's pairs, and untrained weights.
Beside it, what would make it faster: half of the attention heads, an embedding in Q4_K where llama.cpp chooses Q6_K, and both. What these
cost in quality is another measure's business.
"""

from typing import Any

from bench.settings import Settings
from bench.speed import decode_speed, ratio, unfinished
from bench.student import packed
from protocol.models.engine import Engine

PROMPTS, TURNS = 8, 5
FEWER_HEADS = 2


def measure(settings: Settings) -> dict[str, Any]:
    fewer = 1 if settings.quick else FEWER_HEADS
    variants = {
        "student": packed(settings),
        "student, embedding Q4_K": packed(settings, embedding="Q4_K"),
        f"student, {fewer} heads": packed(settings, heads=fewer),
        "student, both": packed(settings, heads=fewer, embedding="Q4_K"),
    }
    files = {**variants, "teacher": settings.base(), "teacher, trimmed vocabulary": settings.trimmed_for_users()}
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
        "would_change_it": {name: ratio(speeds, name, "teacher") for name in variants if name != "student"},
        "speeds": speeds,
        "megabytes": {name: path.stat().st_size / 1e6 for name, path in files.items()},
        "n": speeds["student"]["tokens"],
        "trained": False,
    }
