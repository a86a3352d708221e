"""How much CPU before a student from scratch catches up with one cut from its teacher.

`python -m bench.crossover --data FOLDER --teacher corrected-f16.gguf --preset tiny --budgets 300,1200,4800`: at each budget (seconds of
training, one thread by default) both are trained anew on the same pairs with the same loop, and their held-out loss is compared. It stops
at the first budget where scratch is ahead, or at --limit seconds altogether. A finished budget is kept in --work, an unfinished one is gone
on with. bench/results/crossover.json says the crossover, or that it lies beyond the largest budget.

Cut: embedding frozen as everywhere. Scratch: everything is trained. Each at the best of its --rates, chosen at the smallest budget.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from bench.result import write
from bench.settings import TRANSLATION, Settings
from bench.student import QUICK
from coordinator.forge.students.cut import cut_student, preset
from coordinator.forge.students.scratch import from_scratch
from protocol.models.checkpoint import Checkpoint
from protocol.models.feed import Epochs
from protocol.models.tokenizer import Example, Tokenizer, make_example
from protocol.models.torch_model import best_dtype, to_torch, use_threads
from protocol.models.training import mean_loss, train

RATES = {"cut": (3e-4, 1e-3), "scratch": (1e-3, 3e-3)}
BATCH_TOKENS = 1024
HELD_OUT, CALIBRATION = 300, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("var/data"), help="folder with tatoeba-en-es/")
    parser.add_argument("--teacher", type=Path, help="corrected teacher, F16 GGUF; by default a trimmed, uncorrected one")
    parser.add_argument("--work", type=Path, default=Path("var/forge"))
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--budgets", default="300,1200,4800", help="seconds of training, rising")
    parser.add_argument("--limit", type=float, default=6 * 3600.0, help="seconds altogether; no budget begins that would pass it")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="tiny models and seconds; nothing is written to bench/results")
    run = parser.parse_args()
    use_threads(run.threads)
    settings = Settings(run.data, run.work / "quick" if run.quick else run.work, run.threads, run.seed, run.quick)
    teacher = run.teacher or settings.trimmed()
    budgets = [1.0, 2.0] if run.quick else sorted(float(part) for part in run.budgets.split(","))
    figures = Crossover(settings, teacher, "quick" if run.quick else run.preset).measured(budgets, limit_s=run.limit)
    command = f"python -m bench.crossover --data FOLDER --teacher FILE --preset {run.preset} --budgets {run.budgets}"
    lines = [("seconds", "cut, nats", "scratch, nats")]
    lines += [(f"{row['seconds']:g}", f"{row['cut']['nats']:.3f}", f"{row['scratch']['nats']:.3f}") for row in figures["budgets"]]
    if run.quick:
        print(*lines, sep="\n")
    else:
        write("crossover", figures, command=command, rows=lines)


class Crossover:
    """Two students of one shape, one teacher, one set of pairs."""

    def __init__(self, settings: Settings, teacher: Path, name: str) -> None:
        self.settings, self.teacher = settings, Checkpoint.read(teacher)
        self.preset = QUICK if settings.quick else preset(name)
        self.key = f"crossover-{self.preset.name}-{self.teacher.digest[:12]}-{settings.seed}"
        with Tokenizer(teacher) as tokenizer:

            def made(part: str, count: int | None) -> list[Example]:
                return [make_example(tokenizer, TRANSLATION, record) for record in settings.pairs(part, count)]

            self.examples, self.held_out = made("train", None), made("dev", HELD_OUT)

    def measured(self, budgets: list[float], *, limit_s: float) -> dict[str, Any]:
        """Rising budgets until scratch is ahead or time is up."""
        ends = time.monotonic() + limit_s
        rates = {kind: self.best_rate(kind, budgets[0]) for kind in RATES}
        rows: list[dict[str, Any]] = []
        for seconds in budgets:
            if time.monotonic() + 2 * seconds > ends:
                break
            rows.append({"seconds": seconds} | {kind: self.trained(kind, seconds, rate) for kind, rate in rates.items()})
            if rows[-1]["scratch"]["nats"] <= rows[-1]["cut"]["nats"]:
                break
        crossed = [row["seconds"] for row in rows if row["scratch"]["nats"] <= row["cut"]["nats"]]
        return {
            "preset": self.preset.name, "pairs": len(self.examples), "held_out": len(self.held_out), "rates": rates, "budgets": rows,
            "crossover_s": crossed[0] if crossed else None, "beyond_s": None if crossed or not rows else rows[-1]["seconds"],
        }  # fmt: skip

    def best_rate(self, kind: str, seconds: float) -> float:
        """Learning rate with the lowest held-out loss after the smallest budget."""
        return min(RATES[kind], key=lambda rate: self.trained(kind, seconds, rate)["nats"])

    def trained(self, kind: str, seconds: float, rate: float) -> dict[str, Any]:
        """Held-out loss of a student trained for so long."""
        name = f"{kind}-{seconds:g}-{rate:g}"
        return self.settings.kept(self.key, name, lambda: self._train(kind, seconds, rate, name))

    def _train(self, kind: str, seconds: float, rate: float, name: str) -> dict[str, Any]:
        model = to_torch(self.student(kind), dtype=best_dtype())
        state = self.settings.folder(self.key) / f"{name}.state"
        embedding = {id(parameter) for parameter in model.model.embed_tokens.parameters()}
        free = [parameter for parameter in model.parameters() if kind == "scratch" or id(parameter) not in embedding]
        feed = Epochs(self.examples, batch_tokens=BATCH_TOKENS, seed=self.settings.seed)
        result = train(model, feed, parameters=free, learning_rate=rate, seconds=seconds, state=state)
        state.unlink(missing_ok=True)
        return {"nats": mean_loss(model, self.held_out), "pairs_seen": result.examples, "steps": result.steps, "tokens": result.tokens}

    def student(self, kind: str) -> Checkpoint:
        """Untrained."""
        if kind == "scratch":
            return from_scratch(self.teacher, self.preset, seed=self.settings.seed)
        path = self.settings.folder(self.key) / "cut.gguf"
        if not path.is_file():
            cut_student(self.teacher, self.preset, self.examples[:CALIBRATION])[0].write(path)
        return Checkpoint.read(path)


if __name__ == "__main__":
    main()
