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


def small(settings: Settings, *, teacher: Path | None = None, heads: int | None = None) -> Path:
    """The student's F16 file, made once for all measures.

    Args:
        teacher: the packaged model with the vocabulary that the student is to have; by default that of the training pairs alone.
        heads: another number of them than the preset has.
    """
    teacher = teacher or settings.trimmed()
    name = "-".join(["small", *teacher.stem.split("-")[1:], *([] if heads is None else [f"{heads}-heads"])])
    path = settings.folder("shared") / f"{name}-f16.gguf"

    def cut() -> None:
        with Tokenizer(teacher) as tokenizer:
            examples = [make_example(tokenizer, TRANSLATION, record) for record in settings.pairs("dev", CALIBRATED_ON)]
        cut_evenly(Checkpoint.read(teacher), examples, quick=settings.quick, heads=heads).write(path)

    return settings.once(path, cut)


def packed(settings: Settings, *, heads: int | None = None, embedding: str | None = None) -> Path:
    """The student's Q4_K_M file with the vocabulary that a user's has, made once for all; its embedding of another type, if asked."""
    whole = small(settings, teacher=settings.trimmed_for_users(), heads=heads)
    path = whole.with_name(whole.name.replace("f16", "q4_k_m" if embedding is None else f"q4_k_m-{embedding}"))
    kind, embedding = ("F16", None) if settings.quick else ("Q4_K_M", embedding)  # tiny rows fit no K type
    return settings.once(path, lambda: quantise(whole, path, kind, embedding=embedding, threads=settings.threads))


def cut_evenly(
    teacher: Checkpoint, examples: Sequence[Example], *, quick: bool, heads: int | None = None, name: str = "small"
) -> Checkpoint:
    """The student of that preset, its blocks evenly spread: the same for all that are compared."""
    wanted = QUICK if quick else preset(name)
    wanted = msgspec.structs.replace(wanted, heads=heads or wanted.heads)
    return cut_student(teacher, wanted, examples, blocks=evenly(teacher.blocks, wanted.blocks))[0]
