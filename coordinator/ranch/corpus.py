"""Records of a site and split: seeded, deterministic, and never the same text in two splits.

Splits are apart twice over. In time: train has a plot's first years, dev the last but one, test the last. By text: the digest of a record's
source decides which split it may belong to, so two different days that print alike cannot meet across splits, sites or seeds either.
"""

from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from coordinator.ranch import notes, wording
from coordinator.ranch.scenarios import DAYS, SCENARIOS, Rng, Scenario
from coordinator.ranch.season import Season, season
from coordinator.ranch.sites import Plot, Site
from coordinator.ranch.window import simulate
from protocol.digests import digest_bytes, digest_value
from protocol.errors import BadInput
from protocol.names import known
from protocol.tasks import RANCH, Record

SPLITS = ("train", "dev", "test")
COUNT_LIMIT = 200_000  # records of one call
TRIES = 400  # draws for one record before the site is found too small
SECOND_CLAUSE = 0.35  # share of telling notes that also speak of something else
PLAIN_NORMAL = 0.4  # share of normal records without anything to explain

Pools = dict[str, np.ndarray[Any, np.dtype[np.int64]]]


def generate(
    site: Site, *, seed: int, count: int, split: str = "train", cache: Path | None = None, progress: Callable[[int], None] | None = None
) -> list[Record]:
    """Records of the ranch task. The same arguments give the same records; a larger `count` continues a smaller one.

    Args:
        cache: folder for the seasons; $MILPA_CACHE or ~/.cache/milpa without it. The first call simulates them: 0.7 s a plot and year.
        progress: called with the number of records so far.

    Raises:
        BadInput: count out of range, or the site's days never show one of its faults (the message names it).
        UnknownName: no such split.
    """
    known(split, SPLITS, what="split")
    if not 1 <= count <= COUNT_LIMIT:
        raise BadInput(f"count is {count}, it must be from 1 to {COUNT_LIMIT}")
    records: list[Record] = []
    for record in _records(site, seed=seed, split=split, cache=cache):
        records.append(record)
        if progress is not None:
            progress(len(records))
        if len(records) == count:
            break
    return records


def _records(site: Site, *, seed: int, split: str, cache: Path | None) -> Iterator[Record]:
    places = [(plot, days, pools(days, split)) for plot in site.plots for days in (season(plot, cache=cache),)]
    causes = [code for code, weight in site.faults.items() if weight > 0]
    chances = np.cumsum([site.faults[code] for code in causes])
    rng = np.random.default_rng(int(digest_value([site, seed, split])[:16], 16))
    seen: set[str] = set()
    while True:
        cause = causes[int(np.searchsorted(chances, rng.random() * chances[-1], side="right"))]
        for _ in range(TRIES):
            drawn = _draw(site, places, cause, rng)
            if drawn is None:
                continue
            text, record = drawn[0].source, drawn
            if text in seen or split_of(text) != split:
                continue
            seen.add(text)
            yield _named(record[0], site, split, seed, len(seen), record[1])
            break
        else:
            raise BadInput(
                f"site {site.name!r} shows too few different windows of {cause!r} in split {split!r} after {len(seen)} records: "
                f"ask for fewer, give it more plots or years, or set faults.{cause} to 0"
            )


def split_of(source: str) -> str:
    """The only split in which a record with this source may be."""
    return SPLITS[int(digest_bytes(source.encode())[:8], 16) % len(SPLITS)]


def _named(record: Record, site: Site, split: str, seed: int, number: int, day: int) -> Record:
    return msgspec.structs.replace(record, id=f"{site.name}-{split}-{seed}-{number}-{date.fromordinal(day).isoformat()}")


def _draw(site: Site, places: list[tuple[Plot, Season, Pools]], cause: str, rng: Rng) -> tuple[Record, int] | None:
    """One record of the cause, or None where this plot has no such days."""
    plot, days, found = places[int(rng.integers(len(places)))]
    scenario = _scenario(site, plot, cause, rng)
    if scenario is None:
        return None
    shape = scenario.shape(rng)
    starts = found[shape.pool]
    if not len(starts):
        return None
    window = simulate(plot, days, int(starts[int(rng.integers(len(starts)))]), shape, rng)
    lang = "es" if rng.random() < site.share.spanish else "en"
    note, told = _note(site, scenario, lang, rng)
    sentence = wording.sentence(cause, window, lang=lang, told=told)
    record = Record(
        id="", task=RANCH.name, source=wording.source(window, note), lang=lang, site=site.name, target=RANCH.render(cause, sentence),
        verdict=cause, numbers=window.numbers(),
    )  # fmt: skip
    return record, window.day


def _scenario(site: Site, plot: Plot, cause: str, rng: Rng) -> Scenario | None:
    vague = rng.random() > PLAIN_NORMAL if cause == "normal" else rng.random() < site.share.vague
    fitting = [s for s in SCENARIOS if s.cause == cause and (plot.tank_l or not s.tank)]
    wanted = [s for s in fitting if s.vague == vague] or fitting
    return wanted[int(rng.integers(len(wanted)))] if wanted else None


def _note(site: Site, scenario: Scenario, lang: str, rng: Rng) -> tuple[str, bool]:
    """The worker's note ("" for none), and whether it names the cause."""
    share, kind = site.share, rng.random()
    told = False
    if scenario.vague:
        if rng.random() < share.telling:
            note, told = notes.telling(scenario.concept, lang=lang, words=site.words, local=share.local, rng=rng), True
        else:
            note = notes.symptom(scenario.part, lang=lang, rng=rng) if kind < 0.5 else ""
    elif rng.random() >= share.notes:
        note = ""
    elif scenario.concept and kind < 0.15:
        note, told = notes.telling(scenario.concept, lang=lang, words=site.words, local=share.local, rng=rng), True
    elif scenario.part and kind < 0.4:
        note = notes.symptom(scenario.part, lang=lang, rng=rng)
    elif kind < 0.6:
        note = notes.chatter(lang=lang, rng=rng)
    else:
        note = _stray(site, scenario, lang, rng)
    if told and rng.random() < SECOND_CLAUSE:
        more = notes.chatter(lang=lang, rng=rng) if rng.random() < 0.4 else _stray(site, scenario, lang, rng)
        note = f"{note}, {more}" if rng.random() < 0.5 else f"{more}, {note}"
    if note and rng.random() < share.typos:
        note = notes.slip(note, rng)
    return note, told


def _stray(site: Site, scenario: Scenario, lang: str, rng: Rng) -> str:
    """A phrase about another part of the plant: benign as it is, a fault as a worry or (beside a fault) as a fact that is not the cause."""
    others = [other for other in SCENARIOS if other.concept and other.part != scenario.part]
    other = others[int(rng.integers(len(others)))]
    phrase = notes.telling(other.concept, lang=lang, words=site.words, local=site.share.local, rng=rng)
    worry = other.cause != "normal" and (not scenario.part or rng.random() < 0.5)
    return notes.doubt(phrase, lang=lang) if worry else phrase


def pools(days: Season, split: str) -> Pools:
    """Kind of days -> starts of windows that lie wholly in the split's years and have soil water on every day."""
    years = np.array([date.fromordinal(int(day)).year for day in days.day])
    last = years.max()
    wanted = {"train": years < last - 1, "dev": years == last - 1, "test": years == last}[split]
    usable = wanted & (days.theta > 0) & (days.theta_dry > 0)
    starts = np.flatnonzero(_all(usable))
    irrigated, rain = days.irrigation > 0, days.rain
    wilting, capacity, _ = days.soil
    dry = (days.theta_dry - wilting) / (capacity - wilting)
    rainless, cold = _all(rain < 0.2), -_most(-days.cold)
    kinds = {
        "any": np.ones(len(starts), bool),
        "irrigated": (_sum(irrigated) >= 2)[starts] & irrigated[starts + DAYS - 1],
        "idle": (_sum(irrigated) == 0)[starts],
        "rainless": rainless[starts],
        "rainy": (_most(rain) >= 8)[starts] & (rain < 8)[starts + DAYS - 1],
        "thirsty": (rainless & _all(days.crop > 0.3) & _all(dry < 0.45))[starts],
        "parched": (rainless & _all(days.crop > 0.3) & _all(dry < 0.3) & (_most(days.thirst) > 0.15))[starts],
        "fallow": (rainless & _all(days.crop < 0.1) & _all(dry < 0.45))[starts],
        "cool": (rainless & (cold <= max(9.0, np.quantile(days.cold, 0.15))))[starts],
        "mild": (rainless & (cold > 8))[starts],
        "freezing": (cold <= 0.5)[starts],
    }
    return {kind: starts[chosen] for kind, chosen in kinds.items()}


def _all(flags: Any) -> Any:
    """Whether each of the DAYS days from here has the flag; False where the series ends before."""
    return _sum(flags) == DAYS


def _sum(values: Any) -> Any:
    total = np.zeros(len(values))
    for shift in range(DAYS):
        total[: len(values) - shift] += values[shift:]
    total[len(values) - DAYS + 1 :] = -1
    return total


def _most(values: Any) -> Any:
    most = np.full(len(values), -np.inf)
    for shift in range(DAYS):
        most[: len(values) - shift] = np.maximum(most[: len(values) - shift], values[shift:])
    return most
