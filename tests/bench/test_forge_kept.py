"""What a student keeps is measured from end to end on tiny models; the figures mean nothing there."""

import pytest

from bench import forge_ranch_kept, forge_tatoeba
from bench.forge import TABLE
from bench.settings import Settings

pytestmark = [pytest.mark.torch, pytest.mark.llama]


def test_the_ranch_student_stands_beside_its_teacher_and_the_baselines(settings: Settings) -> None:
    entries = TABLE.judged("ranch_kept", forge_ranch_kept.measure(settings))

    assert list(entries) == ["ranch_kept", "ranch_kept_2"]
    assert {"corrected teacher", "student", "majority"} <= set(entries["ranch_kept"]["against"])


def test_the_translating_student_stands_beside_four_systems_in_and_out_of_domain(settings: Settings) -> None:
    entries = TABLE.judged("tatoeba", forge_tatoeba.measure(settings))

    assert list(entries) == ["tatoeba", "tatoeba_2", "tatoeba_3"]
    assert all(set(entry["against"]) == {"apertium", "teacher few-shot", "teacher corrected", "student"} for entry in entries.values())
    assert entries["tatoeba_3"]["n"] < entries["tatoeba_2"]["n"]
