"""A file's name is a promise about its bytes; an adapter's header is a promise about its numbers."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.adapters import AdapterHeader, Module, pack, unpack
from protocol.blobs import BlobFolder, write_atomically
from protocol.digests import digest_bytes, digest_value
from protocol.errors import BadInput, DoesNotFit, NotEnough, WrongDigest


def test_a_blob_is_found_by_its_digest(tmp_path: Path) -> None:
    blobs = BlobFolder(tmp_path / "blobs")

    digest = blobs.put_bytes(b"seed")

    assert digest == digest_bytes(b"seed")
    assert blobs.path(digest).read_bytes() == b"seed"


def test_other_bytes_are_not_adopted_and_not_kept(tmp_path: Path) -> None:
    blobs = BlobFolder(tmp_path)
    digest = digest_bytes(b"good")
    blobs.part(digest).write_bytes(b"evil")

    with pytest.raises(WrongDigest):
        blobs.adopt(blobs.part(digest), digest)

    assert not blobs.has(digest)
    assert not blobs.part(digest).exists()


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs = BlobFolder(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))

    with pytest.raises(NotEnough, match="free some space"):
        blobs.put_bytes(b"seed")

    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("digest", ["../../etc/passwd", "AB" * 32, "", "0" * 63])
def test_a_digest_that_is_none_never_becomes_a_path(tmp_path: Path, digest: str) -> None:
    with pytest.raises(BadInput):
        BlobFolder(tmp_path).path(digest)


def test_an_atomic_write_replaces_the_whole_file(tmp_path: Path) -> None:
    write_atomically(tmp_path / "pointer", b"long old content")

    write_atomically(tmp_path / "pointer", b"new")

    assert (tmp_path / "pointer").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["pointer"]


def test_the_digest_of_a_value_does_not_depend_on_its_order() -> None:
    assert digest_value({"a": 1, "b": [2]}) == digest_value({"b": [2], "a": 1})


def header(rank: int, shapes: list[tuple[int, int]]) -> AdapterHeader:
    modules = tuple(Module(tensor=f"blk.{i}.attn_q.weight", outputs=out, inputs=inp) for i, (out, inp) in enumerate(shapes))
    return AdapterHeader(site="esteli", release=1, base_digest="b", initial_digest="i", rank=rank, alpha=8.0, modules=modules, examples=9)


@given(st.integers(1, 4), st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=4))
def test_an_adapter_comes_back_as_it_was_packed(rank: int, shapes: list[tuple[int, int]]) -> None:
    head = header(rank, shapes)
    flat = np.arange(head.length, dtype=np.float32)

    factors = unpack(flat, head)

    assert np.array_equal(pack(factors, head.modules), flat)
    assert all(a.shape == (rank, m.inputs) and b.shape == (m.outputs, rank) for m in head.modules for a, b in [factors[m.tensor]])


def test_an_adapter_of_another_length_is_refused() -> None:
    head = header(2, [(3, 4)])

    with pytest.raises(DoesNotFit, match="13 numbers"):
        unpack(np.zeros(13, dtype=np.float32), head)
