"""SIGKILL between any two steps. The processes are real; only the engine is not."""

import multiprocessing
import signal

import pytest

from coordinator.fleet.publishing import Publisher
from protocol.digests import digest_file
from tests.update import victims
from tests.update.conftest import NOW, make_file

UPDATE_STEPS = (
    "metadata", "manifest", "download-model", "download-adapter", "download-calibration", "downloaded", "journal-test", "self-test",
    "tested", "journal-switch", "switch", "switched", "activated", "confirmed", "told", "finished",
)  # fmt: skip
FAILED_TEST_STEPS = ("condemned", "finished")
FAILED_SWITCH_STEPS = ("switched", "went-back", "finished")
INIT_STEPS = ("key", "root", "targets", "snapshot", "timestamp", "done")
PUBLISH_STEPS = ("blob-model", "blob-adapter", "manifest", "targets", "snapshot", "timestamp", "done")

forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(["node.update.updater", "coordinator.fleet.publishing"])


def run(target, *given) -> int:
    process = forkserver.Process(target=target, args=given)
    process.start()
    process.join(30)
    assert not process.is_alive()
    return process.exitcode


def verified(site) -> None:
    """Whatever is live is whole."""
    active = site.slots.active()
    for file in active.release.files_for("student"):
        assert digest_file(site.slots.blobs.path(file.digest)) == file.digest


@pytest.fixture
def one_behind(coordinator, site):
    """A node with release 1, and release 2 in the store."""
    coordinator.publish(1, model=1)
    node = site()
    node.check()
    coordinator.publish(2, model=2, adapter=2)
    return node


def test_the_steps_of_an_update_are_the_ones_that_are_killed(coordinator, one_behind, tmp_path):
    root = coordinator.publisher.root_bytes()
    assert run(victims.update, tmp_path / "node", coordinator.url, root, NOW, "", tmp_path / "log") == 0

    assert tuple((tmp_path / "log").read_text().split()) == UPDATE_STEPS


@pytest.mark.parametrize("at", UPDATE_STEPS)
def test_a_kill_during_an_update_leaves_the_old_or_the_new_release_and_the_update_ends(coordinator, one_behind, site, tmp_path, at):
    root = coordinator.publisher.root_bytes()
    assert run(victims.update, tmp_path / "node", coordinator.url, root, NOW, at) == -signal.SIGKILL

    after = site()

    assert after.slots.starting().number in (1, 2)
    verified(after)
    assert after.check().number == 2
    assert after.check().state == "current"
    assert after.slots.confirmed() and after.slots.previous().number == 1
    verified(after)
    assert not (tmp_path / "node" / "slots" / "journal.json").exists()


@pytest.mark.parametrize("at", ("tested", "switch", "switched"))
def test_an_update_killed_after_its_download_ends_without_a_network(coordinator, one_behind, site, tmp_path, at):
    run(victims.update, tmp_path / "node", coordinator.url, coordinator.publisher.root_bytes(), NOW, at)

    after = site(url="http://127.0.0.1:9/repository")
    after.slots.starting()

    assert after.check().state == "activated"
    assert after.number == 2


@pytest.mark.parametrize(("failing", "at"), [("test", at) for at in FAILED_TEST_STEPS] + [("switch", at) for at in FAILED_SWITCH_STEPS])
def test_a_kill_while_a_bad_release_goes_back_still_ends_on_the_old_one(coordinator, one_behind, site, tmp_path, failing, at):
    root = coordinator.publisher.root_bytes()
    assert run(victims.update, tmp_path / "node", coordinator.url, root, NOW, at, None, failing) == -signal.SIGKILL

    def broken(candidate):
        if candidate.number == 2:
            raise RuntimeError("gibberish")

    after = site(self_test=broken if failing == "test" else lambda c: None, activate=broken if failing == "switch" else lambda c: None)
    after.slots.starting()

    assert after.check().number == 1
    assert after.check().state == "refused"
    assert [kind for kind in after.kinds() if kind == "release-refused"] == ["release-refused"]
    verified(after)


def test_three_self_tests_that_end_the_process_condemn_the_release(coordinator, one_behind, site, tmp_path):
    root = coordinator.publisher.root_bytes()
    for _ in range(3):
        assert run(victims.update, tmp_path / "node", coordinator.url, root, NOW, "self-test") == -signal.SIGKILL

    after = site()
    outcome = after.check()

    assert (outcome.state, outcome.number) == ("refused", 1)
    assert "3 self-tests" in outcome.reason and after.tested == []


@pytest.mark.parametrize("at", INIT_STEPS + PUBLISH_STEPS[:3])
def test_a_kill_during_the_first_publish_is_repaired_by_the_next(tmp_path, at):
    files = _files(tmp_path)
    store = tmp_path / "store"
    assert run(victims.publish, store, 1, files, NOW, at) == -signal.SIGKILL

    victims.publish(store, 1, files, NOW, "")

    publisher = Publisher(store, clock=lambda: NOW)
    assert publisher.verify() > 0 and publisher.numbers() == (1,)
    assert all(path.stat().st_mode & 0o77 == 0 for path in publisher.keys.iterdir())


@pytest.mark.parametrize("at", PUBLISH_STEPS)
def test_a_kill_during_a_publish_leaves_a_store_that_verifies_and_publishes(coordinator, site, tmp_path, at):
    coordinator.publish(1)
    node = site()
    store, files = coordinator.publisher.root, _files(tmp_path)

    assert run(victims.publish, store, 2, files, NOW, at) == -signal.SIGKILL

    assert coordinator.publisher.verify() > 0
    assert coordinator.publisher.latest().number in (1, 2)
    assert node.check().state == "activated"
    victims.publish(store, 2, files, NOW, "")
    assert coordinator.publisher.verify() > 0 and coordinator.publisher.numbers() == (1, 2)
    node.check()
    assert node.number == 2


def test_the_steps_of_a_publish_are_the_ones_that_are_killed(tmp_path):
    run(victims.publish, tmp_path / "store", 1, _files(tmp_path), NOW, "", tmp_path / "log")

    steps = (tmp_path / "log").read_text().split()
    assert tuple(dict.fromkeys(steps[: steps.index("done") + 1])) == INIT_STEPS
    assert tuple(steps[steps.index("done") + 1 :]) == PUBLISH_STEPS


def _files(folder):
    model = make_file(folder / "m.gguf", 40_000, 9)
    return [("student", "model", model, ""), ("student", "adapter", make_file(folder / "a.gguf", 900, 8), digest_file(model))]
