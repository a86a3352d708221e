"""Samples of a teacher become rows: gated, scored, resumable."""

import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from coordinator.forge.synthesis.audit import Audit, audit
from coordinator.forge.synthesis.mixing import mixed, training_records
from coordinator.forge.synthesis.rows import Hypothesis, Row, RowLog, key_of, read_header, read_rows
from coordinator.forge.synthesis.sampling import Plan, synthesise
from coordinator.forge.synthesis.scoring import WEIGHTS, Candidate, Judge, Signals, agreement, consistency
from protocol.errors import BadInput, MalformedMessage, NotEnough, Unavailable, WrongDigest
from protocol.models.tokenizer import Example, Tokenizer
from protocol.tasks import RANCH, Record
from tests.forge.telling import PLAN, TASK, Telling, record, run

ROOT = Path(__file__).parents[2]


def one_row(file: Path, said: list[str], *, source: str = "the cat sat on a mat", plan: Plan = PLAN) -> tuple[Row, Telling]:
    teacher = Telling({source: said})
    with RowLog(file, {}) as log:
        synthesise(teacher, TASK, [Record(id="a", task=TASK.name, source=source, lang="es")], log, plan=plan, judge=Judge())
    (row,) = read_rows(file)
    return row, teacher


def test_two_samples_that_agree_are_enough(tmp_path: Path) -> None:
    row, teacher = one_row(tmp_path / "rows", ["el gato estaba en la alfombra"])

    assert [n for _, n in teacher.asked] == [2]
    assert (row.samples, row.why) == (2, "agreed")


def test_more_samples_are_asked_for_where_the_first_disagree(tmp_path: Path) -> None:
    row, teacher = one_row(tmp_path / "rows", ["el gato en la mesa", "un perro corre por ahí", "el gato en la mesa", "el gato en la mesa"])

    assert [n for _, n in teacher.asked] == [2, 2]
    assert row.why.startswith("the first samples agree by")


def test_more_samples_are_asked_for_where_a_gate_refused_one(tmp_path: Path) -> None:
    row, _ = one_row(tmp_path / "rows", ["el gato en la alfombra", "the cat sat on a mat"])

    assert row.why == "a sample was refused: copy"


def test_what_was_refused_stays_in_the_row_with_its_reason(tmp_path: Path) -> None:
    row, _ = one_row(tmp_path / "rows", ["el gato en la alfombra", "the cat sat on a mat"])

    assert [(one.text, one.gate, one.times) for one in row.refused] == [("the cat sat on a mat", "copy", 2)]


def test_the_text_that_the_others_agree_with_comes_first_and_the_plan_says_how_many_stay(tmp_path: Path) -> None:
    row, _ = one_row(tmp_path / "rows", ["ese perro corre mucho hoy", "el gato en la mesa", "el gato en la cama", "el gato en la casa"])

    assert len(row.hypotheses) == PLAN.keep
    assert all(one.text.startswith("el gato") for one in row.hypotheses)


def test_one_sample_is_the_greedy_answer(tmp_path: Path) -> None:
    row, teacher = one_row(tmp_path / "rows", ["el gato en la mesa", "otro"], plan=Plan(samples=1, keep=1))

    assert [n for _, n in teacher.asked] == [1]
    assert row.hypotheses[0].text == "el gato en la mesa"


def test_a_source_that_the_teacher_cannot_read_is_refused_alone(tmp_path: Path) -> None:
    teacher = Telling({"the cat sat": ["el gato"], "the cat sat on a mat": ["el gato en la mesa"]}, longest=15)
    records = [Record(id=source, task=TASK.name, source=source) for source in teacher.answers]

    with RowLog(tmp_path / "rows", {}) as log:
        synthesise(teacher, TASK, records, log, plan=PLAN, judge=Judge())

    assert [[one.gate for one in row.refused] for row in read_rows(tmp_path / "rows")] == [[], ["too long"]]


def test_a_source_that_stands_twice_is_asked_once_and_counted(tmp_path: Path) -> None:
    teacher = Telling({"the cat sat": ["el gato"]})
    records = [Record(id=name, task=TASK.name, source="the cat sat") for name in "ab"]

    with RowLog(tmp_path / "rows", {}) as log:
        made = synthesise(teacher, TASK, records, log, plan=PLAN, judge=Judge())

    assert (made.sources, made.duplicates) == (1, 1)
    assert [row.record.id for row in read_rows(tmp_path / "rows")] == ["a"]


@pytest.mark.parametrize("plan", [Plan(samples=0), Plan(samples=129), Plan(samples=2, keep=3), Plan(temperature=0.0)])
def test_a_plan_that_cannot_be_followed_is_refused(plan: Plan) -> None:
    with pytest.raises(BadInput):
        plan.checked()


def test_a_synthesis_goes_on_where_it_stopped_and_a_torn_line_is_cut(tmp_path: Path) -> None:
    run(tmp_path / "whole", 40)
    whole = (tmp_path / "whole").read_bytes()
    (tmp_path / "torn").write_bytes(whole[: len(whole) // 2])

    run(tmp_path / "torn", 40)

    assert (tmp_path / "torn").read_bytes() == whole


def test_kill_9_loses_and_doubles_nothing(tmp_path: Path) -> None:
    run(tmp_path / "whole", 400)
    file = tmp_path / "killed"
    kills = 0
    for at in (64, 160, 256):
        with subprocess.Popen([sys.executable, "-m", "tests.forge.telling", str(file), "400"], cwd=ROOT, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if int(line) >= at:
                    process.send_signal(signal.SIGKILL)
                    break
        kills += process.returncode == -signal.SIGKILL

    run(file, 400)

    assert kills == 3
    assert {row.key: row for row in read_rows(file)} == {row.key: row for row in read_rows(tmp_path / "whole")}
    assert len(list(read_rows(file))) == 400


def test_shards_together_are_the_whole(tmp_path: Path) -> None:
    run(tmp_path / "whole", 30)
    for number in range(3):
        run(tmp_path / f"{number}", 30, shard=f"{number}/3")

    parts = [row for number in range(3) for row in read_rows(tmp_path / f"{number}")]

    assert sorted(parts, key=lambda row: row.key) == sorted(read_rows(tmp_path / "whole"), key=lambda row: row.key)


def test_shards_join_into_one_file_once_and_only_of_one_plan(tmp_path: Path) -> None:
    run(tmp_path / "whole", 30)
    for number in range(2):
        run(tmp_path / f"{number}", 30, shard=f"{number}/2")
    plan = dict(read_header(tmp_path / "whole").plan)

    with RowLog(tmp_path / "joined", plan) as log:
        for part in ("0", "1", "0"):
            log.join(tmp_path / part)
    with (
        RowLog(tmp_path / "other", plan | {"back": "another translator"}) as log,
        pytest.raises(WrongDigest, match="back '', not 'another"),
    ):
        log.join(tmp_path / "0")

    joined = list(read_rows(tmp_path / "joined"))
    assert len(joined) == 30
    assert {row.key: row for row in joined} == {row.key: row for row in read_rows(tmp_path / "whole")}


def test_rows_of_another_plan_are_never_appended(tmp_path: Path) -> None:
    RowLog(tmp_path / "rows", {"samples": 4}).close()

    with pytest.raises(WrongDigest, match="samples 4, not 6"):
        RowLog(tmp_path / "rows", {"samples": 6})


def test_two_writers_of_one_file_are_refused(tmp_path: Path) -> None:
    with RowLog(tmp_path / "rows", {}), pytest.raises(Unavailable, match="another process"):
        RowLog(tmp_path / "rows", {})


def test_a_file_that_holds_something_else_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "rows").write_text("the cat\tel gato\n")

    with pytest.raises(MalformedMessage):
        RowLog(tmp_path / "rows", {})

    assert (tmp_path / "rows").read_text() == "the cat\tel gato\n"


def test_a_usual_human_translation_scores_0_and_every_signal_raises_the_score() -> None:
    usual = {name: weight.usual for name, weight in WEIGHTS.items()}

    assert consistency(Signals(**usual)) == pytest.approx(0.0)
    for name in usual:
        assert consistency(Signals(**{**usual, name: usual[name] - 0.1})) < 0.0


def test_a_signal_that_is_not_known_adds_nothing() -> None:
    assert consistency(Signals(length=-0.15)) == pytest.approx(0.0)


def test_agreement_counts_each_text_as_often_as_it_was_said() -> None:
    said = [Candidate("el gato", times=3), Candidate("un perro", times=1)]

    alone = agreement([Candidate("el gato"), Candidate("un perro")], 0)

    assert alone is not None
    assert agreement(said, 0) == pytest.approx((2 * 100.0 + alone) / 3)
    assert agreement([Candidate("el gato")], 0) is None


@pytest.mark.llama
def test_the_end_of_a_text_is_a_signal_of_its_own(tiny: Path) -> None:
    with Tokenizer(tiny) as text:
        tokens = (*text.encode(" el gato", bos=False), text.eos)

        def told(examples: list[Example]) -> list[np.ndarray]:
            return [np.array([-1.0] * (len(one.target) - 1) + [-5.0], dtype=np.float32) for one in examples]

        judge = Judge(log_probs=told, text=text, back=lambda texts: ["the cat"] * len(texts))
        ((found,),) = judge.signals(TASK, [record(1)], [[Candidate("el gato", tokens)]])

    assert (found.log_prob, found.end) == (-1.0, -5.0)
    assert found.round_trip is not None


def row_of(number: int, text: str, *, target: str = "") -> Row:
    asked = msgspec.structs.replace(record(number), target=target)
    kept = (Hypothesis(text, 0.0, Signals()), Hypothesis(f"{text} b", -1.0, Signals())) if text else ()
    return Row(key_of(asked), asked, kept, (), 2, "agreed")


def test_every_kept_text_becomes_a_record_and_the_known_truth_stands_in_where_none_was_kept() -> None:
    rows = [row_of(1, "el gato"), row_of(2, "", target="la verdad"), row_of(3, "")]

    assert [(one.id, one.target) for one in training_records(TASK, rows)] == [
        ("r1#1", "el gato"), ("r1#2", "el gato b"), ("r2", "la verdad"),
    ]  # fmt: skip
    assert [one.id for one in training_records(TASK, rows, keep=1)] == ["r1#1", "r2"]


def test_a_kept_verdict_is_the_records_verdict() -> None:
    asked = Record(id="a", task="ranch", source="soil low")
    row = Row(key_of(asked), asked, (Hypothesis("leak: the tank", 0.0, Signals()),), (), 2, "agreed")

    (found,) = training_records(RANCH, [row])

    assert (found.verdict, found.target) == ("leak", "leak: the tank")


@pytest.mark.parametrize(("share", "generic"), [(0.0, 0), (0.3, 30), (0.5, 70), (0.9, 100)])
def test_generic_records_have_their_share_or_are_all_there(share: float, generic: int) -> None:
    mine = [msgspec.structs.replace(record(number), target="x") for number in range(70)]
    others = [msgspec.structs.replace(record(number), id=f"g{number}", target="y") for number in range(100)]

    found = mixed(mine, others, share=share)

    assert sum(one.target == "y" for one in found) == generic
    assert sum(one.target == "x" for one in found) == 70


def test_a_generic_record_without_an_answer_is_refused() -> None:
    with pytest.raises(BadInput, match="no target"):
        mixed([record(1)], [record(2)])


def test_an_audit_suspects_the_target_that_another_source_explains_better() -> None:
    words = ("gato", "perro", "caballo", "tanque", "bomba", "campo")
    rows = [row_of(number, f"el {word} está allí") for number, word in enumerate(words)]
    rows[2] = row_of(2, "la bomba está allí")
    second = Telling({record(number).source: [f"el {word} está allí"] for number, word in enumerate(words)})

    found = audit(second, TASK, rows)

    assert [verdict.target for verdict in found.verdicts if verdict.suspect] == ["la bomba está allí"]
    assert (found.audited, found.of, found.method) == (6, 6, "agreement, chrF")
    assert "the best of 4 others" in found.verdicts[0].reason


def test_an_audit_is_plain_data_that_reads_back_as_it_was() -> None:
    rows = [row_of(number, f"el gato {number}") for number in range(4)]
    second = Telling({record(number).source: [f"el gato {number}"] for number in range(4)})

    found = audit(second, TASK, rows, sample=3)

    assert found.audited == 3
    assert msgspec.json.decode(msgspec.json.encode(found.plain()), type=Audit) == found


def test_an_audit_needs_another_source() -> None:
    with pytest.raises(NotEnough, match="at least 2"):
        audit(Telling({}), TASK, [row_of(1, "el gato")])
