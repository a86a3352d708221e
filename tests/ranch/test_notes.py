import numpy as np
import pytest

from coordinator.ranch import SITES, site_named
from coordinator.ranch.notes import BENIGN, CONCEPTS, STANDARD, doubt, slip, telling
from coordinator.ranch.scenarios import SCENARIOS


def test_every_concept_has_phrases_in_both_languages_and_a_scenario_that_speaks_of_it():
    assert set(STANDARD["es"]) == set(STANDARD["en"]) == {*CONCEPTS, *BENIGN}
    assert {scenario.concept for scenario in SCENARIOS} == {*CONCEPTS, *BENIGN, ""}


def test_no_phrase_stands_for_two_concepts():
    for phrases in STANDARD.values():
        said = [phrase for group in phrases.values() for phrase in group]

        assert len(said) == len(set(said))


@pytest.mark.parametrize("name", [name for name in SITES if name != "general"])
def test_a_sites_own_phrases_are_in_no_standard_lexicon(name):
    standard = {phrase for phrases in STANDARD.values() for group in phrases.values() for phrase in group}
    own = {phrase for concepts in site_named(name).words.values() for group in concepts.values() for phrase in group}

    assert len(own) >= 8
    assert not own & standard


def test_a_site_without_a_word_of_its_own_uses_the_standard_one():
    rng = np.random.default_rng(1)
    words = {"es": {"pipe": ("la culebra llora",)}}

    own = telling("pipe", lang="es", words=words, local=1.0, rng=rng)
    standard = telling("air", lang="es", words=words, local=1.0, rng=rng)

    assert own == "la culebra llora"
    assert standard in STANDARD["es"]["air"]


def test_a_slip_changes_one_word_and_keeps_the_others():
    for seed in range(50):
        before = ["puddle", "by", "the", "pipe"]
        after = slip(" ".join(before), np.random.default_rng(seed)).split()

        assert len(after) == len(before)
        assert sum(a != b for a, b in zip(after, before, strict=True)) <= 1


def test_a_worry_is_marked_as_one():
    assert doubt("filtro con arena", lang="es") == "sera filtro con arena?"
    assert doubt("sand in the filter", lang="en") == "maybe sand in the filter?"
