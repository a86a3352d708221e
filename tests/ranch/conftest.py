import pytest

from coordinator.ranch import Site
from coordinator.ranch.season import Season, season
from coordinator.ranch.sites import Plot, Share, checked_site
from protocol.tasks import RANCH_CODES

PLOT = Plot(
    weather="tunis", latitude=13.1, soil="SandyLoam", crop="Tomato", planting="03/01", first_year=1984, last_year=1986, area_m2=1500,
    tank_l=20_000, refill_lpd=9_000, pump_lpm=40, panel_w=20, battery_ah=12, distance_km=2.0, chill=-5.0,
)  # fmt: skip


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("seasons")


@pytest.fixture(scope="session")
def plot() -> Plot:
    return PLOT


@pytest.fixture(scope="session")
def days(cache) -> Season:
    return season(PLOT, cache=cache)  # about 2 s of AquaCrop, once


@pytest.fixture(scope="session")
def site(days) -> Site:
    """One plot, three years: the smallest site there can be. Every cause is as likely as the others."""
    whole = Site(
        name="small", about="A site for tests.", plots=(PLOT,), faults=dict.fromkeys(RANCH_CODES, 1.0), share=Share(local=1.0),
        words={"es": {"pipe": ("anda llorona la culebra",)}, "en": {"pipe": ("the culebra cries",)}},
    )  # fmt: skip
    return checked_site(whole, source="test")
