"""A month on the sun, by a virtual clock: a world with a battery, weather and a panel, and the node's own rules in it.

The world knows what comes in and goes out; the node sees the battery's charge, a percent at a time, and the almanac. Every minute a record
is answered by the real use case. Training is wanted whenever a day has brought enough; it takes its watts from the world while it runs.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import settings as tries
from hypothesis import strategies as st

from node.energy import rules
from node.energy.power import Power
from node.energy.readings import Reading
from node.energy.rules import DAY_S, Duty, Plant
from node.learn.rules import Standing, training_due

BEGIN = 1_798_761_600.0  # 2027-01-01 00:00 UTC
PLANT = Plant(source="solar", battery_wh=300.0, panel_w=50.0, latitude=13.1)
STEP_S = 60.0
ANSWER_S = 0.5  # of computing, one record a minute
TRAINING_S = 3600.0  # a training takes an hour of sun
NEEDED = 40  # examples

Weather = Callable[[float], float]  # day -> share of a clear sky


class World:
    """A battery, its weather, and a node that sees no more than a gauge would show."""

    def __init__(self, weather: Weather, *, learns: bool = True, charge: float = 0.8, plant: Plant = PLANT, gauge: bool = True) -> None:
        self.weather, self.learns, self.plant = weather, learns, plant
        self.now, self.charge = BEGIN, charge
        self.power = Power(plant, reading=self.read if gauge else None, clock=lambda: self.now, cores=1)
        self.trained = 0.0  # seconds of the training under way
        self.trainings = 0
        self.trained_at: list[tuple[float, float]] = []  # (day, charge) of every minute of training
        self.flat_at: float | None = None  # day
        self.answered = 0

    def read(self) -> Reading:
        return Reading(math.floor(100 * self.charge) / 100)  # as a gauge tells it

    @property
    def day(self) -> float:
        return (self.now - BEGIN) / DAY_S

    def minute(self) -> None:
        self.now += STEP_S
        joules = self.plant.idle_w * STEP_S + self._answer() + (self._train() if self.learns else 0.0)
        coming = self.weather(self.day) * rules.clear_watts(self.plant, self.now)
        self.charge = rules.charge_after(self.plant, self.charge, coming, joules / STEP_S, STEP_S)
        if self.charge <= 0.0 and self.flat_at is None:
            self.flat_at = self.day
        self.power.sweep()

    def _answer(self) -> float:
        self.answered += 1  # asks nobody
        self.power.spent("answer", ANSWER_S)
        return self.power.watts("answer") * ANSWER_S

    def _train(self) -> float:
        """What the learner does, one minute of it."""
        examples = int(40 * self.day)  # 40 confirmed answers a day
        standing = Standing(examples=examples, held_out=9, learned=NEEDED * self.trainings, unfinished=self.trained > 0)
        due = training_due(
            standing, now=self.now, minimum=NEEDED, held_out=4, new=NEEDED, power=self.power.may("train"), joules_left=math.inf
        )
        if not due.ok:
            return 0.0
        self.trained += STEP_S
        self.trained_at.append((self.day, self.charge))
        self.power.spent("train", STEP_S)
        if self.trained >= TRAINING_S:
            self.trained, self.trainings = 0.0, self.trainings + 1
        return self.power.watts("train") * STEP_S

    def days(self, count: float) -> "World":
        while self.day < count:
            self.minute()
        return self


def sunny(day: float) -> float:
    return 0.9


def cloudy_week(day: float) -> float:
    return 0.25 if 10 <= day < 17 else 0.9


def covered(day: float) -> float:
    return 0.0 if day >= 10 else 0.9


def test_with_sun_every_training_is_done_the_day_its_examples_are_there() -> None:
    world = World(sunny).days(30)

    assert world.trainings == 29  # 40 examples a day, from the end of the first day on
    assert world.flat_at is None
    assert world.power.joules()["train"] == pytest.approx(29 * TRAINING_S * 3.0)


def test_nothing_is_trained_at_night() -> None:
    world = World(sunny).days(10)

    hours = {int(24 * (day % 1)) for day, _ in world.trained_at}
    assert hours and min(hours) >= 6 and max(hours) <= 18


def test_a_cloudy_week_flattens_nothing_and_the_reserve_is_never_trained_away() -> None:
    world, alone = World(cloudy_week).days(30), World(cloudy_week, learns=False).days(30)

    kept = rules.reserve(PLANT, 0.0)
    assert world.flat_at is None and alone.flat_at is None
    assert all(charge >= kept for _, charge in world.trained_at)
    assert world.trainings >= 22  # what waited for the clouds is made up for after them


def test_a_covered_panel_stops_training_within_hours_and_the_battery_lasts_its_dark_days() -> None:
    world, alone = World(covered).days(20), World(covered, learns=False).days(20)

    assert max(day for day, _ in world.trained_at) < 10.75  # the day it was covered
    assert world.flat_at is not None and alone.flat_at is not None
    assert world.flat_at - 10 > PLANT.dark_days
    assert alone.flat_at - world.flat_at < 0.25  # what training took before it noticed is hours of idling


def test_without_a_gauge_the_model_counts_on_a_poor_sky_and_the_battery_is_not_trained_flat() -> None:
    world = World(lambda day: 0.5 if 10 <= day < 17 else 0.9, gauge=False).days(30)

    assert world.flat_at is None
    assert world.trainings >= 20


def test_every_record_is_answered_when_it_comes_whatever_the_battery_says(make_node: Any) -> None:
    """The real use case, every three hours of a month in which the panel is covered, with the node's own Power beside it."""
    node, world = make_node(), World(covered)
    given = []
    for hour in range(0, 30 * 24, 3):
        for _ in range(12):  # coarse steps: the sky is enough here
            world.now += 900.0
            coming = covered(world.day) * rules.clear_watts(PLANT, world.now)
            world.charge = rules.charge_after(PLANT, world.charge, coming, PLANT.idle_w, 900.0)
            world.power.may("train")
        node.clock.now = world.now
        given.append((node.answer(f"soil {hour} %"), world.now))

    assert len(given) == 240
    assert world.charge == 0.0  # by then
    assert {row.created - asked for one, asked in given if (row := node.row(one.id))} == {0.0}


def test_answering_knows_nothing_of_power() -> None:
    import ast

    root = Path(__file__).parents[2]
    for name in ("node/answering.py", "node/engine/worker.py", "protocol/models/engine.py", "node/api/routes.py"):
        tree = ast.parse((root / name).read_text(encoding="utf-8"))
        imported = {part.module for part in ast.walk(tree) if isinstance(part, ast.ImportFrom)}
        assert not {module for module in imported if module and module.startswith("node.energy")}, name


plants = st.builds(
    Plant, source=st.just("solar"), battery_wh=st.floats(20, 1000), panel_w=st.floats(5, 300), latitude=st.floats(-60, 60),
    idle_w=st.floats(0.5, 5), busy_w=st.floats(5, 12), dark_days=st.floats(0.2, 4),
)  # fmt: skip


@given(plant=plants, charge=st.floats(0, 1), sky=st.lists(st.floats(0, 1), min_size=4, max_size=4), start=st.floats(0, 365))
@tries(deadline=None, max_examples=25)
def test_whatever_the_weather_after_optional_work_the_battery_still_lasts_its_dark_days(
    plant: Plant, charge: float, sky: list[float], start: float
) -> None:
    """The promise itself: at any moment at which optional work ran, cover the panel, and idling goes on for `dark_days`."""
    duty, step = Duty(), 600.0
    kept = rules.reserve(plant, 0.0)
    for number in range(4 * 144):
        now = BEGIN + start * DAY_S + number * step
        coming = sky[number // 144] * rules.clear_watts(plant, now)
        duty = rules.next_duty(duty, plant, charge=charge, watts_in=coming, kept=kept)
        works = rules.may(plant, rules.state(plant, duty, charge=charge, watts_in=coming, kept=kept), "train").ok
        if works:
            left = charge * plant.battery_wh / plant.idle_w / 24.0  # days of idling in the dark
            assert left >= plant.dark_days
        out = plant.busy_w if works else plant.idle_w
        charge = rules.charge_after(plant, charge, coming, out, step)


def test_a_battery_that_holds_no_dark_days_never_works_for_anybody_else() -> None:
    small = msgspec.structs.replace(PLANT, battery_wh=100.0)

    world = World(sunny, plant=small).days(5)

    assert world.trained_at == []
    assert "when full" in world.power.may("train").reason
