"""What the student is given to learn."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from coordinator.forge.students.cut import block_influence, evenly
from coordinator.forge.targets.cache import CacheHeader, TargetCache
from coordinator.forge.targets.capture import capture, examples_of, passes
from coordinator.forge.training.objective import distillation_loss, token_weights
from protocol.errors import BadInput
from protocol.models.checkpoint import Checkpoint
from protocol.models.feed import collate
from protocol.models.tokenizer import Example, Tokenizer, make_example
from protocol.models.torch_model import embed, hidden_states, logits_of, to_torch
from protocol.tasks import RANCH, Record, translation
from tests.views import seen

pytestmark = [pytest.mark.torch, pytest.mark.llama]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def ask(teacher: Path, records: list[Record], folder: Path) -> tuple[list[str], list[Example], TargetCache]:
    checkpoint = Checkpoint.read(teacher)
    cache = TargetCache(folder, CacheHeader(teacher=checkpoint.digest, tokenizer="t", k=20, vocabulary=len(checkpoint.vocabulary.tokens)))
    with Tokenizer(teacher) as tokenizer:
        captured, _ = capture(to_torch(checkpoint), tokenizer, RANCH, records, cache=cache, log=folder / "log.jsonl")
    return [one.kind for one in captured], examples_of(captured), cache


def test_the_teacher_speaks_where_it_is_right_and_the_truth_where_it_is_wrong(taught: Path, tmp_path: Path) -> None:
    known = Record(id="a", task="ranch", source="soil low", target="leak: seen", verdict="leak")
    wrong = Record(id="b", task="ranch", source="soil low", target="normal: all is well", verdict="normal")
    free = Record(id="c", task="ranch", source="soil low")
    kinds, examples, cache = ask(taught, [known, wrong, free], tmp_path)

    with Tokenizer(taught) as tokenizer:
        said = [tokenizer.decode(example.target) for example in examples]

    assert kinds == ["teacher", "own", "teacher"]
    assert said == [" leak: the tank", " normal: all is well", " leak: the tank"]
    assert [example in cache for example in examples] == [True, False, True]


def test_cached_log_probabilities_are_those_of_a_pass_over_the_answer(taught: Path, tmp_path: Path) -> None:
    record = Record(id="a", task="ranch", source="soil low", verdict="leak")
    _, examples, cache = ask(taught, [record], tmp_path)
    model, batch = to_torch(Checkpoint.read(taught)), collate(examples, [0])

    with torch.no_grad():
        expected = logits_of(model, hidden_states(model, embed(model, batch.ids), at=(batch.rows, batch.columns))).log_softmax(-1)

    found = cache.get(examples[0])
    assert found is not None
    torch.testing.assert_close(torch.from_numpy(found.log_probs), expected.gather(1, torch.from_numpy(found.ids)), atol=2e-2, rtol=2e-3)


def test_a_capture_that_was_interrupted_asks_only_for_the_rest(
    taught: Path, tmp_path: Path, records: Callable[[int], list[Record]]
) -> None:
    ask(taught, records(3), tmp_path)
    log = tmp_path / "log.jsonl"
    first = log.read_bytes()
    log.write_bytes(first[:-10])

    ask(taught, records(5), tmp_path)

    lines = log.read_text().splitlines()
    assert len(lines) == 5
    assert first.splitlines()[0].decode() == lines[0]


def test_without_the_teacher_the_loss_is_cross_entropy_and_with_it_a_mix(taught: Path, tmp_path: Path) -> None:
    record = Record(id="a", task="ranch", source="soil low", verdict="leak")
    _, examples, cache = ask(taught, [record], tmp_path)
    examples = [*examples, Example([2, 9, 9], [8, 1])]
    batch = collate(examples, [1, 0])
    logits = torch.randn(len(batch.targets), len(Checkpoint.read(taught).vocabulary.tokens), generator=torch.Generator().manual_seed(1))
    plain = torch.nn.functional.cross_entropy(logits, batch.targets)

    assert float(distillation_loss(examples, cache=cache, alpha=0.0)(seen(logits), batch)) == pytest.approx(float(plain), rel=1e-5)
    assert float(distillation_loss(examples, cache=cache, alpha=0.5)(seen(logits), batch)) != pytest.approx(float(plain), rel=1e-3)
    alone = collate(examples, [1])
    assert float(distillation_loss(examples, cache=cache, alpha=0.5)(seen(logits[:2]), alone)) == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits[:2], alone.targets)), rel=1e-5
    )


@pytest.mark.parametrize(
    ("said", "stands"),
    [("leak: the tank", True), ("leak:", False), ("leek: the tank", False), ("normal: the tank", False), ("the tank leaks", False)],
)
def test_a_verdict_must_have_the_form_and_not_contradict_the_truth(said: str, stands: bool) -> None:
    assert passes(RANCH, Record(id="a", task="ranch", source="x", verdict="leak"), said) is stands


@pytest.mark.parametrize(
    ("said", "stands"),
    [
        ("el gato come pescado en la mesa", True),
        ("the cat eats fish on the table", False),
        ("", False),
        ("el " * 60, False),
        ("gato", False),
    ],
)
def test_a_translation_is_no_copy_and_of_a_sane_length(said: str, stands: bool) -> None:
    record = Record(id="a", task="translate-english-spanish", source="the cat eats fish on the table")

    assert passes(translation("English", "Spanish"), record, said) is stands


def test_the_blocks_a_student_keeps_are_spread_and_end_with_the_last() -> None:
    assert evenly(18, 8) == (0, 1, 2, 5, 8, 11, 14, 17)
    assert all(len(evenly(18, keep)) == keep and evenly(18, keep)[-1] == 17 for keep in range(1, 19))
    with pytest.raises(BadInput, match="1 to 4"):
        evenly(4, 5)


def test_a_block_that_does_nothing_has_no_influence(tiny: Path) -> None:
    model = to_torch(Checkpoint.read(tiny))
    model.model.layers[0].post_attention_layernorm.weight.fill_(-1.0)  # 1 + w = 0: the block adds nothing
    model.model.layers[0].post_feedforward_layernorm.weight.fill_(-1.0)

    idle, busy = block_influence(model, [Example([2, 5, 6], [7, 1])])

    assert idle == pytest.approx(0.0, abs=1e-5)
    assert busy > 0.001


def test_the_code_counts_more_than_the_sentence_and_free_text_counts_evenly(tiny: Path) -> None:
    record = Record(id="a", task="ranch", source="soil low", target="leak: the tank: empty", verdict="leak")
    with Tokenizer(tiny) as tokenizer:
        example = make_example(tokenizer, RANCH, record)
        (weights,) = token_weights(tokenizer, RANCH, [example], verdict=4.0)
        (even,) = token_weights(tokenizer, translation("English", "Spanish"), [example], verdict=4.0)
        code = len(tokenizer.encode(" leak:", bos=False))

    assert weights.tolist() == [4.0] * code + [1.0] * (len(example.target) - code)
    assert set(even.tolist()) == {1.0}
    batch, logits = collate([example], [0]), torch.randn(len(example.target), 600, generator=torch.Generator().manual_seed(1))
    each = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")
    expected = float((each * weights).sum() / weights.sum())
    assert float(distillation_loss([example], weights=[weights])(seen(logits), batch)) == pytest.approx(expected, rel=1e-5)
