"""A round's collection through the real SuperLink and real SuperNodes, with what goes wrong on the way."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from coordinator.federation.admission import admit
from coordinator.federation.collect import Reply, collect, has_reply, keep, load
from node.learn import stored
from protocol.adapters import AdapterQuestion, AdapterReply
from protocol.digests import digest_bytes
from protocol.errors import BadInput, Unavailable
from tests.federation.adapters import BASE, START, make
from tests.federation.conftest import ROOT, SuperLink, Window, flower_children, wait_until
from tests.federation.test_admission import EXPECTED

QUESTION = AdapterQuestion(2, BASE, START)
SITE_TEXT = "the pump of Don Julio is broken"


def store_adapter(state_dir: Path, site: str, *, seed: int = 1, poison: bool = False) -> np.ndarray:
    header, flat = make(site, seed=seed, release=2)
    if poison:
        flat[3] = np.nan
    stored.save(state_dir, flat, header)
    return flat


def gather(
    link: SuperLink, folder: Path, *, seconds: float = 60.0, token: str = "", expected: tuple[str, ...] = (), ca: str | None = None
) -> list[Reply]:
    replies: list[Reply] = []
    collect(
        link.address, QUESTION, folder, token=token or link.keys.control, secret=link.keys.secret, ca=link.ca if ca is None else ca,
        seconds=seconds, expected=expected, flower_home=folder.parent / "flower", on_reply=replies.append,
    )  # fmt: skip
    return replies


@pytest.mark.flower
def test_two_adapters_arrive_a_poisoned_one_is_refused_and_the_round_goes_on(
    superlink: SuperLink, windows: Callable[..., Window], tmp_path: Path
) -> None:
    sent = store_adapter(tmp_path / "esteli", "esteli")
    store_adapter(tmp_path / "malacatoya", "malacatoya", poison=True)
    open_windows = [windows(tmp_path / site, site) for site in ("esteli", "malacatoya")]

    replies = gather(superlink, tmp_path / "round", expected=("esteli", "malacatoya"))

    assert sorted(reply.node for reply in replies) == ["esteli", "malacatoya"]
    arrived = {reply.node: (reply, flat) for reply, flat in load(tmp_path / "round")}
    assert np.array_equal(arrived["esteli"][1], sent)
    decisions = admit([(reply.header, flat) for reply, flat in arrived.values()], EXPECTED)  # type: ignore[misc]
    assert {decision.site: decision.reason for decision in decisions} == {"esteli": "accepted", "malacatoya": "not-finite"}
    assert all(window.wait().delivered for window in open_windows), "a node did not get its receipt"


@pytest.mark.flower
def test_what_a_site_holds_never_reaches_the_superlink_when_its_files_are_spoiled(
    superlink: SuperLink, windows: Callable[..., Window], tmp_path: Path
) -> None:
    store_adapter(tmp_path / "esteli", "esteli")
    (stored.folder(tmp_path / "esteli", 2) / "header.json").write_text(f'{{"note": "{SITE_TEXT}"}}')
    window = windows(tmp_path / "esteli", "esteli")

    replies = gather(superlink, tmp_path / "round", expected=("esteli",))

    assert [(reply.node, reply.code) for reply in replies] == [("esteli", "damaged")]
    assert not window.close().delivered
    kept = b"".join(path.read_bytes() for path in superlink.state.glob("superlink.db*"))
    assert b"damaged" in kept, "the reply itself is not in the SuperLink's file: this test looks in the wrong place"
    assert SITE_TEXT.encode() not in kept


@pytest.mark.flower
def test_a_node_that_hangs_does_not_hold_the_round_past_its_deadline(
    superlink: SuperLink, windows: Callable[..., Window], tmp_path: Path
) -> None:
    store_adapter(tmp_path / "malacatoya", "malacatoya")
    hanging = windows(tmp_path / "malacatoya", "malacatoya")
    wait_until(lambda: bool(flower_children()), what="a SuperNode")
    process = flower_children()[0]
    wait_until(lambda: online(superlink) > 0, what="a node online")
    os.kill(process, signal.SIGSTOP)
    store_adapter(tmp_path / "esteli", "esteli")
    windows(tmp_path / "esteli", "esteli")

    try:
        replies = gather(superlink, tmp_path / "round", seconds=20, expected=("esteli", "malacatoya"))
    finally:
        os.kill(process, signal.SIGCONT)
    hanging.close()

    assert [(reply.node, reply.code) for reply in replies if reply.code != "lost"] == [("esteli", "adapter")]


def online(link: SuperLink) -> int:
    """How many nodes the SuperLink has seen come: its log says so for each."""
    return (link.state.parent / "superlink.log").read_text().count("[Fleet.ActivateNode] Activated") - (
        (link.state.parent / "superlink.log").read_text().count("[Fleet.DeactivateNode] Deactivated")
    )


@pytest.mark.flower
def test_a_superlink_killed_in_the_middle_of_a_round_loses_no_adapter(
    superlink: SuperLink, windows: Callable[..., Window], tmp_path: Path
) -> None:
    store_adapter(tmp_path / "esteli", "esteli", seed=1)
    store_adapter(tmp_path / "malacatoya", "malacatoya", seed=2)
    windows(tmp_path / "esteli", "esteli", seconds=120)
    first = threading.Event()
    replies: list[Reply] = []

    def on_reply(reply: Reply) -> None:
        replies.append(reply)
        first.set()

    collecting = threading.Thread(
        target=collect, args=(superlink.address, QUESTION, tmp_path / "round"),
        kwargs={"token": superlink.keys.control, "secret": superlink.keys.secret, "seconds": 100, "expected": ("esteli", "malacatoya"),
                "flower_home": tmp_path / "flower", "on_reply": on_reply},
    )  # fmt: skip
    collecting.start()
    assert first.wait(60), "the first adapter did not arrive"

    superlink.kill()
    superlink.start(superlink.port)
    windows(tmp_path / "malacatoya", "malacatoya", seconds=100)
    collecting.join(120)

    assert not collecting.is_alive()
    assert {reply.node for reply, flat in load(tmp_path / "round") if flat is not None} == {"esteli", "malacatoya"}


@pytest.mark.flower
def test_a_wrong_control_token_is_told_in_words(superlink: SuperLink, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"control\.token"):
        gather(superlink, tmp_path / "round", token="x" * 40, seconds=30)


@pytest.mark.flower
def test_no_superlink_at_all_is_told_in_words(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="milpa-coordinator superlink"):
        collect(
            "127.0.0.1:1", QUESTION, tmp_path / "round", token="x" * 40, secret="y" * 40, seconds=4, flower_home=tmp_path / "flower",
            on_reply=lambda reply: None,
        )  # fmt: skip


@pytest.mark.flower
def test_a_node_without_the_fleet_token_is_not_heard(superlink: SuperLink, windows: Callable[..., Window], tmp_path: Path) -> None:
    store_adapter(tmp_path / "esteli", "esteli")
    window = windows(tmp_path / "esteli", "esteli", fleet_token="guessed-and-wrong-fleet-token", seconds=8)

    replies = gather(superlink, tmp_path / "round", seconds=7, expected=("esteli",))

    assert replies == []
    assert not window.wait().delivered


@pytest.mark.flower
def test_a_node_with_nothing_to_send_is_told_that_it_was_heard(
    superlink: SuperLink, windows: Callable[..., Window], tmp_path: Path
) -> None:
    window = windows(tmp_path / "esteli", "esteli", seconds=100)

    replies = gather(superlink, tmp_path / "round", expected=("esteli",))
    result = window.wait()

    assert [(reply.node, reply.code) for reply in replies] == [("esteli", "nothing")]
    assert (result.answered, result.delivered) == (("nothing", "noted"), False)


@pytest.mark.flower
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_sync_window_leaves_no_process_behind(superlink: SuperLink, tmp_path: Path, number: int) -> None:
    state = tmp_path / "esteli"
    arguments = ["--superlink", superlink.address, "--window", "100", "--state-dir", str(state), "--json"]
    program = "import typer; from node.learn.commands import sync; typer.run(sync)"
    window = subprocess.Popen(
        [sys.executable, "-c", program, *arguments, "--fleet-token-file", str(superlink.state / "fleet.token")],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ, "MILPA_NODE_NODE_NAME": "esteli"},
    )  # fmt: skip
    from tests.federation.conftest import children_of

    wait_until(lambda: bool(children_of(window.pid)), what="the window's Flower process")
    child = children_of(window.pid)[0]

    window.send_signal(number)
    out, _ = window.communicate(timeout=30)

    if number == signal.SIGTERM:
        assert window.returncode == 0
        assert msgspec.json.decode(out)["delivered"] is False
    wait_until(
        lambda: not Path(f"/proc/{child}/cmdline").exists() or not Path(f"/proc/{child}/cmdline").read_bytes(), what="the end of the child"
    )


# ------------------------------------------------------------------------------------- what arrives, without Flower


def arrived(node: str = "esteli", **changes: object) -> tuple[bytes, np.ndarray]:
    header, flat = make("esteli")
    reply = AdapterReply(node, "adapter", digest_bytes(flat.tobytes()), header)
    return msgspec.json.encode(msgspec.structs.replace(reply, **changes)), flat


def test_the_same_reply_twice_is_one_adapter(tmp_path: Path) -> None:
    for _ in range(2):
        keep(tmp_path, *arrived(), 0)

    assert len(load(tmp_path)) == 1


def test_a_neighbours_reply_is_not_taken_for_a_sites_own(tmp_path: Path) -> None:
    header, flat = make("esteli-norte")
    keep(tmp_path, msgspec.json.encode(AdapterReply("esteli-norte", "adapter", digest_bytes(flat.tobytes()), header)), flat, 0)

    assert has_reply(tmp_path, "esteli-norte")
    assert not has_reply(tmp_path, "esteli")


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (b"", "malformed"),
        (b"not json", "malformed"),
        (b"[" * 100_000, "malformed"),
        (b"{" + b" " * 300_000 + b"}", "malformed"),
        (b'{"node": "../../etc", "code": "nothing"}', "malformed"),
        (b'{"node": "esteli", "code": "nothing", "note": "a text"}', "malformed"),
        (b'{"node": "esteli", "code": "we have a problem"}', "malformed"),
        (b'{"node": "esteli", "code": "adapter"}', "malformed"),
        (b'{"node": "esteli", "code": "nothing"}', "nothing"),
        (None, "lost"),
    ],
)
def test_whatever_a_node_sends_becomes_a_code_and_no_file(tmp_path: Path, payload: bytes | None, code: str) -> None:
    reply = keep(tmp_path, payload, None, 5)

    assert reply.code == code
    assert list(tmp_path.iterdir()) == []


def test_an_array_that_is_not_the_one_named_is_damaged(tmp_path: Path) -> None:
    payload, flat = arrived()

    assert keep(tmp_path, payload, flat + 1, 0).code == "damaged"


def test_a_node_cannot_speak_for_another_site(tmp_path: Path) -> None:
    payload, flat = arrived(node="malacatoya")

    assert keep(tmp_path, payload, flat, 0).code == "malformed"


def test_a_reply_cut_short_on_disk_is_never_merged(tmp_path: Path) -> None:
    reply = keep(tmp_path, *arrived(), 0)
    file = tmp_path / reply.file
    shutil.copy(file, tmp_path / "copy")
    file.write_bytes((tmp_path / "copy").read_bytes()[:-8])

    assert [flat for _, flat in load(tmp_path)] == [None]
