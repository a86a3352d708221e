"""Vocabulary trimming loses nothing that was counted."""

from pathlib import Path

import numpy as np
import pytest

from coordinator.forge.students.trim import coverage, general_weights, trim
from protocol.errors import BadInput, UnknownName
from protocol.models.checkpoint import TOKEN_NORMAL, Checkpoint, Vocabulary
from protocol.models.tokenizer import Tokenizer, make_example
from protocol.tasks import RANCH, Record

pytestmark = pytest.mark.llama
TEXTS = ["the soil moisture is low", "la bomba trabaja sin agua\nes:", " leak: the tank 12% ñandú"]


def pieces(path: Path, text: str) -> list[bytes]:
    with Tokenizer(path) as tokenizer:
        return [tokenizer.piece(token) for token in tokenizer.encode(text, bos=False)]


def test_counted_texts_keep_their_pieces_and_the_rest_goes(tiny: Path, tmp_path: Path) -> None:
    trimmed = trim(tiny, TEXTS, tmp_path / "small.gguf", frequent=0)

    assert len(trimmed.vocabulary.tokens) < len(Checkpoint.read(tiny).vocabulary.tokens)
    assert [pieces(tmp_path / "small.gguf", text) for text in TEXTS] == [pieces(tiny, text) for text in TEXTS]
    assert "▁clogged" not in trimmed.vocabulary.tokens


def test_kept_rows_of_the_embedding_are_the_stored_bytes(tiny: Path, tmp_path: Path) -> None:
    before, after = Checkpoint.read(tiny), trim(tiny, TEXTS, tmp_path / "small.gguf", frequent=0)
    rows = [before.vocabulary.tokens.index(piece) for piece in after.vocabulary.tokens]

    np.testing.assert_array_equal(after.tensors["token_embd.weight"].data, before.tensors["token_embd.weight"].data[rows])


def test_any_text_still_has_a_spelling_after_trimming(tiny: Path, tmp_path: Path) -> None:
    trim(tiny, TEXTS, tmp_path / "small.gguf", frequent=0)

    with Tokenizer(tmp_path / "small.gguf") as tokenizer:
        for text in ("clogged filter", "水", "Ω & 🌽"):
            assert tokenizer.decode(tokenizer.encode(text, bos=False)) == text


def test_coverage_counts_texts_that_changed(tiny: Path, tmp_path: Path) -> None:
    trim(tiny, TEXTS, tmp_path / "small.gguf", frequent=0)

    found = coverage(tiny, tmp_path / "small.gguf", [TEXTS[0], "clogged filter overflow"])

    assert found.identical == 0.5
    assert found.longer > 0


def test_coverage_is_the_share_of_tokens_that_are_the_same_at_the_same_place(tiny: Path, tmp_path: Path) -> None:
    trim(tiny, TEXTS, tmp_path / "small.gguf", frequent=0)
    text = "the soil clogged the tank"  # "▁clogged" goes, the four others stay
    tokens = pieces(tiny, text)

    found = coverage(tiny, tmp_path / "small.gguf", [text])

    assert found.same == pytest.approx((len(tokens) - 1) / len(tokens))


def test_general_words_fill_the_vocabulary_heaviest_first(tiny: Path, tmp_path: Path) -> None:
    """ "water" and "sun" are common English words, "clogged" is a rare one."""
    without = trim(tiny, [], tmp_path / "none.gguf", frequent=0)
    room = len(without.vocabulary.tokens) + 12

    trimmed = trim(tiny, [], tmp_path / "some.gguf", frequent=0, general=["en"], pieces=room)

    assert room - 5 <= len(trimmed.vocabulary.tokens) <= room
    assert "▁the" in trimmed.vocabulary.tokens
    assert "▁clogged" not in trimmed.vocabulary.tokens


def test_with_general_words_what_texts_use_least_gives_way_to_the_limit(tiny: Path, tmp_path: Path) -> None:
    """Merges of what stays stay too: the other texts keep their pieces."""
    often, once = ["the soil moisture is low", "la bomba sin agua"], "the clogged tank 水"
    lossless = trim(tiny, [*often, *often, once], tmp_path / "lossless.gguf", frequent=0)
    room = len(lossless.vocabulary.tokens) - 1

    trimmed = trim(tiny, [*often, *often, once], tmp_path / "held.gguf", frequent=0, general=["en"], pieces=room)

    assert room - 12 <= len(trimmed.vocabulary.tokens) <= room
    assert [pieces(tmp_path / "held.gguf", text) for text in often] == [pieces(tiny, text) for text in often]
    assert pieces(tmp_path / "held.gguf", once) != pieces(tiny, once)
    with Tokenizer(tmp_path / "held.gguf") as tokenizer:
        assert tokenizer.decode(tokenizer.encode(once, bos=False)) == once


def test_a_limit_below_what_always_stays_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"300 pieces are too few: \d+ always stay"):
        trim(tiny, TEXTS, tmp_path / "small.gguf", frequent=0, general=["en"], pieces=300)


def test_spellings_share_a_words_frequency_by_how_early_they_were_merged() -> None:
    vocabulary = Vocabulary(
        ["▁Boston", *(f"▁filler{i}" for i in range(98)), "▁boston"], -np.arange(100, dtype=np.float32), np.full(100, TOKEN_NORMAL)
    )

    weights = general_weights(vocabulary, NoTokenizer(), ["en"])

    assert weights[0] == pytest.approx(100 * weights[99])


class NoTokenizer(Tokenizer):
    """For vocabularies that hold every word in question whole; the others are nothing."""

    def __init__(self) -> None:
        pass

    def encode(self, text: str, *, bos: bool) -> list[int]:
        return []


def test_a_language_without_a_word_list_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="'xx'"):
        trim(tiny, TEXTS, tmp_path / "small.gguf", general=["xx"])


def test_a_prompt_starts_with_bos_and_a_target_ends_in_eos(tiny: Path) -> None:
    record = Record(id="1", task="ranch", source="soil low", target="leak: the tank")

    with Tokenizer(tiny) as tokenizer:
        made = make_example(tokenizer, RANCH, record)

        assert made.prompt[0] == tokenizer.bos
        assert made.target[-1] == tokenizer.eos
        assert tokenizer.decode(made.prompt) == "soil low\nen:"
        assert tokenizer.decode(made.target) == " leak: the tank"
