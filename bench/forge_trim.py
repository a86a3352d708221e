"""The vocabulary trim: how much smaller and faster the packaged teacher gets, and how much of unseen general text still tokenises the same.

The setting is `milpa-coordinator distill --pieces 46000`; by default there are fewer, for a small student's sake. Counted, as there: the
task's training pairs and, up to `PIECES`, English and Spanish word lists with frequencies (`wordfreq`).
Coverage is of text that was not counted: NTREX-MX (news) and the Tatoeba test set, both languages of both. Share of text = tokens that are
still there at the same place. The curve says what other numbers of pieces buy.
"""

from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from bench.settings import TRANSLATION, Settings
from bench.speed import decode_speed, ratio, unfinished
from coordinator.forge.pairs import read_pairs
from coordinator.forge.students.trim import PIECES as DEFAULT
from coordinator.forge.students.trim import coverage
from protocol.models.engine import Engine

PIECES = 46_000  # 2.5 times smaller and twice as fast; 99% of unseen general text takes 70,000 and gives up both
CURVE = (25_000, 30_000, 60_000, 70_000, 90_000)
PROMPTS, TURNS = 6, 5
QUICK_PIECES = 400


def measure(settings: Settings) -> dict[str, Any]:
    base = settings.base()
    unseen = texts(settings)
    chosen = settings.trimmed_for_users(QUICK_PIECES if settings.quick else PIECES)
    found = msgspec.to_builtins(coverage(base, chosen, [text for part in unseen.values() for text in part]))
    parts = {name: msgspec.to_builtins(coverage(base, chosen, part)) for name, part in unseen.items()}
    speeds = speed(settings, {"untrimmed": base, "trimmed": chosen})
    size = {name: path.stat().st_size / 1e6 for name, path in (("untrimmed", base), ("trimmed", chosen))}
    about = {"pieces": found["after"], "of": found["before"]}
    return {
        "trim": {
            "figure": size["untrimmed"] / size["trimmed"], "against": {"untrimmed, MB": size["untrimmed"]}, "megabytes": size, **about,
            "curve": [] if settings.quick else curve(settings, unseen),
        },
        "trim_2": ratio(speeds, "trimmed", "untrimmed") | {
            "against": {"untrimmed, tokens a CPU-second": speeds["untrimmed"]["tokens_per_cpu_s"]}, "speeds": speeds,
            "n": speeds["trimmed"]["tokens"], **about,
        },
        "trim_3": {"figure": found["same"], "segments": found["identical"], "n": found["texts"], "parts": parts, **about},
    }  # fmt: skip


def texts(settings: Settings) -> dict[str, list[str]]:
    """Unseen general text by name."""
    sets = {"Tatoeba test": settings.pairs("test")}
    if not settings.quick:
        sets["NTREX-MX"] = read_pairs(settings.data / "ntrex-en-es" / "first-997-mx.tsv", TRANSLATION)
    return {
        f"{name}, {language}": [getattr(record, side) for record in records]
        for name, records in sets.items()
        for side, language in (("source", "English"), ("target", "Spanish"))
    }


def curve(settings: Settings, unseen: dict[str, list[str]]) -> list[dict[str, Any]]:
    everything = [text for part in unseen.values() for text in part]

    def point(pieces: int) -> dict[str, Any]:
        path = settings.trimmed_for_users(pieces)
        found = coverage(settings.base(), path, everything)
        row = {"pieces": found.after, "same": found.same, "segments": found.identical, "megabytes": path.stat().st_size / 1e6}
        if pieces != DEFAULT:  # the students are made of that one
            path.unlink()
        return row

    return [settings.kept("trim", f"curve-{pieces}", partial(point, pieces)) for pieces in CURVE]


def speed(settings: Settings, files: dict[str, Path]) -> dict[str, dict[str, Any]]:
    prompts = unfinished([record.source for record in settings.pairs("dev")], 2 if settings.quick else PROMPTS)
    engines = {name: Engine(path, threads=1) for name, path in files.items()}
    try:
        return decode_speed(engines, prompts, turns=2 if settings.quick else TURNS)
    finally:
        for engine in engines.values():
            engine.close()
