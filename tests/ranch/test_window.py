import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.ranch.corpus import pools
from coordinator.ranch.scenarios import Shape
from coordinator.ranch.season import _seasons, season
from coordinator.ranch.window import simulate
from coordinator.ranch.wording import digits, level


@pytest.fixture
def seen(plot, days):
    """A window from the first day of a pool, with the same randomness every time."""

    def see(shape: Shape, pool: str, which: int = 3):
        return simulate(plot, days, int(pools(days, "train")[pool][which]), shape, np.random.default_rng(7))

    return see


def test_a_drain_empties_the_tank_faster_than_the_same_healthy_days(seen):
    healthy, leaking = seen(Shape(refill=0.2), "any"), seen(Shape(refill=0.2, drain=0.3), "any")

    assert leaking.tank[-1] < healthy.tank[-1] - 0.3


def test_without_refill_the_tank_only_falls(seen):
    window = seen(Shape(refill=0.0), "irrigated")

    assert window.tank[-1] < window.tank[0]


def test_a_float_that_does_not_shut_holds_the_tank_over_its_full_mark(seen):
    window = seen(Shape(brim=1.1, level=(1.0, 1.1)), "idle")

    assert min(window.tank) > 1.0
    assert digits(window)["tank"] == "9999"


def test_water_that_does_not_arrive_leaves_the_soil_drier(seen):
    healthy, dry = seen(Shape(), "irrigated"), seen(Shape(flow=(0.0,) * 4), "irrigated")

    assert dry.soil[-1] < healthy.soil[-1]
    assert healthy.opened == dry.opened >= 2
    assert max(dry.flow) == 0


def test_a_blocked_gauge_counts_nothing_on_days_of_rain(seen):
    healthy, blocked = seen(Shape(), "rainy"), seen(Shape(gauge=0.0), "rainy")

    assert max(healthy.rain) >= 8
    assert digits(blocked)["rain"] == "0000"


def test_a_frozen_probe_repeats_itself_while_a_healthy_one_follows_the_rain(seen):
    healthy, frozen = seen(Shape(), "rainy"), seen(Shape(soil="frozen"), "rainy")

    assert len(set(frozen.soil)) == 1
    assert len(set(healthy.soil)) > 1


def test_soaked_soil_is_wetter_than_field_capacity(seen):
    assert min(seen(Shape(pool="rainy", soil="soaked", wetting=0.15), "rainy").soil) > 1.0


def test_dust_takes_light_and_in_the_end_voltage(seen):
    clean, dirty = seen(Shape(), "rainless"), seen(Shape(dust=0.2), "rainless")

    assert dirty.sun == pytest.approx(0.2 * clean.sun, rel=0.05)
    assert dirty.volt[-1] <= clean.volt[-1]


def test_frost_alone_costs_some_voltage(plot, days, seen):
    cold, mild = seen(Shape(), "freezing", 0), seen(Shape(), "mild", 0)

    assert cold.cold < 1 < mild.cold
    assert min(cold.volt) < min(mild.volt)


def test_distance_and_fading_lower_the_signal(seen):
    assert seen(Shape(fade=20), "any").rssi == pytest.approx(seen(Shape(), "any").rssi - 20)


def test_a_season_holds_the_physics_it_should(days):
    wilting, capacity, saturation = days.soil

    assert 0 < wilting < capacity < saturation < 0.6
    assert len(days.day) == len(days.theta) == len(days.clear_wh) == 1096  # 1984 is a leap year
    assert days.irrigation.sum() > 100 and days.irrigation.max() <= 5.0
    assert days.theta[days.theta > 0].min() > wilting / 2 - 1e-9 and days.theta.max() <= saturation + 1e-9
    assert days.theta[(days.theta > 0) & (days.crop > 0.5)].mean() > days.theta_dry[(days.theta > 0) & (days.crop > 0.5)].mean()
    assert days.clear_wh.max() < 9 and days.clear_wh.min() > 3  # hours of full sun on a panel at 13 degrees north


def test_a_cache_file_that_was_cut_short_is_simulated_again(plot, days, tmp_path):
    _seasons.clear()
    season(plot, cache=tmp_path)
    file = next((tmp_path / "ranch").iterdir())
    file.write_bytes(file.read_bytes()[:1000])
    _seasons.clear()

    again = season(plot, cache=tmp_path)

    assert all(np.array_equal(a, b) for a, b in zip(again, days, strict=True))
    assert file.stat().st_size > 1000


@given(st.floats(allow_nan=False, allow_infinity=False, width=32))
def test_a_level_is_always_one_digit(value):
    assert 0 <= level(value, low=-9, step=4) <= 9
