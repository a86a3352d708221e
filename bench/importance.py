"""Does the importance matrix help? `python -m bench.importance --data FOLDER --model FLOAT.gguf`: how far files are from the float model.

For each type, with and without importance: mean over target tokens of KL(float || quantised) on Tatoeba pairs that were not calibrated on,
by sentence, so that the difference has a paired interval. Weights only: both sides are computed in torch float32 from what the files hold
(8-bit activations cost the same with and without). Then less and more calibration text. FLOAT.gguf must not come from a quantised file
unchanged: its weights lie on that type's grid already. Each figure is kept in --work. Writes bench/results/importance.json.
"""

import argparse
import random
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from bench.result import print_table, write
from bench.settings import TRANSLATION, Settings
from coordinator.forge.judging.metrics import paired_difference
from coordinator.forge.students.export import stored
from coordinator.forge.students.importance import ENOUGH, importance
from protocol.digests import digest_value
from protocol.models.checkpoint import Checkpoint, Importance, quantise
from protocol.models.feed import collate, plan
from protocol.models.tokenizer import Example, Tokenizer, make_example
from protocol.models.torch_model import embed, from_torch, hidden_states, logits_of, to_torch
from protocol.tasks import Record

KINDS = ("Q5_K_M", "Q4_K_M", "IQ4_NL", "Q4_0", "Q3_K_M")
AMOUNTS = (8, 4 * ENOUGH)  # calibration examples, besides ENOUGH
AMOUNTS_KIND = "Q4_0"
HELD_OUT = 96  # sentences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("var/data"))
    parser.add_argument("--work", type=Path, default=Path("var/importance"))
    parser.add_argument("--model", type=Path, help="a GGUF; the packaged Gemma, trimmed, by default")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--held-out", type=int, default=HELD_OUT)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a tiny model; nothing is written to bench/results")
    said = parser.parse_args()
    torch.set_num_threads(said.threads)
    settings = Settings(said.data, said.work / "quick" if said.quick else said.work, said.threads, said.seed, said.quick)
    figures = measure(settings, said.model or settings.trimmed(), kinds=said.kinds.split(","), held_out=said.held_out)
    if said.quick:
        print_table(rows(figures))
    else:
        write("importance", figures, command="python -m bench.importance --data FOLDER --model FLOAT.gguf", rows=rows(figures))


def measure(settings: Settings, model: Path, *, kinds: Sequence[str] = KINDS, held_out: int = HELD_OUT) -> dict[str, Any]:
    """Figures by type, and by amount of calibration text."""
    run = _Run(settings, model, held_out)
    return {
        "model": run.float.digest,
        "n": held_out,
        "calibrated_on": ENOUGH,
        "kinds": {kind: run.kind(kind) for kind in kinds},
        "amounts": {"kind": AMOUNTS_KIND} | {str(count): run.amount(count) for count in AMOUNTS},
    }


class _Run:
    """One model; each figure is kept and not computed again."""

    def __init__(self, settings: Settings, model: Path, held_out: int) -> None:
        self.settings, self.float = settings, Checkpoint.read(model)
        self.key = f"importance-{digest_value([self.float.digest, held_out, settings.seed])[:8]}"
        self.folder = settings.folder(self.key)
        with Tokenizer(model) as tokenizer:
            self.calibration = examples(tokenizer, settings.pairs("train"), max(AMOUNTS), seed=settings.seed)
            self.held = examples(tokenizer, settings.pairs("dev"), held_out, seed=settings.seed)
        self.whole, self.small = self.folder / "whole.gguf", self.folder / "small.gguf"

    @cached_property
    def truth(self) -> list[torch.Tensor]:
        """The float model's log-probabilities, the file to quantise written on the way."""
        model = to_torch(self.float)
        from_torch(model, self.float).write(self.whole)
        return log_probs(model, self.held)

    @cached_property
    def matters(self) -> Importance:
        return importance(self.float, self.calibration[:ENOUGH])

    def off_by(self, kind: str, given: Importance | None) -> list[float]:
        truth = self.truth
        quantise(self.whole, self.small, kind, importance=given, threads=self.settings.threads)
        return divergence(truth, log_probs(to_torch(Checkpoint.read(self.small)), self.held))

    def kind(self, kind: str) -> dict[str, Any]:
        def make() -> dict[str, Any]:
            without, within = self.off_by(kind, None), self.off_by(kind, self.matters)
            return {
                "without": sum(without) / len(without),
                "with": sum(within) / len(within),
                "difference": paired_difference(without, within, seed=self.settings.seed),
                "mb": self.small.stat().st_size / 1e6,
                "fell_back": sorted({f"{one.kind} for rows of {one.row}" for one in stored(self.small, kind) if one.fell_back}),
            }

        return self.settings.kept(self.key, kind, make)

    def amount(self, count: int) -> float:
        def make() -> float:
            off = self.off_by(AMOUNTS_KIND, importance(self.float, self.calibration[:count]))
            return sum(off) / len(off)

        return self.settings.kept(self.key, f"amount-{count}", make)


def examples(tokenizer: Tokenizer, records: Sequence[Record], count: int, *, seed: int) -> list[Example]:
    chosen = random.Random(seed).sample(list(records), min(count, len(records)))
    return [make_example(tokenizer, TRANSLATION, record) for record in chosen]


@torch.no_grad()
def log_probs(model: Any, held: Sequence[Example]) -> list[torch.Tensor]:
    """Of each example: (targets, V)."""
    found: dict[int, torch.Tensor] = {}
    lengths = [len(one.prompt) + len(one.target) - 1 for one in held]
    for index in plan(lengths, batch_tokens=1024, generator=None):
        batch = collate(held, index)
        logits = logits_of(model, hidden_states(model, embed(model, batch.ids), at=(batch.rows, batch.columns)))
        parts = logits.log_softmax(-1).split([len(held[i].target) for i in index])
        found |= dict(zip(index, parts, strict=True))
    return [found[i] for i in range(len(held))]


def divergence(truth: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> list[float]:
    """Mean KL(truth || other) of each example, nats a target token."""
    return [float((p.exp() * (p - q)).sum(-1).mean()) for p, q in zip(truth, other, strict=True)]


def rows(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    table = [("type", "MB", "KL without", "KL with", "difference (95%)", "fell back")]
    for kind, one in figures["kinds"].items():
        gap = one["difference"]
        table.append((
            kind, f"{one['mb']:.1f}", f"{one['without']:.4f}", f"{one['with']:.4f}",
            f"{gap['diff']:+.4f} ({gap['low']:+.4f} to {gap['high']:+.4f})", "; ".join(one["fell_back"]),
        ))  # fmt: skip
    amounts = figures["amounts"]
    return [*table, *((f"{amounts['kind']}, {count} examples", "", "", f"{amounts[str(count)]:.4f}", "", "") for count in AMOUNTS)]


if __name__ == "__main__":
    main()
