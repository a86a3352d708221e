"""The real engine, on a tiny model: adapters, texts that split characters, and what cannot be loaded. See also tests/contracts."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from protocol.digests import digest_file
from protocol.errors import BadInput, DoesNotFit
from protocol.models import engine as module
from protocol.models.engine import Engine
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
        patch.setattr(module, "_read", lambda logits: (4 + next(said), -0.1, 1.0, 0.5))  # the vocabulary's byte tokens begin at 4
        spoken = engine.generate(PROMPT, max_new_tokens=20)

    assert spoken.text == "\N{LLAMA}\N{REPLACEMENT CHARACTER}A"
    assert spoken.pieces == ("", "", "", "\N{LLAMA}", "", "", "\N{REPLACEMENT CHARACTER}A", "")
    assert (spoken.stopped, len(spoken.logprobs)) == ("line", 8)


def test_the_end_token_has_its_figures_and_no_text(engine: Engine) -> None:
    said = iter([4 + 0x41, 1])  # "A", then <eos>

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_read", lambda logits: (next(said), -0.1, 1.0, 0.5))
        spoken = engine.generate(PROMPT, max_new_tokens=20)

    assert (spoken.text, spoken.pieces, spoken.tokens, spoken.stopped) == ("A", ("A", ""), (69, 1), "end")


def test_figures_are_those_of_the_softmax() -> None:
    logits = np.array([1.0, 3.0, 2.0, -4.0], dtype=np.float32)
    exact = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())

    token, logprob, margin, entropy = module._read(logits)

    assert token == 1
    assert np.allclose([logprob, margin, entropy], [exact[1], 1.0, -(np.exp(exact) * exact).sum()], atol=1e-6)


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
