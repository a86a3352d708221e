"""The vocabulary trim: how much smaller and faster the packaged teacher gets, and how much of unseen general text still tokenises the same.

Counted, as a forge run counts: the task's training pairs and, up to `PIECES`, English and Spanish word lists with frequencies (`wordfreq`).
Coverage is of text that was not counted: NTREX-MX (news) and the Tatoeba test set, both languages of both. Share of text = tokens that are
still there at the same place. The curve says what other numbers of pieces buy. `lossless` is the trim alone; the file of the figures has a
5-bit embedding too, and `embedding_nat` says what that costs.
"""

from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from bench.settings import TRANSLATION, Settings
from bench.speed import decode_speed, ratio, unfinished
from coordinator.forge.pairs import read_pairs
from coordinator.forge.students.trim import coverage, trim
from protocol.models.checkpoint import Checkpoint
from protocol.models.engine import Engine
from protocol.models.tokenizer import Tokenizer, make_example
from protocol.models.torch_model import to_torch
from protocol.models.training import mean_loss

LANGUAGES = ("en", "es")
PIECES = 70_000  # where 99% of unseen general text is reached
CURVE = (25_000, 32_000, 46_000, 60_000, 90_000)
EMBEDDING = "Q5_0"
PROMPTS, TURNS = 6, 5
MEASURED_ON = 60  # development pairs, for what the smaller embedding costs


def measure(settings: Settings) -> dict[str, Any]:
    base = settings.base()
    unseen = texts(settings)
    wanted = 300 if settings.quick else PIECES
    chosen, lossless = made(settings, wanted, None if settings.quick else EMBEDDING), made(settings, wanted, None)
    found = msgspec.to_builtins(coverage(base, chosen, [text for part in unseen.values() for text in part]))
    parts = {name: msgspec.to_builtins(coverage(base, chosen, part)) for name, part in unseen.items()}
    speeds = speed(settings, {"untrimmed": base, "trimmed": chosen, "lossless": lossless})
    size = {name: path.stat().st_size / 1e6 for name, path in (("untrimmed", base), ("trimmed", chosen), ("lossless", lossless))}
    about = {"pieces": found["after"], "of": found["before"], "embedding": EMBEDDING}
    nats = {name: loss(settings, path) for name, path in (("trimmed", chosen), ("lossless", lossless))}
    return {
        "trim": {
            "figure": size["untrimmed"] / size["trimmed"], "against": {"untrimmed, MB": size["untrimmed"]}, "megabytes": size, **about,
            "lossless": size["untrimmed"] / size["lossless"], "embedding_nat": nats["trimmed"] - nats["lossless"],
            "curve": [] if settings.quick else curve(settings, unseen),
        },
        "trim_2": ratio(speeds, "trimmed", "untrimmed") | {
            "against": {"untrimmed, tokens a CPU-second": speeds["untrimmed"]["tokens_per_cpu_s"]}, "speeds": speeds,
            "lossless": ratio(speeds, "lossless", "untrimmed"), "n": speeds["trimmed"]["tokens"], **about,
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


def made(settings: Settings, pieces: int, embedding: str | None) -> Path:
    path = settings.folder("trim") / f"{pieces}-{embedding or 'stored'}.gguf"
    if not path.is_file():
        counted = [text for one in settings.pairs("train") for text in (TRANSLATION.prompt(one), TRANSLATION.target(one), one.target or "")]
        counted.append(TRANSLATION.template)
        trim(settings.base(), counted, path, frequent=0, general=LANGUAGES, pieces=pieces, embedding=embedding)
    return path


def curve(settings: Settings, unseen: dict[str, list[str]]) -> list[dict[str, Any]]:
    everything = [text for part in unseen.values() for text in part]

    def point(pieces: int) -> dict[str, Any]:
        path = made(settings, pieces, None)
        found = coverage(settings.base(), path, everything)
        row = {"pieces": found.after, "same": found.same, "segments": found.identical, "megabytes": path.stat().st_size / 1e6}
        path.unlink()
        return row

    return [settings.kept("trim", f"curve-{pieces}", partial(point, pieces)) for pieces in CURVE]


def loss(settings: Settings, path: Path) -> float:
    """Nats a target token of the uncorrected teacher on development pairs."""
    with Tokenizer(path) as tokenizer:
        examples = [make_example(tokenizer, TRANSLATION, record) for record in settings.pairs("dev", MEASURED_ON)]
    return mean_loss(to_torch(Checkpoint.read(path)), examples, batch_tokens=512)


def speed(settings: Settings, files: dict[str, Path]) -> dict[str, dict[str, Any]]:
    prompts = unfinished([record.source for record in settings.pairs("dev")], 2 if settings.quick else PROMPTS)
    engines = {name: Engine(path, threads=1) for name, path in files.items()}
    try:
        return decode_speed(engines, prompts, turns=2 if settings.quick else TURNS)
    finally:
        for engine in engines.values():
            engine.close()
