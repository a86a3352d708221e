"""What every engine keeps, the real one and the one the tests use."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from protocol.errors import BadInput, Unavailable
from protocol.tasks import RANCH
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


def test_with_a_form_the_answer_begins_with_one_of_its_codes_whatever_the_model_would_say(engine: Any) -> None:
    for prompt in (PROMPT, "la bomba suena raro\nes:", "no es nada:"):
        said = engine.generate(prompt, max_new_tokens=30, form=RANCH.form)

        assert RANCH.parse(said.text).verdict in RANCH.codes


def test_a_verdict_is_finished_however_few_tokens_are_asked_for(engine: Any) -> None:
    said = engine.generate(PROMPT, max_new_tokens=1, form=RANCH.form)

    assert said.stopped == "length"
    assert RANCH.parse(said.text).verdict in RANCH.codes and RANCH.parse(said.text).sentence == ""


def test_the_pieces_come_as_they_are_said_and_make_the_text(engine: Any) -> None:
    heard: list[Any] = []

    said = engine.generate(PROMPT, max_new_tokens=30, form=RANCH.form, on_piece=heard.append)

    assert tuple(piece.text for piece in heard) == said.pieces
    assert tuple(piece.logprob for piece in heard) == said.logprobs


def test_what_the_listener_raises_stops_the_generation_and_spoils_nothing(engine: Any) -> None:
    before = engine.generate(PROMPT, max_new_tokens=12)
    heard: list[Any] = []

    def hang_up(piece: Any) -> None:
        heard.append(piece)
        raise InterruptedError("enough")

    with pytest.raises(InterruptedError):
        engine.generate(PROMPT, max_new_tokens=12, on_piece=hang_up)

    assert len(heard) == 1
    assert engine.generate(PROMPT, max_new_tokens=12).logprobs == before.logprobs


def test_alternatives_are_told_at_each_place_best_first(engine: Any) -> None:
    said = engine.generate(PROMPT, max_new_tokens=6, alternatives=2)

    assert [len(place) for place in said.alternatives] == [2] * len(said.tokens)
    assert all(best.logprob >= second.logprob for best, second in said.alternatives)
    assert [place[0].logprob for place in said.alternatives] == pytest.approx(said.logprobs)  # greedy: the best was taken


def test_samples_are_the_same_for_the_same_seed_and_keep_to_the_form(engine: Any) -> None:
    def draw(seed: int) -> list[str]:
        return [said.text for said in engine.sample(PROMPT, n=3, temperature=1.0, seed=seed, max_new_tokens=30, form=RANCH.form)]

    first = draw(5)

    assert draw(5) == first
    assert len(first) == 3 and all(RANCH.parse(text).verdict for text in first)


def test_a_vector_has_length_one_and_is_the_same_for_the_same_text(engine: Any) -> None:
    vector, again = engine.embed("the pump is dry"), engine.embed("the pump is dry")

    assert vector.dtype == "float32" and vector.ndim == 1
    assert float(vector @ vector) == pytest.approx(1.0, abs=1e-5)
    assert (vector == again).all()


def test_a_text_is_nearer_to_its_like_than_to_another(engine: Any) -> None:
    here, near, far = (engine.embed(text) for text in ("the pump is dry", "the pump is dry now", "gateway loss radio 17 17 17"))

    assert float(here @ near) > float(here @ far)


def test_a_closed_engine_says_so_and_closes_twice(engine: Any) -> None:
    engine.close()
    engine.close()

    with pytest.raises(Unavailable, match="closed"):
        engine.generate(PROMPT, max_new_tokens=1)
