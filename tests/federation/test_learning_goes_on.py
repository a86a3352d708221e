"""A training on a tiny model that is stopped, killed, or whose files a power cut tore: it goes on, or begins anew."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from node.energy.power import Power
from node.energy.rules import Plant
from node.engine.live import LiveModel
from node.engine.worker import Worker
from node.learn import session, site, stored, underway
from node.learn.learner import Learner, in_a_child
from node.learn.process import Job, Said
from node.settings import Model, NodeSettings, read
from node.store import ExampleRow, Store, is_held_out
from node.update.slots import Slots
from protocol.codec import encode
from protocol.digests import digest_bytes, digest_file
from protocol.errors import Unavailable
from protocol.releases import Release, ReleaseFile
from protocol.tasks import Record
from tests.federation.conftest import children_of, command_of

pytestmark = pytest.mark.torch
EPOCHS = 6


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A release's files: a tiny model, an initial adapter, general records."""
    pytest.importorskip("torch", reason="pip install -e '.[train]'")
    from protocol.models.checkpoint import Checkpoint
    from protocol.models.lora import initial_adapter, write_adapter_gguf
    from tests.tiny import tiny_gguf

    folder = tmp_path_factory.mktemp("published")
    model = tiny_gguf(folder / "student.gguf")
    write_adapter_gguf(folder / "initial.gguf", *initial_adapter(Checkpoint.read(model), rank=4, alpha=8.0, seed=1))
    general = [Record(id=f"g{i}", task="ranch", source=f"level {i}", target="normal: level is on", verdict="normal") for i in range(40)]
    (folder / "rehearsal.jsonl").write_bytes(b"".join(encode(record) + b"\n" for record in general))
    return {"model": model, "initial-adapter": folder / "initial.gguf", "rehearsal": folder / "rehearsal.jsonl"}


@pytest.fixture
def node(published: dict[str, Path], tmp_path: Path) -> NodeSettings:
    """A node's folder with that release live and sixty confirmed examples."""
    flags = {"node.state_dir": str(tmp_path / "state"), "node.name": "esteli", "learn.rate": 5e-3, "learn.epochs": EPOCHS}
    settings = read(flags=flags, environment={})[0]
    slots = Slots(settings.state_dir)
    files = []
    for kind, path in published.items():
        slots.blobs.put_file(path)
        base = files[0].digest if kind == "initial-adapter" else ""
        files.append(ReleaseFile(path.name, "student", kind, digest_file(path), path.stat().st_size, base))  # type: ignore[arg-type]
    slots.activate(Release(number=1, task="ranch", created=0, files=tuple(files)))
    slots.confirm()
    confirm(settings, 0, 60)
    return settings


def confirm(settings: NodeSettings, first: int, last: int) -> None:
    store = Store(settings.state_dir / "node.db")
    with store.transaction() as opened:
        for number in range(first, last):
            dry = number % 2 == 0
            source = f"moisture {'low' if dry else 'high'} hours {number}"
            key = digest_bytes(source.encode())
            target, verdict = ("irrigation-due: the soil is dry", "irrigation-due") if dry else ("normal: the soil is on", "normal")
            opened.add(
                ExampleRow(
                    key=key, answer="", record=f"r{number}", task="ranch", site="esteli", lang="en", source=source, target=target,
                    verdict=verdict, partial=False, origin="operator", weight=1.0, held_out=is_held_out(key), created=float(number),
                )
            )  # fmt: skip
    store.close()


def after(steps: int) -> Callable[[], bool]:
    """Told to stop after so many steps."""
    asked = iter(range(10_000))
    return lambda: next(asked) >= steps


def interrupt(settings: NodeSettings, steps: int) -> Path:
    from protocol.models.training import Interrupted

    with pytest.raises(Interrupted):
        session.train(settings, interrupted=after(steps))
    return stored.folder(settings.state_dir, 1) / underway.STATE


def test_a_training_interrupted_twice_ends_in_the_same_adapter_as_one_that_was_not(node: NodeSettings, tmp_path: Path) -> None:
    import shutil

    twin = read(flags={"node.state_dir": str(tmp_path / "twin"), "learn.rate": 5e-3, "learn.epochs": EPOCHS}, environment={})[0]
    shutil.copytree(node.state_dir, twin.state_dir)
    at_once = session.train(twin)

    interrupt(node, 5)
    confirm(node, 60, 90)  # what is confirmed meanwhile is for the next training
    interrupt(node, 9)
    resumed = session.train(node)

    assert at_once.stored and resumed.stored, resumed.reason
    assert (resumed.digest, resumed.steps, resumed.examples) == (at_once.digest, at_once.steps, at_once.examples)
    assert not underway.unfinished(node.state_dir, 1)
    ended = underway.last(node.state_dir, 1)
    assert ended is not None and ended.examples + resumed.rehearsed == resumed.examples


@pytest.mark.parametrize("tear", ["empty", "half", "a byte short", "one bit"])
def test_a_training_file_torn_by_a_power_cut_costs_work_and_nothing_else(node: NodeSettings, tear: str) -> None:
    state = interrupt(node, 4)
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    torn = {"empty": b"", "half": data[: len(data) // 2], "a byte short": state.read_bytes()[:-1], "one bit": data}[tear]
    state.write_bytes(torn)

    result = session.train(node)

    assert result.stored and result.steps > 4
    assert not state.exists()


def test_a_torn_plan_begins_anew_with_what_is_confirmed_now(node: NodeSettings) -> None:
    interrupt(node, 4)
    plan = stored.folder(node.state_dir, 1) / "plan.json"
    plan.write_bytes(plan.read_bytes()[:1000])
    confirm(node, 60, 90)

    result = session.train(node)

    assert result.stored
    assert underway.last(node.state_dir, 1).examples > 60  # type: ignore[union-attr]


def test_the_timer_trains_again_only_where_enough_is_new(node: NodeSettings) -> None:
    assert session.nothing_new(node) == ""
    trained = session.train(node)
    last = underway.last(node.state_dir, 1)

    assert last is not None and last.examples + trained.rehearsed == trained.examples
    assert session.nothing_new(node) == "0 examples more than at the last training, of the 16 that are worth another"
    confirm(node, 60, 90)
    assert session.nothing_new(node) == ""


def test_a_plan_of_last_month_is_not_finished(node: NodeSettings) -> None:
    interrupt(node, 4)

    assert underway.begun(node.state_dir, 1, now=time.time() + underway.STALE_S + 1) is None
    assert not underway.unfinished(node.state_dir, 1)


def test_two_trainings_of_one_node_do_not_run_at_once(node: NodeSettings) -> None:
    with underway.alone(node.state_dir), pytest.raises(Unavailable, match="another training runs"):
        session.train(node)


def test_more_memory_than_allowed_ends_the_training_and_keeps_the_earlier_adapter(node: NodeSettings) -> None:
    from node.learn.train import watching
    from protocol.errors import NotEnough
    from protocol.models.training import Step

    with pytest.raises(NotEnough, match="10 MiB may be used"):
        watching(10, None)(Step(1, 0.1, 1.0, 10, 1.0))


@pytest.mark.llama
def test_killed_with_9_in_the_middle_it_goes_on_is_judged_and_answers_in_the_running_engine(node: NodeSettings) -> None:
    """The whole way, as the daemon goes it: children of our own, one of them killed."""
    pids: list[int] = []
    longer = msgspec.structs.replace(node, learn=msgspec.structs.replace(node.learn, epochs=20))

    def run(job: Job, over: Callable[[], bool]) -> Iterator[Said]:
        for said in in_a_child(msgspec.structs.replace(job, humble=False), over):
            if not pids and said.kind == "step":
                pids.extend(pid for pid in children_of(os.getpid()) if "node.learn.process" in command_of(pid))
                os.kill(pids[0], signal.SIGKILL)
            yield said

    now = [time.time()]
    store, slots, worker = Store(node.state_dir / "node.db"), Slots(node.state_dir), Worker()
    worker.start()
    try:
        model = LiveModel(worker, slots, Model(context=256), updates=False, on_change=lambda: None)
        model.at_start()
        learner = Learner(longer, slots, store, model, Power(Plant()), clock=lambda: now[0], run=run)
        learner.look()
        assert pids and "without a word" in learner.failure
        assert underway.unfinished(node.state_dir, 1)

        now[0] += 7 * 3600
        learner.look()

        judged = site.read(node.state_dir, 1).last
        assert judged is not None and judged.good, learner.last  # the tiny model knows nothing: two verdicts are soon learned
        assert worker.speaker is not None and worker.speaker.adapter_digest == judged.adapter
        assert judged.held_out >= 4 and judged.general >= 4
        said: Any = worker.ask("ranch", "moisture low hours 200\nen:", max_new_tokens=8, deadline_s=30)
        assert said.generation.text.strip().startswith("irrigation-due") or judged.after < 1.0
        assert learner.failure == ""
    finally:
        worker.stop()
        store.close()
