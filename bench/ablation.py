"""What one choice of the synthesis is worth, the other choice beside it: `python -m bench.ablation filtered|frozen|generic`.

filtered   a student learns from sampled, gated and scored targets, or from the teacher's greedy ones: same sources, same seconds
frozen     the teacher is corrected with its embeddings frozen, or trained with the rest
generic    a model learns one domain (kitchen) with no generic sentences among its records, or with 30%

Each arm trains for --seconds by the one loop, from the same checkpoint and seed, and answers the same sentences, in its domain and out of
it; the paired bootstrap compares them. Sampling is not counted in the seconds: it is paid once for all students, and reported. Every part
is kept in --work; the same command goes on. Writes bench/results/ablation-NAME.json.
"""

import argparse
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec

from bench.result import print_table, write
from bench.settings import TRANSLATION, Settings
from bench.tatoeba import TOPICS
from coordinator.forge.judging.evaluation import Evaluation, evaluate, paired_bootstrap
from coordinator.forge.pairs import read_pairs
from coordinator.forge.students.cut import evenly
from coordinator.forge.synthesis.language import identify
from coordinator.forge.synthesis.mixing import GENERIC_SHARE, mixed, training_records
from coordinator.forge.synthesis.rows import RowLog, read_rows
from coordinator.forge.synthesis.sampling import Plan, synthesise
from coordinator.forge.synthesis.scoring import Judge
from coordinator.forge.teachers import asked, open_teacher
from protocol.models.checkpoint import Checkpoint
from protocol.models.feed import Epochs
from protocol.models.tokenizer import Tokenizer, make_example
from protocol.models.torch_model import best_dtype, body, from_torch, to_torch, use_threads
from protocol.models.training import train
from protocol.tasks import Record

RATE = 5e-4
BATCH_TOKENS = 512
BLOCKS = 8  # of the student
TRAINING = 20_000  # records to correct a teacher on
SOURCES = 2_000  # answered by the teacher
JUDGED = 400  # sentences of each set
SPARE_STEPS = 4  # quick: steps instead of seconds


class Arms:
    """The arms of one ablation: trains and judges them, keeps what is done."""

    def __init__(self, name: str, settings: Settings, seconds: float) -> None:
        self.name, self.settings, self.seconds = f"ablation-{name}", settings, seconds
        self.folder = settings.folder(self.name)
        use_threads(settings.threads)

    def trained(self, name: str, start: Path, records: Sequence[Record], *, blocks: int | None = None, embedding: bool = False) -> Path:
        """`start` trained on `records` for the arm's seconds; with `embedding` its embedding too."""
        path = self.folder / f"{name}.gguf"
        if path.is_file():
            return path
        checkpoint = Checkpoint.read(start)
        if blocks is not None and blocks < checkpoint.blocks:
            checkpoint = checkpoint.keep_blocks(evenly(checkpoint.blocks, blocks))
        with Tokenizer(start) as text:
            examples = [make_example(text, TRANSLATION, record) for record in records]
        model = to_torch(checkpoint, dtype=best_dtype())
        limit = {"steps": SPARE_STEPS} if self.settings.quick else {"seconds": self.seconds}
        free = [*body(model), *(model.model.embed_tokens.parameters() if embedding else ())]
        feed = Epochs(examples, batch_tokens=BATCH_TOKENS, seed=self.settings.seed)
        train(model, feed, learning_rate=RATE, parameters=free, state=path.with_suffix(".state"), **limit)
        from_torch(model.float(), checkpoint, embedding="F16" if embedding else None).write(path)
        path.with_suffix(".state").unlink(missing_ok=True)
        return path

    def judged(self, name: str, model: Path, sets: dict[str, Sequence[Record]]) -> dict[str, Evaluation]:
        """The model on each set."""
        return {
            where: msgspec.convert(
                self.settings.kept(self.name, f"{name}-{where}", lambda rows=rows: evaluate(model, rows, TRANSLATION, name=name)),
                Evaluation,
            )
            for where, rows in sets.items()
        }

    def compared(self, names: tuple[str, str], models: tuple[Path, Path], sets: dict[str, Sequence[Record]]) -> dict[str, Any]:
        """Both arms on each set, and the first minus the second."""
        first, second = (self.judged(name, model, sets) for name, model in zip(names, models, strict=True))
        return {
            where: {
                **{name: found[where].figures() for name, found in zip(names, (first, second), strict=True)},
                "difference": paired_bootstrap(second[where], first[where], seed=self.settings.seed),
            }
            for where in sets
        }


def filtered(arms: Arms) -> dict[str, Any]:
    """Sampled, gated and scored targets against greedy ones."""
    settings = arms.settings
    train_pairs = settings.pairs("train", 2 * TRAINING)
    half = len(train_pairs) // 2
    teacher = arms.trained("teacher", settings.trimmed(), train_pairs[:half][:TRAINING])
    sources = [msgspec.structs.replace(record, target="") for record in train_pairs[half:][: 8 if settings.quick else SOURCES]]
    plan = Plan(samples=2 if settings.quick else 6, keep=2, seed=settings.seed)
    file = arms.folder / "rows.jsonl"
    with closing(open_teacher(f"hf:{teacher}", threads=settings.threads)) as speaker, Tokenizer(teacher) as text:
        judge = Judge(log_probs=speaker.log_probs, text=text)
        with RowLog(file, {"teacher": speaker.digest, **msgspec.to_builtins(plan)}) as log:
            made = synthesise(speaker, TRANSLATION, sources, log, plan=plan, judge=judge, identify=None if settings.quick else identify)

        def answers() -> list[str]:
            said = speaker.generate(asked(speaker, TRANSLATION, sources), n=1, temperature=0.0, seed=0, max_new_tokens=129)
            return [TRANSLATION.parse(one.text).text for (one,) in said]

        greedy = settings.kept(arms.name, "greedy", answers)
    plain = [msgspec.structs.replace(record, target=text) for record, text in zip(sources, greedy, strict=True) if text]
    best = training_records(TRANSLATION, read_rows(file)) or plain  # an untrained model's nonsense passes no gate
    students = (
        arms.trained("filtered", teacher, best, blocks=BLOCKS),
        arms.trained("greedy", teacher, plain, blocks=BLOCKS),
    )
    about = {"synthesis": msgspec.to_builtins(made), "records": {"filtered": len(best), "greedy": len(plain)}}
    return {"sets": arms.compared(("filtered", "greedy"), students, general_sets(settings)), **about}


def frozen(arms: Arms) -> dict[str, Any]:
    """Embeddings frozen in the correction against trained."""
    records = arms.settings.pairs("train", TRAINING)
    start = arms.settings.trimmed()
    models = (arms.trained("frozen", start, records), arms.trained("not frozen", start, records, embedding=True))
    return {"sets": arms.compared(("frozen", "not frozen"), models, general_sets(arms.settings))}


def generic(arms: Arms) -> dict[str, Any]:
    """30% generic sentences among a domain's against none."""
    settings = arms.settings
    inside, outside = by_topic(settings.pairs("train"))
    within, beyond = by_topic(settings.pairs("dev"))
    start = arms.trained("start", settings.trimmed(), outside[:TRAINING])
    models = (
        arms.trained("generic 30%", start, mixed(inside, outside[-TRAINING:], share=GENERIC_SHARE, seed=settings.seed)),
        arms.trained("generic 0%", start, inside),
    )
    sets: dict[str, Sequence[Record]] = {"kitchen": within[:JUDGED], "elsewhere": beyond[:JUDGED]}
    return {"sets": arms.compared(("generic 30%", "generic 0%"), models, sets), "records": len(inside)}


ABLATIONS: dict[str, Callable[[Arms], dict[str, Any]]] = {"filtered": filtered, "frozen": frozen, "generic": generic}


def by_topic(records: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """Sentences about the kitchen, and the others; every other one where none is."""
    words = set(TOPICS["kitchen"].split("|"))
    inside = [record for record in records if words & set(record.source.lower().rstrip(".!?").split())] or list(records[::2])
    ids = {record.id for record in inside}
    return inside, [record for record in records if record.id not in ids]


def general_sets(settings: Settings) -> dict[str, Sequence[Record]]:
    """Tatoeba dev, and NTREX-MX: out of domain."""
    if settings.quick:
        return {"tatoeba": settings.pairs("dev", 4)}
    far = read_pairs(settings.data / "ntrex-en-es" / "first-997-mx.tsv", TRANSLATION, limit=JUDGED)
    return {"tatoeba": settings.pairs("dev", JUDGED), "ntrex": far}


def rows(figures: dict[str, Any]) -> list[Sequence[str]]:
    """A line a set and arm."""
    found: list[Sequence[str]] = [("set", "arm", "BLEU", "chrF (95%)", "first - second, sentence chrF (95%)")]
    for where, of in figures["sets"].items():
        pair = of["difference"]
        for name, row in of.items():
            if name != "difference":
                low, high = row["chrf_ci"]
                found.append((where, name, f"{row['bleu']:.1f}", f"{row['chrf']:.1f} ({low:.1f}-{high:.1f})", ""))
        found.append((where, "", "", "", f"{pair['diff']:+.2f} ({pair['low']:+.2f} to {pair['high']:+.2f}), p = {pair['p']:.3f}"))
    return found


def main(words: Sequence[str] | None = None) -> None:
    """One ablation, its table and its JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=tuple(ABLATIONS))
    parser.add_argument("--data", type=Path, default=Path("var/data"), help="folder with tatoeba-en-es/ and ntrex-en-es/")
    parser.add_argument("--work", type=Path, default=Path("var/forge"), help="kept between runs")
    parser.add_argument("--seconds", type=float, default=600.0, help="of training, each arm and each teacher")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="tiny models, seconds; nothing is written to bench/results")
    said = parser.parse_args(words)
    settings = Settings(said.data, said.work / "quick" if said.quick else said.work, said.threads, said.seed, said.quick)
    figures = ABLATIONS[said.name](Arms(said.name, settings, said.seconds)) | {"seconds_an_arm": said.seconds, "seed": said.seed}
    if said.quick:
        print_table(rows(figures))
        return
    command = f"python -m bench.ablation {said.name} --data FOLDER --seconds {said.seconds:g} --threads {said.threads} --seed {said.seed}"
    write(f"ablation-{said.name}", figures, command=command, rows=rows(figures))


if __name__ == "__main__":
    main()
