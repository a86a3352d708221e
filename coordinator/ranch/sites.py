"""Sites of the ranch: plots, equipment, faults and words. Read from TOML and checked here, once.

A site is frozen data; nothing in it is simulated yet. The ones that ship are the TOML files in `sites/`; `general` is a mixture of
climates with standard words, made for the distillation corpus. A file of yours has the same form (docs/ranch.md).
"""

import tomllib
from pathlib import Path
from typing import Any

import msgspec

from coordinator.ranch.notes import BENIGN, CONCEPTS
from protocol.errors import BadInput
from protocol.names import checked_name, known
from protocol.tasks import LANGUAGES, RANCH_CODES

FOLDER = Path(__file__).parent / "sites"
SITES = tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))
SITE_FILE_LIMIT = 64 * 1024  # bytes; the longest that ships is 4 kB

WEATHER = {  # AquaCrop's bundled series: first and last whole year
    "tunis": (1979, 2001), "hyderabad": (2000, 2010), "champion": (1982, 2018), "brussels": (1976, 2005), "cordoba": (1991, 2021),
    "cambridge": (1991, 2021), "lincolnshire": (1991, 2021), "norfolk": (1991, 2021), "north_yorks": (1991, 2021),
    "northumberland": (1991, 2021), "suffolk": (1991, 2021),
}  # fmt: skip
SOILS = (
    "Clay", "ClayLoam", "Loam", "LoamySand", "Sand", "SandyClay", "SandyClayLoam", "SandyLoam", "Silt", "SiltClayLoam", "SiltLoam", "Paddy",
)  # fmt: skip
CROPS = (
    "Barley", "Cotton", "DryBean", "Maize", "PaddyRice", "Potato", "Quinoa", "Sorghum", "Soybean", "SugarBeet", "Sunflower", "Tomato",
    "Wheat",
)  # fmt: skip
YEARS = (3, 8)  # fewest and most years of a plot: the last is for test, the one before for dev, the rest for train


class Plot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One field with its sensor node."""

    weather: str  # one of WEATHER
    latitude: float  # degrees, south negative
    soil: str  # one of SOILS
    crop: str  # one of CROPS
    planting: str  # "MM/DD"
    first_year: int
    last_year: int
    area_m2: float
    tank_l: float  # litres; 0: no tank, and no tank channel
    refill_lpd: float  # litres a day that the well gives the tank
    pump_lpm: float  # litres a minute of the healthy pump
    panel_w: float  # watts at standard conditions
    battery_ah: float  # ampere-hours at 12 V, lead-acid
    distance_km: float  # to the LoRaWAN gateway
    chill: float = 0.0  # degrees C that the plot is above (below: negative) its weather station


class Share(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How often; each in [0, 1]."""

    spanish: float = 0.5  # records asked for, and noted, in Spanish
    vague: float = 0.5  # faults whose window alone does not tell them from another cause
    notes: float = 0.6  # clear windows with a worker's note
    telling: float = 0.85  # vague windows whose note tells the cause
    local: float = 0.0  # telling notes in the site's own words, where it has any
    typos: float = 0.2  # notes with a slip of the finger


class Site(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A ranch, or a mixture of ranches."""

    name: str
    about: str
    plots: tuple[Plot, ...]
    faults: dict[str, float]  # verdict code -> weight; "normal" is one of them
    share: Share = Share()
    words: dict[str, dict[str, tuple[str, ...]]] = {}  # language -> concept -> the site's own phrases


def site_named(name: str) -> Site:
    """A site that ships with the repository.

    Raises:
        UnknownName: none is called so; the message lists them.
    """
    return read_site(FOLDER / f"{known(name, SITES, what='site')}.toml")


def read_site(path: Path) -> Site:
    """A site described in a TOML file.

    Raises:
        BadInput: no such file, not TOML, a value missing, of the wrong type or out of range; the message names key and range.
        UnknownName: a key, fault, soil, crop, weather or note concept nobody knows, with the nearest known one.
    """
    try:
        with path.open("rb") as file:
            data = file.read(SITE_FILE_LIMIT + 1)
    except OSError as error:
        raise BadInput(f"cannot read the site file {path}: {error.strerror}") from error
    if len(data) > SITE_FILE_LIMIT:
        raise BadInput(f"{path} is over {SITE_FILE_LIMIT // 1024} kB: this is not a site file")
    try:
        value = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not TOML: {error}") from error
    _known_keys(value, path)
    try:
        site = msgspec.convert(value, Site)
    except msgspec.ValidationError as error:
        raise BadInput(f"{path}: {error}") from error
    return checked_site(site, source=str(path))


def checked_site(site: Site, *, source: str) -> Site:
    """The site, if it can be simulated.

    Raises:
        BadInput, UnknownName: as `read_site`.
    """
    checked_name(site.name, what=f"site name in {source}")
    if not site.plots:
        raise BadInput(f"{source}: a site needs at least one [[plots]] section")
    for number, plot in enumerate(site.plots, 1):
        _check_plot(plot, f"{source}, plot {number}")
    for code, weight in site.faults.items():
        known(code, RANCH_CODES, what=f"fault in {source}")
        _within(weight, 0, 1000, f"{source}: faults.{code}")
    if not any(site.faults.values()):
        raise BadInput(f"{source}: [faults] gives no cause a weight above 0")
    for name in Share.__struct_fields__:
        _within(getattr(site.share, name), 0, 1, f"{source}: share.{name}")
    for language, phrases in site.words.items():
        known(language, LANGUAGES, what=f"language of [words] in {source}")
        for concept, said in phrases.items():
            known(concept, (*CONCEPTS, *BENIGN), what=f"note concept in {source}")
            if not said or any(not phrase.strip() or len(phrase) > 60 or "\n" in phrase for phrase in said):
                raise BadInput(f"{source}: words.{language}.{concept} needs phrases of 1 to 60 characters on one line")
    return site


def _known_keys(value: dict[str, Any], path: Path) -> None:
    """Refuse unknown keys with a suggestion; msgspec alone would only name them."""
    for key in value:
        known(key, Site.__struct_fields__, what=f"key in {path}")
    share, plots = value.get("share", {}), value.get("plots", [])
    for key in share if isinstance(share, dict) else ():
        known(key, Share.__struct_fields__, what=f"key of [share] in {path}")
    for plot in plots if isinstance(plots, list) else ():
        for key in plot if isinstance(plot, dict) else ():
            known(key, Plot.__struct_fields__, what=f"key of [[plots]] in {path}")


def _check_plot(plot: Plot, where: str) -> None:
    known(plot.weather, WEATHER, what=f"weather ({where})")
    known(plot.soil, SOILS, what=f"soil ({where})")
    known(plot.crop, CROPS, what=f"crop ({where})")
    month, _, day = plot.planting.partition("/")
    if not (len(plot.planting) == 5 and month.isdigit() and day.isdigit() and 1 <= int(month) <= 12 and 1 <= int(day) <= 28):
        raise BadInput(f"{where}: planting {plot.planting!r} is not MM/DD with a day from 01 to 28")
    first, last = WEATHER[plot.weather]
    if not first <= plot.first_year <= plot.last_year <= last:
        raise BadInput(f"{where}: years {plot.first_year} to {plot.last_year} are not within {plot.weather}'s {first} to {last}")
    _within(plot.last_year - plot.first_year + 1, *YEARS, f"{where}: number of years")
    for name, low, high in (
        ("latitude", -60, 60), ("area_m2", 50, 1e6), ("tank_l", 0, 1e7), ("refill_lpd", 0, 1e7), ("pump_lpm", 1, 1e4), ("panel_w", 1, 1000),
        ("battery_ah", 1, 1000), ("distance_km", 0.05, 15), ("chill", -15, 15),
    ):  # fmt: skip
        _within(getattr(plot, name), low, high, f"{where}: {name}")


def _within(value: float, low: float, high: float, what: str) -> None:
    if not low <= value <= high:
        raise BadInput(f"{what} is {value:g}, it must be from {low:g} to {high:g}")
