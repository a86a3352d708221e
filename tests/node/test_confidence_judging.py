"""node/confidence/judging.py: each answer is judged by the site's budget, and how is remembered with the answer."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from node.answering import Answering
from node.confidence import judging
from node.confidence.budget import Budget
from node.confidence.judging import Judge, budget_of, judged, samples_of
from node.engine.worker import Speaker, Worker
from node.settings import Confidence, Model, NodeSettings
from node.store import AnswerRow, Store, next_change
from protocol.confidence import FEATURES, VERSION, Agreed, Calibration
from protocol.errors import Unavailable
from protocol.tasks import RANCH, Answer, Record
from tests.node.fake_engine import FakeEngine

PRIOR = tuple(step / 100 for step in range(101))


def calibration(engine: FakeEngine, **changes: Any) -> Calibration:
    """The verdict's log-probability as it is: sure of 0.9 where it is 0, of 0.1 where it is -2."""
    weights = tuple(1.0 if name == "verdict_sum" else 0.0 for name in FEATURES)
    values: dict[str, Any] = {
        "task": "ranch", "model_digest": engine.model_digest, "adapter_digest": "", "means": (0.0,) * len(FEATURES),
        "scales": (1.0,) * len(FEATURES), "weights": weights, "bias": 0.0, "points": ((-2.0, 0.1), (0.0, 0.9)), "quantiles": PRIOR,
        "count": 100, "right": 60, "method": "single", "names": FEATURES, "version": VERSION,
    }  # fmt: skip
    return Calibration(**(values | changes))


class Site:
    """A node of store, worker, judge and answering; one folder may be opened again."""

    def __init__(self, folder: Path, *, budget: Budget | None = None, calibrated: bool = True, **judge: Any) -> None:
        self.now = 1e9
        self.engine = FakeEngine()
        self.store = Store(folder / "node.db")
        self.worker = Worker()
        made = calibration(self.engine, **judge.pop("calibration", {})) if calibrated else None
        self.worker.swap_after_current_record(Speaker(self.engine, "ranch", 1, made))
        self.worker.start()
        budget = budget or Budget(share=0.25, audit=0.0)
        self.judge = Judge(self.store, budget, clock=lambda: self.now, random=random.Random(1), **judge)
        self.answering = Answering(self.store, self.worker, node="esteli", judge=self.judge, clock=lambda: self.now)

    def answer(self, probability: float, *, source: str = "soil 21 C") -> Any:
        self.now += 60
        self.engine.probability = probability
        return self.answering.answer(Record(id="r", task="ranch", source=source), deadline_s=10)

    def rows(self) -> list[Any]:
        with self.store.transaction() as session:
            return list(session.execute(sa.select(judged).order_by(judged.c.row)).all())

    def confirm(self, count: int, *, right: Callable[[int], bool], probability: float = 0.7) -> None:
        """So many answers that were asked and then confirmed, or put right, by a peer."""
        given = self.answer(probability)
        with self.store.transaction() as session:
            template = session.execute(sa.select(judged)).all()[-1]
            for index in range(count):
                row = AnswerRow(
                    id=f"{index:032d}", created=self.now, record="r", task="ranch", site="", lang="en", source=f"soil {index} C", prompt="",
                    local="normal: all is well", text="", verdict="normal" if right(index) else "leak", confidence=0.7, reason="",
                    state="confirmed", by="peer:base", model_digest="", adapter_digest="", release=1, seconds=0.1,
                )  # fmt: skip
                row.change = next_change(session)
                session.add(row)
                values = template._asdict() | {"answer": row.id, "asked": True, "chance": 1.0}
                values.pop("row")
                session.execute(sa.insert(judged).values(values))
        assert given.id

    def close(self) -> None:
        self.worker.stop()
        self.store.close()


@pytest.fixture
def site(tmp_path: Path) -> Any:
    opened: list[Site] = []

    def make(folder: str = "a", **how: Any) -> Site:
        for before in opened:
            before.close()
        opened[:] = [Site(tmp_path / folder, **how)]
        return opened[0]

    yield make
    for last in opened:
        last.close()


def test_an_unsure_answer_is_asked_and_says_which_budget_and_which_threshold(site: Any) -> None:
    node = site()

    given = node.answer(0.1)

    assert given.judgement.ask and not given.judgement.keep
    assert given.judgement.reason.startswith("probability of a right verdict 0.10 below 0.2")
    assert given.judgement.reason.endswith("(share budget 25%)")


def test_a_sure_answer_stands(site: Any) -> None:
    given = site().answer(0.99)

    assert given.judgement.keep and given.state == "final"
    assert "not below" in given.judgement.reason


def test_an_uncalibrated_model_is_judged_by_its_probability_and_the_reason_says_so(site: Any) -> None:
    given = site(calibrated=False).answer(0.3)

    assert given.judgement.reason == "verdict probability 0.30 below 0.50 (not calibrated; share budget 25%)"


def test_a_broken_answer_neither_stands_nor_is_asked_without_a_budget(site: Any) -> None:
    node = site(budget=Budget(share=0.0))
    spoken = node.worker.ask("ranch", "soil 21 C", max_new_tokens=8, deadline_s=10)

    judgement = node.judge.rule(RANCH, Answer(text="babble"), spoken, prompt="soil 21 C", left_s=10).judgement

    assert not judgement.keep and not judgement.ask
    assert judgement.confidence == 0.0
    assert judgement.reason == "the answer is not of the task's form (share budget 0%)"


def test_a_sure_answer_is_audited_and_says_so(site: Any) -> None:
    node = site(budget=Budget(share=0.5, audit=0.5))

    reasons = [node.answer(0.99).judgement.reason for _ in range(8)]

    assert any("not below" in reason and "one of the 50% asked to check" in reason for reason in reasons)


def test_the_ruling_is_written_in_the_transaction_of_the_answer(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    node = site()
    node.answer(0.9)

    def fails(*_: Any, **__: Any) -> None:
        raise Unavailable("the disk is full")

    monkeypatch.setattr(node.judge, "remember", fails)
    with pytest.raises(Unavailable):
        node.answer(0.9)

    with node.store.transaction() as session:
        answers = session.scalar(sa.select(sa.func.count()).select_from(AnswerRow))
    assert answers == len(node.rows()) == 1


def test_what_is_owed_and_spent_and_seen_survives_the_process(site: Any) -> None:
    budget = Budget(share=0.25, bytes_a_day=1e6, audit=0.0)
    node = site(budget=budget)
    for step in range(40):
        node.answer(0.05 + 0.02 * step)
    before = node.judge.status()

    again = site(budget=budget)
    again.now = node.now
    again.answer(0.99)  # the speaker is known from its first answer on

    after = again.judge.status()
    assert after["owed"] == pytest.approx(before["owed"] + 0.25, abs=1e-3)
    assert after["day"]["bytes"] == before["day"]["bytes"] > 0
    assert after["realised"] == pytest.approx(before["realised"] * 40 / 41)
    assert after["threshold"] == pytest.approx(before["threshold"], abs=0.05)


def test_another_calibration_begins_with_its_own_confidences(site: Any) -> None:
    node = site(calibration={"quantiles": (0.8, 0.9)})
    node.answer(0.1)

    made = calibration(node.engine, quantiles=(0.01,) * 200)
    node.worker.swap_after_current_record(Speaker(node.engine, "ranch", 2, made))
    given = node.answer(0.1)

    assert given.judgement.keep
    assert len({row.judge for row in node.rows()}) == 2


def test_confirmed_answers_move_what_the_number_means_and_not_who_is_asked(site: Any) -> None:
    node = site()
    node.confirm(120, right=lambda index: index % 3 == 0)
    before = node.answer(0.7).judgement

    made = node.judge.refit()
    after = node.answer(0.7).judgement

    assert made.used
    assert after.confidence < before.confidence - 0.1
    assert after.keep == before.keep
    assert "refitted here" in after.reason
    assert node.rows()[-1].shipped == node.rows()[-2].shipped


def test_a_refit_survives_the_process_and_belongs_to_its_model(site: Any) -> None:
    node = site()
    node.confirm(120, right=lambda index: index % 3 == 0)
    node.judge.refit()

    again = site()
    mine = again.answer(0.7).judgement
    other = calibration(again.engine, bias=0.001)
    again.worker.swap_after_current_record(Speaker(again.engine, "ranch", 2, other))

    assert "refitted here" in mine.reason
    assert "refitted here" not in again.answer(0.7).judgement.reason


def test_an_operators_word_on_an_answer_that_was_not_to_be_asked_teaches_nothing(site: Any) -> None:
    node = site()
    node.confirm(120, right=lambda index: index % 3 == 0)
    with node.store.transaction() as session:
        session.execute(sa.update(judged).values(asked=False))

    made = node.judge.refit()

    assert (made.fitted, made.held_out, made.used) == (0, 0, False)


def test_refits_run_by_the_hour_in_the_sweep(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    node = site()
    monkeypatch.setattr(judging, "LOG_KEPT", 50)
    node.confirm(120, right=lambda index: index % 3 == 0)

    node.judge.sweep()
    early = node.judge.status()["refit"]["fitted"]
    node.now += judging.REFIT_S
    node.judge.sweep()

    assert early == 0
    assert node.judge.status()["refit"]["fitted"] > 50
    assert len(node.rows()) == 50  # and the oldest are forgotten after it


def test_samples_are_taken_of_close_answers_with_energy_and_move_the_number(site: Any) -> None:
    asked: list[int] = []
    energy = [True]

    def samples(task: Any, prompt: str, count: int, temperature: float, seconds: float) -> list[Any]:
        asked.append(count)
        return [node.engine.generate("x", max_new_tokens=8) for _ in range(count)]

    agreed = Agreed(samples=3, temperature=0.7, bias=0.0, slope=1.0, weight=3.0)
    node = site(calibration={"agreed": agreed}, samples=samples, may_agree=lambda: energy[0])
    plain = calibration(node.engine)

    close, sure = node.answer(0.1), node.answer(0.999)
    energy[0] = False
    dark = node.answer(0.1)

    assert asked == [3]
    assert close.judgement.confidence > dark.judgement.confidence
    assert sure.judgement.confidence == pytest.approx(0.9, abs=0.02)
    assert plain.agreed is None


def test_samples_take_no_more_than_their_part_of_the_time_that_is_left(site: Any) -> None:
    within: list[float] = []

    def samples(task: Any, prompt: str, count: int, temperature: float, seconds: float) -> list[Any]:
        within.append(seconds)
        return [node.engine.generate("x", max_new_tokens=8) for _ in range(count)]

    agreed = Agreed(samples=3, temperature=0.7, bias=0.0, slope=1.0, weight=3.0)
    node = site(calibration={"agreed": agreed}, samples=samples)
    node.engine.probability = 0.1
    spoken = node.worker.ask("ranch", "soil 21 C", max_new_tokens=8, deadline_s=10)
    answer = RANCH.parse(spoken.generation.text)

    for left_s in (60.0, 3.0, 0.0, -1.0):
        node.judge.rule(RANCH, answer, spoken, prompt="soil 21 C", left_s=left_s)

    assert within == [judging.SAMPLES_S, 3.0 * judging.SAMPLES_SHARE]


def test_a_request_s_deadline_holds_for_its_samples(site: Any) -> None:
    within: list[float] = []

    def samples(task: Any, prompt: str, count: int, temperature: float, seconds: float) -> list[Any]:
        within.append(seconds)
        raise Unavailable("answers are waiting")

    agreed = Agreed(samples=3, temperature=0.7, bias=0.0, slope=1.0, weight=3.0)
    node = site(calibration={"agreed": agreed}, samples=samples)
    node.engine.probability = 0.1

    node.answering.answer(Record(id="r", task="ranch", source="soil 21 C"), deadline_s=judging.SAMPLES_S)

    assert 0.0 < within[0] < judging.SAMPLES_SHARE * judging.SAMPLES_S


def test_samples_that_must_wait_are_done_without(site: Any) -> None:
    agreed = Agreed(samples=3, temperature=0.7, bias=0.0, slope=1.0, weight=3.0)

    def busy(*_: Any) -> list[Any]:
        raise Unavailable("answers are waiting")

    given = site(calibration={"agreed": agreed}, samples=busy).answer(0.1)

    assert given.judgement.ask


def test_samples_of_a_worker_are_of_the_task_s_form(site: Any) -> None:
    node = site()

    said = samples_of(node.worker)(judging.task_named("ranch"), "soil 21 C", 2, 0.7, 10.0)

    assert len(said) == 2


def test_status_and_figures_name_the_plan_and_what_came_of_it(site: Any) -> None:
    node = site()
    for probability in (0.1, 0.9, 0.9, 0.9):
        node.answer(probability)

    status, figures = node.judge.status(), {name: value() for name, _, value in node.judge.figures()}

    assert (status["plan"], status["bound"], status["why"], status["over"]) == (0.25, "share", "share budget 25%", 4)
    assert figures["escalation_realised_ratio"] == status["realised"] == 0.25
    assert figures["escalation_plan_ratio"] == 0.25


def test_reloaded_settings_change_the_budget_at_once(site: Any) -> None:
    node = site()

    node.judge.reload(NodeSettings(model=Model(budget=0.0), confidence=Confidence(audit=0.1)))

    assert node.answer(0.1).judgement.keep
    assert budget_of(NodeSettings(model=Model(budget=0.4))).share == 0.4
