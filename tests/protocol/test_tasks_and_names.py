"""Prompts, targets, verdicts and names."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import topics
from protocol.errors import BadInput, UnknownName
from protocol.names import checked_name, known
from protocol.tasks import RANCH, RANCH_CODES, Record, task_named

RECORD = Record(id="1", task="ranch", source="tank 9753", lang="es", target="leak: El tanque baja.", verdict="leak")


def test_a_prompt_never_ends_in_a_space_and_a_target_begins_with_one() -> None:
    assert RANCH.prompt(RECORD) == "tank 9753\nes:"
    assert RANCH.target(RECORD) == " leak: El tanque baja."


def test_what_is_rendered_is_parsed_back() -> None:
    answer = RANCH.parse(RANCH.render("leak", "El tanque baja."))

    assert (answer.verdict, answer.sentence) == ("leak", "El tanque baja.")


@pytest.mark.parametrize("text", ["", "leak", "leek: what", ": none", "\nleak: second line", "a leak: no"])
def test_a_text_not_of_the_form_has_no_verdict(text: str) -> None:
    assert RANCH.parse(text).verdict == "" or text.startswith("\n")


@given(st.text(max_size=200))
def test_no_text_crashes_the_parser(text: str) -> None:
    assert RANCH.parse(text).verdict in (*RANCH_CODES, "")


def test_a_record_without_a_target_cannot_be_learned_from() -> None:
    with pytest.raises(BadInput, match="no target"):
        RANCH.target(Record(id="1", task="ranch", source="x"))


def test_a_translation_task_is_found_by_its_name() -> None:
    task = task_named("translate-english-spanish")

    assert task.prompt(Record(id="1", task=task.name, source="Good day.")) == "English: Good day.\nSpanish:"
    assert task.parse(" Buen día.\nEnglish: more").text == "Buen día."


def test_an_unknown_task_is_refused_with_a_suggestion() -> None:
    with pytest.raises(UnknownName, match="did you mean 'ranch'"):
        task_named("ranhc")


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a b", "a/b", "a+", "#", "é", "x" * 49, "a\n"])
def test_a_name_that_is_unsafe_in_a_topic_or_a_path_is_refused(name: str) -> None:
    with pytest.raises(BadInput):
        checked_name(name)
    with pytest.raises(BadInput):
        topics.status(name)


@given(st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True))
def test_a_safe_name_is_kept(name: str) -> None:
    assert checked_name(name) == name


def test_a_filter_matches_its_topic() -> None:
    assert topics.questions_to("base").replace("+", "esteli") == topics.question("base", "esteli")
    assert topics.replies_to("esteli").replace("+", "base") == topics.reply("esteli", "base")


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UnknownName, match="known: esteli, malacatoya"):
        known("zzz", ("malacatoya", "esteli"), what="site")
