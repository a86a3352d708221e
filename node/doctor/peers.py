"""Whom this node asks when it is unsure: whether anybody there can help, as the running node sees them."""

from typing import Any

from node.doctor.finding import Finding
from node.settings import NodeSettings

LOW_TRUST = 0.5  # a peer below it was outvoted about as often as not


def asked(settings: NodeSettings, *, running: dict[str, Any]) -> list[Finding]:
    """The peers, one by one where something is wrong; nothing where none are asked, or no node runs that could tell."""
    wanted = (*settings.peers.ask, *settings.peers.ask_groups)
    told = (running.get("broker") or {}).get("peers") or []
    if not wanted or not told:
        return []
    found = [finding for peer in told if (finding := _wrong(peer))]
    awake = [peer["name"] for peer in told if peer["awake"] and not peer["why_not"]]
    if not awake and not found:
        advice = "questions wait at the broker until their deadline; see that one of them runs and reaches the broker"
        return [Finding("peers", "warn", f"none of {', '.join(peer['name'] for peer in told)} is awake", advice)]
    if awake:
        found.append(Finding("peers", "good", f"{', '.join(awake)} can be asked"))
    return found


def _wrong(peer: dict[str, Any]) -> Finding | None:
    name = peer["name"]
    if peer["why_not"]:
        return Finding("peers", "warn", f"{name} is never asked: {peer['why_not']}", "name a peer with a larger model in peers.ask")
    if peer["trust"] < LOW_TRUST:
        advice = "look at its answers and its model; until it agrees with the others again it weighs little"
        return Finding("peers", "warn", f"{name} is often outvoted, its trust is {peer['trust']:.2f}", advice)
    return None
