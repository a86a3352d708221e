"""What decides a student: the plan of a distillation, and the time it may take."""

import math
from dataclasses import dataclass, field
from typing import Literal

from coordinator.forge.students.export import DEFAULT_KIND
from coordinator.forge.students.trim import FREQUENT, PIECES
from coordinator.forge.training.recipe import Recipe
from protocol.errors import BadInput


@dataclass(frozen=True)
class Budget:
    """Wall-clock seconds for the three stages that take as long as one lets them."""

    name: str
    correct_s: float
    capture_s: float
    student_s: float

    @classmethod
    def named(cls, name: str) -> "Budget":
        """ "demo", "hour", a number of seconds for the three together, or three with commas: teacher, capture, student.

        Raises:
            BadInput: none of those, or below 10 seconds in all.
        """
        if name in PRESETS:
            return PRESETS[name]
        try:
            given = [float(part) for part in name.split(",")]
        except ValueError:
            given = []
        if len(given) not in (1, 3) or not (min(given) > 0 and 10 <= sum(given) < math.inf):
            raise BadInput(
                f"budget {name!r} is not usable: say {', '.join(PRESETS)}, seconds (10 or more), or three: teacher,capture,student"
            )
        return cls(name, *(given if len(given) == 3 else [share * given[0] for share in SHARES]))

    def for_student(self) -> "Budget":
        """All of it for the student, where the teacher is taken as it is."""
        return Budget(self.name, 0.0, 0.0, self.correct_s + self.capture_s + self.student_s)

    def over(self, cores: int) -> "Budget":
        """A budget of CPU-seconds in wall-clock seconds, where that many cores work at once."""
        return Budget(self.name, self.correct_s / cores, self.capture_s / cores, self.student_s / cores)


SHARES = (0.52, 0.15, 0.33)  # of one number: teacher, capture, student
PRESETS = {"demo": Budget("demo", 165.0, 20.0, 130.0), "hour": Budget("hour", 1800.0, 500.0, 1100.0)}


@dataclass(frozen=True)
class Plan:
    """Everything that decides the result, beside the records."""

    budget: Budget
    seed: int = 0
    preset: str = ""  # "nano", "tiny", "small" (students.cut): cut in depth and width; "": `blocks` of the teacher's width
    blocks: int = 8  # the student's, without a preset
    scratch: bool = False  # a preset's shapes with random weights instead of a cut
    mode: Literal["topk", "sampled", "hidden8"] = "topk"  # what is captured of the teacher's distribution
    loss: str = "kl"  # between the teacher's distribution and the student's (training.objective)
    alpha: float = 0.1  # weight of the teacher's distribution: what a teacher of minutes is sure of is often wrong (docs/log.md)
    verdict: float = 1.0  # weight of a verdict's tokens in the loss; 4 made no difference to accuracy (docs/log.md)
    own: float = 3.0  # for each captured record, so many records more with their own targets, which the capture had no time for
    kind: str = DEFAULT_KIND  # of the student's file
    teacher_kind: str = "Q8_0"
    frequent: int = FREQUENT
    pieces: int = PIECES  # of the vocabulary at most, where general words fill it up
    general: tuple[str, ...] | None = None  # languages whose general words the vocabulary keeps; None: a translation's two, else none
    accumulate: int = 1  # batches a step, over all processes; a multiple of their number
    threads: int = 2  # more than the idle cores of the machine makes it slower, not faster
    correct: Recipe | None = None  # None: the upper half of the blocks whole, which learns faster than LoRA on all (docs/log.md)
    student: Recipe = field(default_factory=lambda: Recipe(mode="full", learning_rate=5e-4))
    on_policy: Recipe | None = None  # after distilling: the student writes, the teacher scores (training.on_policy)
    blockwise: bool = False  # on policy in blocks, of which the teacher keeps what it might have said (training.speculative)
    polish: Recipe | None = None  # after that: by rewards (training.polish)
