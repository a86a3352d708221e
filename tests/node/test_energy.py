"""What a node lives on: the sun, the reserve, the latches, the counts, the battery's own word."""

import math
import os
import threading
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import settings as tries
from hypothesis import strategies as st

from node.energy import rules
from node.energy.book import Book
from node.energy.power import Power
from node.energy.readings import Reading, read
from node.energy.rules import DAY_S, Duty, Plant, PowerState
from node.update.rules import BUILT_AT
from protocol.errors import Unavailable
from protocol.links import Verdict

NOON = 1_800_014_400.0 + 0.0  # 2027-01-15 12:00 UTC
SOLAR = Plant(source="solar", latitude=13.1, longitude=0.0)
duties = st.builds(Duty, st.booleans(), st.booleans())
works = st.sampled_from(rules.WORKS)
plants = st.builds(
    Plant, source=st.sampled_from(["mains", "battery", "solar"]), battery_wh=st.floats(5, 2000), panel_w=st.floats(1, 400),
    latitude=st.floats(-65, 65), longitude=st.floats(-180, 180), clearness=st.floats(0, 1), idle_w=st.floats(0.3, 8),
    busy_w=st.floats(8, 40), dark_days=st.floats(0, 10),
)  # fmt: skip  # settings take no busy_w below idle_w


class Clock:
    def __init__(self, now: float = NOON) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Battery:
    """A battery that says what the test wants."""

    def __init__(self, charge: float, watts_in: float | None = None, *, charging: bool = False) -> None:
        self.reading: Reading | None = Reading(charge, watts_in, charging)

    def __call__(self) -> Reading:
        if self.reading is None:
            raise Unavailable("the battery says nothing")
        return self.reading


# ---- the sun


@pytest.mark.parametrize(("latitude", "hours"), [(13.1, (0, 6, 9, 12, 15, 18)), (40.7, (12, 14)), (-33.9, (8, 12)), (64.0, (0, 12))])
def test_the_sun_stands_where_pvlib_says_but_for_the_equation_of_time(latitude: float, hours: tuple[int, ...]) -> None:
    pandas, pvlib = pytest.importorskip("pandas"), pytest.importorskip("pvlib")
    midnights = [1_800_014_400.0 - DAY_S / 2 + 91 * DAY_S * season for season in range(4)]
    times = [midnight + 3600 * hour for midnight in midnights for hour in hours]
    true = pvlib.solarposition.ephemeris(pandas.to_datetime(times, unit="s", utc=True), latitude, 0.0)["elevation"].to_numpy()

    ours = [math.degrees(math.asin(rules.sun_height(at, latitude, 0.0))) for at in times]

    assert max(abs(a - b) for a, b in zip(ours, true, strict=True)) < 4.2  # the equation of time alone is 4 degrees in November


def test_a_clear_day_brings_what_a_panel_of_that_size_brings_in_the_tropics() -> None:
    begin = NOON - DAY_S / 2

    brought = sum(rules.clear_watts(SOLAR, begin + 600 * step) * 600 / 3600 for step in range(144))

    assert 0.75 * 50 * 4.5 < brought < 0.75 * 50 * 6.5  # Wh: 4.5 to 6.5 hours of full sun in January at 13 N


def test_noon_comes_later_in_the_west() -> None:
    ranch = msgspec.structs.replace(SOLAR, longitude=-86.35)

    assert rules.clear_watts(ranch, NOON) < 0.8 * rules.clear_watts(ranch, NOON + 3600 * 86.35 / 15)


def test_a_curve_of_the_operators_own_stands_in_for_the_sun() -> None:
    shaded = msgspec.structs.replace(SOLAR, curve=(0.0,) * 12 + (0.5,) + (0.0,) * 11)

    assert rules.clear_watts(shaded, NOON) == 25.0
    assert rules.clear_watts(shaded, NOON + 1800) == 12.5
    assert rules.clear_watts(shaded, NOON - 7200) == 0.0


# ---- what may run


@given(
    plant=plants,
    charge=st.floats(0, 1),
    watts=st.floats(0, 400),
    rich=st.booleans(),
    sunny=st.booleans(),
    answering=st.floats(0, 100),
    work=works,
)
def test_below_the_reserve_nothing_optional_runs(
    plant: Plant, charge: float, watts: float, rich: bool, sunny: bool, answering: float, work: rules.Work
) -> None:
    kept = rules.reserve(plant, answering)

    duty = rules.next_duty(Duty(rich, sunny), plant, charge=charge, watts_in=watts, kept=kept)
    now = rules.state(plant, duty, charge=charge, watts_in=watts, kept=kept, measured=True, charging=True, problem="")

    verdict = rules.may(plant, now, work)
    assert not verdict.ok or plant.source == "mains" or charge >= kept
    assert verdict.reason


@given(plant=plants, charge=st.floats(0, 1), kept=st.floats(0, 2), watts=st.floats(0, 400))
def test_the_latches_do_not_chatter(plant: Plant, charge: float, kept: float, watts: float) -> None:
    """Whatever a look decides, the same look again decides the same."""
    for before in (Duty(False, False), Duty(True, True)):
        once = rules.next_duty(before, plant, charge=charge, watts_in=watts, kept=kept)

        assert rules.next_duty(once, plant, charge=charge, watts_in=watts, kept=kept) == once
    start, stop = rules.edges(kept)
    assert start > stop > kept


def test_between_the_two_edges_what_runs_goes_on_and_what_waits_goes_on_waiting() -> None:
    (rich, poor), (bright, dim) = rules.edges(0.5), rules.sun_edges(SOLAR)

    for before in (Duty(True, True), Duty(False, False)):
        assert rules.next_duty(before, SOLAR, charge=(rich + poor) / 2, watts_in=(bright + dim) / 2, kept=0.5) == before


@given(plant=plants, charge=st.floats(0, 1), kept=st.floats(0, 1), now=st.floats(BUILT_AT, BUILT_AT + 10 * 365 * DAY_S))
def test_a_sleeping_node_names_a_time_to_come_within_two_days(plant: Plant, charge: float, kept: float, now: float) -> None:
    state = PowerState(plant.source, charge, 0.0, False, rich=charge > kept, reserve=kept)

    until = rules.sleeping_until(plant, state, now)

    assert until == 0 if plant.source == "mains" or charge > kept else now - 1 < until <= now + rules.HORIZON_S + rules.STEP_S


def test_a_night_below_the_reserve_ends_in_the_morning() -> None:
    midnight = NOON - DAY_S / 2
    low = PowerState("solar", 0.2, 0.0, False, daylight=False, rich=False, reserve=0.6)

    until = rules.sleeping_until(SOLAR, low, midnight)

    assert 6 <= (until - midnight) / 3600 <= 9


@pytest.mark.parametrize(
    ("state", "work", "ok", "says"),
    [
        (PowerState("mains", 1.0, 0.0, True), "train", True, "mains"),
        (PowerState("solar", 0.9, 20.0, True), "train", True, "90%"),
        (PowerState("solar", 0.9, 0.0, False, daylight=False), "train", False, "of sun"),
        (PowerState("solar", 0.9, 1.0, False), "download", True, "90%"),
        (PowerState("solar", 0.9, 1.0, False), "agree", False, "of sun"),
        (PowerState("solar", 0.5, 20.0, False, rich=False, reserve=0.55), "sync", False, "waits for 70%"),
        (PowerState("solar", 1.0, 20.0, False, rich=False, reserve=1.0), "sync", False, "2.0 dark days of 2 when full"),
        (PowerState("battery", 0.9, 0.0, False, daylight=False), "train", False, "nothing charges"),
        (PowerState("battery", 0.9, 0.0, False, daylight=False), "sync", True, "90%"),
        (PowerState("battery", 0.9, 0.0, True), "train", True, "90%"),
        (PowerState("solar", 0.9, 20.0, False, problem="the gauge is silent"), "train", False, "the gauge is silent"),
    ],
)
def test_every_verdict_says_why(state: PowerState, work: rules.Work, ok: bool, says: str) -> None:
    verdict = rules.may(SOLAR, state, work)

    assert (verdict.ok, says in verdict.reason) == (ok, True), verdict.reason


# ---- Power


def test_a_node_with_no_power_settings_hangs_on_the_mains() -> None:
    power = Power(Plant())

    assert power.now().surplus and power.sleeping_until() == 0
    assert all(power.may(work).ok for work in rules.WORKS)


def test_a_gauge_that_falls_silent_stops_what_can_wait_and_says_so() -> None:
    clock, battery = Clock(), Battery(0.95, 20.0)
    power = Power(SOLAR, reading=battery, clock=clock)
    assert power.may("train").ok

    battery.reading = None
    clock.now += 60

    assert power.may("train") == Verdict(False, "the battery says nothing")


def test_a_gauge_that_hangs_holds_nobody_up_and_counts_as_bad_news_in_the_end() -> None:
    clock, hangs = Clock(), threading.Event()
    battery = Battery(0.95, 20.0)

    def reading() -> Reading:
        if clock.now > NOON:
            hangs.wait(30)
        return battery()

    power = Power(SOLAR, reading=reading, clock=clock)
    power.sweep()
    clock.now += 60
    sweep = threading.Thread(target=power.sweep)
    sweep.start()
    try:
        assert power.may("agree").ok  # at once: the last word stands
        power.spent("answer", 1.0)
        clock.now += 1000
        assert "has not ended" in power.may("agree").reason
    finally:
        hangs.set()
        sweep.join(10)


def test_a_clock_in_1970_keeps_what_waits_for_sun_waiting_unless_the_sun_is_measured() -> None:
    blind, seeing = Power(SOLAR, reading=Battery(0.95), clock=Clock(5.0)), Power(SOLAR, reading=Battery(0.95, 20.0), clock=Clock(5.0))

    assert "clock is not set" in blind.may("train").reason
    assert seeing.may("train").ok


def test_a_covered_panel_is_noticed_by_the_charge_alone() -> None:
    """Nothing measures the panel: noon by the almanac, but the charge falls as if it were night."""
    clock, battery = Clock(NOON), Battery(0.90)
    power = Power(SOLAR, reading=battery, clock=clock)
    assert power.may("train").ok

    for minute in range(60):
        clock.now = NOON + 60 * minute
        battery.reading = Reading(0.90 - minute / 60 * SOLAR.idle_w / SOLAR.battery_wh)
        power.sweep()

    assert power.now().watts_in < 0.5
    assert "of sun" in power.may("train").reason


def test_joules_are_counted_by_kind_and_day_and_survive_a_restart(tmp_path: Path) -> None:
    clock = Clock()
    power = Power(SOLAR, folder=tmp_path, clock=clock, cores=4)
    power.sweep()
    power.spent("train", 100.0, threads=2)
    power.spent("download", 50.0)
    clock.now += 1000
    power.stop()
    clock.now += 3600

    again = Power(SOLAR, folder=tmp_path, clock=clock)

    assert again.joules()["train"] == 100.0 * (5.5 - 2.5) * 0.5
    assert again.joules()["download"] == 50.0
    assert again.joules()["idle"] == pytest.approx(2500.0)
    assert again.joules_today("train") == 150.0
    clock.now += DAY_S
    assert again.joules_today("train") == 0.0


def test_a_spoiled_book_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "energy.json").write_bytes(b'{"totals": {"train": 12')

    assert Power(SOLAR, folder=tmp_path).joules()["train"] == 0.0


def test_a_disk_that_refuses_does_not_stop_the_counting(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "energy.json.part").mkdir()
    clock = Clock()
    power = Power(SOLAR, folder=tmp_path, clock=clock)
    power.spent("agree", 10.0)
    clock.now += 600

    power.stop()

    assert "cannot be written" in caplog.text
    assert power.joules()["agree"] > 0


@given(steps=st.lists(st.tuples(st.floats(-5000, 5000), st.sampled_from(rules.KINDS), st.floats(0, 500)), max_size=30))
@tries(deadline=None, max_examples=50)
def test_a_clock_that_jumps_breaks_neither_charge_nor_counts(steps: list[tuple[float, rules.Kind, float]]) -> None:
    clock = Clock()
    power = Power(SOLAR, clock=clock)
    for jump, kind, seconds in steps:
        clock.now += jump
        power.spent(kind, seconds)
        found = power.now()

        assert 0.0 <= found.charge <= 1.0 and found.watts_in >= 0.0
    assert all(joules >= 0 for joules in power.joules().values())


def test_old_days_are_forgotten() -> None:
    book = Book(None)
    for day in range(200):
        book.add("idle", 1.0, day * DAY_S)

    assert len(book.days) == 62 and min(book.days) == 138
    assert book.totals["idle"] == 200.0


# ---- the battery's own word


@pytest.mark.parametrize(
    ("files", "reading"),
    [
        ({"capacity": "83\n", "status": "Discharging\n"}, Reading(0.83)),
        ({"capacity": "100", "status": "Full"}, Reading(1.0, charging=True)),
        ({"energy_now": "30000000", "energy_full": "60000000"}, Reading(0.5)),
        ({"charge_now": "1", "charge_full": "4", "status": "Charging"}, Reading(0.25, charging=True)),
    ],
)
def test_a_battery_of_linux_is_read(tmp_path: Path, files: dict[str, str], reading: Reading) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)

    assert read(tmp_path) == reading


@pytest.mark.parametrize(
    ("text", "reading"),
    [
        ("71\n", Reading(0.71)),
        ('{"charge": 55.5, "watts_in": 12.5}', Reading(0.555, 12.5)),
        ('{"charge": 5, "charging": true, "volt": 12}', Reading(0.05, None, True)),
    ],
)
def test_a_file_that_a_script_writes_is_read(tmp_path: Path, text: str, reading: Reading) -> None:
    (tmp_path / "battery").write_text(text)

    assert read(tmp_path / "battery") == reading


@pytest.mark.parametrize("text", ["", "full", "-3", "nan", "230", "{", '{"watts_in": 3}', '{"charge": 50, "watts_in": -1}', "\x00\xff"])
def test_what_is_not_a_charge_is_refused_and_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "battery").write_text(text)

    with pytest.raises(Unavailable, match="battery"):
        read(tmp_path / "battery")


def test_an_old_or_missing_file_says_nothing(tmp_path: Path) -> None:
    file = tmp_path / "battery"
    file.write_text("50")
    os.utime(file, (NOON, NOON))

    with pytest.raises(Unavailable, match="30 minutes old"):
        read(file, now=NOON + 1800)
    with pytest.raises(Unavailable, match="No such file"):
        read(tmp_path / "nothing")
