"""Capturing a teacher's view: read or asked for, alone or shared out, interrupted or not."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import coordinator.cli
from coordinator.forge.sharing import Worker
from coordinator.forge.targets import capture as capturing
from coordinator.forge.targets.cache import TargetCache, Targets
from coordinator.forge.targets.capture import CaptureResult, capture, captured_in, examples_of, header_of, log_of
from coordinator.forge.targets.score import score, views
from protocol.errors import BadInput
from protocol.models.checkpoint import Checkpoint
from protocol.models.tokenizer import Example, Tokenizer, make_example
from protocol.models.torch_model import generate, to_torch
from protocol.tasks import RANCH, Record

pytestmark = [pytest.mark.torch, pytest.mark.llama]
Make = Callable[[int], list[Record]]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def given(teacher: Path, records: list[Record], folder: Path, worker: Worker | None = None, *, replace: bool = False) -> CaptureResult:
    checkpoint, worker = Checkpoint.read(teacher), worker or Worker()
    with Tokenizer(teacher) as tokenizer, TargetCache(folder, header_of(checkpoint, k=20), worker=worker) as cache:
        model = to_torch(checkpoint)
        log = log_of(folder, worker)
        _, result = capture(model, tokenizer, RANCH, records, cache=cache, log=log, answers="given", replace=replace)
    return result


def test_given_targets_are_read_and_not_answered(tiny: Path, tmp_path: Path, records: Make) -> None:
    result = given(tiny, [*records(4), Record(id="free", task="ranch", source="soil low")], tmp_path)

    with Tokenizer(tiny) as tokenizer:
        examples = [make_example(tokenizer, RANCH, record) for record in records(4)]
    assert (result.given, result.dropped) == (0.8, 0.2)
    assert sorted(examples_of(captured_in(tmp_path))) == sorted(examples)
    with TargetCache.open(tmp_path) as cache:
        for example, expected in zip(examples, score(to_torch(Checkpoint.read(tiny)), examples, k=20), strict=True):
            found = cache.get(example)
            assert isinstance(found, Targets)
            assert (found.ids == expected.ids).all()


def test_workers_share_the_records_and_one_reader_finds_them_all(tiny: Path, tmp_path: Path, records: Make) -> None:
    results = [given(tiny, records(30), tmp_path / "shared", Worker(number, 3)) for number in range(3)]
    given(tiny, records(30), tmp_path / "alone")

    assert [result.records for result in results] == [len(Worker(number, 3).share(records(30))) for number in range(3)]
    assert min(result.records for result in results) > 0
    shared, alone = captured_in(tmp_path / "shared"), captured_in(tmp_path / "alone")
    assert sorted(one.id for one in shared) == sorted(one.id for one in alone)
    with TargetCache.open(tmp_path / "shared") as cache:
        assert all(cache.get(example) is not None for example in examples_of(alone))


def test_a_capture_killed_between_cache_and_log_doubles_nothing(tiny: Path, tmp_path: Path, records: Make) -> None:
    given(tiny, records(6), tmp_path)
    size, log = TargetCache.open(tmp_path).size, log_of(tmp_path, Worker())
    log.write_bytes(log.read_bytes()[:-30])  # the cache had the record, the log not yet

    given(tiny, records(6), tmp_path)

    assert TargetCache.open(tmp_path).size == size
    assert len(captured_in(tmp_path)) == 6


@pytest.mark.parametrize("kind", ["damaged", "gone"])
def test_a_view_that_was_lost_is_captured_again_and_no_other(
    kind: str, tiny: Path, tmp_path: Path, records: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    given(tiny, records(6), tmp_path)
    shard = tmp_path / "shard-0-of-1-0000.bin"
    data = bytearray(shard.read_bytes())
    data[60] ^= kind == "damaged"
    shard.write_bytes(data if kind == "damaged" else data[:-1])
    monkeypatch.setattr(capturing, "views", only(1, capturing.views))

    result = given(tiny, records(6), tmp_path)

    assert (result.records, result.again) == (6, 1)
    assert sorted(one.id for one in captured_in(tmp_path)) == [f"r{i}" for i in range(6)]
    with TargetCache.open(tmp_path) as cache:
        assert all(cache.get(example) is not None for example in examples_of(captured_in(tmp_path)))
        assert cache.size == len(data)


def test_a_record_that_changed_under_its_id_is_refused_or_captured_in_place_of_the_old_one(
    tiny: Path, tmp_path: Path, records: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    given(tiny, records(6), tmp_path)
    edited = records(6)
    edited[2] = msgspec.structs.replace(edited[2], source="tank low; nota", target="leak: otra cosa", verdict="leak")

    with pytest.raises(BadInput, match=r"1 records, r2 for one, are not those .* --replace .* rename it or capture into another folder"):
        given(tiny, edited, tmp_path)
    monkeypatch.setattr(capturing, "views", only(1, capturing.views))
    result = given(tiny, edited, tmp_path, replace=True)

    assert (result.records, result.again) == (6, 1)
    with Tokenizer(tiny) as tokenizer:
        assert sorted(examples_of(captured_in(tmp_path))) == sorted(make_example(tokenizer, RANCH, record) for record in edited)
    assert given(tiny, edited, tmp_path).again == 0


def test_another_file_of_the_same_name_is_not_taken_for_what_is_done(tiny: Path, tmp_path: Path) -> None:
    def captured(folder: str, text: str) -> int:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.tsv").write_text(text, encoding="utf-8")
        return CliRunner().invoke(
            coordinator.cli.complete(),
            ["capture", "--teacher", str(tiny), "--pairs", str(tmp_path / folder / "train.tsv"), "--out", str(tmp_path / "cache")],
        ).exit_code  # fmt: skip

    assert captured("one", "the water\tel agua\n") == 0
    assert captured("two", "the tank\tel tanque\n") != 0
    assert len(captured_in(tmp_path / "cache")) == 1


def test_two_records_of_one_name_are_refused(tiny: Path, tmp_path: Path, records: Make) -> None:
    twice = [*records(2), msgspec.structs.replace(records(1)[0], target="leak: otra cosa")]

    with pytest.raises(BadInput, match="two different records are called 'r0'"):
        given(tiny, twice, tmp_path)


def test_answers_of_the_other_kind_are_not_mixed_into_a_capture(tiny: Path, tmp_path: Path, records: Make) -> None:
    given(tiny, records(2), tmp_path)

    with (
        Tokenizer(tiny) as tokenizer,
        TargetCache.open(tmp_path) as cache,
        pytest.raises(BadInput, match="other kind"),
    ):
        capture(to_torch(Checkpoint.read(tiny)), tokenizer, RANCH, records(3), cache=cache, log=log_of(tmp_path, Worker()))


@pytest.mark.parametrize("mode", ["topk", "sampled", "hidden8"])
def test_the_command_captures_in_every_mode_and_goes_on_where_it_stopped(
    mode: str, tiny: Path, tmp_path: Path, records: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "train.jsonl"
    file.write_bytes(b"\n".join(msgspec.json.encode(record) for record in records(5)))
    command = [
        "capture",
        "--teacher",
        str(tiny),
        "--task",
        "ranch",
        "--records",
        str(file),
        "--mode",
        mode,
        "--out",
        str(tmp_path / "cache"),
    ]

    first = CliRunner().invoke(coordinator.cli.complete(), [*command, "--limit", "3", "--json"])
    monkeypatch.setattr(capturing, "views", only(2, capturing.views))
    second = CliRunner().invoke(coordinator.cli.complete(), [*command, "--json"])

    assert (first.exit_code, second.exit_code) == (0, 0), second.output
    told = msgspec.json.decode(second.stdout)
    assert (told["records"], told["given"], told["mode"]) == (5, 1.0, mode)
    assert len(TargetCache.open(tmp_path / "cache")) == 5


def only(count: int, views: Callable[..., list[object]]) -> Callable[..., list[object]]:
    """`views`, but never of more than `count` examples in all."""

    def limited(model: object, examples: list[object], header: object) -> list[object]:
        assert len(examples) <= count
        return views(model, examples, header)

    return limited


@pytest.mark.parametrize("mode", ["topk", "sampled", "hidden8"])
def test_an_answer_is_scored_by_what_was_computed_while_it_was_written(
    tiny: Path, tmp_path: Path, records: Make, monkeypatch: pytest.MonkeyPatch, mode: Literal["topk", "sampled", "hidden8"]
) -> None:
    checkpoint, rows = Checkpoint.read(tiny), records(5)
    model, header = to_torch(checkpoint), header_of(checkpoint, mode=mode, k=20)
    monkeypatch.setattr(capturing, "passes", lambda *_: True)
    monkeypatch.setattr(capturing, "views", lambda *_: pytest.fail("a second pass"))
    drawn = partial(generate, temperature=5.0, seed=1)  # the likeliest tokens of an untrained model are all the same
    monkeypatch.setattr(capturing, "generate", drawn)
    with Tokenizer(tiny) as tokenizer, TargetCache(tmp_path / "cache", header) as cache:
        prompt = tokenizer.encode(RANCH.prompt(rows[0]), bos=True)
        tokenizer.eos = drawn(model, [prompt], max_new_tokens=RANCH.max_new_tokens + 1, eos=-1)[0][3]  # and none of them is an end
        found, _ = capture(model, tokenizer, RANCH, rows, cache=cache, log=tmp_path / "log.jsonl")
        written = [Example(one.prompt, one.target) for one in found if one.kind == "teacher"]
        kept = [cache.get(one) for one in written]

    assert written and any(one.kind == "own" for one in found)
    for mine, again in zip(kept, views(model, written, header), strict=True):
        for one, other in zip(mine, again, strict=True):
            np.testing.assert_allclose(np.asarray(one, np.float32), np.asarray(other, np.float32), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("text", ["1", "2/2", "-1/2", "a/b", "0/0", "0/20000"])
def test_a_shard_is_one_of_so_many(text: str) -> None:
    with pytest.raises(BadInput, match="I/N"):
        Worker.named(text)


def test_every_record_is_exactly_one_workers(records: Make) -> None:
    shares = [Worker.named(f"{number}/7").share(records(200)) for number in range(7)]

    assert sorted(record.id for share in shares for record in share) == sorted(record.id for record in records(200))
    assert max(map(len, shares)) < 2.5 * 200 / 7
