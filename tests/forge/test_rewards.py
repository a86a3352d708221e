"""What an answer is worth, and which of its tokens are to blame."""

import math
from collections.abc import Mapping

import numpy as np
import pytest

from coordinator.forge.training.rewards import (
    IN_FORM,
    Sample,
    advantages,
    blamed,
    chosen,
    consistency,
    ensemble,
    inside,
    language,
    length,
    natural,
    task_reward,
)
from protocol.errors import BadInput, UnknownName
from protocol.tasks import RANCH, Record, translation

SPANISH = translation("English", "Spanish")


def leak(**changes: str) -> Record:
    return Record(**{"id": "1", "task": "ranch", "source": "flow 12", "verdict": "leak", "target": "leak: water is lost", **changes})


def sentence(source: str = "The cat sat on the mat.", target: str = "El gato se sentó.") -> Record:
    return Record(id="1", task=SPANISH.name, source=source, lang="es", target=target)


def said(*texts: str) -> list[Sample]:
    return [Sample(text, True) for text in texts]


def test_a_right_verdict_is_worth_more_than_a_wrong_one_and_that_more_than_none() -> None:
    assert task_reward(RANCH, leak(), said(" leak: water", " normal: water", " nonsense")) == [1.0, IN_FORM, 0.0]


def test_a_text_is_worth_its_likeness_to_the_reference() -> None:
    near, far = task_reward(SPANISH, sentence(), said(" El gato se sentó.", " Llueve mucho."))

    assert near == pytest.approx(1.0)
    assert far < 0.2


def test_without_a_reference_a_text_is_worth_its_likeness_to_the_others() -> None:
    group = said(" El gato duerme.", " El gato duerme.", " Llueve.")

    assert task_reward(SPANISH, sentence(target=""), group) == consistency(SPANISH, sentence(), group)


def test_consistency_is_the_share_of_the_others_with_the_same_verdict() -> None:
    assert consistency(RANCH, leak(), said(" leak: a", " leak: b", " normal: c")) == [0.5, 0.5, 0.0]


def test_the_language_is_judged_against_the_sources() -> None:
    def identify(text: str) -> Mapping[str, float]:
        return {"es": 0.6, "pt": 0.4} if "gato" in text else {"en": 0.9, "es": 0.1}

    assert language(identify)(SPANISH, sentence(), said(" El gato", " The cat")) == [1.0, pytest.approx(0.1)]


def test_natural_is_the_inverse_perplexity_and_nothing_without_a_teacher() -> None:
    found = natural(RANCH, leak(), [Sample("", True, math.log(0.25)), Sample("", True)])

    assert found == [pytest.approx(0.25), 0.0]


def test_an_answer_that_was_cut_off_has_no_good_length() -> None:
    record = leak(target="0123456789")

    assert length(RANCH, record, [Sample(" 0123456789", True), Sample(" 01234", True), Sample(" 0123456789", False)]) == [1.0, 0.5, 0.0]


@pytest.mark.parametrize("name", ["task", "consistency", "natural", "length"])
def test_a_reward_is_between_nothing_and_one(name: str) -> None:
    group = [*said(" leak: agua", "", " : ", " normal: x"), Sample("\ufffd", False, -3.0)]

    assert all(0.0 <= value <= 1.0 for value in ensemble()[name](RANCH, leak(), group))


def test_an_advantage_is_relative_to_its_group() -> None:
    found = advantages({"task": np.array([[1.0, 0.0], [0.2, 0.2]])}, {"task": 1.0})

    assert found[0, 0] == -found[0, 1] > 0
    assert (found[1] == 0).all()


def test_five_rewards_that_agree_make_no_larger_step_than_one() -> None:
    values = np.array([[1.0, 0.0, 0.5], [0.3, 0.2, 0.9]])
    names = ("task", "consistency", "language", "natural", "length")

    one, five = advantages({"task": values}, {"task": 1.0}), advantages(dict.fromkeys(names, values), dict.fromkeys(names, 1.0))

    np.testing.assert_allclose(one, five)


def test_a_reward_that_hardly_differs_says_hardly_anything() -> None:
    found = advantages({"natural": np.array([[0.500, 0.501]])}, {"natural": 1.0})

    assert abs(found).max() == pytest.approx(0.01)


def test_a_weight_of_zero_takes_a_reward_out() -> None:
    task, noise = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])

    found = advantages({"task": task, "length": noise}, {"task": 1.0, "length": 0.0})

    np.testing.assert_allclose(found, advantages({"task": task}, {"task": 1.0}))


def test_an_unknown_reward_is_named() -> None:
    with pytest.raises(UnknownName, match="beauty"):
        chosen({"beauty": 1.0}, ensemble())


def test_a_polish_without_rewards_is_refused() -> None:
    with pytest.raises(BadInput, match="at least one"):
        chosen({}, ensemble())


@pytest.mark.parametrize(
    ("task", "record", "text", "wrong"),
    [
        (RANCH, leak(), " normal: water is lost", ["normal"]),
        (RANCH, leak(), " leak: water is lost", []),
        (RANCH, leak(), " water is lost", ["water"]),
        (RANCH, leak(verdict=""), " normal: all well", []),
        (RANCH, leak(), " leak: flow 12 and 13", ["13"]),
        (RANCH, leak(), " leak: the pump the pump the pump the pump runs", ["the pump the pump the pump"]),
        (SPANISH, sentence(), " El gato sat on the mat", ["sat on the", "on the mat"]),
        (SPANISH, sentence("I saw New York City.", ""), " Vi New York City.", []),
        (SPANISH, sentence("I paid 1,000 pesos.", ""), " Pagué 1.000 pesos.", []),
        (SPANISH, sentence("I paid 1,000 pesos.", ""), " Pagué 100 pesos.", ["100"]),
    ],
)
def test_what_is_wrong_is_pointed_at(task, record: Record, text: str, wrong: list[str]) -> None:
    assert [text[span.begin : span.end] for span in blamed(task, record, text)] == wrong


def test_a_language_without_word_lists_is_blamed_for_no_numbers_or_untranslated_words() -> None:
    german = translation("English", "German")
    text = " Die 3 Pumpen: Hamburg Hafen Nord."
    record = Record(id="1", task=german.name, source="A few pumps: Hamburg Hafen Nord.", target="Einige Pumpen.")

    assert blamed(german, record, text) == []
    assert blamed(SPANISH, record, text)


def test_a_token_is_blamed_where_it_touches_a_span() -> None:
    pieces = [b" nor", b"mal", b":", " á".encode()[:2], " á".encode()[2:], b" 13", b""]
    text = b"".join(pieces).decode()

    found = inside(blamed(RANCH, leak(), text), pieces)

    assert found == [True, True, False, False, False, True, False]
