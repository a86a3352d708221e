"""`milpa-node doctor`: what keeps a node from working, and what to do about it. Looks, and changes nothing.

finding       what one look says: good, warn (it works, look at it), bad (do something)
machine       the clock, the disk and its wear, the supply's voltage, the temperature; paths are arguments, so tests build broken machines
certificates  expired, soon expired, not matching their key, open to others
outside       the port, brokers that refuse and why, what the link has left for today, the coordinator and its clock
peers         whether anybody who is asked can help
confidence    whether it is calibrated, and whether its budget for asking is kept
remembered    whether the memory can do what it is set to
upkeep        a battery that says nothing or is too small, a training that cannot run
model         whether it fits this machine's memory, loads and speaks; whether releases still come

No look waits longer than a few seconds on anything off the machine. One that the machine does not allow is a finding; the others go on.
"""

import time
from collections.abc import Callable
from typing import Any

from node.client import daemon_status
from node.doctor import certificates, confidence, machine, model, outside, peers, remembered, upkeep
from node.doctor.finding import Finding
from node.settings import NodeSettings, missing_files
from protocol.errors import MilpaError

__all__ = ["Finding", "examine"]


def examine(
    settings: NodeSettings,
    *,
    now: Callable[[], float] = time.time,
    running: dict[str, Any] | None = None,
    places: machine.Places | None = None,
) -> list[Finding]:
    """All looks, in the order in which to repair.

    Args:
        running: the status of the node that runs here, by itself: then nothing is connected to, its own words stand; None: ask for it.
        places: where the kernel tells about the machine.
    """
    inside = running is not None
    running = _running(settings) if running is None else running
    places = places or machine.Places()
    found = [
        machine.clock(now(), floor=model.newest_signed_time(settings), places=places),
        *_allowed("disk", lambda: [machine.disk(settings.state_dir, places=places)]),
        machine.wear(settings.state_dir, places=places),
        machine.supply(places),
        machine.temperature(places),
        _files(settings),
        outside.port(settings, running=bool(running)),
        *certificates.every(settings, now()),
        *_allowed("free memory", lambda: [model.memory(settings, places=places, running=running)]),
    ]
    if found[-1].state != "bad":
        found.append(model.speaks(settings, running=running))
    found += [
        outside.broker(settings, running=running),
        *outside.link(running),
        *peers.asked(settings, running=running),
        *outside.topic(settings, running=running),
        *outside.spool(running),
        *_allowed("memory", lambda: [remembered.memory(settings, running=running)]),
        confidence.confidence(running),
        *upkeep.power(settings, running=running),
        *upkeep.learning(settings, running=running),
        *(outside.updates(running) if inside else outside.coordinator(settings, now())),
        *([] if inside else outside.superlink(settings)),
        *_allowed("release", lambda: [model.release(settings, now(), running=running)]),
        *model.trust(settings, now()),
    ]
    return found


def _allowed(what: str, look: Callable[[], list[Finding]]) -> list[Finding]:
    """What a look finds; or that it is closed to this user, as a service's folder is to all but root and the service."""
    try:
        return look()
    except PermissionError as error:
        return [Finding(what, "bad", f"{error.filename} is closed to this user", "run it with sudo")]


def _files(settings: NodeSettings) -> Finding:
    missing = missing_files(settings)
    if not missing:
        return Finding("files", "good", "all that the settings name can be read")
    named = "; ".join(f"{name} names {file}" for name, file in missing.items())
    return Finding("files", "bad", f"not readable: {named}", "run it with sudo; if it stays, bring the file or correct the setting")


def _running(settings: NodeSettings) -> dict[str, Any]:
    try:
        return daemon_status(settings) or {}
    except MilpaError:
        return {}  # somebody else listens there; `port` says so
