"""What a teacher that only tells text costs: what the forge cannot do with it, and what that was measured to be worth.

Figures are from docs/log.md and from measurements on the packaged Gemma 3 270M; each says what it was measured on. No figure, no claim.
"""

import msgspec


class Missing(msgspec.Struct, frozen=True):
    """One thing that needs log-probabilities."""

    what: str
    instead: str  # what the forge does without it
    measured: str  # "" where nothing was measured


class TextOnly(msgspec.Struct, frozen=True):
    """What falls away with a teacher; goes into a student's lineage as it is."""

    teacher: str
    missing: tuple[Missing, ...]

    @property
    def sentence(self) -> str:
        """One line for an error or a terminal."""
        parts = [f"{one.what}{f' ({one.measured})' if one.measured else ''}" for one in self.missing]
        return f"no {'; no '.join(parts)}. It can still write targets: sequence-level distillation by cross-entropy"


MISSING = (
    Missing(
        "sparse KL on the top k and the tail",
        "cross-entropy on the teacher's texts (Kim and Rush 2016)",
        "the step itself is no cheaper: 2.55 CPU-s against 2.64 with cached top-50, 512 tokens, 32k vocabulary",
    ),
    Missing("on-policy scoring of the student's own answers", "fixed targets only", ""),
    Missing(
        "teacher log-probability in the consistency score",
        "round trip and agreement among the samples",
        "shuffled words: AUC 0.66 by round trip alone, 1.00 with it, 80 sentences",
    ),
)


def cost_of_text_only(name: str) -> TextOnly:
    """What the forge goes without when the teacher called `name` teaches."""
    return TextOnly(name, MISSING)
