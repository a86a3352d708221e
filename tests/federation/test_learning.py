"""A site learns from its confirmed examples, on a tiny model, through the real model code."""

from pathlib import Path

import numpy as np
import pytest

from node.learn import stored
from node.learn.examples import general_held_out, split, with_rehearsal
from node.store import LearningExample
from node.update.slots import ActiveRelease
from protocol.adapters import AdapterQuestion, unpack
from protocol.digests import digest_file
from protocol.errors import BadInput, NotEnough
from protocol.releases import Release, ReleaseFile
from protocol.tasks import RANCH, Record


def example(number: int, *, held_out: bool, weight: float = 1.0, partial: bool = False) -> LearningExample:
    dry = number % 2 == 0
    record = Record(
        id=f"r{number}", task="ranch", source=f"moisture {'low' if dry else 'high'} hours {number % 7}", lang="en", site="esteli",
        target="irrigation-due: the soil is dry" if dry else "normal: the soil is on", verdict="irrigation-due" if dry else "normal",
    )  # fmt: skip
    return LearningExample(record, "operator", weight, held_out, partial)


def examples(count: int) -> list[LearningExample]:
    return [example(number, held_out=number % 5 == 0) for number in range(count)]


def test_too_few_examples_are_refused_with_figure_and_need() -> None:
    with pytest.raises(NotEnough, match="16 confirmed examples to train on, 32 are needed"):
        split(examples(20), minimum=32)


def test_three_of_ten_trained_on_are_general_and_none_is_held_out() -> None:
    own = split(examples(60), minimum=32)
    general = [Record(id=f"g{i}", task="ranch", source=f"soil{i}", target="normal: level is on", verdict="normal") for i in range(100)]

    parts = with_rehearsal(own, general)

    added = parts.training[len(own.training) :]
    assert len(added) / len(parts.training) == pytest.approx(0.3, abs=0.01)
    kept_apart = general_held_out(general)
    assert [one.record for one in added] == [record for record in general if record not in kept_apart][: len(added)]
    assert 10 <= len(kept_apart) <= 30  # one in five, by a hash
    assert parts.held_out == own.held_out
    assert with_rehearsal(own, [Record(id="g", task="ranch", source="unanswered")]).training == own.training


def test_no_example_is_both_trained_on_and_held_out() -> None:
    parts = split(examples(50), minimum=32)

    trained, judged = ({one.record.id for one in part} for part in (parts.training, parts.held_out))
    assert len(trained) == 40
    assert len(judged) == 10
    assert not trained & judged


@pytest.fixture(scope="module")
def active(tmp_path_factory: pytest.TempPathFactory) -> ActiveRelease:
    pytest.importorskip("torch", reason="pip install -e '.[train]'")
    from protocol.models.checkpoint import Checkpoint
    from protocol.models.lora import initial_adapter, write_adapter_gguf
    from tests.tiny import tiny_gguf

    folder = tmp_path_factory.mktemp("release")
    model = tiny_gguf(folder / "student.gguf")
    initial = folder / "initial.gguf"
    write_adapter_gguf(initial, *initial_adapter(Checkpoint.read(model), rank=4, alpha=8.0, seed=1))
    digest = digest_file(model)
    files = (
        ReleaseFile("student.gguf", "student", "model", digest, model.stat().st_size),
        ReleaseFile("initial.gguf", "student", "initial-adapter", digest_file(initial), initial.stat().st_size, digest),
    )
    release = Release(number=1, task="ranch", created=0, files=files)
    return ActiveRelease(release=release, role="student", model=model, initial_adapter=initial)


@pytest.mark.torch
def test_training_lowers_the_held_out_loss_and_stores_what_a_round_asks_for(active: ActiveRelease, tmp_path: Path) -> None:
    from node.learn.train import learn

    result = learn(tmp_path, "esteli", active, RANCH, split(examples(60), minimum=32), rate=5e-3, epochs=12, threads=1)

    assert result.stored, result.reason
    assert result.loss_after < 0.8 * result.loss_before
    question = AdapterQuestion(1, active.release.files[0].digest, active.release.files[1].digest)
    reply, flat = stored.answer(tmp_path, "esteli", question)
    assert reply.code == "adapter"
    assert reply.digest == result.digest
    assert reply.header is not None
    assert (reply.header.site, reply.header.examples, reply.header.held_out) == ("esteli", 48, 12)
    assert flat is not None
    assert any(np.any(b) for _, b in unpack(flat, reply.header).values()), "B is still zero: nothing was learned"
    assert not (stored.folder(tmp_path, 1) / "training.pt").exists()


@pytest.mark.torch
def test_a_training_that_does_not_help_stores_nothing(active: ActiveRelease, tmp_path: Path) -> None:
    from node.learn.train import learn

    result = learn(tmp_path, "esteli", active, RANCH, split(examples(60), minimum=32), rate=1e-30, epochs=1, threads=1)

    assert not result.stored
    assert "did not" in result.reason
    assert stored.load(tmp_path, 1) is None


@pytest.mark.torch
def test_training_is_refused_when_memory_is_short(active: ActiveRelease, tmp_path: Path) -> None:
    from node.learn.train import learn

    with pytest.raises(NotEnough, match="100 MiB may be used"):
        learn(tmp_path, "esteli", active, RANCH, split(examples(60), minimum=32), max_memory_mb=100)


@pytest.mark.torch
def test_a_release_without_an_initial_adapter_cannot_be_learned_on(active: ActiveRelease, tmp_path: Path) -> None:
    import msgspec

    from node.learn.train import learn

    with pytest.raises(BadInput, match="no initial adapter"):
        learn(tmp_path, "esteli", msgspec.structs.replace(active, initial_adapter=None), RANCH, split(examples(60), minimum=32))


@pytest.mark.torch
def test_an_operators_correction_counts_more_than_a_doubtful_peers() -> None:
    import torch

    from node.learn.train import weighted
    from protocol.models.feed import Batch
    from tests.views import seen

    logits = torch.tensor([[2.0, 0.0], [2.0, 0.0]])  # sure of token 0, twice
    batch = Batch([0, 1], torch.zeros(2, 1, dtype=torch.long), torch.tensor([0, 1]), torch.tensor([0, 0]), torch.tensor([0, 1]))

    trusting_the_first = float(weighted([1.0, 0.1])(seen(logits), batch))
    trusting_the_second = float(weighted([0.1, 1.0])(seen(logits), batch))

    assert trusting_the_first < trusting_the_second


@pytest.mark.torch
def test_a_verdict_without_a_sentence_teaches_no_end_of_text(active: ActiveRelease) -> None:
    from node.learn.train import tokenised
    from protocol.models.tokenizer import Tokenizer

    with Tokenizer(active.model) as tokenizer:
        rows, _, _ = tokenised(tokenizer, RANCH, [example(0, held_out=False), example(0, held_out=False, partial=True)])

        assert rows[0].target[-1] == tokenizer.eos
        assert rows[1].target == rows[0].target[:-1]


def header_and_numbers() -> tuple[np.ndarray, object]:
    from protocol.adapters import AdapterHeader, Module

    header = AdapterHeader(
        site="esteli", release=1, base_digest="a" * 64, initial_digest="b" * 64, rank=2, alpha=4.0,
        modules=(Module("blk.0.attn_q.weight", 3, 5),), examples=40,
    )  # fmt: skip
    return np.arange(16, dtype=np.float32), header


def test_an_adapter_of_another_base_is_not_offered(tmp_path: Path) -> None:
    flat, header = header_and_numbers()
    stored.save(tmp_path, flat, header)

    reply, found = stored.answer(tmp_path, "esteli", AdapterQuestion(1, "c" * 64, "b" * 64))

    assert (reply.code, found) == ("nothing", None)


def test_a_late_adapter_is_offered_to_a_later_release_on_the_same_base(tmp_path: Path) -> None:
    flat, header = header_and_numbers()
    stored.save(tmp_path, flat, header)

    reply, found = stored.answer(tmp_path, "esteli", AdapterQuestion(3, "a" * 64, "b" * 64))

    assert reply.header == header
    assert np.array_equal(found, flat)


def test_a_spoiled_adapter_becomes_a_code(tmp_path: Path) -> None:
    flat, header = header_and_numbers()
    stored.save(tmp_path, flat, header)
    file = next(stored.folder(tmp_path, 1).glob("*.npy"))
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)

    reply, found = stored.answer(tmp_path, "esteli", AdapterQuestion(1, "a" * 64, "b" * 64))

    assert (reply.code, reply.header, found) == ("damaged", None, None)


def test_no_exceptions_text_leaves_a_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_text(*_: object) -> None:
        raise RuntimeError("Note of a worker: the pump of Don Julio is broken")

    monkeypatch.setattr(stored, "load", raise_text)
    (tmp_path / "learn" / "1").mkdir(parents=True)

    reply, found = stored.answer(tmp_path, "esteli", AdapterQuestion(1, "a" * 64, "b" * 64))

    assert (reply.code, found) == ("failed", None)
    assert "Julio" not in repr(reply)
