"""Which adapter a site answers with: on disk, in the running engine, and as arithmetic against torch."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from node.engine.live import LiveModel
from node.engine.worker import Speaker, Worker
from node.learn import site, stored
from node.learn.site import Judged, SiteFile
from node.settings import Model
from node.update.slots import Slots
from protocol.adapters import stacked
from protocol.digests import digest_bytes, digest_file
from protocol.errors import DoesNotFit, Unavailable
from protocol.releases import Release, ReleaseFile
from tests.node.conftest import write_adapter

BASE = "a" * 64


def put(state: Path, data: bytes, *, good: bool = True, learned: str = "l1") -> Judged:
    """An adapter's file as a judgement leaves it."""
    one = Judged(learned=learned, good=good, reason="more became right", at=1.0, adapter=digest_bytes(data) if good else "", base=BASE)
    if good:
        path = site.path_of(state, 1, one)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    site.judged(state, 1, one)
    return one


def files(state: Path) -> set[str]:
    return {path.name for path in stored.folder(state, 1).glob("site-*.gguf")}


# ---- on disk


def test_a_good_adapter_answers_and_a_worse_one_after_it_changes_nothing(tmp_path: Path) -> None:
    first = put(tmp_path, b"first")
    site.proven(tmp_path, 1)

    worse = put(tmp_path, b"", good=False, learned="l2")

    found = site.usable(tmp_path, 1, BASE)
    assert found is not None and found[0] == first
    assert site.read(tmp_path, 1).last == worse


def test_the_last_good_adapter_is_kept_until_the_new_one_has_spoken_and_put_back_when_it_does_not(tmp_path: Path) -> None:
    first = put(tmp_path, b"first")
    site.proven(tmp_path, 1)
    second = put(tmp_path, b"second", learned="l2")
    assert len(files(tmp_path)) == 2

    after = site.put_back(tmp_path, 1, "does not compute")

    assert after.current == first and site.read(tmp_path, 1).current == first
    assert files(tmp_path) == {site.path_of(tmp_path, 1, first).name}
    assert after.last == msgspec.structs.replace(second, good=False, reason="does not compute")


def test_a_new_adapter_that_never_spoke_is_not_what_one_goes_back_to(tmp_path: Path) -> None:
    first = put(tmp_path, b"first")
    site.proven(tmp_path, 1)
    put(tmp_path, b"second", learned="l2")
    put(tmp_path, b"third", learned="l3")

    assert site.put_back(tmp_path, 1, "broken").current == first
    assert site.put_back(tmp_path, 1, "broken too").current is None


def test_a_proven_adapter_forgets_the_one_before(tmp_path: Path) -> None:
    put(tmp_path, b"first")
    site.proven(tmp_path, 1)
    second = put(tmp_path, b"second", learned="l2")

    site.proven(tmp_path, 1)

    assert files(tmp_path) == {site.path_of(tmp_path, 1, second).name}


@pytest.mark.parametrize("damage", ["missing", "changed", "another base"])
def test_a_file_that_is_not_what_was_judged_does_not_answer(tmp_path: Path, damage: str) -> None:
    path = site.path_of(tmp_path, 1, put(tmp_path, b"first"))
    if damage == "missing":
        path.unlink()
    elif damage == "changed":
        path.write_bytes(b"fjrst")

    assert site.usable(tmp_path, 1, "b" * 64 if damage == "another base" else BASE) is None


def test_a_torn_site_file_means_the_release_answers_alone(tmp_path: Path) -> None:
    put(tmp_path, b"first")
    file = stored.folder(tmp_path, 1) / "site.json"
    file.write_bytes(file.read_bytes()[:-20])

    assert site.read(tmp_path, 1) == SiteFile()
    assert site.usable(tmp_path, 1, BASE) is None


# ---- in the running engine


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Release]:
    """A state folder with a live release of a tiny model and an adapter of its own."""
    pytest.importorskip("torch", reason="pip install -e '.[train]'")
    from tests.tiny import tiny_gguf

    state = tmp_path_factory.mktemp("worn")
    slots = Slots(state)
    model, adapter = tiny_gguf(state / "tiny.gguf"), write_adapter(state / "release.gguf", scale=0.3)
    for path in (model, adapter):
        slots.blobs.put_file(path)
    digest = digest_file(model)
    files = (
        ReleaseFile("student.gguf", "student", "model", digest, model.stat().st_size),
        ReleaseFile("adapter.gguf", "student", "adapter", digest_file(adapter), adapter.stat().st_size, digest),
    )
    found = Release(number=1, task="ranch", created=0, files=files)
    slots.activate(found)
    slots.confirm()
    return state, found


@pytest.fixture
def live(release: tuple[Path, Release]) -> Iterator[tuple[LiveModel, Worker]]:
    worker = Worker()
    worker.start()
    model = LiveModel(worker, Slots(release[0]), Model(context=256), updates=False, on_change=lambda: None)
    model.at_start()
    yield model, worker
    worker.stop()


def says(worker: Worker, prompt: str = "soil 12 %, pump dry\nen:") -> tuple[str, tuple[float, ...], str]:
    spoken = worker.ask("ranch", prompt, max_new_tokens=8, deadline_s=30)
    return spoken.generation.text, spoken.generation.logprobs, spoken.speaker.adapter_digest


@pytest.mark.llama
def test_the_sites_adapter_in_the_running_engine_answers_as_a_fresh_engine_with_it(
    release: tuple[Path, Release], live: tuple[LiveModel, Worker], tmp_path: Path
) -> None:
    from protocol.models.engine import Engine

    model, worker = live
    before = says(worker)
    ours = write_adapter(tmp_path / "ours.gguf", scale=0.6)

    model.wear(ours, release=1)

    worn = says(worker)
    with Engine(Slots(release[0]).active().model, context=256, adapter=ours) as fresh:  # type: ignore[union-attr]
        alone = fresh.generate("soil 12 %, pump dry\nen:", max_new_tokens=8)
    assert worn == (alone.text, alone.logprobs, digest_file(ours))
    assert worn[1] != before[1]
    model.wear(None, release=1)
    assert says(worker) == before


@pytest.mark.llama
def test_an_adapter_that_computes_no_figures_is_taken_off_and_the_one_before_answers(
    live: tuple[LiveModel, Worker], tmp_path: Path
) -> None:
    model, worker = live
    good = write_adapter(tmp_path / "good.gguf", scale=0.6)
    model.wear(good, release=1)
    before = says(worker)

    with pytest.raises(DoesNotFit):
        model.wear(write_adapter(tmp_path / "nan.gguf", scale=float("nan")), release=1)
    with pytest.raises(DoesNotFit):
        model.wear(write_adapter(tmp_path / "other.gguf", hidden=32, inputs=64), release=1)

    assert says(worker) == before


@pytest.mark.llama
def test_another_release_than_the_one_that_speaks_is_not_dressed(live: tuple[LiveModel, Worker], tmp_path: Path) -> None:
    model, worker = live
    before = says(worker)

    with pytest.raises(Unavailable, match="release 2"):
        model.wear(write_adapter(tmp_path / "ours.gguf"), release=2)

    assert says(worker) == before


@pytest.mark.llama
def test_no_answer_is_dropped_or_ascribed_to_another_adapter_while_adapters_change(live: tuple[LiveModel, Worker], tmp_path: Path) -> None:
    model, worker = live
    ours = write_adapter(tmp_path / "ours.gguf", scale=0.6)
    wanted = {}
    for path in (None, ours):
        model.wear(path, release=1)
        _, logprobs, digest = says(worker)
        wanted[digest] = logprobs
    heard: list[tuple[str, tuple[float, ...], str]] = []

    def ask() -> None:
        heard.extend(says(worker) for _ in range(15))

    askers = [threading.Thread(target=ask) for _ in range(2)]
    for asker in askers:
        asker.start()
    for turn in range(10):
        model.wear(ours if turn % 2 else None, release=1)
    for asker in askers:
        asker.join(60)

    assert len(heard) == 30
    assert all(logprobs == wanted[digest] for _, logprobs, digest in heard)


# ---- arithmetic


def factors(seed: int, rank: int, tensors: dict[str, tuple[int, int]]) -> dict[str, tuple[Any, Any]]:
    random = np.random.default_rng(seed)
    return {
        name: (random.standard_normal((rank, inputs), dtype=np.float32), random.standard_normal((outputs, rank), dtype=np.float32))
        for name, (outputs, inputs) in tensors.items()
    }


def test_stacked_factors_are_the_sum_of_the_products_whatever_the_ranks() -> None:
    first = factors(1, 2, {"a": (5, 7), "b": (3, 4)})
    second = factors(2, 3, {"b": (3, 4), "c": (6, 2)})

    found = stacked([(first, 0.5), (second, -2.0)])

    assert list(found) == ["a", "b", "c"]
    for name, (a, b) in found.items():
        parts = [(part[name], scale) for part, scale in ((first, 0.5), (second, -2.0)) if name in part]
        wanted = sum(scale * wide_b.astype(float) @ wide_a.astype(float) for (wide_a, wide_b), scale in parts)
        assert a.shape[0] == b.shape[1] == 5
        np.testing.assert_allclose(b.astype(float) @ a.astype(float), wanted, rtol=1e-5, atol=1e-5)


def test_one_tensor_of_two_shapes_does_not_stack() -> None:
    with pytest.raises(DoesNotFit, match="shapes"):
        stacked([(factors(1, 2, {"a": (5, 7)}), 1.0), (factors(1, 2, {"a": (7, 5)}), 1.0)])


@pytest.mark.torch
@pytest.mark.llama
@pytest.mark.parametrize("mixture", [(0.0, 1.0), (0.5, 0.5), (1.0, 1.0)])
def test_release_and_site_in_one_file_say_to_llama_cpp_what_both_say_to_torch(mixture: tuple[float, float], tmp_path: Path) -> None:
    import torch

    from node.learn.judging import mixed
    from protocol.models.checkpoint import Checkpoint
    from protocol.models.engine import Engine
    from protocol.models.lora import attach_factors, fold, write_factors_gguf
    from protocol.models.tokenizer import Tokenizer
    from protocol.models.torch_model import embed, hidden_states, logits_of, to_torch
    from tests.tiny import tiny_gguf

    model = tiny_gguf(tmp_path / "tiny.gguf", kind="F32")
    checkpoint = Checkpoint.read(model)
    theirs, ours = (trained(checkpoint, seed=seed, rank=rank) for seed, rank in ((3, 2), (4, 4)))
    write_factors_gguf(tmp_path / "release.gguf", theirs[0], alpha=8.0)
    write_factors_gguf(tmp_path / "both.gguf", mixed(tmp_path / "release.gguf", ours, mixture))

    torch_model = to_torch(checkpoint, dtype=torch.float32)
    for (parts, scale), share in zip((theirs, ours), mixture, strict=True):
        attach_factors(torch_model, parts, dict.fromkeys(parts, scale * share))
        fold(torch_model)
    prompt = "moisture low hours 3"
    with Tokenizer(model) as tokenizer:
        ids = torch.tensor([tokenizer.encode(prompt, bos=True)])
    with torch.no_grad():
        logits = logits_of(torch_model, hidden_states(torch_model, embed(torch_model, ids)))[0, -1]
    wanted = float(logits.float().log_softmax(-1).max())

    with Engine(model, context=128, adapter=tmp_path / "both.gguf") as engine:
        said = engine.generate(prompt, max_new_tokens=1)

    assert said.tokens[0] == int(logits.argmax())
    assert said.logprobs[0] == pytest.approx(wanted, abs=0.02)  # float16 factors


def trained(checkpoint: Any, *, seed: int, rank: int) -> tuple[Any, float]:
    """Factors as after a training, with their scale."""
    from protocol.adapters import unpack
    from protocol.models.lora import initial_adapter

    flat, header = initial_adapter(checkpoint, rank=rank, alpha=8.0, seed=seed)
    random = np.random.default_rng(seed)
    moved = {name: (a, (0.2 * random.standard_normal(b.shape)).astype(np.float32)) for name, (a, b) in unpack(flat, header).items()}
    return moved, header.alpha / header.rank


def test_a_speaker_keeps_the_digests_it_began_with(tmp_path: Path) -> None:
    from tests.node.fake_engine import FakeEngine

    engine, adapter = FakeEngine(), tmp_path / "a.gguf"
    adapter.write_bytes(b"x")
    before = Speaker(engine, "ranch")

    engine.set_adapter(adapter)

    assert (before.adapter_digest, Speaker(engine, "ranch").adapter_digest) == ("", digest_file(adapter))


def judged_good(release: tuple[Path, Release], ours: Path, learned: str) -> Judged:
    """What `milpa-node learn --judge` leaves on disk."""
    state, found = release
    model = found.file("student", "model")
    assert model is not None
    judged = Judged(learned, True, "more became right", 1.0, adapter=digest_file(ours), base=model.digest)
    path = site.path_of(state, 1, judged)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(ours.read_bytes())
    site.judged(state, 1, judged)
    return judged


@pytest.mark.llama
def test_a_node_that_does_not_learn_by_itself_takes_up_what_the_timer_judged(release: tuple[Path, Release], tmp_path: Path) -> None:
    from node.app import Daemon
    from node.settings import read
    from tests.node.conftest import ask, eventually

    flags = {"node.state_dir": str(release[0]), "api.port": 0, "model.context": 256, "learn.auto": False}
    daemon = Daemon(read(flags=flags, environment={})[0])
    daemon.start()
    try:
        judged = judged_good(release, write_adapter(tmp_path / "ours.gguf", scale=0.7), "by the timer")
        daemon.learner.look_soon()

        eventually(lambda: ask(daemon.server.url).json()["x_milpa"]["adapter_digest"] == judged.adapter)
        assert "learn.auto is off" in daemon.status()["learn"]["reason"]
    finally:
        daemon.stop()


@pytest.mark.llama
def test_a_whole_node_boots_with_its_own_adapter_and_every_answer_names_it(release: tuple[Path, Release], tmp_path: Path) -> None:
    from node.app import Daemon
    from node.settings import read
    from tests.node.conftest import ask

    state, _ = release
    judged = judged_good(release, write_adapter(tmp_path / "ours.gguf", scale=0.6), "l1")
    daemon = Daemon(read(flags={"node.state_dir": str(state), "api.port": 0, "model.context": 256}, environment={})[0])
    daemon.start()
    try:
        answer = ask(daemon.server.url).json()["x_milpa"]

        assert answer["adapter_digest"] == judged.adapter
        assert daemon.status()["learn"]["site_adapter"] == judged.adapter
        assert site.read(state, 1).proven
    finally:
        daemon.stop()
