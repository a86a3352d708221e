"""What a record is about, by rules that a person can check."""

from collections import Counter

import pytest

from coordinator.forge.judging.categories import GROUPS, categories, denies, kept, names, not_read, numbers, order, speaks
from protocol.tasks import RANCH, RANCH_CODES, Record, Task, translation
from tests.evaluation.conftest import SPANISH


def translated(target: str, source: str = "x") -> Record:
    return Record(id="1", task=SPANISH.name, source=source, target=target, lang="es")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Tank is at 3.", {"3": 1}),
        ("Son las 9:30 y hay 2 gatos y 2 perros", {"9:30": 1, "2": 2}),
        ("1,000 people", {"1000": 1}),
        ("1.000.000,5 pesos", {"1000000.5": 1}),
        ("mide 2,5 m", {"2.5": 1}),
        ("at 9am", {"9": 1}),
        ("007", {"7": 1}),
        ("soil0321 rain0000", {}),  # a channel's digits are no number of the sentence
        ("tengo dos gatos", {"2": 1}),
        ("twenty-five men and thirty women", {"25": 1, "30": 1}),
        ("treinta y cinco años, cuarenta y un días", {"35": 1, "41": 1}),
        ("veinticinco", {"25": 1}),
        ("cincuenta dos", {"50": 1, "2": 1}),
        ("el 10 por ciento", {"10": 1}),
        ("one man, una casa, once", {}),  # articles, and a word of both languages
    ],
)
def test_numbers_have_one_spelling(text: str, found: dict[str, int]) -> None:
    assert numbers(text) == Counter(found)


@pytest.mark.parametrize(
    ("text", "source", "found"),
    [
        ("Ayer vi a María en Boston.", "", ("María", "Boston")),
        ("Tom duerme.", "Tom sleeps.", ("Tom",)),  # first in its sentence, and the same in the source
        ("Duerme. Come mucho.", "He sleeps. Come here.", ()),  # a capital that starts a sentence is no name
        ("He visto el mar.", "He saw the sea.", ()),  # a word of both languages
        ("I think I saw him on Monday.", "", ()),
        ("¿Dónde está Tom?", "", ("Tom",)),
        ("—Bien —dijo él.", "", ()),
    ],
)
def test_names_are_capitals_inside_a_sentence_or_alike_in_the_source(text: str, source: str, found: tuple[str, ...]) -> None:
    assert names(text, source) == found


@pytest.mark.parametrize(
    ("text", "language", "found"),
    [
        ("No es así.", "es", True),
        ("It isn’t so.", "en", True),
        ("Sin agua.", "es", True),
        ("A sin.", "en", False),
        ("Es así.", "es", False),
    ],
)
def test_negation_is_a_word_that_denies_in_the_answers_language(text: str, language: str, found: bool) -> None:
    assert denies(text, language) is found


def test_a_language_is_told_by_its_function_words() -> None:
    assert speaks("El tanque está vacío.", "es")
    assert not speaks("The tank is empty.", "es")
    assert speaks("No me he decidido.", "es")  # "he" and "me" are words of both
    assert speaks("Fuga.", "es")  # nothing speaks against it
    assert not speaks("", "es")


def test_a_record_is_in_every_category_that_fits() -> None:
    record = translated("No vi a Tom hasta las 9.", "I didn't see Tom until 9.")

    assert categories(record, SPANISH) == ("numbers", "entities", "negation", "length: medium", "language: es")


def test_a_record_with_none_of_the_contents_is_plain() -> None:
    assert categories(translated("El gato duerme."), SPANISH) == ("plain", "length: short", "language: es")


def test_a_verdict_record_has_its_group_and_its_site() -> None:
    record = Record(id="1", task="ranch", source="soil1 x", target="tank-low: Tank falls to 3: the well does not refill.", site="esteli")

    assert categories(record, RANCH) == (
        "numbers", "negation", "length: medium", "language: en", "verdicts: tank", "site: esteli",
    )  # fmt: skip


def test_every_verdict_has_a_group() -> None:
    assert set(GROUPS) == set(RANCH_CODES)


@pytest.mark.parametrize(
    ("category", "sentence", "keeps"),
    [
        ("numbers", "Tom no llegó antes de las nueve.", True),  # in words
        ("numbers", "Tom no llegó antes de las 8.", False),
        ("numbers", "Tom no llegó antes de las 9 del 9.", False),  # one too many
        ("entities", "Tom vino.", True),
        ("entities", "Tomás vino.", False),
        ("negation", "Tom no vino.", True),
        ("negation", "Tom vino.", False),
        ("language: es", "Tom no vino a la casa.", True),
        ("language: es", "Tom did not come to the house.", False),
        ("length: medium", "x", None),
        ("language: en", "x", None),  # not this record's
    ],
)
def test_what_makes_the_category_is_kept_or_not(category: str, sentence: str, keeps: bool | None) -> None:
    record = translated("No vi a Tom hasta las 9.", "I didn't see Tom until 9.")

    assert kept(category, sentence, record, SPANISH) is keeps


@pytest.mark.parametrize("lang", ["en", "es"])  # what a record has to name where the codec knows no code
def test_an_answer_in_a_language_without_word_lists_is_not_judged_by_those_of_another(lang: str) -> None:
    french = translation("English", "French")
    record = Record(id="1", task=french.name, source="Tom has no six cats.", target="Tom n'a pas six chats.", lang=lang, site="lyon")

    assert categories(record, french) == ("length: short", "site: lyon")
    assert [kept(name, record.target, record, french) for name in ("numbers", "entities", "negation", f"language: {lang}")] == [None] * 4


def test_a_translations_language_is_its_tasks_also_where_the_record_says_nothing() -> None:
    record = Record(id="1", task=SPANISH.name, source="It is not here.", target="No está aquí.")

    assert categories(record, SPANISH) == ("negation", "length: short", "language: es")


@pytest.mark.parametrize(
    ("task", "told"),
    [
        (translation("English", "French"), ("none of French",)),
        (translation("French", "English"), ()),
        (SPANISH, ()),
        (RANCH, ()),
    ],
)
def test_what_no_rule_can_tell_is_said(task: Task, told: tuple[str, ...]) -> None:
    found = not_read(task)

    assert len(found) == len(told)
    assert all(part in sentence for part, sentence in zip(told, found, strict=True))


def test_categories_are_shown_contents_first() -> None:
    assert order(dict.fromkeys(["site: a", "verdicts: soil", "language: es", "length: long", "plain", "numbers"])) == [
        "numbers", "plain", "length: long", "language: es", "verdicts: soil", "site: a",
    ]  # fmt: skip
