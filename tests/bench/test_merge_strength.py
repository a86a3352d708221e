"""The measure of a merge's strength, on a tiny model; its figures mean nothing here."""

from pathlib import Path

import pytest

from bench import merge_strength
from coordinator.federation.collect import keep
from coordinator.ranch import generate, site_named
from deploy.loop import write_records
from protocol import codec
from protocol.adapters import AdapterReply, Module
from protocol.digests import digest_bytes
from protocol.models.checkpoint import Checkpoint
from tests.federation.adapters import make
from tests.tiny import tiny_gguf

pytestmark = pytest.mark.llama
SITES = ("esteli", "malacatoya")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished demo's folder, as far as the measure reads it."""
    (tmp_path / "models").mkdir()
    (replies := tmp_path / "fleet/store/rounds/1").mkdir(parents=True)
    model = Checkpoint.read(tiny_gguf(tmp_path / "models/student.gguf"))
    modules = tuple(Module(name, *shape) for name, shape in model.matrices())
    for seed, site in enumerate(SITES):
        header, flat = make(site, seed=seed, modules=modules)
        keep(replies, codec.encode(AdapterReply(site, "adapter", header=header, digest=digest_bytes(flat.tobytes()))), flat, 0)
        for part in ("gate", "season-2"):
            write_records(tmp_path / "records" / f"{site}-{part}.jsonl", generate(site_named(site), seed=1, count=3, split="dev"))
    return tmp_path


def test_a_merge_of_no_strength_changes_nothing_and_every_strength_is_judged_everywhere(run: Path) -> None:
    general = generate(site_named("general"), seed=1, count=4, split="test")

    found = merge_strength.of_run(run, [1e-6, 1.0], general, 1)

    assert {name for told in found.values() for name in told} == {"general", *SITES, "sites together"}
    assert [one["n"] for one in found["1"].values()] == [4, 6, 6, 12]
    assert all(one["after"] == one["before"] for one in found["1e-06"].values())
    assert len(merge_strength.rows({run.name: found})) == 3
    assert not list(run.glob("merged-again-*"))
