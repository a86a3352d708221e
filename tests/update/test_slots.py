import threading

import pytest

from node.update.slots import Slots
from protocol.errors import BadInput


@pytest.fixture
def slots(tmp_path, coordinator):
    """Slots with release 1 confirmed; releases 2 and 3 whole on disk."""
    made = Slots(tmp_path / "node")
    made.releases = {}
    for number in (1, 2, 3):
        release, paths = coordinator.describe(number, model=number)
        for path in paths.values():
            made.blobs.put_file(path)
        made.releases[number] = release
    made.activate(made.releases[1])
    made.confirm()
    return made


def test_a_node_that_never_had_a_release_starts_without_one(tmp_path):
    assert Slots(tmp_path).starting() is None


def test_three_starts_without_a_confirm_go_back(slots):
    slots.activate(slots.releases[2])

    assert [slots.starting().number for _ in range(4)] == [2, 2, 2, 1]
    assert slots.confirmed() and slots.failures()[0].number == 2
    assert "never confirmed" in slots.failures()[0].reason


def test_a_confirmed_release_may_start_any_number_of_times(slots):
    assert {slots.starting().number for _ in range(10)} == {1}


def test_a_release_on_probation_never_becomes_the_one_to_go_back_to(slots):
    slots.activate(slots.releases[2])
    slots.activate(slots.releases[3])

    assert slots.go_back("gibberish").number == 1


def test_an_incomplete_release_does_not_go_live(slots, coordinator):
    release, _ = coordinator.describe(4, model=4)

    with pytest.raises(BadInput, match="not complete"):
        slots.activate(release)
    assert slots.active().number == 1


def test_going_back_with_nothing_before_leaves_no_model(tmp_path, slots):
    slots.blobs.root.rename(tmp_path / "fresh-blobs")
    fresh = Slots(tmp_path / "fresh")
    (tmp_path / "fresh" / "blobs").rmdir()
    (tmp_path / "fresh-blobs").rename(tmp_path / "fresh" / "blobs")
    fresh.activate(slots.releases[2])

    assert fresh.go_back("gibberish") is None
    assert fresh.starting() is None


def test_a_lost_file_falls_back_to_the_previous_release_without_blaming(slots):
    slots.activate(slots.releases[2])
    slots.confirm()
    slots.active().model.unlink()

    assert slots.starting().number == 1
    assert slots.failures() == ()


def test_a_damaged_pointer_is_set_aside_and_the_node_starts(slots):
    path = slots.folder / "pointer.json"
    path.write_bytes(b"\0" * 100)

    assert slots.starting() is None
    assert path.with_suffix(".bad").is_file()


def test_a_lost_model_is_fetched_again(coordinator, site):
    coordinator.publish(1)
    node = site()
    node.check()
    node.slots.active().model.unlink()

    assert node.check().state == "activated"
    assert node.slots.active().model.is_file()


def test_a_release_that_fails_its_known_answers_is_refused_and_not_tried_again(coordinator, site):
    from node.update.selftest import known_answers_hold

    coordinator.publish(1)
    node = site()
    node.check()
    tries = []

    def gibberish(candidate):
        tries.append(candidate.number)
        known_answers_hold(lambda prompt: "xx", candidate.release)

    coordinator.publish(2, model=2)
    bad = site(self_test=gibberish)
    states = [bad.check().state for _ in range(3)]

    assert states == ["refused"] * 3 and tries == [2]
    assert bad.number == 1 and bad.kinds() == ["release-refused"]
    assert "known answer 1" in bad.events[0][2]["reason"]


def test_a_release_after_a_failed_one_is_tried(coordinator, site):
    coordinator.publish(1)
    site().check()
    coordinator.publish(2, model=2)
    bad = site(self_test=lambda candidate: (_ for _ in ()).throw(RuntimeError("no")) if candidate.number == 2 else None)
    bad.check()
    coordinator.publish(3, model=3)

    assert bad.check().state == "activated"
    assert bad.number == 3 and bad.slots.previous().number == 1


def test_a_release_that_does_not_load_live_goes_back_at_once(coordinator, site):
    coordinator.publish(1)
    site().check()
    coordinator.publish(2, model=2)
    live = []

    def activate(release):
        live.append(release.number)
        if release.number == 2:
            raise MemoryError("no room")

    node = site(activate=activate)
    outcome = node.check()

    assert (outcome.state, outcome.number, live) == ("refused", 1, [2, 1])
    assert "MemoryError" in outcome.reason


def test_a_self_test_past_its_deadline_is_refused(coordinator, site):
    coordinator.publish(1)
    never = threading.Event()
    node = site(self_test=lambda candidate: never.wait(60), self_test_deadline_s=0.05)

    outcome = node.check()
    never.set()

    assert outcome.state == "refused" and "not done within" in outcome.reason


def test_an_operator_may_have_a_failed_release_tried_again(coordinator, site):
    coordinator.publish(1)
    broken = [True]

    def self_test(candidate):
        if broken[0]:
            raise RuntimeError("no")

    node = site(self_test=self_test)
    node.check()
    broken[0] = False
    node.slots.forgive(1)

    assert node.check().state == "activated"
