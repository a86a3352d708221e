import pytest

from node.memory import rules
from node.memory.rules import Neighbour, Pair, Remembered
from protocol.tasks import RANCH, Record


def near(*pairs: tuple[float, str]) -> list[Neighbour]:
    return [Neighbour(f"k{number}", similarity, meaning) for number, (similarity, meaning) in enumerate(pairs)]


def test_white_space_and_unicode_form_do_not_make_another_record() -> None:
    assert rules.memory_key("ranch", "es", "caña  seca\n") == rules.memory_key("ranch", "es", "cañ" + "a seca")


@pytest.mark.parametrize("other", ["soil 12.1", "Soil 121", "soil 121 C"])
def test_digits_case_and_words_make_another_record(other: str) -> None:
    assert rules.memory_key("ranch", "es", "soil 121") != rules.memory_key("ranch", "es", other)


def test_task_and_language_are_part_of_what_is_remembered() -> None:
    assert len({rules.memory_key(task, lang, "a b") for task in ("ranch", "other") for lang in ("es", "en")}) == 4


def test_a_pattern_is_never_the_entry_of_a_record() -> None:
    assert rules.pattern_key("ranch", "es", "chuco") != rules.memory_key("ranch", "es", "chuco")


@pytest.mark.parametrize(("when", "fits"), [("el espejo", True), ("Chuco el ESPEJO;", True), ("espejo el", False), ("espe", False)])
def test_a_patterns_words_stand_whole_and_in_order(when: str, fits: bool) -> None:
    assert (rules.spread(when) in rules.spread("tank8 sun4; chuco el espejo")) is fits


def test_neighbours_that_agree_and_are_close_answer() -> None:
    found = rules.agreed(near((0.90, "leak"), (0.99, "leak"), (0.95, "leak")), 0.90)

    assert found is not None and found.similarity == 0.99


@pytest.mark.parametrize(
    "neighbours",
    [
        near((0.99, "leak"), (0.98, "leak")),
        near((0.99, "leak"), (0.98, "dry-run"), (0.97, "leak")),
        near((0.99, "leak"), (0.98, "leak"), (0.89, "leak")),
    ],
    ids=["too few", "one disagrees", "the farthest is too far"],
)
def test_neighbours_that_are_few_or_disagree_or_are_far_do_not(neighbours: list[Neighbour]) -> None:
    assert rules.agreed(neighbours, 0.90) is None


def test_a_similarity_is_learned_from_where_it_was_right_often_enough() -> None:
    sure = [Pair(0.95 + index / 10_000, True) for index in range(200)]
    unsure = [Pair(0.80 + index / 10_000, index % 2 == 0) for index in range(200)]

    least = rules.learned_least([*unsure, *sure], of=500, floor=0.95)

    assert least is not None
    assert 0.80 < least.similarity <= 0.95 and least.precision >= 0.95 and least.of == 500


@pytest.mark.parametrize(
    "pairs",
    [[Pair(0.9, True)] * 20, [Pair(0.9, index % 3 > 0) for index in range(300)], []],
    ids=["too few", "right too seldom", "none"],
)
def test_without_enough_right_answers_no_similarity_is_trusted(pairs: list[Pair]) -> None:
    assert rules.learned_least(pairs, of=len(pairs), floor=0.95) is None


@pytest.mark.parametrize(("models", "trusted"), [(0.5, True), (0.99, False)])
def test_neighbours_must_be_right_as_often_as_the_model_was_on_the_same_records(models: float, trusted: bool) -> None:
    pairs = [Pair(0.9 + index / 10_000, index % 20 > 0, index % 100 < 100 * models) for index in range(300)]

    assert (rules.learned_least(pairs, of=300, floor=0.75) is not None) is trusted


def test_what_the_model_had_said_is_held_against_the_truth() -> None:
    pair = rules.leave_one_out(Remembered("leak", model="dry-run"), near((0.7, "leak"), (0.9, "leak"), (0.8, "leak")))

    assert pair == Pair(0.7, True, model_right=False)


def test_equal_similarities_are_trusted_together_or_not_at_all() -> None:
    tied = [Pair(0.9, True)] * 100 + [Pair(0.9, False)] * 100

    assert rules.learned_least(tied, of=200, floor=0.9) is None


def test_an_entry_whose_neighbours_disagree_teaches_nothing() -> None:
    assert rules.leave_one_out(Remembered("leak"), near((0.9, "leak"), (0.9, "dry-run"), (0.9, "leak"))) is None


def test_the_farthest_neighbour_is_what_a_similarity_is_learned_on() -> None:
    assert rules.leave_one_out(Remembered("leak"), near((0.7, "leak"), (0.9, "leak"), (0.8, "leak"))) == Pair(0.7, True)


def test_examples_stand_before_the_record_nearest_last_and_too_many_are_left_out() -> None:
    record = Record(id="r", task="ranch", source="soil 1")
    far, close = (Record(id=one, task="ranch", source=one, target=f"leak: {one}") for one in ("far", "close"))
    long = Record(id="l", task="ranch", source="x" * rules.SHOWN_CHARACTERS, target="leak: long")

    prompt = rules.with_examples(RANCH, record, (long, far, close))

    assert prompt == "far\nen: leak: far\n\nclose\nen: leak: close\n\nsoil 1\nen:"


def test_free_texts_agree_but_for_case_and_end_mark() -> None:
    assert rules.meaning("", "¿Dónde está?") == rules.meaning("", "dónde está")
    assert rules.meaning("leak", "leak: one") == rules.meaning("leak", "leak: another")
