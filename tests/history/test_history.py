"""A minute of random histories; and the rules themselves, on histories that break them."""

import os

import pytest

from deploy.broker import find_mosquitto
from tests.history.machine import history
from tests.history.rules import Change, Given, History, wrong

SEEDS, STEPS = (4770, 17648), 12  # each holds all of KINDS and kills peer and broker too; see `python -m tests.history.machine --paper`
KINDS = ("partition", "heal", "kill esteli", "clock of esteli", "release ", "revoke")  # beginnings of lines of `World.log`

GOOD = History(
    given=[Given("a", "soil 1", 1, "m1"), Given("b", "soil 2", 2, "m2"), Given("c", "soil 2", 0, "", "b")], silent=[],
    corrected={"b": "leak"},
    changes=[
        Change("a", 1, "provisional", ""), Change("b", 2, "provisional", ""), Change("a", 3, "upgraded", "peer:base"),
        Change("b", 4, "corrected", "operator"),
    ],
    stored={"a": "soil 1", "b": "soil 2", "c": "soil 2"}, verdicts={"a": "normal", "b": "leak"},
    events=[("e1", "upgraded")], signed={"m1", "m2"},
)  # fmt: skip


@pytest.mark.broker
@pytest.mark.llama
@pytest.mark.fleet
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", SEEDS)
def test_no_history_loses_an_answer_applies_one_twice_or_keeps_a_site_waiting(seed: int) -> None:
    if find_mosquitto() is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("mosquitto is not installed: apt install mosquitto")

    told = history(seed, steps=STEPS)

    assert "answers" in told.held
    assert [kind for kind in KINDS if not any(line.startswith(kind) for line in told.log)] == []
    assert told.log.index("partition") < told.log.index("heal")  # and something was cut when it healed


def test_a_history_without_a_fault_is_not_complained_of() -> None:
    assert wrong(GOOD) == []


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ({"silent": ["soil 9: 503"]}, "silence"),
        ({"stored": {"a": "soil 1", "c": "soil 2"}}, "lost: answer b"),
        ({"stored": {"a": "soil 2", "b": "soil 2", "c": "soil 2"}}, "lost: answer a"),
        ({"verdicts": {"a": "normal", "b": "normal"}}, "lost: the operator's 'leak'"),
        ({"events": []}, "lost: 1 replies upgraded"),
        ({"events": [("e1", "upgraded"), ("e2", "upgraded")]}, "twice: 1 replies upgraded"),
        ({"changes": [*GOOD.changes, Change("a", 5, "confirmed", "peer:base")]}, "twice: 2 replies changed a"),
        ({"changes": [*GOOD.changes, Change("b", 5, "unconfirmed", "")]}, "order: the clock changed b after the operator"),
        ({"changes": [*GOOD.changes, Change("a", 4, "corrected", "operator")]}, "order: change 4"),
        ({"given": GOOD.given[::-1]}, "order: release 1 answered after 2"),
        ({"signed": {"m1"}}, "unverified: b"),
        ({"given": [*GOOD.given, Given("c", "soil 2", 0, "")]}, "unverified: c was answered by"),
        ({"given": [*GOOD.given, Given("c", "soil 2", 0, "", "x")]}, "unverified: c was remembered from x"),
    ],
)  # fmt: skip
def test_each_rule_sees_its_fault(broken: dict[str, object], says: str) -> None:
    found = wrong(GOOD._replace(**broken))  # type: ignore[arg-type]

    assert any(line.startswith(says) for line in found), found
