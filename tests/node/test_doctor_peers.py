"""node/doctor/peers.py: whether anybody who is asked can help."""

from typing import Any

from node.doctor.peers import asked
from node.settings import NodeSettings, Peers

ASKS = NodeSettings(peers=Peers(ask=("base", "ridge")))


def seen(name: str, **fields: Any) -> dict[str, Any]:
    return {
        "name": name,
        "awake": True,
        "asleep_s": 0,
        "trust": 1.0,
        "state": "answering",
        "model": "",
        "queue": 0,
        "why_not": "",
        **fields,
    }


def said(*peers: dict[str, Any]) -> list[tuple[str, str]]:
    return [(one.state, one.found) for one in asked(ASKS, running={"broker": {"peers": list(peers)}})]


def test_peers_that_can_be_asked_are_named() -> None:
    assert said(seen("base"), seen("ridge", awake=False)) == [("good", "base can be asked")]


def test_a_peer_that_is_never_asked_is_told_with_the_reason() -> None:
    found = said(seen("base"), seen("ridge", why_not="its model has fewer parameters than this node's"))

    assert found[0] == ("warn", "ridge is never asked: its model has fewer parameters than this node's")


def test_a_peer_that_lost_its_trust_is_told() -> None:
    assert said(seen("base", trust=0.2))[0] == ("warn", "base is often outvoted, its trust is 0.20")


def test_when_nobody_is_awake_the_doctor_says_what_happens_to_questions() -> None:
    [(state, found)] = said(seen("base", awake=False), seen("ridge", awake=False))

    assert (state, found) == ("warn", "none of base, ridge is awake")


def test_a_node_that_asks_nobody_or_does_not_run_has_nothing_to_tell() -> None:
    assert asked(NodeSettings(), running={"broker": {"peers": [seen("base")]}}) == []
    assert asked(ASKS, running={}) == []
