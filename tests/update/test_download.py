import random

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.update.download import RESERVE_BYTES, Budget, Downloader, http_client
from protocol.blobs import BlobFolder
from protocol.digests import digest_bytes
from protocol.errors import NotEnough, Unavailable, WrongDigest
from tests.faults import Fault, FaultProxy

DATA = random.Random(5).randbytes(300_000)
DIGEST = digest_bytes(DATA)


class Link(httpx.SyncByteStream):
    """A body that breaks after `left` bytes."""

    def __init__(self, body: bytes, left: int) -> None:
        self.body, self.left = body, left

    def __iter__(self):
        for at in range(0, min(self.left, len(self.body)), 4096):
            yield self.body[at : min(at + 4096, self.left)]
        if self.left < len(self.body):
            raise httpx.ReadError("cut")


def server(cuts=(), *, ranges=True, statuses=()):
    """A transport that serves DATA, cutting the n-th answer after cuts[n] bytes, or answering statuses[n] instead."""
    seen = []

    def handle(request: httpx.Request) -> httpx.Response:
        n = len(seen)
        seen.append(request.headers["range"])
        if n < len(statuses) and statuses[n]:
            return httpx.Response(statuses[n])
        first, last = (int(part) for part in request.headers["range"].removeprefix("bytes=").split("-"))
        body = DATA[first : last + 1] if ranges else DATA
        headers = {"content-length": str(len(body))}
        if ranges:
            headers["content-range"] = f"bytes {first}-{last}/{len(DATA)}"
        return httpx.Response(206 if ranges else 200, headers=headers, stream=Link(body, cuts[n] if n < len(cuts) else len(body)))

    return httpx.Client(transport=httpx.MockTransport(handle)), seen


def downloader(folder, client, *, daily_bytes=0, **more):
    budget = Budget(folder / "budget.json", daily_bytes)
    budget.open_day(86_400 * 5)
    return Downloader(client, BlobFolder(folder / "blobs"), budget, sleep=lambda seconds: None, jitter=lambda: 0.5, **more)


def fetch(one, **more):
    return one.fetch("http://x/blob", DIGEST, len(DATA), **more)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 60_000), max_size=50), st.booleans())
def test_any_cuts_end_in_the_same_bytes_and_none_is_paid_twice(tmp_path_factory, cuts, restart):
    folder = tmp_path_factory.mktemp("cuts")
    client, seen = server(cuts)
    one = downloader(folder, client, attempts=60)
    if restart and cuts:
        with pytest.raises(Unavailable):
            fetch(downloader(folder, client, attempts_in_all=1)) if cuts[0] < len(DATA) else pytest.fail("not cut")

    path = fetch(one)

    assert path.read_bytes() == DATA
    assert one.budget.received <= len(DATA)
    assert len(seen) <= len(cuts) + 2


def test_fifty_real_cuts_cost_less_than_two_percent(coordinator, tmp_path):
    size = 3_000_000
    release = coordinator.publish(1, size=size)
    digest = release.files[0].digest
    with FaultProxy(("127.0.0.1", coordinator.port), lambda n: Fault(cut_after=50_000, reset=n % 3 == 0) if n < 50 else Fault()) as proxy:
        one = downloader(tmp_path / "node", http_client())
        path = one.fetch(f"http://127.0.0.1:{proxy.port}/repository/blobs/{digest}", digest, size)
        one.client.close()

    assert path.stat().st_size == size
    assert proxy.connections > 40
    assert one.budget.received <= 1.02 * size + 64 * 1024
    assert proxy.bytes_down <= 1.02 * size + 50 * 64 * 1024


@pytest.mark.parametrize("status", [404, 410, 403, 301])
def test_a_refusal_is_final_at_once(tmp_path, status):
    client, seen = server(statuses=[status])

    with pytest.raises(Unavailable, match=str(status)):
        fetch(downloader(tmp_path, client))
    assert len(seen) == 1


def test_a_server_in_trouble_is_asked_again_with_growing_waits(tmp_path):
    client, seen = server(statuses=[503, 500, 429])
    one = downloader(tmp_path, client)
    waits = []
    one._sleep = waits.append

    assert fetch(one).read_bytes() == DATA
    assert len(seen) == 4 and waits == sorted(waits) and waits[0] < waits[-1]


def test_attempts_without_a_byte_are_capped(tmp_path):
    client, seen = server(statuses=[503] * 100)

    with pytest.raises(Unavailable, match="6 attempts brought nothing"):
        fetch(downloader(tmp_path, client))
    assert len(seen) == 6


def test_attempts_in_all_are_capped_even_with_progress(tmp_path):
    client, seen = server([10] * 1000)

    with pytest.raises(Unavailable, match="7 attempts were not enough"):
        fetch(downloader(tmp_path, client, attempts_in_all=7))
    assert len(seen) == 7


def test_the_days_budget_is_not_exceeded_and_the_next_day_goes_on(tmp_path):
    client, _ = server()
    one = downloader(tmp_path, client, daily_bytes=200_000)
    with pytest.raises(NotEnough, match="budget of 200000 bytes is spent; 200000 of 300000"):
        fetch(one)
    assert one.budget.received == 200_000

    one.budget.open_day(86_400 * 6)

    assert fetch(one).read_bytes() == DATA
    assert one.budget.received == len(DATA)


def test_the_budget_survives_a_kill_and_never_undercounts(tmp_path):
    budget = Budget(tmp_path / "budget.json", 10 * RESERVE_BYTES)
    budget.open_day(86_400)
    budget.spend(1000)

    after_kill = Budget(tmp_path / "budget.json", 10 * RESERVE_BYTES)

    assert 1000 <= after_kill.spent <= 1000 + RESERVE_BYTES
    budget.settle()
    assert Budget(tmp_path / "budget.json").spent == 1000


def test_a_clock_that_goes_back_opens_no_new_account(tmp_path):
    budget = Budget(tmp_path / "budget.json", 1000)
    budget.open_day(86_400 * 9)
    budget.spend(600)

    budget.open_day(86_400 * 2)

    assert budget.left == 400


def test_a_server_without_ranges_is_accepted_and_its_repeats_are_counted(tmp_path, caplog):
    client, _ = server([100_000], ranges=False)
    one = downloader(tmp_path, client)

    assert fetch(one).read_bytes() == DATA
    assert one.budget.received == 100_000 + len(DATA)
    assert "ignores Range" in caplog.text


def test_a_server_without_ranges_is_refused_when_the_whole_does_not_fit_the_budget(tmp_path):
    client, _ = server([100_000], ranges=False)
    one = downloader(tmp_path, client, daily_bytes=350_000)

    with pytest.raises(NotEnough, match="ignores Range"):
        fetch(one)
    assert one.budget.received == 100_000


def test_a_part_with_wrong_bytes_is_thrown_away(tmp_path):
    client, _ = server()
    one = downloader(tmp_path, client)
    one.blobs.part(DIGEST).write_bytes(b"x" * 1000)

    with pytest.raises(WrongDigest):
        fetch(one)
    assert fetch(one).read_bytes() == DATA


def test_a_damaged_account_is_begun_anew(tmp_path):
    (tmp_path / "budget.json").write_bytes(b"\0\0\0")

    assert Budget(tmp_path / "budget.json", 10).left == 10


def test_a_black_hole_ends_by_its_time_limit(tmp_path, coordinator):
    release = coordinator.publish(1)
    with FaultProxy(("127.0.0.1", coordinator.port), lambda n: Fault(black_hole=True)) as proxy:
        client = httpx.Client(timeout=0.2, trust_env=False)
        one = downloader(tmp_path / "node", client, attempts=2)
        with pytest.raises(Unavailable, match="ReadTimeout"):
            one.fetch(f"http://127.0.0.1:{proxy.port}/repository/blobs/{release.files[0].digest}", release.files[0].digest, 50_000)
        client.close()


def test_a_download_that_must_wait_for_sun_keeps_what_came_and_goes_on_from_there(tmp_path):
    client, seen = server()
    one = downloader(tmp_path, client)
    sun = iter(["", *[""] * 10])  # it shines for ten pieces

    with pytest.raises(Unavailable, match="the rest waits: no sun"):
        fetch(one, wait_for=lambda: next(sun, "no sun"))
    had = one.budget.received
    path = fetch(one)

    assert 0 < had < len(DATA)
    assert path.read_bytes() == DATA and one.budget.received == len(DATA)
    assert len(seen) == 2


def test_a_download_spends_the_links_bytes_and_stops_where_they_end(tmp_path):
    class Account:
        spent = 0

        def left(self, what):
            return max(0, 1_000 - self.spent)

        def spend(self, up, down, packets=0):
            self.spent += down

    account = Account()
    budget = Budget(tmp_path / "budget.json", 0, link=account)

    budget.spend(700)

    assert (budget.left, account.spent, budget.limit) == (300, 700, "the link's")
