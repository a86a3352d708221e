"""Translation: the `small` student against Apertium and its own teacher, on Tatoeba's test and out of domain on NTREX-MX.

Six CPU-hours of training at most, over as many runs as it takes. chrF above Apertium is of the corpus; shares of the teacher are of mean
sentence chrF, with the paired interval.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import msgspec

from bench.kept import answered, distilled, share, shown
from bench.settings import TRANSLATION, Settings
from coordinator.forge.judging.evaluation import Evaluation, evaluate_texts, few_shot, paired_bootstrap
from coordinator.forge.judging.peers import apertium
from coordinator.forge.pairs import read_pairs
from coordinator.forge.plan import Budget
from protocol.tasks import Record

BUDGET = Budget("tatoeba", correct_s=4_200.0, capture_s=900.0, student_s=12_300.0)  # CPU-seconds: 4.8 hours, most of them the student's
OWN = 19.0  # nearly all pairs: the capture has time for one in twenty
SHOTS = 5
KEY = "tatoeba"


def measure(settings: Settings) -> dict[str, Any]:
    train = settings.pairs("train")
    made = distilled(settings, KEY, TRANSLATION, train, budget=BUDGET, own=OWN, preset="small", kind="Q4_K_M")
    found: dict[str, Any] = {}
    for number, (name, test) in enumerate({"tatoeba": settings.pairs("test"), "ntrex": ntrex(settings)}.items()):
        teacher = answered(settings, KEY, f"{name}-teacher", made.teacher, test, TRANSLATION)
        student = answered(settings, KEY, f"{name}-student", made.student, test, TRANSLATION)
        peer = text(settings, f"{name}-apertium", test, lambda records: list(apertium(records, TRANSLATION).texts))
        shown = text(settings, f"{name}-few-shot", test, lambda records: few(settings, records))
        systems = {"apertium": peer, "teacher few-shot": shown, "teacher corrected": teacher, "student": student}
        about = {
            "against": {key: brief(one) for key, one in systems.items()},
            "student_minus": {
                key: paired_bootstrap(one, student, seed=settings.seed) for key, one in systems.items() if one is not student
            },
            "budget": dataclasses.asdict(BUDGET),
            "own": OWN,
            "training": made.lineage["distil"]["training"],
        }
        if number == 0:
            gain = student.figures()["chrf"] - peer.figures()["chrf"]
            found["tatoeba"] = {"figure": gain, "n": len(test)} | about
        found[f"tatoeba_{number + 2}"] = share(Evaluation.quality, teacher, student, seed=settings.seed) | about
    return found


def ntrex(settings: Settings) -> list[Record]:
    if settings.quick:
        return settings.pairs("test", 8)
    return read_pairs(settings.data / "ntrex-en-es" / "first-997-mx.tsv", TRANSLATION)


def text(settings: Settings, name: str, test: Sequence[Record], ask: Any) -> Evaluation:
    made = settings.kept(KEY, name, lambda: evaluate_texts(ask(test), test, TRANSLATION, name=name))
    return msgspec.convert(made, Evaluation)


def few(settings: Settings, records: Sequence[Record]) -> list[str]:
    """The uncorrected teacher with examples shown; its vocabulary is the corrected one's, trimmed."""
    base = next((settings.folder(KEY) / "stages").glob("trim-*/trimmed.gguf"))
    shots = few_shot(TRANSLATION, settings.pairs("dev", SHOTS))
    return shown(base, shots, records, seed=settings.seed)


def brief(evaluation: Evaluation) -> dict[str, Any]:
    keys = ("bleu", "bleu_ci", "chrf", "chrf_ci", "bleu_signature", "chrf_signature", "file_mb", "tokens_per_second", "peak_rss_mb")
    return {key: value for key, value in evaluation.figures().items() if key in keys}
