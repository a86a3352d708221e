"""Targets on disk: compact, checked, resumable, in three modes, written by several processes."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.forge.sharing import Worker
from coordinator.forge.targets import cache as caching
from coordinator.forge.targets.cache import Cached, CacheHeader, Samples, States, TargetCache, Targets
from coordinator.forge.targets.packing import pack_ids, unpack_ids
from protocol.errors import BadInput, WrongDigest
from protocol.models.tokenizer import Example
from tests.forge.written import HEADER, example, targets

SAMPLED = msgspec.structs.replace(HEADER, mode="sampled")
HIDDEN = msgspec.structs.replace(HEADER, mode="hidden8", k=0, width=640)


def samples(seed: int, length: int = 18) -> Samples:
    chance = np.random.default_rng(seed)
    ids, weights = np.zeros((length, 9), np.int64), np.zeros((length, 9), np.float32)
    for row in range(length):
        drawn, counts = np.unique(chance.integers(0, 9, SAMPLED.k) * 900 + row, return_counts=True)
        ids[row, : len(drawn)], weights[row, : len(drawn)] = drawn, counts / SAMPLED.k
    return Samples(ids, weights, np.where(weights > 0, -1.5, 0.0).astype(np.float32))


def states(seed: int, length: int = 18) -> States:
    return States(np.random.default_rng(seed).standard_normal((length, HIDDEN.width), dtype=np.float32) * 9)


def written(folder: Path, header: CacheHeader, *records: tuple[Example, Cached], worker: Worker | None = None) -> None:
    with TargetCache(folder, header, worker=worker) as cache:
        for one, found in records:
            cache.put(one, found)


def test_what_was_put_comes_back_after_opening_again(tmp_path: Path) -> None:
    written(tmp_path, HEADER, (example(1), targets(1)))

    found = TargetCache.open(tmp_path).get(example(1))

    assert isinstance(found, Targets)
    np.testing.assert_array_equal(found.ids, targets(1).ids)
    np.testing.assert_allclose(found.log_probs, targets(1).log_probs, rtol=1e-3)
    np.testing.assert_allclose(found.tail, targets(1).tail, rtol=1e-3)
    assert TargetCache.open(tmp_path).get(example(2)) is None


def test_samples_come_back_with_their_counts_and_padding(tmp_path: Path) -> None:
    written(tmp_path, SAMPLED, (example(1), samples(1)))

    found = TargetCache.open(tmp_path).get(example(1))

    assert isinstance(found, Samples)
    width = found.ids.shape[1]
    np.testing.assert_array_equal(found.ids, samples(1).ids[:, :width])
    np.testing.assert_allclose(found.weights, samples(1).weights[:, :width], rtol=1e-6)
    np.testing.assert_allclose(found.log_probs, samples(1).log_probs[:, :width], rtol=1e-3)


def test_states_come_back_to_a_part_in_200_of_their_blocks_largest(tmp_path: Path) -> None:
    written(tmp_path, HIDDEN, (example(1), states(1)))

    found = TargetCache.open(tmp_path).get(example(1))

    assert isinstance(found, States)
    assert np.abs(found.states - states(1).states).max() < np.abs(states(1).states).max() / 200


@pytest.mark.parametrize("vocabulary", [8192, 16_384, 32_768])
def test_a_token_takes_at_most_200_bytes_at_trimmed_vocabularies(tmp_path: Path, vocabulary: int) -> None:
    header = msgspec.structs.replace(HEADER, vocabulary=vocabulary)
    written(tmp_path, header, *((example(number), targets(number)) for number in range(10)))

    assert TargetCache.open(tmp_path).size / (10 * 18) <= 200


@given(st.integers(1, 25), st.integers(0, 40), st.integers(0, 2**32))
@settings(deadline=None)
def test_ids_of_any_width_survive_packing(bits: int, count: int, seed: int) -> None:
    ids = np.random.default_rng(seed).integers(0, 1 << bits, count)

    packed = pack_ids(ids, bits)

    assert len(packed) == (count * bits + 7) // 8
    np.testing.assert_array_equal(unpack_ids(memoryview(packed), count, bits), ids)


@pytest.mark.parametrize("lost", [1, 20, 500])
def test_a_record_cut_by_kill_9_is_lost_alone_and_written_anew_once(tmp_path: Path, lost: int) -> None:
    written(tmp_path, HEADER, *((example(number), targets(number)) for number in range(3)))
    shard = tmp_path / "shard-0-of-1-0000.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-lost])

    with TargetCache(tmp_path, HEADER) as cache:
        assert [example(number) in cache for number in range(3)] == [True, True, False]
        for number in range(3):
            cache.put(example(number), targets(number))

    assert shard.read_bytes() == whole


def test_writers_killed_in_the_middle_again_and_again_lose_and_double_nothing(tmp_path: Path) -> None:
    chance, told = random.Random(3), [0, 0]
    for _ in range(6):
        writers = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.forge.written", str(tmp_path), str(number), "2"], stdout=subprocess.PIPE, text=True
            )
            for number in range(2)
        ]
        for writer in writers:
            assert writer.stdout is not None
            writer.stdout.readline()
        time.sleep(chance.uniform(0.0, 0.15))
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
        for number, writer in enumerate(writers):
            lines = writer.communicate()[0].split("\n")[:-1]
            told[number] = max(told[number], *(int(line) + 1 for line in lines or ["-1"]))

    with TargetCache.open(tmp_path) as cache:
        names = [number for number in range(20_000) if example(number) in cache]
        sound = [cache.get(example(number)) for number in names]
    for number in range(2):
        mine = [name for name in names if name % 2 == number]
        assert mine == [2 * i + number for i in range(len(mine))]
        assert len(mine) >= told[number] > 0
    assert all(isinstance(found, Targets) for found in sound)
    for number in range(2):
        written(tmp_path, HEADER, worker=Worker(number, 2))
        with TargetCache(tmp_path, HEADER, worker=Worker(number, 2)) as cache:
            cache.put(example(30_000 + number), targets(1))
    assert TargetCache.open(tmp_path).size == (len(names) + 2) * record_bytes(tmp_path)


def record_bytes(folder: Path) -> int:
    alone = folder / "alone"
    written(alone, HEADER, (example(1), targets(1)))
    return TargetCache.open(alone).size


def test_several_writers_share_a_folder_and_one_reader_sees_all(tmp_path: Path) -> None:
    with TargetCache(tmp_path, HEADER, worker=Worker(0, 2)) as first, TargetCache(tmp_path, HEADER, worker=Worker(1, 2)) as second:
        for number in range(4):
            (first, second)[number % 2].put(example(number), targets(number))

    assert all(example(number) in TargetCache.open(tmp_path) for number in range(4))


def test_opening_a_cache_that_is_being_written_changes_nothing(tmp_path: Path) -> None:
    written(tmp_path, HEADER, (example(1), targets(1)))
    shard = tmp_path / "shard-0-of-1-0000.bin"
    with shard.open("ab") as file:
        file.write(b"half a record")
    before = shard.read_bytes()

    assert len(TargetCache.open(tmp_path)) == 1
    assert shard.read_bytes() == before


def test_a_family_has_one_writer_at_a_time(tmp_path: Path) -> None:
    with TargetCache(tmp_path, HEADER) as first, TargetCache(tmp_path, HEADER) as second:
        first.put(example(1), targets(1))

        with pytest.raises(BadInput, match="another process is writing shard-0-of-1"):
            second.put(example(2), targets(2))


def test_what_another_writer_of_the_family_put_meanwhile_is_not_put_twice(tmp_path: Path) -> None:
    late = TargetCache(tmp_path, HEADER)
    written(tmp_path, HEADER, (example(1), targets(1)))
    size = late.size

    with late:
        late.put(example(1), targets(1))

    assert late.size == size


def test_shards_stay_below_their_limit_and_all_are_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching, "SHARD_BYTES", 8000)
    written(tmp_path, HEADER, *((example(number), targets(number)) for number in range(6)))

    assert len(list(tmp_path.glob("shard-*.bin"))) == 3
    with TargetCache.open(tmp_path) as cache:
        assert all(cache.get(example(number)) is not None for number in range(6))


def test_a_record_is_read_while_more_are_put(tmp_path: Path) -> None:
    with TargetCache(tmp_path, HEADER) as cache:
        for number in range(3):
            cache.put(example(number), targets(number))
            found = cache.get(example(number))
            assert isinstance(found, Targets)
            np.testing.assert_array_equal(found.ids, targets(number).ids)


PLACES = {"magic": 2, "key": 9, "tokens": 20, "k": 22, "size, upwards": 27, "size, downwards": 24, "checksum": 30, "payload": 900}


def damaged(folder: Path, at: int, *, of: int = 10, flip: int = 0x40) -> Path:
    """Ten records, one bit of them turned."""
    written(folder, HEADER, *((example(number), targets(number)) for number in range(of)))
    shard = folder / "shard-0-of-1-0000.bin"
    data = bytearray(shard.read_bytes())
    data[at] ^= flip
    shard.write_bytes(data)
    return shard


@pytest.mark.parametrize("record", [0, 4, 8])
@pytest.mark.parametrize("at", PLACES.values(), ids=list(PLACES))
def test_a_damaged_byte_costs_its_own_record_and_no_other(tmp_path: Path, at: int, record: int) -> None:
    shard = damaged(tmp_path, record * 3331 + at)
    before = shard.read_bytes()
    assert len(before) == 10 * 3331

    with TargetCache(tmp_path, HEADER) as cache:
        assert [number for number in range(10) if example(number) not in cache] == [record]
        assert shard.read_bytes() == before

        cache.put(example(record), targets(record))

    with TargetCache.open(tmp_path) as mended:
        for number in range(10):
            found = mended.get(example(number))
            assert isinstance(found, Targets)
            np.testing.assert_array_equal(found.ids, targets(number).ids)
        assert mended.size == 10 * 3331


@pytest.mark.parametrize("name", ["key", "size, downwards", "checksum", "payload"])
def test_a_last_record_that_is_whole_and_wrong_is_not_taken_for_a_torn_one(tmp_path: Path, name: str) -> None:
    damaged(tmp_path, 9 * 3331 + PLACES[name])

    with pytest.raises(WrongDigest, match=f"damaged at byte {9 * 3331}"):
        TargetCache.open(tmp_path)
    with TargetCache(tmp_path, HEADER) as cache:
        cache.claim()
        assert [number for number in range(10) if example(number) in cache] == list(range(9))
    assert len(TargetCache.open(tmp_path)) == 9


def test_a_damaged_cache_is_not_learned_from_and_the_message_says_what_mends_it(tmp_path: Path) -> None:
    damaged(tmp_path, 900)

    with pytest.raises(WrongDigest, match=r"0000\.bin is damaged at byte 0 \(3331 bytes of 33310 .* run the same capture into"):
        TargetCache.open(tmp_path)


def test_damage_and_a_torn_end_are_taken_out_together_and_a_reader_before_that_goes_on(tmp_path: Path) -> None:
    shard = damaged(tmp_path, 900, of=3)
    shard.write_bytes(shard.read_bytes()[:-100])

    with TargetCache(tmp_path, HEADER) as reader, TargetCache(tmp_path, HEADER) as writer:
        assert reader.get(example(1)) is not None
        writer.claim()

        assert shard.stat().st_size == 3331
        assert reader.get(example(1)) is not None
        assert writer.get(example(1)) is not None


def test_bytes_altered_later_are_noticed(tmp_path: Path) -> None:
    with TargetCache(tmp_path, HEADER) as cache:
        cache.put(example(1), targets(1))
        shard = tmp_path / "shard-0-of-1-0000.bin"
        data = bytearray(shard.read_bytes())
        data[100] ^= 1
        shard.write_bytes(data)

        with pytest.raises(WrongDigest, match="altered"):
            cache.get(example(1))


@pytest.mark.parametrize(
    "other",
    [{"teacher": "c" * 64}, {"tokenizer": "c" * 64}, {"k": 20}, {"temperature": 2.0}, {"mode": "sampled"}],
    ids=lambda change: next(iter(change)),
)
def test_the_targets_of_another_teacher_or_setting_are_never_mixed_in(tmp_path: Path, other: dict[str, object]) -> None:
    TargetCache(tmp_path, HEADER)

    with pytest.raises(WrongDigest, match="another teacher"):
        TargetCache(tmp_path, msgspec.structs.replace(HEADER, **other))


BAD: list[dict[str, object]] = [
    {"k": 0},
    {"k": 9000},
    {"temperature": 0.0},
    {"mode": "sampled", "k": 256},
    {"mode": "hidden8"},
    {"mode": "hidden8", "k": 0, "width": 50},
]


@pytest.mark.parametrize("bad", BAD)
def test_a_header_that_fits_no_mode_is_refused(tmp_path: Path, bad: dict[str, object]) -> None:
    with pytest.raises(BadInput):
        TargetCache(tmp_path / "new", msgspec.structs.replace(HEADER, **bad))

    assert not (tmp_path / "new").exists()


def test_numbers_that_are_not_finite_and_wrong_shapes_are_refused(tmp_path: Path) -> None:
    with TargetCache(tmp_path, HEADER) as cache:
        good = targets(1)

        with pytest.raises(BadInput, match="not finite"):
            cache.put(example(1), good._replace(log_probs=np.full_like(good.log_probs, np.nan)))
        with pytest.raises(BadInput, match="do not fit"):
            cache.put(example(1, length=17), good)
        with pytest.raises(BadInput, match="it takes Targets, not States"):
            cache.put(example(1), states(1))
        assert len(cache) == 0


def test_a_folder_without_a_cache_is_told_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="milpa-coordinator capture"):
        TargetCache.open(tmp_path)


def test_reading_a_token_takes_microseconds(tmp_path: Path) -> None:
    written(tmp_path, HEADER, *((example(number), targets(number)) for number in range(100)))
    with TargetCache.open(tmp_path) as cache:
        began = time.process_time()
        for number in range(100):
            cache.get(example(number))
        spent = time.process_time() - began

    assert spent / (100 * 18) < 200e-6, os.cpu_count()
