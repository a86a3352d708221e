"""Every cause as a few changes to a healthy plot. No I/O; randomness comes in.

A clear scenario shows in the window alone. A vague one is drawn from a shape that it shares with other causes: only its note tells which
(a tank that falls: leak, dry well, or the sprayer was filled). Pumps are of the displacement kind: blocked, they draw more; dry, less.
"""

from collections.abc import Callable
from typing import NamedTuple

import msgspec
import numpy as np

DAYS = 4  # of a window
Rng = np.random.Generator


class Shape(msgspec.Struct, frozen=True):
    """What is not healthy, and which days it can happen on. The defaults are the healthy plot."""

    pool: str = "any"  # kind of days, see corpus.pools
    rainfed: bool = False  # soil water of the rainfed run
    refill: float = 1.0  # share of the well's refill
    drain: float = 0.0  # share of the tank's capacity lost a day, not through the meter
    level: tuple[float, float] = (0.6, 0.95)  # the tank's start, share of capacity
    brim: float = 0.0  # level at which a float that does not shut holds the tank; 0: it shuts
    flow: tuple[float, ...] = (1.0,) * DAYS  # share of the healthy flow while the valve is open
    amp: float = 1.0  # share of the healthy pump current
    by_hand: float = 0.0  # flow on days without a command, share of the healthy flow
    soil: str = ""  # "frozen": one reading for ever; "soaked": nothing drains; "wetted": water that nobody metered
    wetting: float = 0.0  # m3/m3 added when soaked or wetted
    gauge: float = 1.0  # share of the rain that the gauge counts
    dust: float = 1.0  # share of the light that reaches the cells
    sag: tuple[float, ...] = (0.0,) * DAYS  # V below the healthy night's lowest
    fade: float = 0.0  # dB below the usual signal
    loss: float = 0.0  # share of packets lost


class Scenario(NamedTuple):
    """One way in which a cause shows."""

    cause: str  # verdict code
    part: str  # whose symptoms a note may tell: tank, pump, soil, power, radio; "" for nothing to tell
    concept: str  # what a telling note speaks of; "" where there is none
    vague: bool  # the window alone does not tell
    shape: Callable[[Rng], Shape]
    tank: bool = False  # needs a tank


def _falling_flow(rng: Rng) -> tuple[float, ...]:
    start, end = rng.uniform(0.65, 0.9), rng.uniform(0.25, 0.5)
    return tuple(np.linspace(start, end, DAYS))


def _nights(rng: Rng, low: float, high: float, *, first: int = 0) -> tuple[float, ...]:
    return tuple(0.0 if day < first else rng.uniform(low, high) for day in range(DAYS))


def _even(value: float) -> tuple[float, ...]:
    return (value,) * DAYS


# the shapes that causes share
def tank_falls(rng: Rng) -> Shape:
    """Water goes somewhere the meter does not see, or does not come."""
    return Shape(refill=rng.uniform(0.0, 0.2), drain=rng.uniform(0.1, 0.2))


def high_flow(rng: Rng) -> Shape:
    """More water than one line takes."""
    return Shape(pool="irrigated", flow=_even(rng.uniform(1.2, 1.5)))


def weak_flow(rng: Rng) -> Shape:
    """The pump turns and little arrives."""
    return Shape(pool="irrigated", flow=_even(rng.uniform(0.03, 0.3)), amp=rng.uniform(0.65, 1.1))


def half_flow(rng: Rng) -> Shape:
    """About half of the water arrives."""
    return Shape(pool="irrigated", flow=_even(rng.uniform(0.45, 0.7)), amp=rng.uniform(0.95, 1.15))


def uncommanded(rng: Rng) -> Shape:
    """Water without a command."""
    return Shape(pool="idle", by_hand=rng.uniform(0.8, 1.1), soil="wetted", wetting=0.02)


def flat_soil(rng: Rng) -> Shape:
    """One soil reading for days without rain."""
    return Shape(pool="rainless", soil="frozen")


def wet_without_rain(rng: Rng) -> Shape:
    """The soil gets wet and the gauge counts nothing."""
    return Shape(pool="rainless", soil="wetted", wetting=rng.uniform(0.06, 0.12))


def unseen_rain(rng: Rng) -> Shape:
    """It rained and the gauge counts nothing."""
    return Shape(pool="rainy", gauge=0.0, soil="wetted", wetting=rng.uniform(0.04, 0.1))


def soaked(rng: Rng) -> Shape:
    """Water stands in the soil."""
    return Shape(pool="rainy", soil="soaked", wetting=rng.uniform(0.08, 0.2))


def dry_soil(rng: Rng) -> Shape:
    """Dry soil under a thirsty crop."""
    return Shape(pool="thirsty", rainfed=True)


def bare_dry_soil(rng: Rng) -> Shape:
    """Dry soil under no crop."""
    return Shape(pool="fallow", rainfed=True)


def brim(rng: Rng) -> Shape:
    """A tank about as full as it gets."""
    return Shape(pool="idle", level=(0.95, 1.0), brim=rng.uniform(0.99, 1.06))


def tired_nights(rng: Rng) -> Shape:
    """Low nights, not much sun, cool weather."""
    return Shape(pool="cool", dust=rng.uniform(0.55, 0.75), sag=_nights(rng, 0.5, 0.9))


def missing_packets(rng: Rng) -> Shape:
    """Packets go missing and the signal is a little low."""
    return Shape(fade=rng.uniform(4, 10), loss=rng.uniform(0.3, 0.65))


def dim_panel(rng: Rng) -> Shape:
    """Half the sun, and nights a little low."""
    return Shape(dust=rng.uniform(0.35, 0.6), sag=_nights(rng, 0.1, 0.4))


# the shapes that tell one cause
def broken_pipe(rng: Rng) -> Shape:
    """The tank is empty in two or three days; most of what the well gives is lost on its way too."""
    return Shape(refill=rng.uniform(0.1, 0.3), drain=rng.uniform(0.38, 0.5), level=(0.75, 0.95))


def empty_pump(rng: Rng) -> Shape:
    """No water and little current."""
    return Shape(pool="irrigated", flow=_even(rng.uniform(0, 0.1)), amp=rng.uniform(0.2, 0.45))


def clogging(rng: Rng) -> Shape:
    """Less water every day and much current."""
    return Shape(pool="irrigated", flow=_falling_flow(rng), amp=rng.uniform(1.2, 1.4))


def dark_panel(rng: Rng) -> Shape:
    """Little energy on days without rain."""
    return Shape(pool="rainless", dust=rng.uniform(0.1, 0.3), sag=_nights(rng, 0.3, 0.7))


SCENARIOS = (
    Scenario("normal", "", "", False, lambda rng: Shape()),
    Scenario("normal", "tank", "use", True, tank_falls, tank=True),
    Scenario("normal", "tank", "lines", True, high_flow),
    Scenario("normal", "tank", "full", True, brim, tank=True),
    Scenario("normal", "pump", "half", True, half_flow),
    Scenario("normal", "pump", "hand", True, uncommanded),
    Scenario("normal", "soil", "steady", True, flat_soil),
    Scenario("normal", "soil", "hose", True, wet_without_rain),
    Scenario("normal", "soil", "flood", True, soaked),
    Scenario("normal", "soil", "harvest", True, bare_dry_soil),
    Scenario("normal", "power", "cloudy", True, dim_panel),
    Scenario("normal", "power", "charge", True, tired_nights),
    Scenario("normal", "radio", "service", True, missing_packets),
    Scenario("leak", "tank", "pipe", True, tank_falls, tank=True),
    Scenario("leak", "tank", "pipe", True, high_flow),
    Scenario("leak", "tank", "pipe", False, broken_pipe, tank=True),
    Scenario("leak", "tank", "pipe", False, lambda rng: Shape(pool="irrigated", flow=_even(rng.uniform(1.5, 1.8)), drain=0.1)),
    Scenario("tank-low", "tank", "supply", True, tank_falls, tank=True),
    Scenario("tank-low", "tank", "supply", False, lambda rng: Shape(refill=0.0, level=(0.05, 0.25)), tank=True),
    Scenario("overflow", "tank", "spill", True, brim, tank=True),
    Scenario("overflow", "tank", "spill", False, lambda rng: Shape(level=(1.0, 1.1), brim=rng.uniform(1.08, 1.15)), tank=True),
    Scenario("dry-run", "pump", "air", True, weak_flow),
    Scenario("dry-run", "pump", "air", False, empty_pump),
    Scenario("clogged-filter", "pump", "filter", True, weak_flow),
    Scenario("clogged-filter", "pump", "filter", True, half_flow),
    Scenario("clogged-filter", "pump", "filter", False, clogging),
    Scenario("valve-stuck", "pump", "valve", True, weak_flow),
    Scenario("valve-stuck", "pump", "valve", True, uncommanded),
    Scenario("valve-stuck", "pump", "valve", False, lambda rng: Shape(pool="irrigated", flow=_even(0.0), amp=rng.uniform(1.4, 1.6))),
    Scenario("sensor-stuck", "soil", "probe", True, flat_soil),
    Scenario("sensor-stuck", "soil", "probe", False, lambda rng: Shape(pool="rainy", soil="frozen")),
    Scenario("gauge-blocked", "soil", "rained", True, unseen_rain),
    Scenario("saturated-soil", "soil", "drain", True, soaked),
    Scenario("saturated-soil", "soil", "drain", False, lambda rng: Shape(pool="rainy", soil="soaked", wetting=0.3)),
    Scenario("irrigation-due", "soil", "wilt", True, dry_soil),
    Scenario("irrigation-due", "soil", "wilt", False, lambda rng: Shape(pool="parched", rainfed=True)),
    Scenario("panel-soiled", "power", "dust", True, tired_nights),
    Scenario("panel-soiled", "power", "dust", True, dim_panel),
    Scenario("panel-soiled", "power", "dust", False, dark_panel),
    Scenario("aged-battery", "power", "old", True, tired_nights),
    Scenario("aged-battery", "power", "old", False, lambda rng: Shape(pool="mild", sag=_nights(rng, 1.0, 1.5))),
    Scenario("cold-battery", "power", "frost", True, tired_nights),
    Scenario("cold-battery", "power", "frost", False, lambda rng: Shape(pool="freezing", sag=_nights(rng, 0.8, 1.4, first=1))),
    Scenario("gateway-loss", "radio", "power", True, missing_packets),
    Scenario("gateway-loss", "radio", "power", False, lambda rng: Shape(loss=rng.uniform(0.75, 1.0))),
    Scenario("radio-weak", "radio", "trees", True, missing_packets),
    Scenario("radio-weak", "radio", "trees", False, lambda rng: Shape(fade=rng.uniform(16, 26), loss=rng.uniform(0.15, 0.5))),
)  # fmt: skip
