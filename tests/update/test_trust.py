import pytest
from tuf.api.metadata import Metadata, Snapshot

from coordinator.fleet.publishing import Publisher
from node.update.rules import BUILT_AT, Machine, Seen, checked_number, judged_time
from protocol.errors import BadInput, DoesNotFit, NumberAlreadySeen
from protocol.names import checked_digest
from tests.update.conftest import NOW

DAY = 86_400


@pytest.fixture
def node(coordinator, site):
    """A node that has release 1, with release 2 waiting in the store."""
    coordinator.publish(1, model=1)
    node = site()
    node.check()
    coordinator.publish(2, model=2)
    node.events.clear()
    return node


def refused(node, error, *, now=NOW):
    outcome = node.check(now)
    assert (outcome.state, outcome.error) == ("refused", error), outcome
    assert node.number == 1 and node.slots.active().model.is_file()
    return outcome


def test_an_altered_blob_is_thrown_away(coordinator, node):
    path = coordinator.publisher.blobs.path(coordinator.publisher.latest().file("student", "model").digest)
    data = bytearray(path.read_bytes())
    data[1234] ^= 1
    path.write_bytes(data)

    refused(node, "WrongDigest")

    assert not list(node.slots.blobs.root.glob("??/*.part"))
    assert node.slots.failures() == ()


def test_a_cut_blob_is_refused(coordinator, node):
    path = coordinator.publisher.blobs.path(coordinator.publisher.latest().file("student", "model").digest)
    path.write_bytes(path.read_bytes()[:-1])

    refused(node, "WrongDigest")


def test_a_longer_blob_is_refused_before_its_end(coordinator, node):
    path = coordinator.publisher.blobs.path(coordinator.publisher.latest().file("student", "model").digest)
    path.write_bytes(path.read_bytes() + b"x" * 5_000_000)

    assert refused(node, "WrongDigest").fetched < 200_000


def test_an_older_release_is_refused_even_when_its_signature_is_good(coordinator, node):
    node.check()
    publisher = coordinator.publisher
    state = publisher._read()
    for name in [name for name in state.targets.signed.targets if name == "releases/2.json"]:
        del state.targets.signed.targets[name]
    for role in (state.targets, state.snapshot, state.timestamp):
        role.signed.version += 1
    publisher._commit(state.targets.signed, state.snapshot.signed, state.timestamp.signed)

    outcome = node.check()

    assert (outcome.state, outcome.error, outcome.number) == ("refused", "NumberAlreadySeen", 2)
    assert "1 follows 2" in outcome.reason


def test_an_older_timestamp_is_refused(coordinator, node):
    timestamp = coordinator.publisher.metadata / "timestamp.json"
    old = timestamp.read_bytes()
    coordinator.publisher.refresh_timestamp()
    coordinator.publisher.refresh_timestamp()
    node.updater.trust.refresh(coordinator.url, NOW)
    timestamp.write_bytes(old)

    refused(node, "NumberAlreadySeen")


def test_a_frozen_repository_is_noticed_when_it_expires(node):
    refused(node, "ExpiredRelease", now=NOW + 31 * DAY)


def test_expiry_stops_updates_and_never_the_start(node):
    node.check(NOW + 31 * DAY)

    assert node.slots.starting().number == 1


def test_a_refresh_thaws_an_expired_repository(coordinator, node):
    node.check(NOW + 31 * DAY)
    coordinator.now += 31 * DAY
    coordinator.publisher.refresh_timestamp()

    assert node.check(NOW + 31 * DAY).state == "activated"


def test_a_key_nobody_knows_is_refused(coordinator, node, tmp_path):
    thief = Publisher(tmp_path / "thief", clock=lambda: NOW)
    thief.init()
    for _ in range(9):
        thief.refresh_timestamp()
    (coordinator.publisher.metadata / "timestamp.json").write_bytes((thief.metadata / "timestamp.json").read_bytes())

    refused(node, "TrustError")


def test_flipped_bytes_in_metadata_are_refused(coordinator, node):
    path = coordinator.publisher.metadata / "timestamp.json"
    path.write_bytes(path.read_bytes().replace(b'"version":3', b'"version":9'))

    refused(node, "TrustError")


def test_oversized_metadata_is_cut_off_at_its_limit(coordinator, node):
    path = coordinator.publisher.metadata / "timestamp.json"
    path.write_bytes(path.read_bytes() + b" " * 3_000_000)

    assert refused(node, "TooLarge").fetched < 300_000


def test_a_snapshot_of_another_state_is_refused(coordinator, node):
    metadata = coordinator.publisher.metadata
    (metadata / "3.snapshot.json").write_bytes((metadata / "2.snapshot.json").read_bytes())

    refused(node, "NumberAlreadySeen")


def test_another_roles_file_under_the_snapshots_name_is_refused(coordinator, node):
    metadata = coordinator.publisher.metadata
    (metadata / "3.snapshot.json").write_bytes((metadata / "3.targets.json").read_bytes())

    refused(node, "TrustError")


def test_a_snapshot_without_the_targets_role_is_refused(coordinator, node):
    publisher = coordinator.publisher
    state = publisher._read()
    snapshot = Snapshot(
        version=4, expires=state.snapshot.signed.expires, meta={"strangers.json": state.snapshot.signed.meta["targets.json"]}
    )
    state.timestamp.signed.version += 1
    publisher._write("4.snapshot.json", Metadata(snapshot), publisher._signer("snapshot"))
    publisher._commit(None, snapshot, state.timestamp.signed)

    refused(node, "TrustError")


def test_an_altered_manifest_is_refused(coordinator, node):
    path = next((coordinator.publisher.targets / "releases").glob("*.2.json"))
    path.write_bytes(path.read_bytes().replace(b'"ranch"', b'"Ranch"'))

    refused(node, "WrongDigest")


def test_a_release_for_more_memory_is_refused_before_any_file_is_fetched(coordinator, node):
    coordinator.publish(3, model=3, size=2_000_000, min_memory_mb=513)

    outcome = refused(node, "DoesNotFit")

    assert "513 MiB" in outcome.reason and outcome.fetched < 20_000


def test_a_release_for_another_task_is_refused(coordinator, site):
    coordinator.publish(1)

    outcome = site(task="translate-english-spanish").check()

    assert (outcome.state, outcome.error) == ("refused", "DoesNotFit")


def test_an_adapter_for_another_model_is_refused_at_publishing(coordinator):
    with pytest.raises(DoesNotFit, match="was made for model aaaa"):
        coordinator.describe(1, adapter=1, base=checked_digest("a" * 64))


def test_a_standing_refusal_is_told_once(coordinator, node):
    for _ in range(3):
        node.check(NOW + 31 * DAY)

    assert node.kinds() == ["release-refused"]
    assert node.events[0][2]["error"] == "ExpiredRelease"


def test_a_clock_in_1970_still_takes_a_fresh_release(node):
    assert node.check(0).state == "activated"


def test_a_clock_in_1970_refuses_what_expired_before_the_newest_signed_time(coordinator, node):
    coordinator.now = NOW + 90 * DAY
    coordinator.publisher.refresh_timestamp()
    node.updater.trust.refresh(coordinator.url, 0)
    coordinator.now = NOW
    coordinator.publisher.refresh_timestamp()

    refused(node, "ExpiredRelease", now=0)


def test_a_clock_that_ran_ahead_does_not_move_the_floor(coordinator, node):
    node.check(NOW + 3_000 * DAY)

    assert node.check(NOW).state == "activated"


def test_the_clock_floor_is_the_newest_signed_time():
    assert judged_time(0, BUILT_AT + 5) == BUILT_AT + 5
    assert judged_time(BUILT_AT + 9, BUILT_AT + 5) == BUILT_AT + 9


def test_one_number_has_one_content():
    checked_number(2, "a", Seen(number=2, digest="a"))
    with pytest.raises(NumberAlreadySeen, match="other content"):
        checked_number(2, "b", Seen(number=2, digest="a"))


def test_without_space_nothing_is_fetched(coordinator, node, monkeypatch):
    monkeypatch.setattr("protocol.blobs.shutil.disk_usage", lambda path: type("Usage", (), {"free": 64 << 20})())

    outcome = node.check()

    assert (outcome.state, outcome.error, outcome.number) == ("waiting", "NotEnough", 1)
    assert outcome.fetched < 20_000


def test_machine_is_the_smaller_of_memory_and_container_limit(tmp_path):
    from node.update.updater import this_machine

    (tmp_path / "meminfo").write_text("MemTotal:  2048000 kB\nMemFree: 1 kB\n")
    (tmp_path / "max").write_text("536870912\n")

    assert this_machine(tmp_path / "meminfo", tmp_path / "max") == Machine(memory_mb=512)
    assert this_machine(tmp_path / "meminfo", tmp_path / "none") == Machine(memory_mb=2000)


def test_an_unknown_release_is_named(coordinator):
    with pytest.raises(BadInput, match="no release 7"):
        coordinator.publisher.release(7)
