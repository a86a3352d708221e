"""Four days of one plot under one scenario: our tank, pump, battery and radio on top of the season. No I/O; randomness comes in."""

import math

import msgspec
import numpy as np

from coordinator.ranch.scenarios import DAYS, Rng, Shape
from coordinator.ranch.season import Season
from coordinator.ranch.sites import Plot

FULL_NIGHT_V = 12.6  # a charged lead-acid battery at dawn
NODE_W = 0.4  # mean draw of node, valves and radio
HAND_HOURS = 2.0  # of a watering without a command
ABSENT = -1.0  # stands for a channel the plot does not have, in `numbers`


class Window(msgspec.Struct, frozen=True):
    """What the node saw, in physical units; one value a day where there are four."""

    day: int  # proleptic ordinal of the first day
    soil: tuple[float, ...]  # 0 wilting point, 1 field capacity, 1.5 saturation
    rain: tuple[float, ...]  # mm
    flow: tuple[float, ...]  # share of the healthy flow, mean while it runs
    tank: tuple[float, ...]  # share of capacity at dusk; empty without a tank
    volt: tuple[float, ...]  # V, the night's lowest
    opened: int  # days with a command to open the valve
    amp: float  # share of the healthy pump current, last day it ran; 0: never ran
    sun: float  # panel's energy, share of a clear day's
    cold: float  # degrees C, lowest
    rssi: float  # dBm
    loss: float  # share of packets lost

    def numbers(self) -> tuple[float, ...]:
        """All figures in one fixed order, for the tabular baseline."""
        tank = self.tank or (ABSENT,) * DAYS
        rest = (float(self.opened), self.amp, self.sun, self.cold, self.rssi, self.loss)
        return tuple(round(float(value), 3) for value in (*self.soil, *self.rain, *self.flow, *tank, *self.volt, *rest))


def simulate(plot: Plot, season: Season, start: int, shape: Shape, rng: Rng) -> Window:
    """The window of `DAYS` days from index `start` of the season."""
    days = slice(start, start + DAYS)
    litres = season.irrigation[days] * plot.area_m2 * (not shape.rainfed)  # 1 mm on 1 m2 is 1 litre
    flow = [
        _noisy(shape.flow[day], rng, 0.03) if litres[day] > 0 else _noisy(shape.by_hand, rng, 0.03) if shape.by_hand and day > 0 else 0.0
        for day in range(DAYS)
    ]
    ran = any(litres > 0) or shape.by_hand > 0
    sun = float(np.mean(season.clouds[days])) * shape.dust
    return Window(
        day=int(season.day[start]), soil=_soil(season, start, shape, flow, rng), rain=tuple((season.rain[days] * shape.gauge).tolist()),
        flow=tuple(flow),
        tank=_tank(plot, litres, flow, shape, rng), volt=_volts(plot, season, start, shape, rng), opened=int((litres > 0).sum()),
        amp=_noisy(shape.amp, rng, 0.03) if ran else 0.0,
        sun=min(_noisy(sun, rng, 0.03), 1.0), cold=float(season.cold[days].min()),
        rssi=_rssi(plot, rng) - shape.fade, loss=min(max(shape.loss + abs(rng.normal(0, 0.03)), 0.0), 1.0),
    )  # fmt: skip


def _noisy(value: float, rng: Rng, share: float) -> float:
    return max(value * (1 + share * rng.normal()), 0.0)


def _soil(season: Season, start: int, shape: Shape, flow: list[float], rng: Rng) -> tuple[float, ...]:
    days = slice(start, start + DAYS)
    theta = (season.theta_dry if shape.rainfed else season.theta)[days].copy()
    wilting, capacity, saturation = season.soil
    planned = season.irrigation[days] / 200.0 if not shape.rainfed else np.zeros(DAYS)  # mm over the probe's 200 mm
    missing = np.array([planned[day] * max(1 - flow[day], 0.0) if planned[day] > 0 else 0.0 for day in range(DAYS)])
    theta = theta - np.cumsum(missing)
    if shape.soil == "frozen":
        theta[:] = theta[0]
    elif shape.soil == "soaked":
        theta = np.minimum(np.maximum(theta, capacity) + shape.wetting * np.array([0.5, 0.9, 1.0, 1.0]), saturation)
    elif shape.soil == "wetted":
        onset = int(rng.integers(1, 3))
        theta = theta + np.array([0.0 if day < onset else shape.wetting * 0.85 ** (day - onset) for day in range(DAYS)])
    theta = np.clip(theta, wilting, saturation)
    above = 1 + 0.5 * (theta - capacity) / (saturation - capacity)
    scaled = np.where(theta > capacity, above, (theta - wilting) / (capacity - wilting))
    noise = 0.0 if shape.soil == "frozen" else 0.012
    return tuple(float(value) for value in np.clip(scaled + noise * rng.normal(size=DAYS), 0, 1.5))


def _tank(plot: Plot, litres: np.ndarray, flow: list[float], shape: Shape, rng: Rng) -> tuple[float, ...]:
    """Levels at dusk: what was there, less use and drain, plus the well's refill up to the float."""
    if not plot.tank_l:
        return ()
    level = rng.uniform(*shape.level)
    top = shape.brim or 0.96
    usual = plot.pump_lpm * 60 * HAND_HOURS  # litres of one watering by hand
    levels = []
    for day in range(DAYS):
        use = litres[day] * min(flow[day], 1.6) if litres[day] > 0 else usual * flow[day]
        level = max(level - use / plot.tank_l - _noisy(shape.drain, rng, 0.15), 0.0)
        level = max(min(level + shape.refill * plot.refill_lpd / plot.tank_l, top), 0.0)
        levels.append(max(level + 0.01 * rng.normal(), 0.0))
    return tuple(levels)


def _volts(plot: Plot, season: Season, start: int, shape: Shape, rng: Rng) -> tuple[float, ...]:
    """The night's lowest voltage. State of charge falls when the panel gives less than the node takes."""
    capacity_wh = plot.battery_ah * 12.0
    charge = rng.uniform(0.85, 1.0)
    volts = []
    for day in range(DAYS):
        gained = plot.panel_w * 0.7 * season.clear_wh[start + day] * season.clouds[start + day] * shape.dust
        charge = min(max(charge + (gained - NODE_W * 24) / capacity_wh, 0.1), 1.0)
        chill = 0.012 * max(10.0 - season.cold[start + day], 0.0)  # V; a cold cell's resistance
        volts.append(FULL_NIGHT_V - 1.1 * (1 - charge) - chill - shape.sag[day] + 0.03 * rng.normal())
    return tuple(volts)


def _rssi(plot: Plot, rng: Rng) -> float:
    """Signal at the gateway, dBm: log-distance path loss, exponent 2.9, shadowing 2 dB."""
    return -72.0 - 29.0 * math.log10(max(plot.distance_km, 0.05) / 0.5) + 2.0 * rng.normal()
