"""The whole daemon and its power: figures, status, what rests and what does not."""

from pathlib import Path
from typing import Any

import httpx

from node.app import Daemon
from node.engine.worker import Speaker
from protocol.ports import free_port
from tests.node.conftest import ask, settings
from tests.node.fake_engine import FakeEngine


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
