import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from coordinator.fleet.publishing import Publisher, build_release
from coordinator.fleet.repository import routes
from protocol.errors import BadInput, NumberAlreadySeen, TrustError, WrongDigest
from tests.update.conftest import NOW

DAY = 86_400


@pytest.fixture
def web(coordinator):
    return TestClient(coordinator.app)


def test_a_number_taken_by_another_release_is_refused(coordinator):
    coordinator.publish(1, model=1)

    with pytest.raises(NumberAlreadySeen, match="the next number is 2"):
        coordinator.publish(1, model=2)


def test_the_same_release_again_changes_nothing(coordinator):
    release, paths = coordinator.describe(1)
    coordinator.publisher.publish(release, paths)
    before = sorted(path.name for path in coordinator.publisher.metadata.iterdir())

    coordinator.publisher.publish(release, paths)

    assert sorted(path.name for path in coordinator.publisher.metadata.iterdir()) == before


def test_a_number_may_not_be_left_out(coordinator):
    with pytest.raises(BadInput, match="the next is 1"):
        coordinator.publish(2)


def test_a_missing_file_is_named_and_nothing_is_signed(coordinator):
    release, _ = coordinator.describe(1)

    with pytest.raises(BadInput, match="neither given nor in the store"):
        coordinator.publisher.publish(release, {})
    assert coordinator.publisher.latest() is None


def test_a_file_with_other_bytes_than_described_is_refused(coordinator, tmp_path):
    release, paths = coordinator.describe(1)
    (digest,) = paths
    paths[digest].write_bytes(b"x" * 50_000)

    with pytest.raises(WrongDigest):
        coordinator.publisher.publish(release, paths)


def test_a_file_that_is_in_the_store_need_not_be_given(coordinator):
    coordinator.publish(1, model=1)
    release, _ = coordinator.describe(2, model=1)

    coordinator.publisher.publish(release, {})

    assert coordinator.publisher.numbers() == (1, 2)


def test_a_store_without_metadata_says_how_to_make_one(tmp_path):
    with pytest.raises(BadInput, match="publish --init"):
        Publisher(tmp_path / "none").latest()
    assert not (tmp_path / "none").exists()


def test_root_keys_may_leave_after_init_and_keys_may_live_elsewhere(coordinator, tmp_path):
    publisher = coordinator.publisher
    for path in publisher.keys.glob("root-*.pem"):
        path.unlink()
    publisher.keys.rename(tmp_path / "stick")

    with pytest.raises(BadInput, match="bring it back"):
        coordinator.publish(1)
    Publisher(publisher.root, keys=tmp_path / "stick", clock=lambda: NOW).publish(*coordinator.describe(1))

    assert publisher.verify() > 0 and publisher.numbers() == (1,)


def test_a_root_needs_two_of_three_signatures(coordinator):
    root = coordinator.publisher._read().root.signed

    assert root.roles["root"].threshold == 2 and len(root.roles["root"].keyids) == 3
    assert len({key for role in root.roles.values() for key in role.keyids}) == 6


def test_an_impossible_threshold_is_refused(tmp_path):
    with pytest.raises(BadInput, match="4 of 3"):
        Publisher(tmp_path).init(threshold=4)


def test_verify_finds_an_altered_file(coordinator):
    release = coordinator.publish(1)
    path = coordinator.publisher.blobs.path(release.files[0].digest)
    path.write_bytes(path.read_bytes()[::-1])

    with pytest.raises(WrongDigest):
        coordinator.publisher.verify()


def test_a_year_of_refreshes_keeps_everything_fresh(coordinator):
    coordinator.publish(1)
    for _ in range(40):
        coordinator.now += 20 * DAY
        coordinator.publisher.refresh_timestamp()

    assert coordinator.publisher.verify() > 0


def test_a_store_that_was_not_refreshed_says_so(coordinator):
    coordinator.publish(1)
    coordinator.now += 31 * DAY

    with pytest.raises(TrustError, match="refresh_timestamp"):
        coordinator.publisher.verify()


def test_an_empty_file_is_no_release(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"")

    with pytest.raises(BadInput, match="empty"):
        build_release(1, "ranch", [("student", "model", tmp_path / "m.gguf", "")])


def test_a_range_of_a_blob_is_served_with_its_digest_as_tag(coordinator, web):
    file = coordinator.publish(1).files[0]
    data = coordinator.publisher.blobs.path(file.digest).read_bytes()

    answer = web.get(f"/repository/blobs/{file.digest}", headers={"range": "bytes=1000-1999"})

    assert answer.status_code == 206 and answer.content == data[1000:2000]
    assert answer.headers["content-range"] == f"bytes 1000-1999/{len(data)}"
    assert answer.headers["etag"] == f'"{file.digest}"' and "immutable" in answer.headers["cache-control"]
    assert web.get(f"/repository/blobs/{file.digest}", headers={"if-none-match": f'"{file.digest}"'}).status_code == 304
    assert web.get(f"/repository/targets/blobs/{file.digest}.{file.digest}").content == data


def test_only_the_timestamp_is_not_to_be_cached(web):
    assert web.get("/repository/metadata/timestamp.json").headers["cache-control"] == "no-cache"
    assert "immutable" in web.get("/repository/metadata/1.root.json").headers["cache-control"]


@pytest.mark.parametrize(
    "path",
    [
        "/repository/metadata/..%2Fkeys%2Ftimestamp.pem",
        "/repository/metadata/timestamp.json.part",
        "/repository/targets/../keys/root-1.pem",
        "/repository/targets/..%2f..%2fkeys%2froot-1.pem",
        "/repository/targets/releases/%2e%2e/%2e%2e/keys/timestamp.pem",
        "/repository/blobs/..%2Fkeys",
        "/repository/blobs/" + "A" * 64,
        "/repository/blobs/" + "a" * 64,
        "/repository/keys/timestamp.pem",
    ],
)
def test_nothing_but_signed_files_is_served(coordinator, web, path):
    coordinator.publish(1)

    assert web.get(path).status_code == 404


def test_routes_of_a_store_that_is_not_there_yet_answer_404(tmp_path):
    app = FastAPI()
    app.include_router(routes(tmp_path / "none"))

    assert TestClient(app).get("/repository/metadata/timestamp.json").status_code == 404
