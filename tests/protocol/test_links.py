"""protocol/links.py: what may travel, what may be spent, and when a day is over."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import UnknownName
from protocol.links import BELIEVED_FROM, DAY_S, LEAVES, LINKS, Day, Reading, advanced, link, may_spend, may_travel, passed

NOW = BELIEVED_FROM + 30 * DAY_S


def reading(uptime: float, wall: float = NOW, boot: str = "b1") -> Reading:
    return Reading(boot, uptime, wall)


def test_a_lan_link_carries_everything_without_a_limit_and_a_lora_link_only_small_words():
    assert may_spend(link("lan"), 10**12, 10**9, "bulk").ok
    assert {what for what in LEAVES if may_travel(link("lora"), what).ok} == {"status", "reply", "question"}
    assert not may_travel(link("cellular"), "bulk").ok


def test_an_unknown_class_is_refused_with_the_known_ones():
    with pytest.raises(UnknownName, match="did you mean 'cellular'"):
        link("celular")


def test_the_operators_own_limit_stands_before_the_classs():
    assert link("cellular", bytes_a_day=500_000).bytes_a_day == 500_000
    assert link("cellular").bytes_a_day == LINKS["cellular"].bytes_a_day


@given(st.integers(0, 20_000_000), st.integers(0, 1_000_000))
def test_what_matters_less_is_never_allowed_where_what_matters_more_is_not(spent: int, cost: int):
    rules = link("cellular")
    allowed = [may_spend(rules, spent, cost, what).ok for what in LEAVES if what in rules.travels]

    assert allowed == sorted(allowed, reverse=True)


@given(st.sampled_from(["cellular", "lora"]), st.lists(st.tuples(st.integers(1, 5_000), st.sampled_from(sorted(LEAVES))), max_size=60))
def test_whatever_is_asked_for_the_days_bytes_are_never_exceeded(name: str, wishes: list):
    rules, spent = link(name), 0
    for cost, what in wishes * 20:
        if may_spend(rules, spent, cost, what).ok:
            spent += cost

    assert spent <= rules.bytes_a_day


def test_a_refusal_says_what_is_spent_and_what_is_kept_for_others():
    verdict = may_spend(link("cellular", bytes_a_day=1_000), 900, 60, "event")

    assert verdict.reason == "900 of today's 1000 bytes are spent, 150 are kept for what matters more; 60 more for event wait for tomorrow"


@pytest.mark.parametrize("jump", [-56 * 365 * DAY_S, -3_600.0, 3_600.0, 56 * 365 * DAY_S])
def test_within_a_boot_a_wall_clock_that_jumps_changes_nothing(jump: float):
    assert passed(reading(100.0), reading(160.0, NOW + jump)) == 60.0


def test_over_a_boot_a_believed_wall_clock_counts_the_time_off():
    assert passed(reading(9_000.0), reading(30.0, NOW + 3_600.0, "b2")) == 3_600.0


@pytest.mark.parametrize(("before", "after"), [(NOW, 40.0), (40.0, NOW), (40.0, 30.0)])
def test_over_a_boot_without_a_believed_clock_only_the_time_since_the_boot_counts(before: float, after: float):
    assert passed(reading(9_000.0, before), reading(30.0, after, "b2")) == 30.0


def test_a_day_is_over_after_24_hours_that_passed_and_the_next_begins_empty():
    day = Day(700, 300, 0.0, reading(0.0))

    before = advanced(day, reading(DAY_S - 1))
    after = advanced(before, reading(DAY_S + 5))

    assert (before.spent, after.spent, after.elapsed) == (1_000, 0, 5.0)


@given(st.lists(st.tuples(st.floats(0, 3_600), st.floats(-1e9, 3e9), st.booleans()), max_size=40))
def test_no_sequence_of_clock_jumps_and_reboots_without_a_believed_clock_makes_a_day_shorter(steps: list):
    """uptime moves as it does; the wall clock says anything that is not believed; reboots happen."""
    day, uptime, boot, real = Day(1, 0, 0.0, reading(0.0, 0.0)), 0.0, 0, 0.0
    for moved, wall, reboot in steps:
        real += moved
        uptime = moved if reboot else uptime + moved
        boot += reboot
        day = advanced(day, Reading(f"b{boot}", uptime, min(wall, BELIEVED_FROM - 1)))

    assert day.spent == 1 or real >= DAY_S - 1e-6
