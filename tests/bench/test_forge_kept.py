"""What a student keeps is measured from end to end on tiny models; the figures mean nothing there."""

import pytest

from bench import forge_ranch_kept, forge_tatoeba
from bench.forge import TABLE
from bench.kept import distilled
from bench.settings import Settings
from bench.stamps import Stamp
from protocol.tasks import RANCH

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


def test_stages_that_were_finished_before_count_with_their_seconds_and_their_maker(settings: Settings) -> None:
    records = forge_ranch_kept.records(settings, "train", 16)

    def found() -> Stamp:
        again = Settings(settings.data, settings.work, quick=True)
        distilled(again, "ranch_kept", RANCH, records, budget=forge_ranch_kept.BUDGET)
        return again.parts["ranch_kept/stages"]

    made, read = found(), found()
    (settings.work / "ranch_kept" / "stages.made.json").unlink()
    old = found()

    assert made.known and read.known
    assert read.runs == made.runs
    assert (read.here, read.seconds) == (0.0, made.seconds)
    assert not old.known
    assert old.runs[0].commit == "unknown"
