"""A student, its teacher and its calibration on ranch and on translation: what the three measures of confidence look at.

* Models: WORK/ranch_kept/model and WORK/tatoeba/model, or those of `make bench-forge` beside this WORK; else made here in CPU_S.
* The calibration is fitted on records that nothing else looks at; every figure is of other ones. Ranch: the splits dev and test of the
  simulator. Translation: Tatoeba's dev.tsv and test.tsv.
* Answers of both are computed once and kept in WORK/cascade, named by the model's digest: another model is asked anew.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from bench import stamps
from bench.kept import answered, distilled
from bench.settings import TRANSLATION, Settings
from coordinator.forge.judging.calibrate import fit, good_enough
from coordinator.forge.judging.evaluation import Evaluation
from coordinator.forge.plan import Budget
from coordinator.ranch import generate, site_named
from protocol.confidence import FEATURES, Calibration
from protocol.digests import digest_file
from protocol.tasks import RANCH, Record, Task

KEY = "cascade"
CPU_S = 1_800.0  # of training, where no models were made by the forge's measures
RANCH_TRAIN, RANCH_CALIBRATION, RANCH_TEST = 8_000, 1_500, 2_000
SITE, SITE_RECORDS = "esteli", 1_000  # another ranch: its own soil, faults and words, of which neither model has seen anything
QUICK = 24


class Cascade(msgspec.Struct, frozen=True):
    """One task's."""

    task: Task
    calibration: Calibration
    student: Evaluation  # on the test records
    teacher: Evaluation
    elsewhere: Evaluation | None  # the student on a site that is unlike the calibration records

    @property
    def confidences(self) -> tuple[float, ...]:
        """A node's, on the test records."""
        return self.student.confidences(self.calibration)

    @property
    def mean_log_probability(self) -> tuple[float, ...]:
        """The baseline: of the whole answer, per token."""
        place = FEATURES.index("mean")
        return tuple(answer.features[place] for answer in self.student.answers)

    @property
    def good(self) -> tuple[float, ...]:
        """1.0 where the answer may stand: what the confidence is the probability of."""
        return good_enough(self.student, teacher=self.teacher)[0]

    def about(self) -> dict[str, Any]:
        """Beside every figure."""
        quality = {name: sum(one.quality()) / len(one.answers) for name, one in (("student", self.student), ("teacher", self.teacher))}
        return {"n": len(self.student.answers), "method": self.calibration.method, "calibration_records": self.calibration.count,
                "target": self.calibration.target, "quality": quality}  # fmt: skip


def cascades(settings: Settings) -> dict[str, Cascade]:
    """Of both tasks."""
    general = site_named("general")
    count = (QUICK, 2 * QUICK, QUICK, QUICK) if settings.quick else (RANCH_TRAIN, RANCH_CALIBRATION, RANCH_TEST, SITE_RECORDS)
    train, dev, test = (
        generate(general, seed=settings.seed, count=many, split=split)
        for many, split in zip(count, ("train", "dev", "test"), strict=False)
    )  # fmt: skip
    elsewhere = generate(site_named(SITE), seed=settings.seed, count=count[3], split="test")
    ranch = _models(settings, "ranch_kept", RANCH, train)
    translation = _models(settings, "tatoeba", TRANSLATION, settings.pairs("train"), preset="small", kind="Q4_K_M")
    return {
        "ranch": _cascade(settings, "ranch", RANCH, ranch, dev, test, elsewhere),
        "translation": _cascade(settings, "translation", TRANSLATION, translation, settings.pairs("dev"), settings.pairs("test")),
    }


def _cascade(
    settings: Settings,
    name: str,
    task: Task,
    models: tuple[Path, Path],
    dev: Sequence[Record],
    test: Sequence[Record],
    elsewhere: Sequence[Record] = (),
) -> Cascade:
    def ask(model: Path, part: str, records: Sequence[Record]) -> Evaluation:
        return answered(settings, KEY, f"{name}-{part}-{digest_file(model)[:12]}-{len(records)}", model, records, task)

    student, teacher = models
    calibration = fit(ask(student, "dev", dev), teacher=ask(teacher, "dev", dev), seed=settings.seed)
    other = ask(student, "elsewhere", elsewhere) if elsewhere else None
    return Cascade(task, calibration, ask(student, "test", test), ask(teacher, "test", test), other)


def _models(settings: Settings, key: str, task: Task, train: Sequence[Record], **plan: Any) -> tuple[Path, Path]:
    """Student and teacher."""
    if settings.quick:
        return settings.base(), _another(settings.folder(KEY) / "teacher.gguf")
    for folder in (settings.work / key / "model", settings.work.parent / "forge" / key / "model"):
        student, teacher = folder / "student.gguf", folder / "teacher.gguf"
        if student.is_file() and teacher.is_file():
            settings.used(folder.with_name("stages"), stamps.read(folder.with_name("stages")))
            return student, teacher
    made = distilled(settings, key, task, train, budget=Budget.named(str(CPU_S)), **plan)
    return made.student, made.teacher


def _another(path: Path) -> Path:
    from tests.tiny import tiny_checkpoint

    if not path.is_file():
        tiny_checkpoint(layers=2, kind="F16").write(path)
    return path
