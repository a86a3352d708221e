"""What a cut costs before any training: held-out loss of the teacher with parts taken away, importance against random against first.

`python -m bench.cut --data FOLDER --teacher corrected-f16.gguf`: forward passes only, some minutes of a quiet core; bench/results/cut.json.
Tatoeba pairs: calibration from train.tsv, loss on dev.tsv, nats a target token. Finished lines are kept in --work.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.result import write
from bench.settings import TRANSLATION, Settings
from bench.student import QUICK
from coordinator.forge.students.cut import Preset, block_influence, by_influence, by_loss, cut_student, evenly, preset
from coordinator.forge.students.width import Calibration, Order, Widths, calibrate, choose, narrowed
from protocol.models.checkpoint import Checkpoint
from protocol.models.tokenizer import Example, Tokenizer, make_example
from protocol.models.torch_model import to_torch, use_threads
from protocol.models.training import mean_loss

ORDERS: tuple[Order, ...] = ("importance", "random", "first")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("var/data"), help="folder with tatoeba-en-es/")
    parser.add_argument("--teacher", type=Path, required=True, help="corrected teacher, F16 GGUF")
    parser.add_argument("--work", type=Path, default=Path("var/forge"))
    parser.add_argument("--examples", type=int, default=200, help="held-out pairs")
    parser.add_argument("--calibration", type=int, default=256, help="pairs to calibrate on")
    parser.add_argument("--seed", type=int, default=1)
    run = parser.parse_args()
    use_threads(1)
    settings = Settings(run.data, run.work, seed=run.seed)
    figures = Table(settings, run.teacher, examples=run.examples, calibration=run.calibration).figures()
    lines = [("what stays", "nats", "above the teacher")]
    lines += [(name, f"{row['nats']:.3f}", f"{row['nats'] - figures['teacher']['nats']:+.3f}") for name, row in figures.items()]
    write("cut", figures, command=f"python -m bench.cut --data FOLDER --teacher FILE --examples {run.examples}", rows=lines)


class Table:
    """One teacher, cut in many ways."""

    def __init__(self, settings: Settings, teacher: Path, *, examples: int, calibration: int) -> None:
        self.settings, self.teacher = settings, Checkpoint.read(teacher)
        self.key = f"cut-{self.teacher.digest[:12]}"
        with Tokenizer(teacher) as tokenizer:

            def made(part: str, count: int) -> list[Example]:
                return [make_example(tokenizer, TRANSLATION, record) for record in settings.pairs(part, count)]

            self.held_out, self.calibration = made("dev", examples), made("train", calibration)

    def figures(self) -> dict[str, Any]:
        found: Calibration = calibrate(to_torch(self.teacher), self.calibration)
        own, small = Widths.of(self.teacher), QUICK if self.settings.quick else preset("small")
        narrower = {
            f"{small.hidden} of {own.hidden} channels": Widths(small.hidden, own.feed_forward, own.heads),
            f"{small.feed_forward} of {own.feed_forward} neurons": Widths(own.hidden, small.feed_forward, own.heads),
            f"{own.heads // 2} of {own.heads} heads": Widths(own.hidden, own.feed_forward, own.heads // 2),
            "all widths of small": small.widths,
        }
        table = {"teacher": self.nats("teacher", lambda: (self.teacher, {}))}
        for name, widths in narrower.items():
            for order in ORDERS:
                table[f"{name}, {order}"] = self.nats(
                    f"{name}-{order}",
                    lambda widths=widths, order=order: (
                        narrowed(self.teacher, found, choose(found, widths, order=order, seed=self.settings.seed)),
                        {},
                    ),
                )
        for name, keep in self.depths(small).items():
            blocks = keep["blocks"]
            table[f"{len(blocks)} blocks, {name}"] = self.nats(
                f"blocks-{name}", lambda blocks=blocks: (self.teacher.keep_blocks(blocks), {})
            )
        for order in ORDERS:
            blocks = self.depths(small)["by loss"]["blocks"]
            table[f"small, {order}"] = self.nats(
                f"small-{order}",
                lambda order=order, blocks=blocks: cut_student(
                    self.teacher, small, self.calibration, order=order, blocks=blocks, seed=self.settings.seed
                ),
            )
        return table

    def depths(self, small: Preset) -> dict[str, dict[str, Any]]:
        """Ways to choose blocks."""

        def chosen() -> dict[str, dict[str, Any]]:
            model = to_torch(self.teacher)
            influence = block_influence(model, self.calibration)
            return {
                "evenly": {"blocks": evenly(self.teacher.blocks, small.blocks)},
                "by influence": {"blocks": by_influence(influence, small.blocks, same_kind=False)},
                "by influence, same kind": {"blocks": by_influence(influence, small.blocks)},
                "by loss": {"blocks": by_loss(model, self.calibration[:64], small.blocks)[0]},
            }

        return self.settings.kept(self.key, "depths", chosen)

    def nats(self, name: str, make: Callable[[], tuple[Checkpoint, dict[str, Any]]]) -> dict[str, Any]:
        def measure() -> dict[str, Any]:
            checkpoint, about = make()
            return {"nats": mean_loss(to_torch(checkpoint), self.held_out), "n": len(self.held_out), "about": about}

        return self.settings.kept(self.key, name.replace(" ", "-").replace(",", ""), measure)


if __name__ == "__main__":
    main()
