"""File and memory of the `small` student: Q4_K_M, ternary, and the peak resident memory of the engine's process that answers with it.

Its vocabulary is that of `milpa-coordinator distill --student small` on all of Tatoeba's pairs; its weights are untrained.
"""

from pathlib import Path
from typing import Any

from bench.settings import TRANSLATION, Settings
from bench.student import packed, small
from coordinator.forge.judging.evaluation import generate_all
from coordinator.forge.students.export import export_ternary
from coordinator.forge.students.ternary import make_ternary, settle
from protocol.models.checkpoint import Checkpoint
from protocol.models.torch_model import from_torch, to_torch

ANSWERED = 16  # prompts, the longest of the development set: memory peaks on them
MIB = 1 << 20


def measure(settings: Settings) -> dict[str, Any]:
    folder = settings.folder("size_mb")
    whole, four_bits = small(settings, teacher=settings.trimmed_for_users()), packed(settings)
    three_valued = folder / "small-tq2_0.gguf"
    if not settings.quick:
        settings.once(three_valued, lambda: ternary(whole, three_valued))
    checkpoint = Checkpoint.read(whole)
    prompts = sorted((TRANSLATION.prompt(record) for record in settings.pairs("dev")), key=len)[-ANSWERED:]
    figures = {
        "size_mb": {"figure": four_bits.stat().st_size / 1e6, "kind": "Q4_K_M"},
        "size_mb_3": {
            "figure": peak(four_bits, prompts) * MIB / 1e6,
            "against": {"teacher's Q4_K_M, peak resident MB": peak(settings.base(), prompts) * MIB / 1e6},
            "n": len(prompts),
        },
    }
    if three_valued.is_file():
        figures["size_mb_2"] = {"figure": three_valued.stat().st_size / 1e6, "kind": "TQ2_0"}
    teacher = settings.base().stat().st_size / 1e6
    about = {"pieces": len(checkpoint.vocabulary.tokens), "blocks": checkpoint.blocks, "hidden": checkpoint.hidden, "trained": False}
    return {key: {"against": {"teacher's Q4_K_M, MB": teacher}, **about, **found} for key, found in sorted(figures.items())}


def ternary(whole: Path, target: Path) -> None:
    """Three values straight from the untrained weights: of use to a pair of scales only."""
    checkpoint = Checkpoint.read(whole)
    model = to_torch(checkpoint)
    make_ternary(model)
    settle(model)
    export_ternary(from_torch(model, checkpoint), target, "TQ2_0")


def peak(model: Path, prompts: list[str]) -> float:
    """MiB of one engine process that answers the prompts."""
    return generate_all(model, prompts, max_new_tokens=32, threads=1)[2]
