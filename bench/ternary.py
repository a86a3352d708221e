"""Ternary against Q4_K_M and Q8_0: `python -m bench.ternary --data FOLDER [--student FLOAT.gguf] [--steps 600]`.

One student (cut to 12x512 from the packaged Gemma and trained in float, unless one is given) is trained on for the same steps and examples,
once in float and once ternary. Compared as GGUF files, through the engine that nodes use:
 * the same student: float as Q8_0, Q4_K_M and Q3_K_M, ternary as TQ2_0 and TQ1_0;
 * the same bytes: as many of its blocks as Q4_K_M or Q8_0 fit into the bytes of TQ2_0, trained on in float for the same steps.
Loss is of the file's weights in torch; size, memory and speed are the engine's. Each part is kept in --work; a killed run goes on where it
was. Writes bench/results/ternary.json.
"""

import argparse
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from bench.result import print_table, write
from bench.settings import TRANSLATION, Settings
from coordinator.forge.judging.evaluation import Evaluation, evaluate, paired_bootstrap
from coordinator.forge.students.cut import by_loss, cut_student, preset
from coordinator.forge.students.export import export, export_ternary
from coordinator.forge.students.importance import ENOUGH, importance
from coordinator.forge.training.recipe import Recipe, trained
from protocol.digests import digest_file, digest_value
from protocol.models.checkpoint import Checkpoint
from protocol.models.tokenizer import Example, Tokenizer, make_example
from protocol.models.torch_model import to_torch
from protocol.models.training import Step, mean_loss

STEPS = 600  # of each training
TRAIN, HELD_OUT, TEST = 40_000, 500, 1_000  # pairs
FLOAT_RATE, TERNARY_RATE = 3e-4, 6e-4  # ternary weights want a higher one: a small step moves no weight over a threshold
FLOAT_KINDS = ("Q8_0", "Q4_K_M", "Q3_K_M")
TERNARY_FILES = {"TQ2_0": ("TQ2_0", "Q6_K"), "TQ1_0": ("TQ1_0", "Q6_K"), "TQ2_0, embedding Q4_K": ("TQ2_0", "Q4_K")}
AGAINST = "float Q4_K_M"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("var/data"), help="folder with tatoeba-en-es/")
    parser.add_argument("--work", type=Path, default=Path("var/ternary"), help="kept between runs")
    parser.add_argument("--student", type=Path, help="a float student whose rows divide by 256")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a tiny model, seconds; nothing is written to bench/results")
    said = parser.parse_args()
    torch.set_num_threads(said.threads)
    settings = Settings(said.data, said.work / "quick" if said.quick else said.work, said.threads, said.seed, said.quick)
    figures = measure(settings, student=said.student, steps=3 if said.quick else said.steps)
    if said.quick:
        print_table(rows(figures))
    else:
        command = f"python -m bench.ternary --data FOLDER --steps {said.steps} --threads {said.threads} --seed {said.seed}"
        write("ternary", figures, command=command + (" --student FLOAT.gguf" if said.student else ""), rows=rows(figures))


def measure(settings: Settings, *, student: Path | None = None, steps: int = STEPS) -> dict[str, Any]:
    run = _Run(settings, student, steps)
    return run.figures()


class _Run:
    """Files are made where they are missing."""

    def __init__(self, settings: Settings, student: Path | None, steps: int) -> None:
        about = digest_value([str(steps), digest_file(student) if student else "", str(settings.seed)])
        self.settings, self.steps, self.key = settings, steps, f"ternary-{about[:8]}"
        self.folder = settings.folder(self.key)
        source = student or self.base()
        with Tokenizer(source) as tokenizer:
            self.train = examples(tokenizer, settings, "train", TRAIN)
            self.held = examples(tokenizer, settings, "dev", HELD_OUT)
        self.start = Checkpoint.read(student or self.made("start", lambda: self.healed(source)))

    def base(self) -> Path:
        if not self.settings.quick:
            return self.settings.trimmed()
        from tests.tiny import tiny_checkpoint

        return self.made("tiny", lambda: tiny_checkpoint(layers=4, hidden=256, feed_forward=512, kind="F16"))

    def healed(self, base: Path) -> Checkpoint:
        """Cut and trained in float."""
        cut = Checkpoint.read(base)
        if not self.settings.quick:
            cut, _ = cut_student(cut, preset("small"), self.train[: 4 * ENOUGH])
        return self.learned(cut, "start", ternary=False)

    def figures(self) -> dict[str, Any]:
        files = self.same_student()
        goal = files["ternary TQ2_0"].stat().st_size
        files |= self.same_bytes(files, goal)
        judged = {name: self.judged(name, path) for name, path in files.items()}
        return {
            "steps": self.steps,
            "blocks": self.start.blocks,
            "hidden": self.start.hidden,
            "pieces": len(self.start.vocabulary.tokens),
            "files": {
                name: one.figures()
                | {
                    "mb": files[name].stat().st_size / 1e6,
                    "blocks": Checkpoint.read(files[name]).blocks,
                    "loss": self.settings.kept(self.key, f"{slug(name)}-loss", lambda path=files[name]: self.loss(path)),
                    "minus_q4_k_m": paired_bootstrap(judged[AGAINST], one, seed=self.settings.seed),
                }
                for name, one in judged.items()
            },
        }

    def same_student(self) -> dict[str, Path]:
        floating = Checkpoint.read(self.made("float", lambda: self.learned(self.start, "float", ternary=False)))
        ternary = Checkpoint.read(self.made("ternary", lambda: self.learned(self.start, "ternary", ternary=True)))
        files = {f"float {kind}": self.exported(floating, "float", kind) for kind in FLOAT_KINDS}
        for name, (kind, embedding) in TERNARY_FILES.items():
            path = self.folder / f"{slug(f'ternary {name}')}.gguf"
            export_ternary(ternary, path, kind, embedding=embedding)
            files[f"ternary {name}"] = path
        return files

    def same_bytes(self, files: dict[str, Path], goal: int) -> dict[str, Path]:
        """Students of fewer blocks in types of more bits. A type whose embedding alone fills the bytes has none."""
        found = {}
        for kind in ("Q4_K_M", "Q8_0"):
            keep = blocks_within(files[f"float {kind}"], goal)
            if keep:
                name = f"{keep}-blocks"
                shallow = Checkpoint.read(self.made(name, lambda keep=keep, name=name: self.learned(self.fewer(keep), name, ternary=False)))
                found[f"{keep} blocks {kind}"] = self.exported(shallow, name, kind)
        return found

    def fewer(self, keep: int) -> Checkpoint:
        kept, _ = by_loss(to_torch(self.start), self.train[:ENOUGH], keep)
        return self.start.keep_blocks(kept)

    def learned(self, checkpoint: Checkpoint, name: str, *, ternary: bool) -> Checkpoint:
        recipe = Recipe(mode="full", ternary=ternary, learning_rate=TERNARY_RATE if ternary else FLOAT_RATE, steps=self.steps)
        state = self.folder / f"{name}.state"
        student, _ = trained(checkpoint, self.train, recipe, seed=self.settings.seed, state=state, progress=lambda step: tell(name, step))
        return student

    def exported(self, checkpoint: Checkpoint, name: str, kind: str) -> Path:
        matters = importance(checkpoint, self.train[:ENOUGH])
        return export(checkpoint, self.folder, name=f"{name}-{kind}", kind=kind, importance=matters)[1]

    def judged(self, name: str, path: Path) -> Evaluation:
        records = self.settings.pairs("test", TEST)
        threads = self.settings.threads
        kept = self.settings.kept(
            self.key, slug(name), lambda: msgspec.to_builtins(evaluate(path, records, TRANSLATION, threads=threads, name=name))
        )
        return msgspec.convert(kept, Evaluation)

    def loss(self, path: Path) -> float:
        return mean_loss(to_torch(Checkpoint.read(path)), self.held)

    def made(self, name: str, make: Callable[[], Checkpoint]) -> Path:
        path = self.folder / f"{name}.gguf"
        if not path.is_file():
            make().write(path)
        return path


def blocks_within(path: Path, goal: int) -> int:
    """How many blocks of the file `path` fit beside the rest of it into `goal` bytes; 0 where the rest is larger."""
    checkpoint = Checkpoint.read(path)
    body = sum(tensor.data.nbytes for name, tensor in checkpoint.tensors.items() if name.startswith("blk."))
    room = goal - (path.stat().st_size - body)
    return max(0, min(checkpoint.blocks, room * checkpoint.blocks // body))


def examples(tokenizer: Tokenizer, settings: Settings, part: str, count: int) -> list[Example]:
    records = list(settings.pairs(part))
    chosen = random.Random(settings.seed).sample(records, min(count, len(records)))
    return [make_example(tokenizer, TRANSLATION, record) for record in chosen]


def tell(name: str, step: Step) -> None:
    if step.step % 50 == 0:
        print(f"{name}: step {step.step}, loss {step.loss:.3f}, {step.seconds:.0f} s", flush=True)


def slug(name: str) -> str:
    return name.lower().replace(",", "").replace(" ", "-")


def rows(figures: dict[str, Any]) -> Sequence[tuple[str, ...]]:
    table = [("file", "MB", "peak RSS MiB", "tokens/s", "loss, nat", "chrF (95%)", f"chrF minus {AGAINST}")]
    for name, one in figures["files"].items():
        (low, high), gap = one["chrf_ci"], one["minus_q4_k_m"]
        table.append((
            name, f"{one['mb']:.1f}", f"{one['peak_rss_mb']:.0f}", f"{one['tokens_per_second']:.0f}", f"{one['loss']:.3f}",
            f"{one['chrf']:.1f} ({low:.1f}-{high:.1f})", f"{gap['diff']:+.2f} ({gap['low']:+.2f} to {gap['high']:+.2f})",
        ))  # fmt: skip
    return table


if __name__ == "__main__":
    main()
