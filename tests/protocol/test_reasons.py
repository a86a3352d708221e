"""Reasons: in both languages, with the reader's decimal sign, and kept over a restart."""

import re
import string
from pathlib import Path
from typing import get_args

import pytest

from protocol.reasons import TEXTS, Code, Why, kept, read

ROOT = Path(__file__).parents[2]
UNSURE = Why("below", {"what": Why("right-verdict"), "sure": 0.41, "limit": 0.63}, (Why("share-budget", {"share": 0.25}),))


def test_every_code_has_words_and_every_word_has_a_code() -> None:
    assert set(TEXTS) == set(get_args(Code))


@pytest.mark.parametrize("code", get_args(Code))
def test_a_reason_takes_the_same_figures_in_both_languages(code: Code) -> None:
    english, spanish = (sorted(part[1:] for part in string.Formatter().parse(told) if part[1]) for told in TEXTS[code])

    assert english == spanish
    assert code == "as-written" or TEXTS[code][0] != TEXTS[code][1]


@pytest.mark.parametrize("code", [code for code in get_args(Code) if code != "as-written"])
def test_every_code_is_somebody_s_reason(code: Code) -> None:
    sources = [path for side in ("node", "protocol") for path in (ROOT / side).rglob("*.py") if path.name != "reasons.py"]

    assert any(re.search(rf'"{code}"', path.read_text(encoding="utf-8")) for path in sources)


def test_it_is_told_in_english_to_programs_and_in_the_reader_s_language_to_people() -> None:
    assert str(UNSURE) == "probability of a right verdict 0.41 below 0.63 (share budget 25%)"
    assert UNSURE.told("es") == "probabilidad de que el veredicto sea correcto 0.41, menor que 0.63 (se puede preguntar el 25%)"
    assert "correcto 0,41, menor que 0,63" in UNSURE.told("es", comma=True)


def test_a_figure_s_sign_changes_and_a_peer_s_name_or_a_pattern_does_not() -> None:
    why = Why("pattern", {"pattern": "v1.5 'rota'", "key": "5f0c.1"})

    assert why.told("es", comma=True) == "recordado: el patrón \"v1.5 'rota'\" del operador (5f0c.1)"


def test_what_is_kept_is_read_again_the_same() -> None:
    why = UNSURE.noting(Why("examples-shown", {"count": 3}))

    assert read(kept(why)) == why


@pytest.mark.parametrize("text", ["verdict probability 0.30 below 0.50 (not calibrated)", "", '["a code of next year",{},[]]', "[]"])
def test_a_sentence_of_an_older_program_is_told_as_it_was_written(text: str) -> None:
    assert read(text) == Why("as-written", {"text": text})
    assert read(text).told("es", comma=True) == text
