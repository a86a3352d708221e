"""Targets on disk: compact, checked, resumable."""

from pathlib import Path

import numpy as np
import pytest

from coordinator.forge.targets import cache as caching
from coordinator.forge.targets.cache import CacheHeader, TargetCache, Targets
from protocol.errors import BadInput, WrongDigest
from protocol.models.tokenizer import Example

HEADER = CacheHeader(teacher="a" * 64, tokenizer="b" * 64, k=50, vocabulary=8192)


def example(number: int, length: int = 18) -> Example:
    return Example([2, number], [7] * (length - 1) + [1])


def targets(seed: int, length: int = 18) -> Targets:
    random = np.random.default_rng(seed)
    ids = np.stack([random.choice(HEADER.vocabulary, HEADER.k, replace=False) for _ in range(length)])
    share = random.dirichlet(np.ones(HEADER.k + 1), size=length)
    return Targets(ids, np.log(share[:, :-1]).astype(np.float32), np.log(share[:, -1]).astype(np.float32))


def test_what_was_put_comes_back_after_opening_again(tmp_path: Path) -> None:
    TargetCache(tmp_path, HEADER).put(example(1), targets(1))

    found = TargetCache(tmp_path, HEADER).get(example(1))

    assert found is not None
    np.testing.assert_array_equal(found.ids, targets(1).ids)
    np.testing.assert_allclose(found.log_probs, targets(1).log_probs, rtol=1e-3)
    np.testing.assert_allclose(found.tail, targets(1).tail, rtol=1e-3)
    assert TargetCache(tmp_path, HEADER).get(example(2)) is None


def test_a_token_takes_at_most_200_bytes(tmp_path: Path) -> None:
    cache = TargetCache(tmp_path, HEADER)
    for number in range(10):
        cache.put(example(number), targets(number))

    assert cache.size / (10 * 18) <= 200


@pytest.mark.parametrize("lost", [1, 20, 500])
def test_a_record_cut_by_kill_9_is_lost_alone_and_written_anew_once(tmp_path: Path, lost: int) -> None:
    cache = TargetCache(tmp_path, HEADER)
    for number in range(3):
        cache.put(example(number), targets(number))
    shard = tmp_path / "shard-0000.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-lost])

    cache = TargetCache(tmp_path, HEADER)
    assert [example(number) in cache for number in range(3)] == [True, True, False]
    for number in range(3):
        cache.put(example(number), targets(number))

    assert shard.read_bytes() == whole


def test_shards_stay_below_their_limit_and_all_are_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching, "SHARD_BYTES", 8000)
    cache = TargetCache(tmp_path, HEADER)
    for number in range(6):
        cache.put(example(number), targets(number))

    assert len(list(tmp_path.glob("shard-*.bin"))) == 3
    assert all(example(number) in TargetCache(tmp_path, HEADER) for number in range(6))


def test_bytes_altered_later_are_noticed(tmp_path: Path) -> None:
    cache = TargetCache(tmp_path, HEADER)
    cache.put(example(1), targets(1))
    shard = tmp_path / "shard-0000.bin"
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)

    with pytest.raises(WrongDigest, match="altered"):
        cache.get(example(1))


def test_the_targets_of_another_teacher_are_never_mixed_in(tmp_path: Path) -> None:
    TargetCache(tmp_path, HEADER)

    with pytest.raises(WrongDigest, match="another teacher"):
        TargetCache(tmp_path, CacheHeader(teacher="c" * 64, tokenizer="b" * 64, k=50, vocabulary=8192))


def test_numbers_that_are_not_finite_and_wrong_shapes_are_refused(tmp_path: Path) -> None:
    cache = TargetCache(tmp_path, HEADER)
    good = targets(1)

    with pytest.raises(BadInput, match="not finite"):
        cache.put(example(1), good._replace(log_probs=np.full_like(good.log_probs, np.nan)))
    with pytest.raises(BadInput, match="do not fit"):
        cache.put(example(1, length=17), good)
    assert len(cache) == 0
