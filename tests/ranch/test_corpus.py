import re
from datetime import date

import msgspec
import pytest

from coordinator.ranch import SITES, generate, site_named
from coordinator.ranch.corpus import SPLITS, pools, split_of
from coordinator.ranch.scenarios import SCENARIOS
from coordinator.ranch.wording import SENTENCES
from protocol.codec import decode_record, encode
from protocol.errors import BadInput, UnknownName
from protocol.tasks import LANGUAGES, RANCH, RANCH_CODES

WINDOW = re.compile(
    r"soil\d{4} rain\d{4} flow\d{4}(?: tank\d{4})? volt\d{4} open\d amp\d sun\d temp\d link\d\d(?:; [^\n;]+)?"
)  # the format in docs/ranch.md; models are trained on it


def test_the_same_seed_gives_the_same_records_and_another_seed_others(site, cache):
    first = generate(site, seed=1, count=60, cache=cache)
    again = generate(site, seed=1, count=60, cache=cache)
    other = generate(site, seed=2, count=60, cache=cache)

    assert first == again
    assert not {record.source for record in first} & {record.source for record in other if ";" in record.source}


def test_a_larger_count_continues_a_smaller_one(site, cache):
    few = generate(site, seed=3, count=20, cache=cache)
    more = generate(site, seed=3, count=50, cache=cache)

    assert more[:20] == few


def test_no_text_and_no_day_is_in_two_splits_whatever_the_seed(site, cache):
    made = {split: [r for seed in (1, 2) for r in generate(site, seed=seed, count=150, split=split, cache=cache)] for split in SPLITS}

    texts = [{record.source for record in made[split]} for split in SPLITS]
    years = [{record.id.split("-")[-3] for record in made[split]} for split in SPLITS]

    assert not (texts[0] & texts[1] or texts[0] & texts[2] or texts[1] & texts[2])
    assert [sorted(found) for found in years] == [["1984"], ["1985"], ["1986"]]


def test_a_windows_four_days_all_lie_in_its_splits_years(days):
    for split, year in zip(SPLITS, (1984, 1985, 1986), strict=True):
        starts = pools(days, split)["any"]

        assert {date.fromordinal(int(days.day[at + ahead])).year for at in starts for ahead in range(4)} == {year}


def test_a_text_belongs_to_one_split_by_its_digest(site, cache):
    records = generate(site, seed=4, count=40, split="dev", cache=cache)

    assert {split_of(record.source) for record in records} == {"dev"}


def test_every_record_keeps_the_documented_form(site, cache):
    records = generate(site, seed=5, count=200, cache=cache)

    assert [record.source for record in records if not WINDOW.fullmatch(record.source)] == []
    assert {len(record.numbers) for record in records} == {26}
    assert all(RANCH.parse(RANCH.target(record)).verdict == record.verdict for record in records)
    assert all(decode_record(encode(record)) == record for record in records)


def test_no_text_comes_twice_in_one_call(site, cache):
    records = generate(site, seed=6, count=300, cache=cache)

    assert len({record.source for record in records}) == len({record.id for record in records}) == 300


def test_every_figure_of_an_answer_can_be_read_in_its_window(site, cache):
    records = generate(site, seed=7, count=200, cache=cache)

    for record in records:
        window = record.source.partition(";")[0]
        assert set(re.findall(r"\d", record.target)) <= set(re.findall(r"\d", window)), record


def test_faults_come_in_the_shares_that_the_site_gives(site, cache):
    mixed = msgspec.structs.replace(site, faults={"leak": 3.0, "dry-run": 1.0, "normal": 0.0})

    records = generate(mixed, seed=8, count=400, cache=cache)

    found = [record.verdict for record in records]
    assert set(found) == {"leak", "dry-run"}
    assert 0.67 < found.count("leak") / len(found) < 0.83


def test_a_plot_without_a_tank_has_no_tank_channel_and_no_tank_faults(site, plot, cache):
    dry = msgspec.structs.replace(site, plots=(msgspec.structs.replace(plot, tank_l=0.0),), faults={"leak": 1.0, "normal": 1.0})

    records = generate(dry, seed=9, count=50, cache=cache)

    assert not any("tank" in record.source.partition(";")[0] for record in records)
    with pytest.raises(BadInput, match="overflow"):
        generate(msgspec.structs.replace(dry, faults={"overflow": 1.0}), seed=9, count=5, cache=cache)


def test_days_that_never_show_a_fault_are_told_by_its_name(site, plot, cache):
    warm = msgspec.structs.replace(
        site,
        plots=(msgspec.structs.replace(plot, chill=15.0),),
        faults={"cold-battery": 1.0},
        share=msgspec.structs.replace(site.share, vague=0.0),
    )

    with pytest.raises(BadInput, match=r"cold-battery.*set faults\.cold-battery to 0"):
        generate(warm, seed=1, count=5, cache=cache)


def test_the_sites_own_words_decide_there_and_are_unknown_to_the_general_site(site, cache):
    leaks = generate(msgspec.structs.replace(site, faults={"leak": 1.0}), seed=10, count=80, cache=cache)
    general = site_named("general")

    assert sum("culebra" in record.source for record in leaks) > 20
    assert general.words == {} and general.share.local == 0


@pytest.mark.parametrize(("count", "split", "error"), [(0, "train", BadInput), (10**9, "train", BadInput), (5, "tets", UnknownName)])
def test_an_unusable_count_or_split_is_refused(site, cache, count, split, error):
    with pytest.raises(error):
        generate(site, seed=1, count=count, split=split, cache=cache)


def test_every_verdict_has_scenarios_and_a_sentence_in_every_language():
    assert {scenario.cause for scenario in SCENARIOS} == set(SENTENCES) == set(RANCH_CODES)
    assert all(set(SENTENCES[code]) == set(LANGUAGES) for code in RANCH_CODES)


@pytest.mark.parametrize("name", SITES)
def test_the_sites_that_ship_are_whole_and_name_known_faults(name):
    site = site_named(name)

    assert site.name == name
    assert set(site.faults) <= set(RANCH_CODES) and site.faults["normal"] > 0


def test_no_class_of_the_general_site_is_rare_and_none_dominates():
    weights = site_named("general").faults
    whole = sum(weights.values())

    assert set(weights) == set(RANCH_CODES)
    assert min(weights.values()) / whole > 0.03 and max(weights.values()) / whole < 0.20


def test_held_out_sites_are_in_climates_that_the_general_site_never_saw():
    seen = {plot.weather for plot in site_named("general").plots}

    assert not seen & {plot.weather for name in ("platte", "brabante") for plot in site_named(name).plots}
