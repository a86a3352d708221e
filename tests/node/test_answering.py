from collections.abc import Callable
from typing import Any

import pytest

from node.answering import NoSuchAnswer
from node.store import LearningExample
from protocol.errors import BadInput, UnknownName
from protocol.tasks import Record
from tests.node.conftest import Notes, reply_to
from tests.node.fake_engine import FakeEngine


def examples(node: Any) -> list[LearningExample]:
    return node.store.examples("ranch")


def test_a_sure_answer_is_final_and_asks_nobody(sure: Any) -> None:
    given = sure.answer()

    assert (given.state, given.provisional, given.answer.verdict) == ("final", False, "normal")
    assert sure.asking.questions == []


def test_an_unsure_answer_is_returned_at_once_and_asked_of_a_peer(unsure: Any) -> None:
    given = unsure.answer("tank 3 bar falling")

    question = unsure.asking.questions[0]
    assert given.provisional and given.answer.verdict == "leak"
    assert (question.id, question.asker, question.prompt) == (given.question, "esteli", "tank 3 bar falling\nen:")
    assert unsure.row(given.id).state == "provisional"


def test_the_answer_is_not_stored_when_the_question_is_not(unsure: Any) -> None:
    unsure.asking.fails = True

    with pytest.raises(OSError, match="no space"):
        unsure.answer()

    with unsure.store.transaction() as session:
        from node.store import counts

        assert counts(session) == {}


def test_an_unsure_answer_with_nobody_to_ask_is_unconfirmed(make_node: Callable[..., Any]) -> None:
    node = make_node(FakeEngine(default=" leak: perhaps", probability=0.3), asking=None)

    given = node.answer()

    assert (given.state, given.provisional, given.question) == ("unconfirmed", False, "")


def test_a_verdict_the_form_forced_on_the_model_never_stands_however_sure_it_is_of_the_rest(make_node: Callable[..., Any]) -> None:
    node = make_node(FakeEngine(default=" I do not know", probability=0.99), asking=Notes())

    given = node.answer()

    assert given.provisional and given.answer.verdict
    assert given.judgement.confidence < 0.01


def test_a_budget_of_nothing_escalates_nothing(make_node: Callable[..., Any]) -> None:
    node = make_node(FakeEngine(probability=0.3), asking=Notes(), budget=0.0)

    assert node.answer().state == "final"
    assert node.asking.questions == []


def test_a_peer_that_says_otherwise_upgrades_the_answer(unsure: Any) -> None:
    given = unsure.answer()
    reply = reply_to(unsure.asking.questions[0], "dry-run: the pump ran without water")

    outcome = unsure.answering.apply(reply)

    row = unsure.row(given.id)
    assert (outcome, row.state, row.by) == ("upgraded", "upgraded", "peer:base-station")
    assert (row.verdict, row.text, row.local) == ("dry-run", reply.text, "leak: the pipe lost pressure")


def test_a_peer_that_agrees_confirms_the_answer(unsure: Any) -> None:
    unsure.answer()

    outcome = unsure.answering.apply(reply_to(unsure.asking.questions[0], "leak: pressure fell all night"))

    assert outcome == "confirmed"
    assert [(e.record.verdict, e.origin, e.weight) for e in examples(unsure)] == [("leak", "peer:base-station", 0.9)]


def test_a_second_reply_changes_nothing(unsure: Any) -> None:
    given = unsure.answer()
    unsure.answering.apply(reply_to(unsure.asking.questions[0], "dry-run: no water"))
    before = unsure.row(given.id).change

    outcome = unsure.answering.apply(reply_to(unsure.asking.questions[0], "overflow: too much"))

    assert outcome == "late"
    assert (unsure.row(given.id).change, unsure.row(given.id).verdict) == (before, "dry-run")
    assert len(examples(unsure)) == 1


def test_a_reply_to_another_question_is_refused_and_kept(unsure: Any) -> None:
    given = unsure.answer()

    outcome = unsure.answering.apply(reply_to(unsure.asking.questions[0], "dry-run: no water", question_digest="0" * 64))

    assert outcome == "refused"
    assert unsure.row(given.id).state == "provisional"
    assert unsure.refused() == [("peer:base-station", "the reply names the digest of another question")]


def test_a_peer_that_declines_or_babbles_leaves_the_question_open(unsure: Any) -> None:
    given = unsure.answer()
    question = unsure.asking.questions[0]

    outcomes = [unsure.answering.apply(reply_to(question, "", refused="busy")), unsure.answering.apply(reply_to(question, "bla bla"))]

    assert outcomes == ["refused", "refused"]
    assert unsure.row(given.id).state == "provisional"


def test_what_no_peer_can_help_with_stands_unconfirmed_at_once(unsure: Any) -> None:
    given = unsure.answer()

    unsure.answering.unanswered(unsure.asking.questions[0].id)

    row = unsure.row(given.id)
    assert (row.state, row.text) == ("unconfirmed", "leak: the pipe lost pressure")
    assert unsure.answering.apply(reply_to(unsure.asking.questions[0], "dry-run: no water")) == "late"


def test_past_the_deadline_the_local_answer_stands_unconfirmed(unsure: Any) -> None:
    given = unsure.answer()
    unsure.clock.now += 599
    assert unsure.answering.expire() == 0

    unsure.clock.now += 2
    expired = unsure.answering.expire()

    row = unsure.row(given.id)
    assert (expired, row.state, row.text) == (1, "unconfirmed", "leak: the pipe lost pressure")
    assert unsure.answering.apply(reply_to(unsure.asking.questions[0], "dry-run: no water")) == "late"
    assert unsure.row(given.id).verdict == "leak"


def test_the_coordinator_is_told_how_an_escalation_ended_and_no_text(unsure: Any) -> None:
    unsure.answer("secret of the site")
    unsure.clock.now += 5

    unsure.answering.apply(reply_to(unsure.asking.questions[0], "dry-run: the worker Pedro forgot the valve"))

    kind, figures, detail = unsure.asking.events[0]
    assert (kind, detail) == ("escalation", {"state": "upgraded", "peer": "base-station"})
    assert figures["seconds"] == 5.0 and figures["peer_confidence"] == 0.9


def test_the_operator_outranks_the_peer(unsure: Any) -> None:
    given = unsure.answer()
    unsure.answering.correct(given.id, verdict="overflow", text="the float stuck")

    outcome = unsure.answering.apply(reply_to(unsure.asking.questions[0], "dry-run: no water"))

    row = unsure.row(given.id)
    assert (outcome, row.state, row.by, row.text) == ("late", "corrected", "operator", "overflow: the float stuck")
    assert [(e.record.target, e.origin, e.weight) for e in examples(unsure)] == [("overflow: the float stuck", "operator", 1.0)]


def test_a_peer_does_not_replace_what_the_operator_said_of_the_same_record(unsure: Any) -> None:
    first = unsure.answer("the same window")
    unsure.answering.correct(first.id, verdict="overflow", text="the float stuck")
    unsure.answer("the same window")

    unsure.answering.apply(reply_to(unsure.asking.questions[1], "dry-run: no water"))

    assert [e.record.verdict for e in examples(unsure)] == ["overflow"]


def test_repeating_the_verdict_confirms_the_answer(sure: Any) -> None:
    given = sure.answer()

    row = sure.answering.correct(given.id, verdict="normal")

    assert (row.state, row.text) == ("confirmed", "normal: all is well")
    assert examples(sure)[0].partial is False


def test_a_verdict_without_a_sentence_makes_a_partial_example(sure: Any) -> None:
    given = sure.answer()

    row = sure.answering.correct(given.id, verdict="leak")

    assert (row.state, row.text) == ("corrected", "leak:")
    assert (examples(sure)[0].record.target, examples(sure)[0].partial) == ("leak:", True)


@pytest.mark.parametrize(
    ("verdict", "text", "error"),
    [
        ("", "", "give a verdict"),
        ("leek", "", "did you mean 'leak'"),
        ("", "just words", "begin with a verdict"),
        ("leak", "normal: x", "agree"),
    ],
)
def test_feedback_that_cannot_be_read_changes_nothing(sure: Any, verdict: str, text: str, error: str) -> None:
    given = sure.answer()

    with pytest.raises(BadInput, match=error):
        sure.answering.correct(given.id, verdict=verdict, text=text)

    assert sure.row(given.id).state == "final"
    assert examples(sure) == []


def test_feedback_on_an_unknown_answer_says_so(sure: Any) -> None:
    with pytest.raises(NoSuchAnswer, match="no answer 'nope'"):
        sure.answering.correct("nope", verdict="leak")


def test_bad_input_is_refused_and_kept_with_the_reason(sure: Any) -> None:
    with pytest.raises(UnknownName):
        sure.answering.answer(Record(id="r", task="cook", source="x"), deadline_s=5)
    with pytest.raises(BadInput):
        sure.answer("   ")

    assert [origin for origin, _ in sure.refused()] == ["api", "api"]
    assert "unknown task 'cook'" in sure.refused()[0][1]


def test_an_answer_names_the_model_that_spoke(sure: Any) -> None:
    given = sure.answer(site="malacatoya")

    row = sure.row(given.id)
    assert (row.model_digest, row.adapter_digest, row.release, row.site) == (sure.engine.model_digest, "", 1, "malacatoya")
