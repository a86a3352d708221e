import pytest

from coordinator.ranch import generate, read_site
from coordinator.ranch.sites import SITE_FILE_LIMIT
from protocol.errors import BadInput, UnknownName

GOOD = """
name = "finca-alta"
about = "Terraces above the river."

[faults]
normal = 10
leak = 5

[words.es]
pipe = ["la manguera llora"]

[[plots]]
weather = "tunis"
latitude = 13.1
soil = "SandyLoam"
crop = "Tomato"
planting = "03/01"
first_year = 1984
last_year = 1986
area_m2 = 1500
tank_l = 16000
refill_lpd = 7000
pump_lpm = 35
panel_w = 20
battery_ah = 12
distance_km = 3.5
chill = -5.0
"""


@pytest.fixture
def described(tmp_path):
    """A site file with one passage replaced by another."""

    def describe(old: str = "", new: str = ""):
        assert old in GOOD
        path = tmp_path / "mine.toml"
        path.write_text(GOOD.replace(old, new) if old else GOOD)
        return path

    return describe


def test_a_site_the_repository_has_never_seen_is_simulated(described, cache, days):
    site = read_site(described())

    records = generate(site, seed=1, count=30, cache=cache)

    assert {record.site for record in records} == {"finca-alta"}
    assert {record.verdict for record in records} == {"normal", "leak"}


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("pump_lpm", "pump_lpn", "did you mean 'pump_lpm'"),
        ("[faults]", "[fautls]", "did you mean 'faults'"),
        ("leak = 5", "leek = 5", "did you mean 'leak'"),
        ('"SandyLoam"', '"SandLoam"', "did you mean 'SandyLoam'"),
        ('"tunis"', '"tunes"', "did you mean 'tunis'"),
        ('"Tomato"', '"tomato"', "did you mean 'Tomato'"),
        ("pipe =", "pip =", "did you mean 'pipe'"),
        ("[words.es]", "[words.se]", "language"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_one(described, old, new, told):
    with pytest.raises(UnknownName, match=told):
        read_site(described(old, new))


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("panel_w = 20\n", "", "panel_w"),
        ("panel_w = 20", 'panel_w = "big"', "panel_w"),
        ("latitude = 13.1", "latitude = 131", "latitude is 131, it must be from -60 to 60"),
        ("latitude = 13.1", "latitude = nan", "latitude is nan"),
        ("last_year = 1986", "last_year = 1984", "number of years is 1, it must be from 3 to 8"),
        ("last_year = 1986", "last_year = 2020", "not within tunis's 1979 to 2001"),
        ('"03/01"', '"3 March"', "not MM/DD"),
        ("normal = 10\nleak = 5", "normal = 0", "no cause a weight"),
        ("leak = 5", "leak = -5", "faults.leak is -5"),
        ('"finca-alta"', '"Finca Alta"', "not usable"),
        ('["la manguera llora"]', "[]", "words.es.pipe"),
        ("[[plots]]", "[plots]", "plots"),
        ("[faults]", "[faults", "not TOML"),
        ("normal = 10", f"normal = {'9' * 5_000}", "not TOML"),
        ("normal = 10", f"normal = {'[' * 5_000}", "not TOML"),
    ],
)
def test_a_value_that_cannot_be_simulated_is_refused_by_name(described, old, new, told):
    with pytest.raises(BadInput, match=told):
        read_site(described(old, new))


def test_a_missing_file_and_an_oversized_one_are_refused(tmp_path):
    big = tmp_path / "big.toml"
    big.write_bytes(b"#" * (SITE_FILE_LIMIT + 1))

    with pytest.raises(BadInput, match="cannot read the site file"):
        read_site(tmp_path / "none.toml")
    with pytest.raises(BadInput, match="not a site file"):
        read_site(big)
