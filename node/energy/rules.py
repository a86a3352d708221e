"""Where the power comes from and what a node may do with it. No I/O: clock, sun and charge come in, a state or a verdict goes out.

Rules:
 * Answering never asks. What may wait: training, downloads, self-agreement, sync windows (`Work`).
 * On the mains everything may run at once. On a battery alone nothing that computes for hours does; words and files may, above the reserve.
 * On the sun: only by day, and only above the reserve, which is what `dark_days` without any sun take at this site's own pace.
 * Both limits have two edges (start high, stop lower), so that a cloud or a percent does not switch a training on and off.
 * What is configured to be measured and is not told any more counts as bad news: optional work stops.

The sun is a clear sky by latitude and date (declination: Cooper 1969; intensity 1.353 * 0.7^(AM^0.678) kW/m2: Meinel & Meinel 1976; a tenth
more for the sky itself) on a flat panel, times DERATE for heat, dust and the charge controller. No equation of time: 16 minutes at most.
Joules are by a stated model: (busy_w - idle_w) * share of the cores * seconds, radio_w * seconds for what goes over a link, idle_w always.
Limits: one battery, one panel. No forecast: a cloudy week is what the reserve is for.
"""

import math
from typing import Literal

import msgspec

from protocol.links import Verdict

Source = Literal["mains", "battery", "solar"]
Work = Literal["train", "download", "agree", "sync"]  # what may wait
Kind = Literal["idle", "answer", "train", "download", "agree", "sync"]  # what joules are counted for
WORKS: tuple[Work, ...] = ("train", "download", "agree", "sync")
KINDS: tuple[Kind, ...] = ("idle", "answer", *WORKS)
OVER_A_LINK = frozenset({"download", "sync"})  # cost the radio, not the processor

DAY_S = 86_400.0  # seconds
DERATE = 0.75  # of the panel's nominal watts: heat, dust, angle, controller
CHARGING = 0.9  # share of what comes from the panel that a battery gives back
START_MARGIN, STOP_MARGIN = 0.15, 0.05  # of the battery, above the reserve
START_CEILING = 0.95  # optional work starts at this charge at the latest, if the reserve lies below it
FULL = 0.97  # from here on the controller throws sun away: the charge stands still and tells nothing about the sky
SEEN_DARK_S = 3_600.0  # seconds over which the charge tells how much sun there is
STEP_S = 600.0  # seconds; steps in which the sky is searched and gaps are integrated
HORIZON_S = 2 * DAY_S


class Plant(msgspec.Struct, frozen=True):
    """What the node hangs on, and what it draws."""

    source: Source = "mains"
    battery_wh: float = 220.0  # 12 V, 18 Ah
    panel_w: float = 50.0  # nominal, at 1,000 W/m2
    latitude: float = 0.0  # degrees, south negative
    longitude: float = 0.0  # degrees, west negative: when noon is
    curve: tuple[float, ...] = ()  # 24 shares of panel_w by hour of local solar time, midnight first; empty: the sun by latitude
    clearness: float = 0.4  # share of a clear sky that is counted on where nothing is measured
    idle_w: float = 2.5  # the whole machine, doing nothing
    busy_w: float = 5.5  # the whole machine, all cores at work
    radio_w: float = 1.0  # more, while a link is in use
    dark_days: float = 2.0  # days without any sun that the battery must carry idling and answering


class Duty(msgspec.Struct, frozen=True):
    """The two latches."""

    rich: bool = False  # the charge is above the reserve
    sunny: bool = False  # the panel carries a good part of the work


class PowerState(msgspec.Struct, frozen=True):
    """How it stands now."""

    source: Source
    charge: float  # of the battery, in [0, 1]; 1 on the mains
    watts_in: float  # from the panel, measured or by the model
    surplus: bool  # what waits for sun may run
    daylight: bool = True  # there is some sun
    rich: bool = True  # above the reserve
    reserve: float = 0.0  # share of the battery
    measured: bool = False  # the charge was read, not modelled
    problem: str = ""  # why nothing optional runs although it might: a reading that is missing


def sun_height(now: float, latitude: float, longitude: float) -> float:
    """Sine of the sun's elevation at `now` (seconds since 1970, UTC); below 0 at night.

    sin e = sin(phi) sin(delta) + cos(phi) cos(delta) cos(h), delta = 23.44 deg * sin(2 pi (284 + day) / 365)
    """
    day = (now / DAY_S) % 365.2422 + 1.0
    declination = math.radians(23.44) * math.sin(2 * math.pi * (284 + day) / 365)
    hour_angle = 2 * math.pi * (solar_hour(now, longitude) - 12.0) / 24.0
    phi = math.radians(latitude)
    return math.sin(phi) * math.sin(declination) + math.cos(phi) * math.cos(declination) * math.cos(hour_angle)


def solar_hour(now: float, longitude: float) -> float:
    """Local mean solar time, hours in [0, 24)."""
    return (now / 3600.0 + longitude / 15.0) % 24.0


def clear_watts(plant: Plant, now: float) -> float:
    """What the panel gives under a clear sky."""
    if plant.source != "solar":
        return 0.0
    if plant.curve:
        hour = solar_hour(now, plant.longitude)
        before, after = plant.curve[int(hour)], plant.curve[(int(hour) + 1) % 24]
        return plant.panel_w * (before + (after - before) * (hour % 1.0))
    height = sun_height(now, plant.latitude, plant.longitude)
    if height <= 0.01:
        return 0.0
    intensity = 1.353 * 0.7 ** ((1.0 / height) ** 0.678)  # kW/m2, towards the sun
    return plant.panel_w * DERATE * 1.1 * intensity * height


def watts_by_balance(plant: Plant, before: float, after: float, seconds: float, watts_out: float) -> float:
    """What must have come in for the charge to go from `before` to `after` while `watts_out` went out."""
    return max(0.0, (after - before) * plant.battery_wh * 3600.0 / seconds + watts_out) / CHARGING


def charge_after(plant: Plant, charge: float, watts_in: float, watts_out: float, seconds: float) -> float:
    """The battery's charge after so many seconds."""
    net = watts_in * CHARGING - watts_out
    return min(1.0, max(0.0, charge + net * seconds / (plant.battery_wh * 3600.0)))


def charge_over_gap(plant: Plant, charge: float, begin: float, end: float) -> float:
    """The charge after a time in which nobody looked (at most HORIZON_S of it), idling under the sky that is counted on."""
    at = max(begin, end - HORIZON_S)
    while at < end:
        step = min(STEP_S, end - at)
        charge = charge_after(plant, charge, plant.clearness * clear_watts(plant, at), plant.idle_w, step)
        at += step
    return charge


def reserve(plant: Plant, answering_wh: float) -> float:
    """Share of the battery that `dark_days` take, idling and answering (Wh a day); may be above 1: the battery is too small then."""
    return plant.dark_days * (24.0 * plant.idle_w + answering_wh) / plant.battery_wh


def edges(kept: float) -> tuple[float, float]:
    """(start, stop): optional work starts above the first charge and stops below the second."""
    stop = kept + STOP_MARGIN
    return max(stop + STOP_MARGIN / 2, min(kept + START_MARGIN, START_CEILING)), stop


def sun_edges(plant: Plant) -> tuple[float, float]:
    """(start, stop) in watts: the panel carries the idling machine and half of the work; it carries the idling machine."""
    return plant.idle_w + 0.5 * (plant.busy_w - plant.idle_w), plant.idle_w


def next_duty(duty: Duty, plant: Plant, *, charge: float, watts_in: float, kept: float) -> Duty:
    """The latches after a look."""
    start, stop = edges(kept)
    bright, dim = sun_edges(plant)
    rich = charge >= stop if duty.rich else charge >= start
    sunny = watts_in >= dim if duty.sunny else watts_in >= bright
    return Duty(rich, sunny)


def state(
    plant: Plant,
    duty: Duty,
    *,
    charge: float,
    watts_in: float,
    kept: float,
    measured: bool = False,
    charging: bool = False,
    problem: str = "",
) -> PowerState:
    """The latches and figures as a state.

    Args:
        charging: the battery's own word that something feeds it; makes a battery as good as the mains.
    """
    if plant.source == "mains":
        return PowerState("mains", 1.0, 0.0, True)
    fed = plant.source == "battery" and charging
    sunny = duty.sunny or fed
    return PowerState(
        plant.source, charge, watts_in, surplus=duty.rich and sunny and not problem, daylight=watts_in > 0 or fed, rich=duty.rich,
        reserve=kept, measured=measured, problem=problem,
    )  # fmt: skip


def may(plant: Plant, now: PowerState, work: Work) -> Verdict:
    """Whether `work` may run now."""
    if now.source == "mains":
        return Verdict(True, "on the mains")
    if now.problem:
        return Verdict(False, now.problem)
    if not now.rich:
        start, _ = edges(now.reserve)
        if start > 1.0:
            days = plant.dark_days / now.reserve
            return Verdict(False, f"the battery carries {days:.1f} dark days of {plant.dark_days:g} when full: nothing is to spare")
        return Verdict(False, f"charge {now.charge:.0%}, waits for {start:.0%}: the rest is kept for {plant.dark_days:g} dark days")
    told = f"charge {now.charge:.0%}, {now.watts_in:.1f} W from the panel"
    if now.surplus or (work in OVER_A_LINK and (now.daylight or now.source == "battery")):
        return Verdict(True, told)
    if now.source == "battery":
        return Verdict(False, "on a battery that nothing charges")
    return Verdict(False, f"{told}, waits for {sun_edges(plant)[0]:.1f} W of sun")


def sleeping_until(plant: Plant, power: PowerState, now: float) -> int:
    """When this node will be of use to others again, seconds since 1970; 0: it is awake.

    It rests while it is below its reserve with nothing coming in: until the panel should carry it again, or for a day on a mere battery.
    """
    if power.source == "mains" or power.rich or power.watts_in >= plant.idle_w:
        return 0
    if power.source == "battery":
        return int(now + DAY_S)
    at = now + STEP_S
    while at < now + HORIZON_S and plant.clearness * clear_watts(plant, at) < plant.idle_w:
        at += STEP_S
    return int(at)


def watts_of(plant: Plant, kind: Kind, *, cores: float) -> float:
    """Watts that a kind of work takes on top of idling, on this share of the machine's cores in [0, 1]."""
    if kind == "idle":
        return plant.idle_w
    if kind in OVER_A_LINK:
        return plant.radio_w
    return max(0.0, plant.busy_w - plant.idle_w) * min(1.0, max(0.0, cores))
