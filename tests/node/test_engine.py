"""The real engine, on a tiny model: adapters, texts that split characters, and what cannot be loaded. See also tests/contracts."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.digests import digest_file
from protocol.errors import BadInput, DoesNotFit
from protocol.models import engine as module
from protocol.models.engine import Engine
from protocol.models.generation import Generation
from protocol.models.logits import Logits, Tokens
from protocol.tasks import RANCH, Form, translation
from tests.node.conftest import write_adapter

pytestmark = pytest.mark.llama
PROMPT = "soil moisture 12 %\nen:"


@pytest.fixture
def engine(tiny: Path) -> Iterator[Engine]:
    with Engine(tiny, context=256) as made:
        yield made


def test_an_adapter_changes_the_answer_and_taking_it_off_restores_every_bit(engine: Engine, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a.gguf")
    bare = engine.generate(PROMPT, max_new_tokens=8)

    engine.set_adapter(adapter)
    adapted, digest = engine.generate(PROMPT, max_new_tokens=8), engine.adapter_digest
    engine.set_adapter(None)
    again = engine.generate(PROMPT, max_new_tokens=8)

    assert digest == digest_file(adapter)
    assert adapted.logprobs != bare.logprobs
    assert (again.logprobs, again.tokens, engine.adapter_digest) == (bare.logprobs, bare.tokens, "")


def test_an_adapter_at_start_is_the_adapter_set_later(engine: Engine, tiny: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a.gguf")
    engine.set_adapter(adapter)

    with Engine(tiny, context=256, adapter=adapter) as other:
        assert other.generate(PROMPT, max_new_tokens=8).logprobs == engine.generate(PROMPT, max_new_tokens=8).logprobs


def test_an_adapter_for_another_base_is_refused_and_the_one_before_stays(engine: Engine, tmp_path: Path) -> None:
    engine.set_adapter(write_adapter(tmp_path / "good.gguf"))
    before = engine.generate(PROMPT, max_new_tokens=4).logprobs

    with pytest.raises(DoesNotFit, match="is not for"):
        engine.set_adapter(write_adapter(tmp_path / "wide.gguf", hidden=96))
    with pytest.raises(DoesNotFit, match="is not for"):
        engine.set_adapter(write_adapter(tmp_path / "deep.gguf", tensor="blk.9.ffn_down.weight"))

    assert engine.generate(PROMPT, max_new_tokens=4).logprobs == before


def test_an_adapter_with_nan_is_told_and_leaves_nothing_behind(engine: Engine, tmp_path: Path) -> None:
    bare = engine.generate(PROMPT, max_new_tokens=4).logprobs
    engine.set_adapter(write_adapter(tmp_path / "nan.gguf", scale=float("nan")))

    with pytest.raises(DoesNotFit, match="not finite"):
        engine.generate(PROMPT, max_new_tokens=4)

    engine.set_adapter(None)
    assert engine.generate(PROMPT, max_new_tokens=4).logprobs == bare


def test_a_model_is_no_adapter(engine: Engine, tiny: Path) -> None:
    with pytest.raises(DoesNotFit, match="expect general"):
        engine.set_adapter(tiny)


def test_a_character_split_over_tokens_is_whole_in_the_text(engine: Engine) -> None:
    """Bytes come one a token; the script makes the model say an emoji, a cut one, and a line break."""
    script = [0xF0, 0x9F, 0xA6, 0x99, 0xF0, 0x9F, 0x41, 0x0A]
    said = iter(script)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "greedy", lambda logits, allowed: 4 + next(said))  # the vocabulary's byte tokens begin at 4
        spoken = engine.generate(PROMPT, max_new_tokens=20)

    assert spoken.text == "\N{LLAMA}\N{REPLACEMENT CHARACTER}A"
    assert spoken.pieces == ("", "", "", "\N{LLAMA}", "", "", "\N{REPLACEMENT CHARACTER}A", "")
    assert (spoken.stopped, len(spoken.logprobs)) == ("line", 8)


def test_the_end_token_has_its_figures_and_no_text(engine: Engine) -> None:
    said = iter([4 + 0x41, 1])  # "A", then <eos>

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "greedy", lambda logits, allowed: next(said))
        spoken = engine.generate(PROMPT, max_new_tokens=20)

    assert (spoken.text, spoken.pieces, spoken.tokens, spoken.stopped) == ("A", ("A", ""), (69, 1), "end")


def test_control_tokens_written_in_a_record_stay_text(engine: Engine) -> None:
    plain, marked = engine._tokenize("a"), engine._tokenize("<eos>a")

    assert plain[0] == 2 and 1 not in marked  # begins with <bos>; "<eos>" is spelled out


@pytest.mark.parametrize("damage", ["missing", "text", "cut", "empty"])
def test_a_file_that_is_no_model_is_bad_input(tiny: Path, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "model.gguf"
    if damage != "missing":
        path.write_bytes({"text": b"hello" * 10, "cut": tiny.read_bytes()[:20_000], "empty": b""}[damage])

    with pytest.raises(BadInput, match=r"model\.gguf"):
        Engine(path)


def test_the_answer_and_the_prompt_share_the_context(tiny: Path) -> None:
    with Engine(tiny, context=64) as small:
        spoken = small.generate("el " * 50, max_new_tokens=100)

        assert spoken.prompt_tokens + len(spoken.tokens) <= 64


def test_a_prompt_that_leaves_no_room_for_the_longest_verdict_is_refused_and_no_verdict_is_cut(tiny: Path) -> None:
    """The model is made to spell every verdict letter by letter, as untidily as its vocabulary lets it."""
    with Engine(tiny, context=64) as small, pytest.MonkeyPatch.context() as patch:

        def untidily(logits: Logits, allowed: Tokens | None) -> int:
            assert allowed is not None  # one token is asked for, so nothing is said after the colon
            return min(map(int, allowed), key=lambda token: (len(small._sayable(token)), token))

        patch.setattr(module, "greedy", untidily)
        said: list[str] = []
        for words in range(30, 64):
            try:
                spoken = small.generate("el " * words, max_new_tokens=1, form=RANCH.form)
            except BadInput as error:
                assert "and keeps" in str(error) and "for the verdict; shorten the record" in str(error)
                continue
            assert spoken.prompt_tokens + len(spoken.tokens) <= 64
            said.append(RANCH.parse(spoken.text).verdict)

    assert len(said) > 5 and set(said) <= set(RANCH.codes)


# ---- forms


def test_a_form_that_overrules_the_model_leaves_its_figures_as_they_were(engine: Engine) -> None:
    free = engine.generate(PROMPT, max_new_tokens=1, alternatives=100_000)
    forced = engine.generate(PROMPT, max_new_tokens=30, form=RANCH.form)
    believed = {other.token: other.logprob for other in free.alternatives[0]}

    assert forced.tokens[0] != free.tokens[0]  # random weights never begin with a verdict
    assert forced.logprobs[0] == pytest.approx(believed[forced.tokens[0]], abs=1e-6)
    assert forced.margins[0] == pytest.approx(forced.logprobs[0] - free.logprobs[0], abs=1e-5) and forced.margins[0] < 0


# ---- the fixed beginning of prompts

SHOTS = Form(opening="water pump dry since night:\nes: leak\n\n" * 4)


def told(generation: Generation) -> tuple[object, ...]:
    return generation.text, generation.tokens, generation.logprobs, generation.entropies


def test_an_opening_still_in_the_cache_changes_no_bit(tiny: Path) -> None:
    prompts = [SHOTS.opening + rest for rest in ("soil 12 %\nen:", "tank low, power low\nes:", "soil 12 %\nen:")]
    fresh = []
    for prompt in prompts:
        with Engine(tiny, context=256) as cold:
            fresh.append(told(cold.generate(prompt, max_new_tokens=8, form=SHOTS)))

    with Engine(tiny, context=256) as warm:
        kept = [told(warm.generate(prompt, max_new_tokens=8, form=SHOTS)) for prompt in prompts]

    assert kept == fresh


def test_an_opening_is_computed_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    decode = Engine._decode
    monkeypatch.setattr(Engine, "_decode", lambda self, ids, context=None: (computed.append(len(ids)), decode(self, ids, context))[1])
    first = engine.generate(SHOTS.opening + PROMPT, max_new_tokens=1, form=SHOTS)
    before = sum(computed)

    second = engine.generate(SHOTS.opening + PROMPT, max_new_tokens=1, form=SHOTS)

    assert before == first.prompt_tokens
    assert sum(computed) - before < second.prompt_tokens / 2
    assert told(first) == told(second)


def test_an_adapter_empties_the_cache(engine: Engine, tiny: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a.gguf")
    engine.generate(SHOTS.opening + PROMPT, max_new_tokens=4, form=SHOTS)

    engine.set_adapter(adapter)

    with Engine(tiny, context=256, adapter=adapter) as fresh:
        expected = told(fresh.generate(SHOTS.opening + PROMPT, max_new_tokens=4, form=SHOTS))
        assert told(engine.generate(SHOTS.opening + PROMPT, max_new_tokens=4, form=SHOTS)) == expected


def test_text_that_melts_into_the_opening_is_read_as_the_whole_prompt_is(engine: Engine) -> None:
    task = translation("English", "Spanish")
    opening = Form(opening=task.form.opening + " wa")  # "water" is one token: the opening's last letters are cut differently inside it

    for prompt in ("English: water\nSpanish:", "English: wall\nSpanish:", "English: water\nSpanish:"):
        mine, whole = engine.generate(prompt, max_new_tokens=4, form=opening), engine.generate(prompt, max_new_tokens=4)

        assert mine.prompt_tokens == whole.prompt_tokens
        assert mine.tokens == whole.tokens


def test_a_prompt_that_is_its_opening_and_no_more_is_answered(engine: Engine) -> None:
    form = Form(opening=PROMPT)

    assert told(engine.generate(PROMPT, max_new_tokens=4, form=form)) == told(engine.generate(PROMPT, max_new_tokens=4, form=form))


# ---- vectors and samples


def test_a_vector_is_the_bare_model_s_and_disturbs_no_answer(engine: Engine, tmp_path: Path) -> None:
    bare, answer = engine.embed("soil and water"), told(engine.generate(PROMPT, max_new_tokens=6))
    engine.set_adapter(write_adapter(tmp_path / "a.gguf"))

    adapted = engine.embed("soil and water")
    engine.set_adapter(None)

    assert (adapted == bare).all()
    assert told(engine.generate(PROMPT, max_new_tokens=6)) == answer


def test_a_text_longer_than_the_window_has_a_vector_too(engine: Engine) -> None:
    long = engine.embed("la bomba de agua " * 200)

    assert float(long @ engine.embed("la bomba de agua " * 60)) > 0.9


def test_samples_differ_at_a_high_temperature_and_nearly_agree_at_a_low_one(engine: Engine) -> None:
    greedy = engine.generate(PROMPT, max_new_tokens=8)

    hot = engine.sample(PROMPT, n=4, temperature=5.0, seed=1, max_new_tokens=8)
    cold = engine.sample(PROMPT, n=4, temperature=1e-4, seed=1, max_new_tokens=8)

    assert len({said.tokens for said in hot}) > 1
    assert {said.tokens for said in cold} == {greedy.tokens}
