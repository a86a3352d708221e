"""Which sentences the figures allow."""

import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest

from coordinator.forge.judging import claims, evidence, schema
from coordinator.forge.judging.calibrate import fit
from coordinator.forge.judging.evaluation import Evaluation, evaluate_texts
from protocol.errors import BadInput
from protocol.tasks import Record, translation
from tests.evaluation.conftest import ranch_records, simulated

ROOT = Path(__file__).parents[2]


def with_right(evaluation: Evaluation, right: int) -> Evaluation:
    """The same answers, with exactly the first `right` of them correct."""
    rows = tuple(msgspec.structs.replace(answer, correct=place < right) for place, answer in enumerate(evaluation.answers))
    return msgspec.structs.replace(evaluation, answers=rows)


BASE = simulated(1500, accuracy=0.9)


def test_a_share_of_the_teacher_is_claimed_where_the_interval_is_narrow() -> None:
    sentence = claims.retention(with_right(BASE, 1350), with_right(BASE, 1215), "general", seed=1)

    assert sentence.startswith("general: the student keeps 90% of the teacher's verdict accuracy (95% interval 88.")
    assert "n = 1500" in sentence


def test_few_records_allow_a_range_only() -> None:
    few = msgspec.structs.replace(BASE, answers=BASE.answers[:60])

    sentence = claims.retention(with_right(few, 50), with_right(few, 40), "esteli", seed=1)

    assert "keeps between" in sentence
    assert "60 records allow no closer statement" in sentence


def test_a_teacher_that_knows_nothing_allows_no_ratio() -> None:
    assert "too near zero" in claims.retention(with_right(BASE, 0), with_right(BASE, 10), "general", seed=1)


STUDENT = {"accuracy": 0.80, "accuracy_ci": [0.76, 0.84]}


@pytest.mark.parametrize(
    ("interval", "told"),
    [([0.85, 0.90], "is better than the student"), ([0.75, 0.78], "as good as the student within the intervals"), ([0.60, 0.70], "")],
)
def test_a_baseline_as_good_as_the_student_is_named(interval: list[float], told: str) -> None:
    sentence = claims.against("trees_note", {"accuracy": sum(interval) / 2, "accuracy_ci": interval}, STUDENT, "general")

    assert told in sentence
    assert bool(sentence) == bool(told)


def test_what_quantisation_costs_is_said_with_its_interval() -> None:
    hidden = claims.quantisation({"diff": -0.004, "low": -0.012, "high": 0.004}, "general", "verdict")
    seen = claims.quantisation({"diff": -1.5, "low": -2.5, "high": -0.5}, "general", "text")

    assert hidden.startswith("general: no difference found")
    assert "-1.2 points to +0.4 points" in hidden
    assert seen == "general: quantisation changed the student by -1.5 chrF (95% interval -2.5 chrF to -0.5 chrF, paired)."


def test_a_peer_that_is_better_is_called_better() -> None:
    assert claims.against_peer("apertium", {"diff": -3.0, "low": -4.0, "high": -2.0}, "s", "text").startswith("s: apertium is better")


def test_the_bundle_holds_every_model_on_every_set_and_what_was_not_tested() -> None:
    teacher, student = simulated(200, accuracy=0.95, seed=1), simulated(200, accuracy=0.7, seed=2)

    made = evidence.bundle(
        release=3, task="ranch", sets={"general": {"teacher": teacher, "student_float": student, "student": student}},
        baselines={"general": {"trees": {"accuracy": 0.7, "accuracy_ci": [0.63, 0.76]}}},
        calibration=fit(simulated(200, accuracy=0.7, seed=3)), seed=9, command="milpa-fleet demo --seed 9",
        not_tested=["Rain on the antenna."], lineage={"base_digest": "ab", "cut": {"kept": [0, 2], "of": 4}},
    )  # fmt: skip

    general = made["sets"]["general"]
    assert set(general["models"]) == {"teacher", "student_float", "student"}
    assert general["models"]["student"]["accuracy"] == student.figures()["accuracy"]
    assert any("boosted trees" in sentence for sentence in made["statements"])
    assert made["not_tested"][0] == "Rain on the antenna."
    assert [step["note"] for step in made["lineage"]] == ["", "2 of 4 blocks"]
    assert msgspec.json.decode(msgspec.json.encode(made)) == made  # plain JSON, nothing else


def test_asking_the_peer_is_described_from_the_answers() -> None:
    student, teacher = simulated(400, accuracy=0.6, seed=1), simulated(400, accuracy=0.95, seed=2)

    found = evidence.operating_point(student, teacher, fit(simulated(400, accuracy=0.6, seed=3)), budget=0.25)

    assert found["escalated"] == pytest.approx(0.25, abs=0.07)
    assert found["ends"] == pytest.approx([student.figures()["accuracy"], teacher.figures()["accuracy"]])
    assert student.figures()["accuracy"] < found["accuracy_with_escalation"]
    assert found["curve"][0] == [0.0, found["ends"][0]]
    assert found["curve"][-1] == pytest.approx([1.0, found["ends"][1]])


def test_a_live_curve_ends_where_the_peers_answers_end() -> None:
    found = evidence.live_curve([0.1, 0.9, 0.2, 0.8], [0.0, 1.0, 0.0, 1.0], [1.0, 1.0, 0.0, 1.0], [True, False, True, False])

    assert found["curve"] == [[0.0, 0.5], [0.25, 0.75], [0.5, 0.75]]


def test_codes_that_the_student_lost_come_first() -> None:
    student, teacher = simulated(200, accuracy=0.6, seed=1), simulated(200, accuracy=0.95, seed=2)

    rows = evidence.by_code(student, teacher)

    losses = [(row["student"] - row["teacher"]) / row["n"] for row in rows]
    assert losses == sorted(losses)
    assert sum(row["n"] for row in rows) == 200


def test_this_machine_has_a_name_and_cores() -> None:
    found = evidence.machine()

    assert found["cpu"]
    assert found["cores"] >= 1
    assert "sacrebleu" in found["libraries"]


def test_a_site_that_asked_nothing_has_no_curve() -> None:
    assert evidence.live_curve([0.9, 0.8], [1.0, 0.0], [1.0, 0.0], [False, False])["curve"] == []


RECORDS = ranch_records(300)


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    """An evidence with two sets, a teacher, a release before and a peer, categories and costs."""
    teacher, before, student = (
        costed(simulated(300, accuracy=share, seed=seed), cpu) for share, seed, cpu in ((0.97, 1, 2.0), (0.9, 2, 0.5), (0.6, 3, 0.5))
    )
    models = {"teacher": teacher, "student": student, "release-1": before, "q8_0": student}
    return evidence.bundle(
        release=2, task="ranch", sets={"general": models, "esteli": models}, records={"general": RECORDS, "esteli": RECORDS}, seed=4,
        command="x",
    )  # fmt: skip


def costed(evaluation: Evaluation, cpu: float) -> Evaluation:
    rows = tuple(msgspec.structs.replace(answer, cpu_seconds=cpu * (1 + place % 3)) for place, answer in enumerate(evaluation.answers))
    return msgspec.structs.replace(evaluation, answers=rows)


def test_a_bundle_has_the_documented_types(whole: dict[str, Any]) -> None:
    found = schema.check(whole)

    assert found.regressions is not None
    assert found.regressions.tests == len(found.regressions.rows) > 0
    assert found.sets["general"].economics.models["student"].joules_per_1000 > 0


def test_what_is_no_bundle_is_told_by_its_key(whole: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=r"no evidence bundle.*\$\.sets"):
        schema.check(whole | {"sets": {"general": 1}})


def test_the_schema_in_the_documents_is_the_types_own() -> None:
    assert (ROOT / "docs/evidence.schema.json").read_bytes() == schema.json_schema()


def test_every_key_of_the_bundle_is_in_the_document() -> None:
    text = (ROOT / "docs/evidence.md").read_text(encoding="utf-8")

    keys = [field.name for kind in (schema.Evidence, schema.HeldOut) for field in msgspec.structs.fields(kind)]

    assert not [key for key in keys if f"`{key}`" not in text]


def test_a_collapse_is_named_against_the_release_before_and_the_teacher_in_every_set(whole: dict[str, Any]) -> None:
    named = {(row["set"], row["against"]) for row in whole["regressions"]["rows"] if row["loss"] and row["category"] == "all"}

    assert named == {(where, which) for where in ("general", "esteli") for which in ("teacher", "release-1")}
    assert {row["against"] for row in whole["regressions"]["rows"]} == {"teacher", "release-1"}  # not every quantisation
    assert all(row["tests"] == len(whole["regressions"]["rows"]) for row in whole["regressions"]["rows"])


def test_categories_with_few_records_are_listed_as_not_tested(whole: dict[str, Any]) -> None:
    few = {row["category"] for row in whole["regressions"]["too_few"]}

    assert few
    assert not few & {row["category"] for row in whole["regressions"]["rows"]}


def test_all_paired_comparisons_are_corrected_together(whole: dict[str, Any]) -> None:
    changes = [change for found in whole["sets"].values() for change in found["paired"].values()]

    assert [change["comparisons"] for change in changes] == [6.0] * 6
    assert all(change["p_holm"] >= change["p"] for change in changes)


def test_one_topic_after_another_so_that_sets_stand_side_by_side(whole: dict[str, Any]) -> None:
    kept = [place for place, sentence in enumerate(whole["statements"]) if "of the teacher's verdict accuracy" in sentence]

    assert kept == [0, 1]
    assert [whole["statements"][place].split(":")[0] for place in kept] == ["general", "esteli"]
    assert "one of 2 such intervals" in whole["statements"][0]


def test_one_held_out_set_is_said_to_be_one() -> None:
    models = {"teacher": simulated(60, accuracy=0.9), "student": simulated(60, accuracy=0.8, seed=1)}

    one, two = (
        evidence.bundle(release=1, task="ranch", sets=dict.fromkeys(names, models), seed=1, command="x")["not_tested"]
        for names in (["a"], ["a", "b"])
    )

    assert evidence.ONE_SET in one
    assert evidence.ONE_SET not in two
    assert evidence.NO_CATEGORIES in one


def test_the_same_records_have_the_same_digest_and_others_another(whole: dict[str, Any]) -> None:
    models = {"student": simulated(60, accuracy=0.9)}
    other = evidence.bundle(
        release=1, task="ranch", sets={"general": models}, records={"general": RECORDS[:60]}, seed=1, command="x"
    )  # fmt: skip

    digests = [found["records"]["digest"] for found in (*whole["sets"].values(), other["sets"]["general"])]

    assert digests[0] == digests[1] != digests[2]


def test_the_codes_digest_follows_the_code(tmp_path: Path) -> None:
    for side in evidence.CODE:
        (tmp_path / side).mkdir()
    (tmp_path / "protocol" / "a.py").write_text("x = 1\n")
    before = evidence.code(tmp_path)
    (tmp_path / "protocol" / "a.py").write_text("x = 2\n")

    assert evidence.code(tmp_path) != before
    assert len(evidence.code()) == 64


def test_the_lineage_names_every_stage_that_trained_the_student() -> None:
    trained = {"training": {"examples": 5, "first_loss": 2.0, "last_loss": 1.0}, "file_digest": "d"}

    steps = evidence.lineage_steps({"distil": trained, "on_policy": trained, "polish": trained})

    assert [step["name"] for step in steps][1:] == ["student, distilled", "student, on its own answers", "student, polished"]


def test_synthesised_targets_stand_in_the_lineage_with_their_cost_and_every_verdict_of_the_audit() -> None:
    made = {"file_digest": "f", "sentence": "9 of 9 sources", "cost": {"missing": []}, "audit": {"verdicts": [{"id": "1"}]}, "plan": {}}

    step = evidence.lineage_steps({"base_digest": "b", "targets": made})[1]

    assert step == {"name": "targets", "digest": "f", "note": "9 of 9 sources", "cost": made["cost"], "audit": made["audit"]}


def test_french_is_not_judged_as_english_and_the_evidence_says_what_nobody_looked_at() -> None:
    french = translation("English", "French")
    records = [
        Record(str(place), french.name, f"We see no cats, {place}.", target=f"On n'y voit pas six chats, {place}.") for place in range(40)
    ]
    good, bad = (evaluate_texts([text] * 40, records, french, name=text) for text in ("On n'y voit pas six chats.", "Not that."))

    made = evidence.bundle(
        release=1, task=french.name, sets={"own": {"teacher": good, "student": bad}}, records={"own": records}, seed=1, command="x"
    )

    assert {row["category"] for row in made["sets"]["own"]["categories"]} == {"all", "length: medium"}
    assert {row["measure"] for row in made["regressions"]["rows"]} == {"chrF"}
    assert [sentence for sentence in made["not_tested"] if "none of French" in sentence]


def test_the_commit_says_when_the_code_was_changed_and_a_measured_result_is_no_code(tmp_path: Path) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    result, code = tmp_path / "bench" / "results" / "forge.json", tmp_path / "code.py"
    result.parent.mkdir(parents=True)
    result.write_text("{}")
    code.write_text("")
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)

    result.write_text('{"figure": 1}')
    measured = evidence.commit(tmp_path)
    code.write_text("changed = True")

    assert len(measured) == 40
    assert evidence.commit(tmp_path) == f"{measured}+changes"
