"""What memory is worth: `python -m bench.memory --ranch MODEL.gguf --translation MODEL.gguf [--data FOLDER] [--trained TRAIN.tsv]`.

A site's own records, confirmed, are the memory; later ones that nobody saw are the questions. Each question is answered by the node's own
code (store, worker, memory) with memory off, exact, near and examples, one after the other, so that all four share the machine's noise.
For each: accuracy (or mean sentence chrF) with its interval, the paired difference to off, and the time of a whole answer.
near      also says how many it answered, and how often it and the model were right on just those
agreeing  what near would do if every similarity were trusted: why the limit is learned
again     the memory's own records asked a second time: what exact is for
file      10,000 vectors of 640 figures in a process of its own: memory, disk, time of a search

--trained names pairs the translation student learned from, which are left out of its memory. Writes bench/results/memory.json.
"""

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from bench.result import RESULTS, write
from coordinator.forge.judging.evaluation import Evaluation, evaluate_texts, paired_bootstrap
from coordinator.forge.judging.metrics import mean_interval, wilson
from coordinator.forge.pairs import read_pairs
from coordinator.ranch import generate, site_named
from node.answering import Answering, Given
from node.engine.worker import Speaker, Worker
from node.memory import rules, table
from node.memory.recall import Memory
from node.settings import Memory as Chosen
from node.store import OPERATOR, AnswerRow, Store
from protocol.confidence import quantile
from protocol.models.engine import Engine
from protocol.tasks import RANCH, Record, Task, translation

TRANSLATION = translation("English", "Spanish")
RESULT = RESULTS / "memory.json"  # a run with one model keeps the other task's figures
DEADLINE_S = 60.0
AGAIN = 60  # remembered records asked a second time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranch", type=Path, help="a ranch student")
    parser.add_argument("--site", default="esteli")
    parser.add_argument("--translation", type=Path, help="an English-Spanish student")
    parser.add_argument("--data", type=Path, default=Path("var/data/tatoeba-en-es"), help="folder with train.tsv and test.tsv")
    parser.add_argument("--trained", type=Path, help="pairs left out of the memory")
    parser.add_argument("--remembered", type=int, default=1_000)
    parser.add_argument("--asked", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ways", default=",".join(rules.USES), help="of off,exact,near,examples; the others' figures stay")
    parser.add_argument("--work", type=Path, default=Path("var/memory"), help="keeps the vectors, so that a killed run goes on")
    options = parser.parse_args()
    figures: dict[str, Any] = json.loads(RESULT.read_text("utf-8"))["figures"] if RESULT.is_file() else {}
    figures["file"] = in_a_process(file_of_vectors)
    if options.ranch:
        site = site_named(options.site)
        known = generate(site, seed=options.seed, count=options.remembered, split="train")
        asked = generate(site, seed=options.seed, count=options.asked, split="test")
        figures["ranch"] = figures.get("ranch", {}) | measure(options.ranch, RANCH, known, asked, options)
    if options.translation:
        known, asked = pairs(options.data, options.trained, options.remembered, options.asked)
        figures["translation"] = figures.get("translation", {}) | measure(options.translation, TRANSLATION, known, asked, options)
    command = "python -m bench.memory --ranch MODEL.gguf --translation MODEL.gguf --data FOLDER --trained TRAIN.tsv"
    write("memory", figures, command=command, rows=rows(figures))


def in_a_process(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work).result(timeout=600)


def file_of_vectors() -> dict[str, Any]:
    """What near costs a node with a full memory."""
    import numpy as np

    from node.memory.vectors import Vectors, size_on_disk

    random, size, count = np.random.default_rng(1), 640, 10_000

    def vector() -> Any:
        one = random.standard_normal(size, dtype=np.float32)
        return one / np.linalg.norm(one)

    vector()
    before = resident()
    with tempfile.TemporaryDirectory(prefix="milpa-memory-") as folder:
        vectors = Vectors(Path(folder) / "memory.db")
        began = time.perf_counter()
        for begin in range(0, count, 16):
            vectors.put("m", [(f"{number:064x}", "s", vector()) for number in range(begin, begin + 16)])
        wrote_s, took = time.perf_counter() - began, []
        for _ in range(50):
            wanted, began = vector(), time.perf_counter()
            vectors.nearest("m", wanted, scope="s", count=rules.NEIGHBOURS)
            took.append(time.perf_counter() - began)
        grown, disk = resident() - before, size_on_disk(vectors.path)
        vectors.close()
    return {
        "vectors": count, "figures": size, "resident_mib": grown / 2**20, "disk_mib": disk / 2**20, "write_ms": 1000 * wrote_s / count,
        "search_p50_ms": 1000 * quantile(took, 0.5), "search_p95_ms": 1000 * quantile(took, 0.95),
    }  # fmt: skip


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def pairs(data: Path, trained: Path | None, remembered: int, asked: int) -> tuple[list[Record], list[Record]]:
    seen = {record.source for record in read_pairs(trained, TRANSLATION)} if trained else set()
    known = [record for record in read_pairs(data / "train.tsv", TRANSLATION) if record.source not in seen]
    every = max(1, len(known) // remembered)  # the file is in some order; take from all of it
    return known[::every][:remembered], read_pairs(data / "test.tsv", TRANSLATION, limit=asked)


def measure(model: Path, task: Task, known: Sequence[Record], asked: Sequence[Record], options: argparse.Namespace) -> dict[str, Any]:
    """All ways on the same questions."""
    seed, uses = options.seed, [use for use in rules.USES if use in ("off", *options.ways.split(","))]
    kept = options.work / task.name
    kept.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="milpa-memory-") as folder:
        store, worker = Store(Path(folder) / "node.db"), Worker()
        worker.swap_after_current_record(Speaker(Engine(model), task.name))
        worker.start()
        try:
            memories = {use: Memory(store, worker, kept, Chosen(use=use)) for use in uses}
            confirm(store, known)
            began = time.perf_counter()
            for memory in memories.values():
                while memory.making and memory.making.step():
                    pass
            made_s = time.perf_counter() - began
            ways = {use: Answering(store, worker, node="bench", budget=0.0, memory=memory) for use, memory in memories.items()}
            found = answered(ways, task, asked, seed=seed)
            given = found.pop("given")
            found["about"] = {"remembered": len(known), "asked": len(asked), "seed": seed, "model": model.name}
            if "near" in memories:
                found["near"] |= by_neighbours(memories["near"], task, asked, given, seed=seed)
                told = memories["near"].status() or {}
                found["about"] |= {"vectors_s": round(made_s, 1), "bytes": told["bytes"], "trusted": told["trusted"]}
            if "exact" in memories:
                found["again"] = again(ways, task, known[-AGAIN:])
            return found
        finally:
            for memory in memories.values():
                memory.stop()
            worker.stop()
            store.close()


def confirm(store: Store, known: Sequence[Record]) -> None:
    """As if the operator had confirmed each of them."""
    with store.transaction() as session:
        for number, one in enumerate(known):
            row = AnswerRow(id=one.id, task=one.task, lang=one.lang, source=one.source, text=one.target, verdict=one.verdict)
            table.remember(session, row, origin=OPERATOR, weight=1.0, now=float(number))


def answered(ways: dict[Any, Answering], task: Task, asked: Sequence[Record], *, seed: int) -> dict[str, Any]:
    """Every question by every way, in turn; `given` is what was said."""
    given: dict[str, list[Given]] = {use: [] for use in ways}
    took: dict[str, list[float]] = {use: [] for use in ways}
    for number, record in enumerate(asked):
        order = list(ways)[number % len(ways) :] + list(ways)[: number % len(ways)]
        for use in order:
            began = time.perf_counter()
            given[use].append(ways[use].answer(record, deadline_s=DEADLINE_S))
            took[use].append(time.perf_counter() - began)
        if number % 50 == 49:
            print(f"{task.name}: {number + 1} of {len(asked)}", flush=True)
    judged = {use: evaluate_texts([one.answer.text for one in said], asked, task, name=use) for use, said in given.items()}
    found: dict[str, Any] = {"given": given}
    for use, evaluation in judged.items():
        found[use] = quality(evaluation, seed=seed) | {
            "latency_p50_ms": 1000 * quantile(took[use], 0.5),
            "latency_p95_ms": 1000 * quantile(took[use], 0.95),
            "off_p50_ms": 1000 * quantile(took["off"], 0.5),  # in the same run: times of two runs cannot be compared
            "from_memory": sum(one.recalled is not None for one in given[use]),
            "minus_off": paired_bootstrap(judged["off"], evaluation, seed=seed),
        }
    return found


def by_neighbours(memory: Memory, task: Task, asked: Sequence[Record], given: dict[str, list[Given]], *, seed: int) -> dict[str, Any]:
    """What near answered, beside the model on the same records; and what any agreeing neighbours would have said."""
    own = [index for index, one in enumerate(given["near"]) if one.recalled is not None and one.recalled.match == "near"]
    making = memory.making
    assert making is not None
    agreeing, took = {}, []
    for index, record in enumerate(asked):
        began = time.perf_counter()
        close = memory.neighbours(record, making, deadline_s=DEADLINE_S)
        took.append(time.perf_counter() - began)
        neighbours = [rules.Neighbour(row.key, similarity, rules.meaning(row.verdict, row.text)) for similarity, row in close]
        if (nearest := rules.agreed(neighbours, least=-1.0)) is not None:
            agreeing[index] = next(row.text for _, row in close if row.key == nearest.key)
    return {
        "look_p50_ms": 1000 * quantile(took, 0.5),
        "answered": beside(own, {index: given["near"][index].answer.text for index in own}, task, asked, given["off"], seed=seed),
        "agreeing": beside(sorted(agreeing), agreeing, task, asked, given["off"], seed=seed),
    }


def beside(
    indices: list[int], texts: dict[int, str], task: Task, asked: Sequence[Record], off: list[Given], *, seed: int
) -> dict[str, Any]:
    if not indices:
        return {"n": 0}
    records = [asked[index] for index in indices]
    memory = evaluate_texts([texts[index] for index in indices], records, task)
    model = evaluate_texts([off[index].answer.text for index in indices], records, task)
    return {
        "n": len(indices), "memory": quality(memory, seed=seed), "model": quality(model, seed=seed),
        "minus_model": paired_bootstrap(model, memory, seed=seed),
    }  # fmt: skip


def again(ways: dict[Any, Answering], task: Task, known: Sequence[Record]) -> dict[str, Any]:
    """The memory's own records: exact beside off."""
    found = {}
    for use in ("off", "exact"):
        took, right = [], []
        for record in known:
            began = time.perf_counter()
            said = ways[use].answer(record, deadline_s=DEADLINE_S).answer
            took.append(time.perf_counter() - began)
            right.append(said.verdict == record.verdict if record.verdict else said.text == record.target)
        found[use] = {"right": sum(right) / len(right), "latency_p50_ms": 1000 * statistics.median(took), "n": len(known)}
    return found


def quality(evaluation: Evaluation, *, seed: int) -> dict[str, Any]:
    values = evaluation.quality()
    if evaluation.kind == "verdict":
        right = sum(answer.correct for answer in evaluation.answers)
        interval = wilson(right, len(values))
        return {"accuracy": right / len(values), "interval": list(interval), "chrf": statistics.mean(a.chrf for a in evaluation.answers)}
    return {"chrf": statistics.mean(values), "interval": list(mean_interval(values, seed=seed))}


def rows(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = [("task", "memory", "quality (95%)", "minus off", "from memory", "p50, x off", "p50, off, ms")]
    for name in ("ranch", "translation"):
        for use in rules.USES if name in figures else ():
            one = figures[name][use]
            unit = 100 if "accuracy" in one else 1
            mean, pair = one.get("accuracy", one["chrf"]), one["minus_off"]
            found.append(
                (
                    name, use, f"{unit * mean:.1f} ({unit * one['interval'][0]:.1f} to {unit * one['interval'][1]:.1f})",
                    f"{unit * pair['diff']:+.1f} ({unit * pair['low']:+.1f} to {unit * pair['high']:+.1f})",
                    str(one["from_memory"]), f"{one['latency_p50_ms'] / one['off_p50_ms']:.2f}", f"{one['off_p50_ms']:.0f}",
                )
            )  # fmt: skip
    return found


if __name__ == "__main__":
    main()
