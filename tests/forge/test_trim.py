"""Vocabulary trimming loses nothing that was counted."""

from pathlib import Path

import numpy as np
import pytest

from coordinator.forge.students.trim import coverage, trim
from protocol.models.checkpoint import Checkpoint
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


def test_a_prompt_starts_with_bos_and_a_target_ends_in_eos(tiny: Path) -> None:
    record = Record(id="1", task="ranch", source="soil low", target="leak: the tank")

    with Tokenizer(tiny) as tokenizer:
        made = make_example(tokenizer, RANCH, record)

        assert made.prompt[0] == tokenizer.bos
        assert made.target[-1] == tokenizer.eos
        assert tokenizer.decode(made.prompt) == "soil low\nen:"
        assert tokenizer.decode(made.target) == " leak: the tank"
