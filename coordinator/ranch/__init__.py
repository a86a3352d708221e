"""The ranch: a seeded simulator of what a sensor node on a ranch sees, and what it means.

sites.py      a site: its plots, equipment, faults and words (TOML); the ones that ship, and a reader for yours
season.py     days of soil water, rain, crop and sun on a plot: AquaCrop and pvlib; computed once, kept on disk
scenarios.py  every cause as a few changes to a healthy plot, clear and vague
window.py     four days of one plot under one scenario: tank, pump, battery and radio on top of the season
notes.py      what the worker wrote, in the site's words
wording.py    window and note as compact text; the answer's sentence
corpus.py     records of a site and split
baselines.py  what needs no language model: majority, nearest neighbour, trees on the numbers
"""

from coordinator.ranch.baselines import baselines
from coordinator.ranch.corpus import generate
from coordinator.ranch.sites import SITES, Site, read_site, site_named

__all__ = ["SITES", "Site", "baselines", "generate", "read_site", "site_named"]
