"""The whole daemon and its power: figures, status, what rests and what does not."""

import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from node.app import Daemon
from node.engine.worker import Speaker
from protocol.confidence import Agreed
from protocol.ports import free_port
from tests.node.conftest import ask, eventually, publish, settings
from tests.node.fake_engine import FakeEngine
from tests.node.test_confidence_judging import calibration


def low_on_the_sun(folder: Path) -> dict[str, Any]:
    """A solar node with a gauge that tells ten percent."""
    (folder / "charge").write_text("10")
    return {"power__source": "solar", "power__latitude": 13.1, "power__longitude": -86.35, "power__battery": str(folder / "charge")}


def test_answers_are_counted_in_joules_and_the_battery_is_a_figure(start: Any, tmp_path: Path) -> None:
    daemon: Daemon = start(settings(tmp_path, **low_on_the_sun(tmp_path)))
    slow = FakeEngine()
    slow.pace_s = 0.01
    daemon.worker.swap_after_current_record(Speaker(slow, "ranch"))

    ask(daemon.server.url)

    figures = httpx.get(daemon.server.url + "/metrics").text
    joules = next(
        float(line.split()[1]) for line in figures.splitlines() if line.startswith('milpa_node_energy_joules_total{work="answer"}')
    )
    assert joules > 0
    assert "milpa_node_battery_ratio 0.1" in figures


def test_a_node_below_its_reserve_answers_at_once_rests_in_all_else_and_says_until_when(tmp_path: Path) -> None:
    night = 1_799_992_800.0  # 2027-01-15 06:00 UTC: midnight in Nicaragua
    given = settings(tmp_path, **low_on_the_sun(tmp_path), broker__host="127.0.0.1", broker__port=free_port())
    daemon = Daemon(given, clock=lambda: night)
    daemon.start()
    try:
        daemon.worker.swap_after_current_record(Speaker(FakeEngine(), "ranch"))

        answer = ask(daemon.server.url)

        power, said = httpx.get(daemon.server.url + "/v1/status").json()["power"], daemon._describe()
        assert answer.status_code == 200
        assert set(power["waits"]) == {"train", "download", "agree", "sync"} and not power["surplus"]
        assert said.state == "sleeping" and 6 < (said.sleeping_until - night) / 3600 < 9
    finally:
        daemon.stop()


class Sampled(FakeEngine):
    """Counts the samples that are taken."""

    samples = 0

    def sample(self, *given: Any, **options: Any) -> Any:
        self.samples += 1
        return super().sample(*given, **options)


@pytest.mark.llama
def test_a_release_samples_and_vectors_wait_for_the_sun_and_answers_do_not(tmp_path: Path, tiny: Path, repository: tuple[Any, str]) -> None:
    """The daemon's own wires, one low battery: what waits is asked for by a release, an unsure answer and a confirmed one."""
    publisher, url = repository
    publish(publisher, 1, tiny)
    low = low_on_the_sun(tmp_path)
    later = [0.0]
    given = settings(
        tmp_path, **low, update__url=url, update__root_file=str(tmp_path / "root.json"), update__poll_s=3600.0, memory__use="near",
        confidence__agree=True, confidence__audit=0.0,
    )  # fmt: skip
    daemon = Daemon(given, clock=lambda: time.time() + later[0])
    engine = Sampled(probability=0.1)
    agreed = Agreed(samples=3, temperature=0.7, bias=0.0, slope=1.0, weight=3.0)

    def confirmed(source: str) -> None:
        """An answer that is close to the threshold, and the operator's word on it."""
        answer = ask(daemon.server.url, source)
        assert answer.status_code == 200
        word = {"id": answer.json()["x_milpa"]["id"], "verdict": "leak"}
        assert httpx.post(daemon.server.url + "/v1/feedback", json=word, timeout=30).status_code == 200

    daemon.start()
    try:
        daemon.worker.swap_after_current_record(Speaker(engine, "ranch", 0, calibration(engine, agreed=agreed)))
        confirmed("soil 12 %")
        eventually(lambda: daemon.updated.state != "current")
        daemon.memory.making.step()
        night, dark = daemon.status(), engine.samples

        (tmp_path / "charge").write_text('{"charge": 95, "watts_in": 45}')
        later[0] = 6 * 3600.0
        confirmed("soil 13 %")
        eventually(lambda: daemon.memory.status()["vectors"] == 2)
        sampled = engine.samples
        daemon.updated.announce()
        eventually(lambda: daemon.model.release == 1)
    finally:
        daemon.stop()

    assert (night["update"]["state"], night["release"], night["memory"]["vectors"]) == ("waiting", 0, 0)
    assert "charge 10%" in night["update"]["reason"]
    assert (dark, sampled) == (0, 1)  # of two answers that were unsure alike


def test_a_node_on_the_mains_never_sleeps(start: Any, tmp_path: Path) -> None:
    daemon: Daemon = start(settings(tmp_path))
    daemon.worker.swap_after_current_record(Speaker(FakeEngine(), "ranch"))

    status = httpx.get(daemon.server.url + "/v1/status").json()

    assert status["power"]["source"] == "mains" and status["power"]["waits"] == {}
    assert status["learn"]["doing"] == "waits" and status["learn"]["reason"]
    assert daemon._describe().state == "answering"


def test_joules_outlive_a_restart(start: Any, tmp_path: Path) -> None:
    daemon: Daemon = start(settings(tmp_path))
    daemon.power.spent("train", 100.0)
    before = daemon.power.joules()["train"]
    daemon.stop()

    again: Daemon = start(settings(tmp_path))

    assert again.power.joules()["train"] == round(before, 1) > 0
