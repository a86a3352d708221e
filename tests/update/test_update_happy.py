import pytest

from node.update.selftest import known_answers_hold
from protocol.errors import DoesNotFit
from protocol.releases import KnownAnswer


def test_a_new_release_is_fetched_tested_switched_and_confirmed(coordinator, site):
    coordinator.publish(1)
    node = site()

    outcome = node.check()

    assert (outcome.state, outcome.number) == ("activated", 1)
    assert node.tested == [1] and node.live == [1]
    assert node.slots.confirmed() and node.slots.active().model.is_file()
    assert node.kinds() == ["release-activated"]


def test_nothing_new_costs_two_small_requests_and_changes_nothing(coordinator, site):
    coordinator.publish(1)
    node = site()
    node.check()

    outcome = node.check()

    assert outcome.state == "current"
    assert outcome.fetched < 2_000
    assert node.live == [1]


def test_an_empty_store_is_no_error(site):
    assert site().check().state == "current"


def test_an_adapter_only_release_fetches_no_model_again(coordinator, site):
    coordinator.publish(1, size=400_000)
    node = site()
    node.check()
    coordinator.publish(2, adapter=7, size=400_000)

    outcome = node.check()

    assert outcome.state == "activated"
    assert outcome.fetched < 20_000
    assert node.slots.active().adapter is not None and node.slots.active().calibration is not None
    assert node.slots.previous().number == 1


def test_a_node_starts_with_its_release_and_no_network(coordinator, site):
    coordinator.publish(1)
    site().check()

    node = site(url="http://127.0.0.1:9/repository")

    assert node.slots.starting().number == 1
    assert node.check().state == "waiting"
    assert node.number == 1


def test_a_teacher_node_takes_the_teachers_file_only(coordinator, site, tmp_path):
    from coordinator.fleet.publishing import build_release

    student, teacher = tmp_path / "student.gguf", tmp_path / "teacher.gguf"
    student.write_bytes(b"s" * 100_000)
    teacher.write_bytes(b"t" * 5_000)
    release, paths = build_release(1, "ranch", [("student", "model", student, ""), ("teacher", "model", teacher, "")], min_memory_mb=900)
    coordinator.publisher.publish(release, paths)

    peer = site(role="teacher")
    outcome = peer.check()

    assert outcome.state == "activated" and outcome.fetched < 20_000
    assert peer.slots.active().model.read_bytes() == b"t" * 5_000


def test_going_back_is_a_higher_number_that_names_old_files(coordinator, site):
    coordinator.publish(1, model=1)
    node = site()
    node.check()
    first = node.slots.active().model
    coordinator.publish(2, model=2)
    node.check()
    coordinator.publish(3, model=1)

    outcome = node.check()

    assert (outcome.state, outcome.number) == ("activated", 3)
    assert node.slots.active().model == first and outcome.fetched < 20_000


def test_files_that_no_slot_names_are_deleted(coordinator, site):
    node = site()
    for number in (1, 2, 3):
        coordinator.publish(number, model=number)
        node.check()

    assert len(list(node.slots.blobs.root.glob("??/*"))) == 2


def test_a_second_check_meanwhile_is_told_busy(coordinator, site):
    coordinator.publish(1)
    states = []
    node = site(self_test=lambda candidate: states.append(node.check().state))

    node.check()

    assert states == ["busy"]


def test_known_answers_name_the_one_that_changed(coordinator):
    release, _ = coordinator.describe(1)
    known_answers_hold(lambda prompt: release.known_answers[0].text, release)

    with pytest.raises(DoesNotFit, match="known answer 1 of 1 of release 1"):
        known_answers_hold(lambda prompt: "normal: todo bien", release)


def test_known_answers_are_the_students_and_not_asked_of_a_teacher(coordinator):
    release, _ = coordinator.describe(1)
    assert isinstance(release.known_answers[0], KnownAnswer)

    known_answers_hold(lambda prompt: "something else", release, role="teacher")


def test_files_wait_for_sun_and_metadata_does_not(coordinator, site):
    coordinator.publish(1)
    why, took = ["no sun"], []
    node = site(wait_for=lambda: why[0], received=took.append)

    waiting = node.check()
    why[0] = ""
    activated = node.check()

    assert (waiting.state, "no sun" in waiting.reason) == ("waiting", True)
    assert 0 < waiting.fetched < 10_000 and not node.tested[1:]
    assert activated.state == "activated" and sum(took) > 0
