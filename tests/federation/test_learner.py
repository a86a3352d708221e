"""The daemon's learner: when it trains, when it stops, what it takes up, when it syncs. The training itself is played here."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from node.energy.power import Power
from node.energy.readings import Reading
from node.energy.rules import DAY_S, Plant
from node.engine.live import LiveModel
from node.engine.worker import Speaker, Worker
from node.learn import site, stored, underway
from node.learn.learner import Learner
from node.learn.process import Job, Said
from node.learn.sync import SyncResult
from node.settings import Model, NodeSettings, read
from node.store import ExampleRow, Store, is_held_out
from node.update.slots import Slots
from protocol.adapters import AdapterHeader, Module
from protocol.digests import digest_bytes
from protocol.errors import DoesNotFit
from protocol.models.generation import Generation
from protocol.releases import Release, ReleaseFile
from tests.node.fake_engine import FakeEngine

NOON = 1_800_014_400.0


class Dressed(FakeEngine):
    """An engine that refuses to speak with some adapters on."""

    def __init__(self) -> None:
        super().__init__()
        self.dumb: set[str] = set()

    def generate(self, prompt: str, **more: Any) -> Generation:
        if self.adapter_digest in self.dumb:
            raise DoesNotFit("figures that are not finite")
        return super().generate(prompt, **more)


class Site:
    """A node's learning side: real store, slots, power and worker; a training and a window that the test plays."""

    def __init__(self, folder: Path, **flags: Any) -> None:
        self.now, self.charge, self.watts_in = NOON, 0.95, 20.0
        given = {"node.state_dir": str(folder), "learn.superlink": "127.0.0.1:1", **{k.replace("__", "."): v for k, v in flags.items()}}
        self.settings: NodeSettings = read(flags=given, environment={})[0]
        self.state = folder
        self.store, self.slots, self.engine = Store(folder / "node.db"), Slots(folder), Dressed()
        self.worker = Worker()
        self.worker.start()
        self.model = LiveModel(self.worker, self.slots, Model(), updates=True, on_change=lambda: None)
        self.power = Power(
            Plant(source="solar"), reading=lambda: Reading(self.charge, self.watts_in), clock=lambda: self.now, folder=folder, cores=1
        )
        self.jobs: list[Job] = []
        self.play: Callable[[Job, Callable[[], bool]], Iterator[Said]] = lambda job, over: iter([Said("trained", "well")])
        self.windows = 0
        self.delivers = True
        self.learner = Learner(
            self.settings, self.slots, self.store, self.model, self.power, clock=lambda: self.now, run=self.run, window=self.window
        )

    def run(self, job: Job, over: Callable[[], bool]) -> Iterator[Said]:
        self.jobs.append(job)
        return self.play(job, over)

    def window(self, over: Callable[[], bool]) -> SyncResult:
        self.windows += 1
        return SyncResult("esteli", self.delivers, ("adapter", "noted"), 0, 1.0)

    def release(self, number: int) -> None:
        """A release goes live."""
        files = []
        for kind in ("model", "initial-adapter"):
            data = f"{kind} {number}".encode()
            base = files[0].digest if files else ""
            files.append(ReleaseFile(kind, "student", kind, self.slots.blobs.put_bytes(data), len(data), base))  # type: ignore[arg-type]
        self.slots.activate(Release(number=number, task="ranch", created=0, files=tuple(files)))
        self.slots.confirm()
        self.engine = Dressed()
        self.engine.model_digest = files[0].digest
        self.worker.swap_after_current_record(Speaker(self.engine, "ranch", release=number))

    def confirm(self, count: int, *, first: int = 0) -> None:
        """So many examples to train on are confirmed, and one more in five held out."""
        with self.store.transaction() as session:
            for number in range(first, first + count):
                key = digest_bytes(f"soil {number}".encode())
                session.add(
                    ExampleRow(
                        key=key, answer="", record="r", task="ranch", site="esteli", lang="en", source=f"soil {number}", partial=False,
                        target="normal: on", verdict="normal", origin="operator", weight=1.0, held_out=is_held_out(key), created=self.now,
                    )
                )  # fmt: skip

    def learned(self, number: int, text: bytes, *, good: bool = True) -> site.Judged:
        """What a training and its judgement leave on disk."""
        header = AdapterHeader(
            site="esteli", release=number, base_digest="", initial_digest="", rank=1, alpha=1.0, modules=(Module("m", 2, 2),), examples=40
        )
        digest = stored.save(self.state, np.frombuffer(text.ljust(16, b"x")[:16], dtype="<f4").copy(), header)
        base = self.slots.active().model.name  # type: ignore[union-attr]
        judged = site.Judged(
            learned=digest, good=good, reason="as it is", at=self.now, adapter=digest_bytes(text) if good else "", base=base
        )
        if good:
            site.path_of(self.state, number, judged).write_bytes(text)
        site.judged(self.state, number, judged)
        return judged

    def close(self) -> None:
        self.learner.stop()
        self.worker.stop()
        self.store.close()


@pytest.fixture
def make_site(tmp_path: Path) -> Iterator[Callable[..., Site]]:
    made: list[Site] = []

    def make(**flags: Any) -> Site:
        made.append(Site(tmp_path / f"site{len(made)}", **flags))
        made[-1].release(1)
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def esteli(make_site: Callable[..., Site]) -> Site:
    """A site with enough examples, at noon."""
    found = make_site()
    found.confirm(60)
    return found


# ---- training


def test_a_site_trains_by_itself_once_enough_is_confirmed_and_there_is_sun(make_site: Callable[..., Site]) -> None:
    node = make_site()
    node.confirm(20)
    node.learner.look()
    assert node.jobs == [] and "a training needs 32" in node.learner.reason

    node.confirm(40, first=20)
    node.learner.look()

    assert [job.train for job in node.jobs] == [True]
    assert node.learner.last == "trained: well"


def test_it_waits_for_the_sun_and_says_so(esteli: Site) -> None:
    esteli.watts_in = 0.0
    esteli.learner.look()
    assert esteli.jobs == [] and "waits for power" in esteli.learner.status()["reason"]

    esteli.watts_in, esteli.now = 20.0, esteli.now + 60
    esteli.learner.look()

    assert len(esteli.jobs) == 1


def test_a_training_is_stopped_when_power_falls_and_its_joules_are_counted(esteli: Site) -> None:
    def play(job: Job, over: Callable[[], bool]) -> Iterator[Said]:
        esteli.learner.look_soon()
        yield Said("step", share=0.4)
        esteli.charge, esteli.now = 0.1, esteli.now + 60  # a cloud as large as a week
        while not over():
            pass
        yield Said("interrupted", "saved")

    esteli.play = play

    esteli.learner.look()

    assert "power: charge 10%" in esteli.learner.reason
    assert esteli.power.joules()["train"] > 0
    assert esteli.learner.failure == ""


def test_a_days_joules_are_a_limit_and_the_next_day_brings_new_ones(make_site: Callable[..., Site]) -> None:
    node = make_site(learn__max_joules_a_day=300.0)
    node.confirm(60)

    def play(job: Job, over: Callable[[], bool]) -> Iterator[Said]:
        node.power.spent("train", 100.0)  # 3 W
        while not over():
            pass
        yield Said("interrupted")

    node.play = play
    node.learner.look()
    assert "joules" in node.learner.reason
    node.learner.look()
    assert len(node.jobs) == 1

    node.now += DAY_S
    node.learner.look()

    assert len(node.jobs) == 2


@pytest.mark.parametrize(("said", "why"), [([Said("failed", "memory: 900 MiB needed")], "900 MiB"), ([Said("step")], "without a word")])
def test_a_training_that_fails_or_dies_is_not_tried_again_for_hours(esteli: Site, said: list[Said], why: str) -> None:
    esteli.play = lambda job, over: iter(said)

    for _ in range(3):
        esteli.learner.look()
    assert len(esteli.jobs) == 1 and why in esteli.learner.failure

    esteli.now += 6 * 3600 + 1
    esteli.learner.look()
    assert len(esteli.jobs) == 2


def test_another_training_waits_for_new_examples(esteli: Site) -> None:
    count = esteli.learner.standing(esteli.slots.active()).examples  # type: ignore[arg-type]
    underway.finish(esteli.state, 1, underway.Last(at=0.0, examples=count, stored=True, reason="", loss_before=1.0, loss_after=0.5))
    esteli.learner.look()
    assert esteli.jobs == [] and "0 new examples" in esteli.learner.reason

    esteli.confirm(25, first=60)
    esteli.learner.look()

    assert len(esteli.jobs) == 1


def test_what_nobody_judged_is_judged_without_training_again(esteli: Site) -> None:
    esteli.learned(1, b"ours")
    (stored.folder(esteli.state, 1) / "site.json").unlink()
    count = esteli.learner.standing(esteli.slots.active()).examples  # type: ignore[arg-type]
    underway.finish(esteli.state, 1, underway.Last(at=0.0, examples=count, stored=True, reason="", loss_before=1.0, loss_after=0.5))

    esteli.learner.look()

    assert [job.train for job in esteli.jobs] == [False]


def test_with_auto_off_nothing_begins_by_itself(make_site: Callable[..., Site]) -> None:
    node = make_site(learn__auto=False)
    node.confirm(60)

    node.learner.look()

    assert node.jobs == [] and node.windows == 0


# ---- what answers


def test_an_adapter_judged_good_answers_at_the_next_look_and_after_a_restart(esteli: Site) -> None:
    judged = esteli.learned(1, b"ours")

    esteli.learner.wear()
    assert esteli.worker.speaker.adapter_digest == judged.adapter  # type: ignore[union-attr]
    assert esteli.learner.status()["site_adapter"] == judged.adapter

    esteli.engine.set_adapter(None)  # the process starts anew
    esteli.worker.swap_after_current_record(Speaker(esteli.engine, "ranch", release=1))
    esteli.learner.wear()
    assert esteli.worker.speaker.adapter_digest == judged.adapter  # type: ignore[union-attr]


def test_one_that_does_not_speak_is_put_back_and_the_last_good_one_answers(esteli: Site) -> None:
    first = esteli.learned(1, b"first")
    esteli.learner.wear()
    second = esteli.learned(1, b"second")
    esteli.engine.dumb.add(second.adapter)

    esteli.learner.wear()

    assert esteli.worker.speaker.adapter_digest == first.adapter  # type: ignore[union-attr]
    assert esteli.learner.status()["judged"] == {"good": False, "reason": "figures that are not finite", "before": 0.0, "after": 0.0}
    assert "put back" in esteli.learner.last


def test_a_damaged_file_leaves_the_release_answering_alone(esteli: Site) -> None:
    path = site.path_of(esteli.state, 1, esteli.learned(1, b"ours"))
    path.write_bytes(b"0urs")

    esteli.learner.wear()

    assert esteli.worker.speaker.adapter_digest == ""  # type: ignore[union-attr]


def test_the_next_release_drops_the_adapter_and_going_back_finds_it_again(esteli: Site) -> None:
    judged = esteli.learned(1, b"ours")
    esteli.learner.look()
    esteli.release(2)
    esteli.learner.look()
    assert esteli.worker.speaker.adapter_digest == ""  # type: ignore[union-attr]

    esteli.slots.go_back("does not hold")
    esteli.engine.model_digest = esteli.slots.active().model.name  # type: ignore[union-attr]
    esteli.worker.swap_after_current_record(Speaker(esteli.engine, "ranch", release=1))
    esteli.learner.look()

    assert esteli.worker.speaker.adapter_digest == judged.adapter  # type: ignore[union-attr]


def test_an_operator_who_does_not_want_it_gets_the_release_alone(esteli: Site) -> None:
    esteli.learned(1, b"ours")
    esteli.learner.wear()
    off = read(flags={"node.state_dir": str(esteli.state), "learn.site_adapter": False}, environment={})[0]

    esteli.learner.reload(off)
    esteli.learner.wear()

    assert esteli.worker.speaker.adapter_digest == ""  # type: ignore[union-attr]


def test_old_releases_keep_what_a_round_may_ask_for_and_nothing_else(make_site: Callable[..., Site]) -> None:
    node = make_site()
    for number in range(1, 8):
        if number > 1:
            node.release(number)
        node.learned(number, f"adapter {number}".encode())
        node.learner.look()

    folders = {int(path.name): {file.name for file in path.iterdir()} for path in (node.state / "learn").glob("[0-9]*")}
    assert set(folders) == {7, 6, 5, 4, 3}  # live, previous, and three that are late
    assert all("site.json" in folders[number] for number in (6, 7))
    assert all("header.json" in folders[number] and "site.json" not in folders[number] for number in (3, 4, 5))


# ---- sync windows


def test_a_window_opens_once_for_what_the_coordinator_does_not_have(make_site: Callable[..., Site]) -> None:
    node = make_site()
    node.learner.look()
    assert node.windows == 0  # nothing to deliver

    node.learned(1, b"ours")
    node.learner.look()
    node.now += 7 * 3600
    node.learner.look()
    assert node.windows == 1 and stored.delivered(node.state, 1)

    node.learned(1, b"better")
    node.now += 7 * 3600
    node.learner.look()
    assert node.windows == 2


def test_a_window_nobody_answered_opens_again_on_schedule_and_never_without_power(make_site: Callable[..., Site]) -> None:
    node = make_site()
    node.delivers = False
    node.learned(1, b"ours")
    node.learner.look()
    node.learner.look()
    assert node.windows == 1

    node.charge, node.now = 0.1, node.now + 7 * 3600
    node.learner.look()
    assert node.windows == 1 and "a sync window waits" in node.learner.reason

    node.charge, node.now = 0.95, node.now + 60
    node.learner.look()
    assert node.windows == 2
