"""Days of soil water, rain, crop and sun on a plot. The physics is AquaCrop's and pvlib's; nothing here is ours but the bookkeeping.

AquaCrop (FAO; aquacrop 3.1) runs the plot's years twice: irrigated to a soil-water target, and rainfed. pvlib gives the clear day's sun on
the panel (Haurwitz) and its DC energy (PVWatts); clouds come from the day's temperature range (Hargreaves and Samani 1985).
A season takes about 0.7 s a year and is kept on disk under the digest of its inputs.
"""

import io
import os
import warnings
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np

from coordinator.ranch.sites import Plot
from protocol.blobs import write_atomically
from protocol.digests import digest_value

SEASON_VERSION = 1  # raise it when the arrays below change their meaning
SOIL_TARGET = 85  # percent of available water at which irrigation starts
DAILY_MM = 5.0  # most irrigation a day: drip lines run nearly daily, a little

PHYSICAL = ("weather", "latitude", "soil", "crop", "planting", "first_year", "last_year", "chill")  # what of a plot a season depends on

Days = np.ndarray[Any, np.dtype[np.float64]]


class Season(NamedTuple):
    """Arrays over the plot's days, oldest first."""

    day: Days  # proleptic ordinal
    rain: Days  # mm
    cold: Days  # lowest temperature, degrees C
    theta: Days  # soil water at 10-30 cm of the irrigated plot, m3/m3; 0 where AquaCrop gives none
    theta_dry: Days  # the same, rainfed
    irrigation: Days  # mm commanded on the irrigated plot
    thirst: Days  # 1 - transpiration / potential on the rainfed plot, where a crop stands
    crop: Days  # potential transpiration on the rainfed plot, mm; near 0: no crop
    clear_wh: Days  # DC energy of the clean panel under a clear sky, Wh for each W of panel
    clouds: Days  # share of the clear sky's energy that arrives, in [0, 1]
    soil: Days  # (3,): wilting point, field capacity, saturation, m3/m3


def cache_folder() -> Path:
    """Where seasons are kept: $MILPA_CACHE, else ~/.cache/milpa."""
    return Path(os.environ.get("MILPA_CACHE") or Path.home() / ".cache" / "milpa")


_seasons: dict[str, Season] = {}  # this process's; a season is about 100 kB


def season(plot: Plot, *, cache: Path | None = None) -> Season:
    """The plot's days, from memory, from the cache folder, or simulated now (0.7 s a year).

    A cache file that does not load is simulated again: it was cut short or is of an older version.
    """
    physical = {name: getattr(plot, name) for name in PHYSICAL}
    key = digest_value({"version": SEASON_VERSION, "aquacrop": version("aquacrop"), "pvlib": version("pvlib"), **physical})
    if key in _seasons:
        return _seasons[key]
    path = (cache or cache_folder()) / "ranch" / f"{key[:32]}.npz"
    found = _load(path)
    if found is None:
        found = _simulate(plot)
        _save(found, path)
    return _seasons.setdefault(key, found)


def _load(path: Path) -> Season | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            return Season(**{name: file[name] for name in Season._fields})
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None


def _save(value: Season, path: Path) -> None:
    data = io.BytesIO()
    np.savez(data, **value._asdict())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data.getvalue())


def _simulate(plot: Plot) -> Season:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pandas and numpy deprecations inside aquacrop
        weather = _weather(plot)
        flux, theta, soil = _water(plot, weather, irrigated=True)
        dry_flux, theta_dry, _ = _water(plot, weather, irrigated=False)
        clear = _clear_sky(plot.latitude)
    days = np.array([moment.toordinal() for moment in weather["Date"]], dtype=np.float64)
    of_year = np.array([date.fromordinal(int(day)).timetuple().tm_yday - 1 for day in days])
    low, high = weather["MinTemp"].to_numpy(float), weather["MaxTemp"].to_numpy(float)
    # Hargreaves and Samani: the share of extraterrestrial radiation is 0.17 sqrt(Tmax - Tmin); a clear sky passes about 0.75 of it
    clouds = np.clip(0.17 * np.sqrt(np.maximum(high - low, 0.0)) / 0.75, 0.1, 1.0)
    potential = dry_flux["TrPot"].to_numpy(float)
    thirst = np.where(potential > 0.3, 1 - dry_flux["Tr"].to_numpy(float) / np.maximum(potential, 0.3), 0.0)
    return Season(
        day=days, rain=weather["Precipitation"].to_numpy(float), cold=low + plot.chill, theta=theta, theta_dry=theta_dry,
        irrigation=flux["IrrDay"].to_numpy(float), thirst=thirst, crop=potential, clear_wh=clear[of_year], clouds=clouds, soil=soil,
    )  # fmt: skip


def _weather(plot: Plot) -> Any:
    # from their own modules: the package offers them only when no "-m" is among the program's arguments
    from aquacrop.utils.data import get_filepath
    from aquacrop.utils.prepare_weather import prepare_weather

    frame = prepare_weather(get_filepath(f"{plot.weather}_climate.txt"))
    years = frame["Date"].dt.year
    return frame[(years >= plot.first_year) & (years <= plot.last_year)].reset_index(drop=True)


def _water(plot: Plot, weather: Any, *, irrigated: bool) -> tuple[Any, Days, Days]:
    """AquaCrop over all the plot's years: daily fluxes, soil water at 10-30 cm, and the soil's three marks there."""
    from aquacrop.core import AquaCropModel
    from aquacrop.entities.crop import Crop
    from aquacrop.entities.inititalWaterContent import InitialWaterContent
    from aquacrop.entities.irrigationManagement import IrrigationManagement
    from aquacrop.entities.soil import Soil

    model = AquaCropModel(
        f"{plot.first_year}/01/01", f"{plot.last_year}/12/31", weather, Soil(plot.soil), Crop(plot.crop, planting_date=plot.planting),
        InitialWaterContent(value=["FC"]),
        irrigation_management=IrrigationManagement(1, SMT=[SOIL_TARGET] * 4, MaxIrr=DAILY_MM) if irrigated else None,
        off_season=True,
    )  # fmt: skip
    model.run_model(till_termination=True)
    flux, storage, profile = model.get_water_flux(), model.get_water_storage(), model.soil.profile
    theta = (storage["th2"].to_numpy(float) + storage["th3"].to_numpy(float)) / 2
    return flux, theta, np.array([float(profile[name].iloc[1]) for name in ("th_wp", "th_fc", "th_s")])


def _clear_sky(latitude: float) -> Days:
    """(366,): DC energy of a clean panel on a clear day, Wh for each W of panel; tilted by its latitude towards the equator."""
    import pandas as pd
    import pvlib

    hours = pd.date_range("2000-01-01", "2000-12-31 23:00", freq="h", tz="UTC")
    sun = pvlib.solarposition.get_solarposition(hours, latitude, 0.0)
    ghi = pvlib.clearsky.haurwitz(sun["apparent_zenith"])["ghi"]
    parts = pvlib.irradiance.erbs(ghi, sun["zenith"], hours)
    plane = pvlib.irradiance.get_total_irradiance(
        abs(latitude), 180 if latitude >= 0 else 0, sun["apparent_zenith"], sun["azimuth"], parts["dni"], ghi, parts["dhi"]
    )
    watts = pvlib.pvsystem.pvwatts_dc(plane["poa_global"].fillna(0.0), 45.0, 1.0, -0.004)
    return watts.to_numpy(float).reshape(366, 24).sum(axis=1)
