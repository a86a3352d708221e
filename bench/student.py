"""The untrained `small` student that size and speed are measured on: neither depends on what its weights have learned."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from bench.settings import TRANSLATION, Settings
from coordinator.forge.students.cut import Preset, cut_student, evenly, preset
from protocol.models.checkpoint import Checkpoint, quantise
from protocol.models.tokenizer import Example, Tokenizer, make_example

CALIBRATED_ON = 16  # examples
QUICK = Preset("quick", blocks=2, hidden=32, feed_forward=64, heads=1)


def small(settings: Settings, *, heads: int | None = None) -> Path:
    """The student's F16 file, made once for all measures; with another number of heads than its preset has, if asked."""
    path = settings.folder("shared") / ("small-f16.gguf" if heads is None else f"small-{heads}-heads-f16.gguf")
    if not path.is_file():
        teacher = settings.trimmed()
        with Tokenizer(teacher) as tokenizer:
            examples = [make_example(tokenizer, TRANSLATION, record) for record in settings.pairs("dev", CALIBRATED_ON)]
        cut_evenly(Checkpoint.read(teacher), examples, quick=settings.quick, heads=heads).write(path)
    return path


def packed(settings: Settings, *, heads: int | None = None, embedding: str | None = None) -> Path:
    """The student's Q4_K_M file, made once for all measures; its embedding of another type, if asked."""
    whole = small(settings, heads=heads)
    path = whole.with_name(whole.name.replace("f16", "q4_k_m" if embedding is None else f"q4_k_m-{embedding}"))
    if not path.is_file():
        kind, embedding = ("F16", None) if settings.quick else ("Q4_K_M", embedding)  # tiny rows fit no K type
        quantise(whole, path, kind, embedding=embedding, threads=settings.threads)
    return path


def cut_evenly(
    teacher: Checkpoint, examples: Sequence[Example], *, quick: bool, heads: int | None = None, name: str = "small"
) -> Checkpoint:
    """The student of that preset, its blocks evenly spread: the same for all that are compared."""
    wanted = QUICK if quick else preset(name)
    wanted = msgspec.structs.replace(wanted, heads=heads or wanted.heads)
    return cut_student(teacher, wanted, examples, blocks=evenly(teacher.blocks, wanted.blocks))[0]
