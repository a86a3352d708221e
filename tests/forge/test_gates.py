"""What a teacher's text must pass, and what is said where it does not."""

from collections.abc import Mapping

import pytest

from coordinator.forge.synthesis.gates import languages_of, longest_repeat, passes, refusal
from coordinator.forge.synthesis.language import identify
from protocol.tasks import RANCH, Record, translation

TASK = translation("English", "Spanish")


def asked(source: str) -> Record:
    return Record(id="a", task=TASK.name, source=source, lang="es")


def english(_: str) -> Mapping[str, float]:
    return {"en": 0.9, "es": 0.1}


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("Tom came at 2 with Mary.", " Tom vino a las dos con María."),
        ("We flew from London to Tokyo.", " Volamos de Londres a Tokio."),
        ("It costs 1,000 dollars.", " Cuesta 1.000 dólares."),
        ("No, no, no!", " ¡No, no, no!"),
        ("Go.", " Vete ya."),
    ],
)
def test_a_translation_that_keeps_what_it_must_passes_every_gate(source: str, said: str) -> None:
    assert refusal(TASK, asked(source), said, identify=identify) is None


@pytest.mark.parametrize(
    ("gate", "source", "said"),
    [
        ("form", "Where is the dog?", " ..."),
        ("language", "Where is the dog that barked?", " Où est le chien qui aboyait ?"),
        ("length", "He went to the market to buy some bread.", " Fue."),
        ("length", "Go.", " Se marchó sin decirle nada a nadie de la familia."),
        ("repetition", "I like the red house.", " Me gusta la casa la casa la casa."),
        ("repetition", "I laughed about that.", " Me reí jajajajajajajajaja."),
        ("numbers", "We have 14 apples and 3 pears.", " Tenemos 15 manzanas y 3 peras."),
        ("numbers", "We have apples and pears.", " Tenemos 12 manzanas y peras."),
        ("names", "I saw Tom there.", " Vi a Juan allí."),
        ("names", "I saw a friend of mine there.", " Vi allí a mi amigo Juan."),
    ],
)
def test_the_gate_that_refuses_is_named(gate: str, source: str, said: str) -> None:
    found = refusal(TASK, asked(source), said, identify=identify)

    assert found is not None
    assert found.gate == gate


def test_a_copy_is_refused_also_where_no_language_is_identified() -> None:
    found = refusal(TASK, asked("The old house stands near the river."), " The old house stands near the river.")

    assert found is not None
    assert (found.gate, found.reason) == ("copy", "7 of 7 words are the source's")


def test_the_first_gate_in_order_speaks() -> None:
    found = refusal(TASK, asked("We have 14 apples."), " We have 15 apples.", finished=False, identify=english)

    assert found is not None
    assert found.gate == "finished"


def test_the_reason_says_what_is_missing() -> None:
    found = refusal(TASK, asked("We have 14 apples and 3 pears."), " Tenemos manzanas y 3 peras.")

    assert found is not None
    assert found.reason == "1 of 2 numbers are missing: 14"


@pytest.mark.parametrize(
    ("said", "gate"),
    [
        ("leak: the tank", None),
        ("leak:", "form"),
        ("leek: the tank", "form"),
        ("the tank leaks", "form"),
        ("normal: the tank", "truth"),
        ("leak: the tank the tank the tank", "repetition"),
    ],
)
def test_a_verdict_must_have_the_form_and_not_contradict_the_truth(said: str, gate: str | None) -> None:
    found = refusal(RANCH, Record(id="a", task="ranch", source="soil low", verdict="leak"), said)

    assert (found.gate if found else None) == gate


def test_a_verdict_whose_truth_nobody_knows_passes() -> None:
    assert passes(RANCH, Record(id="a", task="ranch", source="soil low"), "leak: the tank")


def test_a_sentence_in_the_wrong_language_is_refused_after_a_verdict_too() -> None:
    record = Record(id="a", task="ranch", source="soil low", lang="es")

    assert not passes(RANCH, record, "leak: water is being lost between the tank and the valve", identify=identify)
    assert passes(RANCH, record, "leak: se pierde agua entre el tanque y la válvula", identify=identify)


def test_a_language_without_a_code_here_is_not_asked_for() -> None:
    task = translation("English", "Quechua")

    assert languages_of(task, Record(id="a", task=task.name, source="x")) == ("", ("en",))


@pytest.mark.parametrize(
    ("target", "source", "said"),
    [
        ("French", "Tom has four black cats.", " Tom a quatre chats noirs."),  # "four" and no number that we read
        ("German", "The dog is in the garden.", " Der Hund ist im Garten."),  # capitals that are no names
        ("Portuguese", "The end of the days.", " O fim dos dias."),  # "dos" is no 2
    ],
)
def test_numbers_and_names_of_a_language_that_is_not_read_refuse_nothing(target: str, source: str, said: str) -> None:
    task = translation("English", target)

    assert refusal(task, Record(id="a", task=task.name, source=source), said, identify=identify) is None


@pytest.mark.parametrize(
    ("words", "times"), [("a b c", 1), ("a a b", 2), ("x a b a b a b y", 3), ("a b a c", 1), ("a b b a b b", 2), ("", 1)]
)
def test_a_run_of_words_is_counted_as_often_as_it_follows_itself(words: str, times: int) -> None:
    assert longest_repeat(words.split())[0] == times
