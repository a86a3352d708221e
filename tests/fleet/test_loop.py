"""The whole loop through real processes, on tiny models: release, answer, escalate, correct, learn, round, release, answer."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from deploy.broker import find_mosquitto
from deploy.fleet import LocalFleet
from deploy.processes import Processes
from deploy.season import Asked, Site, figures
from protocol.tasks import RANCH

pytestmark = [pytest.mark.fleet, pytest.mark.broker, pytest.mark.flower, pytest.mark.torch, pytest.mark.llama]
SITES = ("north", "south")
ROOT = Path(__file__).parents[2]


def ours(*arguments: str, deadline_s: float = 240.0) -> dict[str, Any]:
    """Run one of our commands; the JSON it prints."""
    done = subprocess.run([sys.executable, "-m", *arguments, "--json"], capture_output=True, cwd=ROOT, timeout=deadline_s)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return dict(msgspec.json.decode(done.stdout))


class Loop:
    """What happened, step by step; every test below looks at one thing of it."""

    def __init__(self, folder: Path) -> None:
        self.fleet = LocalFleet(folder / "fleet", Processes(folder / "fleet"))
        self.folder = folder

    def run(self) -> None:
        from coordinator.fleet.publishing import build_release
        from coordinator.forge.judging import calibrate
        from coordinator.forge.judging.evaluation import evaluate
        from deploy.loop import write_records
        from tests.fleet import toy

        if find_mosquitto() is None:
            pytest.skip("apt install mosquitto")
        folder = self.folder
        self.student = toy.trained(folder / "student.gguf", kinds=(0, 1))
        self.teacher = toy.trained(folder / "teacher.gguf", kinds=(0, 1, 2), seed=1)
        calibration = folder / "calibration.json"
        dev = evaluate(self.student, toy.records(60, start=600, prefix="d"), RANCH)
        calibration.write_bytes(msgspec.json.encode(calibrate.fit(dev, seed=1)))
        for name, start in (("dev", 300), ("heldout", 400)):
            write_records(folder / f"{name}.jsonl", toy.records(60, start=start, prefix=name))
        write_records(folder / "general.jsonl", toy.records(60, kinds=(0, 1), start=700, prefix="g"))

        self.fleet.prepare(sites=SITES, peer="base", budget=0.35)
        self.release, paths = build_release(
            1, "ranch",
            [("student", "model", self.student, ""), ("teacher", "model", self.teacher, ""),
             ("student", "initial-adapter", toy.start_adapter(self.student, folder / "initial.gguf"), dev.model_digest),
             ("student", "rehearsal", write_records(folder / "known.jsonl", toy.records(60, kinds=(0, 1), start=500, prefix="k")), ""),
             ("student", "calibration", calibration, dev.model_digest)],
        )  # fmt: skip
        self.fleet.publisher().publish(self.release, paths)
        self.fleet.start()
        self.fleet.wait_for_release(1, deadline_s=60)
        nodes = {name: Site(name, self.fleet.node_url(name)) for name in SITES}
        self.first: dict[str, list[Asked]] = {}
        for number, (name, node) in enumerate(nodes.items()):
            self.first[name] = node.ask(toy.records(90, start=100 * number))
            node.settle(self.first[name], deadline_s=60)
            node.correct(self.first[name], share=0.6, seed=1)
        self.trained = {
            name: ours("node.cli", "learn", "--config", str(self.fleet.node_config(name)), "--epochs", "30", "--rate", "0.01")
            for name in SITES
        }
        self.round = self._round(folder)
        if self.round["release"]:
            self.fleet.wait_for_release(2, deadline_s=60)
        self.second = {name: node.ask(toy.records(30, start=900)) for name, node in nodes.items()}

    def _round(self, folder: Path) -> dict[str, Any]:
        windows = [
            subprocess.Popen(
                [sys.executable, "-m", "node.cli", "sync", "--config", str(self.fleet.node_config(name)), "--window", "120"], cwd=ROOT
            )
            for name in SITES
        ]
        try:
            sets = [f"{name}={folder / 'heldout.jsonl'}" for name in SITES]
            return ours(
                "coordinator.cli", "round", "--store", str(self.fleet.store), "--superlink", f"127.0.0.1:{self.fleet.plan.superlink_port}",
                "--superlink-keys", str(self.fleet.folder / "superlink"), "--deadline", "90", "--eta", "1,2",
                "--heldout", f"general={folder / 'general.jsonl'}", *[part for one in sets for part in ("--heldout", one)],
                *[part for name in SITES for part in ("--dev", f"{name}={folder / 'dev.jsonl'}")],
            )  # fmt: skip
        finally:
            for window in windows:
                window.terminate()
                window.wait(30)


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loop]:
    loop = Loop(tmp_path_factory.mktemp("loop"))
    try:
        loop.run()
        yield loop
    finally:
        loop.fleet.stop()


@pytest.mark.timeout(600)
def test_what_a_site_is_unsure_of_is_answered_by_the_peer(loop: Loop) -> None:
    for asked in loop.first.values():
        found = figures(asked)
        assert found["escalated"] > 0.1
        assert found["accuracy_with_escalation"] > found["accuracy"] + 0.1
        assert any(item.by == "peer:base" for item in asked if item.state in ("upgraded", "confirmed"))


def test_the_first_answer_never_waited_for_the_peer(loop: Loop) -> None:
    upgraded = [item for asked in loop.first.values() for item in asked if item.state == "upgraded"]

    assert upgraded
    assert all(item.verdict != item.final for item in upgraded)


def test_each_site_trained_and_its_held_out_loss_fell(loop: Loop) -> None:
    for result in loop.trained.values():
        assert result["stored"], result
        assert result["loss_after"] < result["loss_before"]


def test_three_of_ten_examples_of_a_site_are_general_ones_from_the_release(loop: Loop) -> None:
    for result in loop.trained.values():
        assert result["rehearsed"] / result["examples"] == pytest.approx(0.3, abs=0.01)


def test_the_round_took_both_adapters_and_released_a_better_model(loop: Loop) -> None:
    assert {one["site"] for one in loop.round["accepted"]} == set(SITES), loop.round
    assert loop.round["release"] == 2, loop.round["reasons"]
    for name in SITES:
        assert loop.round["sets"][name]["after"] > loop.round["sets"][name]["before"]


def test_the_next_release_answers_better_on_its_own(loop: Loop) -> None:
    for name in SITES:
        assert figures(loop.second[name])["accuracy"] > figures(loop.first[name])["accuracy"]


def test_the_adapter_was_swapped_and_the_model_was_not_sent_again(loop: Loop) -> None:
    latest = loop.fleet.publisher().latest()

    assert latest is not None
    model, adapter = latest.file("student", "model"), latest.file("student", "adapter")
    assert model == loop.release.file("student", "model")
    assert adapter is not None
    for name in SITES:
        spoke = httpx.get(loop.fleet.node_url(name) + "/v1/models", timeout=10).json()["data"][0]["x_milpa"]
        assert (spoke["model_digest"], spoke["adapter_digest"], spoke["release"]) == (model.digest, adapter.digest, 2)


def test_the_coordinator_saw_it_happen_and_kept_no_text(loop: Loop) -> None:
    from coordinator.fleet.ledger import Ledger

    ledger = Ledger(f"sqlite:///{loop.fleet.store / 'ledger.db'}")
    try:
        numbers = [release.number for release in ledger.releases()]
        dump = b"".join(path.read_bytes() for path in loop.fleet.store.glob("ledger.db*"))
    finally:
        ledger.close()

    assert sorted(numbers) == [1, 2]
    assert b"la bomba seco" not in dump


def test_the_dashboard_asks_for_a_login(loop: Loop) -> None:
    answer = httpx.get(loop.fleet.dashboard + "nodes", follow_redirects=False, timeout=10)

    assert answer.status_code in (302, 303, 401)
    assert "north" not in answer.text
