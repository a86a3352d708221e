"""What every engine keeps, the real one and the one the tests use."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from protocol.errors import BadInput, Unavailable
from tests.node.fake_engine import FakeEngine

PROMPT = "soil moisture 12 %, pump dry since 3 hours\nen:"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny import tiny_gguf

    return tiny_gguf(tmp_path_factory.mktemp("engine") / "tiny.gguf")


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.llama)])
def engine(request: pytest.FixtureRequest) -> Iterator[Any]:
    if request.param == "fake":
        yield FakeEngine()
        return
    from protocol.models.engine import Engine

    real = Engine(request.getfixturevalue("tiny"), context=256)
    yield real
    real.close()


def test_every_token_has_its_figures_and_the_pieces_make_the_text(engine: Any) -> None:
    said = engine.generate(PROMPT, max_new_tokens=12)

    assert len(said.tokens) == len(said.logprobs) == len(said.margins) == len(said.entropies) == len(said.pieces) >= 1
    assert "".join(said.pieces) == said.text
    assert all(value <= 0 for value in said.logprobs)
    assert all(value >= 0 for value in (*said.margins, *said.entropies))


def test_the_same_prompt_gives_the_same_answer(engine: Any) -> None:
    first = engine.generate(PROMPT, max_new_tokens=12)
    engine.generate("another prompt in between", max_new_tokens=5)

    second = engine.generate(PROMPT, max_new_tokens=12)

    assert (first.text, first.tokens, first.logprobs) == (second.text, second.tokens, second.logprobs)


def test_an_answer_is_never_longer_than_asked_and_has_no_line_break(engine: Any) -> None:
    said = engine.generate(PROMPT, max_new_tokens=2)

    assert len(said.tokens) <= 2
    assert "\n" not in said.text
    assert said.stopped in ("end", "line", "length")


@pytest.mark.parametrize(("prompt", "tokens"), [("", 4), ("a b " * 2000, 4), (PROMPT, 0)])
def test_what_cannot_be_read_is_bad_input(engine: Any, prompt: str, tokens: int) -> None:
    with pytest.raises(BadInput):
        engine.generate(prompt, max_new_tokens=tokens)


def test_a_model_names_itself_by_digest(engine: Any) -> None:
    assert len(engine.model_digest) == 64
    assert engine.adapter_digest == ""


def test_a_closed_engine_says_so_and_closes_twice(engine: Any) -> None:
    engine.close()
    engine.close()

    with pytest.raises(Unavailable, match="closed"):
        engine.generate(PROMPT, max_new_tokens=1)
