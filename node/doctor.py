"""`milpa-node doctor`: what keeps a node from working, and what to do about it. Looks, and changes nothing.

Each check returns one Finding: good, warn (it works, look at it), bad (do something). No check waits longer than a few seconds on
anything off the machine.
"""

import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from node.api.server import bind
from node.client import daemon_status, load_any
from node.engine.loading import prove
from node.settings import NodeSettings, secret
from node.update.rules import BUILT_AT
from node.update.slots import Slots
from protocol.errors import BadInput, MilpaError, PortInUse

CONNECT_S = 3.0  # seconds for the broker's TCP handshake
DISK_BAD, DISK_WARN = 128 << 20, 512 << 20  # bytes free
RELEASE_OLD_S = 120 * 86_400  # seconds; a season


class Finding(msgspec.Struct, frozen=True):
    """One thing looked at."""

    what: str
    state: Literal["good", "warn", "bad"]
    found: str
    advice: str = ""


def examine(settings: NodeSettings, *, now: Callable[[], float] = time.time, running: dict[str, object] | None = None) -> list[Finding]:
    """All checks, in the order in which to repair. `running`: the status of the node that runs here; None: ask for it."""
    running = _running(settings) if running is None else running
    return [
        clock(now()),
        disk(settings.state_dir),
        port(settings, running=bool(running)),
        model(settings, running=running),
        broker(settings, running=running),
        release(settings, now(), running=running),
    ]


def clock(now: float) -> Finding:
    """Whether the clock can be right at all."""
    shown = time.strftime("%Y-%m-%d", time.gmtime(max(0, now)))
    if now < BUILT_AT:
        built = time.strftime("%Y-%m-%d", time.gmtime(BUILT_AT))
        return Finding("clock", "bad", f"it shows {shown}, before this program was made ({built})", "set it, or fit a clock; answers go on")
    return Finding("clock", "good", shown)


def disk(state: Path) -> Finding:
    """Whether the state folder can be written, with room to spare."""
    here = next((folder for folder in (state, *state.parents) if folder.exists()), Path("/"))
    free = shutil.disk_usage(here).free
    if not os.access(here, os.W_OK):
        return Finding("disk", "bad", f"{here} cannot be written", "give the node's user write access, or set node.state_dir")
    if free < DISK_BAD:
        return Finding("disk", "bad", f"{free >> 20} MiB free on {here}", "free some space: the node stops storing answers when it is full")
    if free < DISK_WARN:
        return Finding("disk", "warn", f"{free >> 20} MiB free on {here}", "a new release may not fit")
    return Finding("disk", "good", f"{free >> 20} MiB free on {here}")


def port(settings: NodeSettings, *, running: bool) -> Finding:
    """Whether the API can listen."""
    host, number = settings.api.host, settings.api.port
    if running:
        return Finding("port", "good", "the node answers")
    try:
        bind(host, number, key=secret(settings.api.key_file, what="api.key_file")).close()
    except PortInUse as error:
        return Finding("port", "bad", str(error), "find it with: ss -ltnp")
    except BadInput as error:
        return Finding("port", "bad", str(error))
    return Finding("port", "good", f"{number} on {host} is free (no node runs)")


def model(settings: NodeSettings, *, running: dict[str, object]) -> Finding:
    """Whether there is a model and it speaks."""
    if running:
        if running.get("ready"):
            return Finding("model", "good", f"release {running.get('release')} is loaded")
        return Finding("model", "bad", str(running.get("why")), "look at the coordinator's rollout, or set model.path")
    try:
        speaker = load_any(settings)
    except MilpaError as error:
        return Finding("model", "bad", str(error), "a new release repairs it; the node waits for one" if settings.update.url else "")
    try:
        prove(speaker)
        return Finding("model", "good", f"{speaker.engine.model_digest[:12]} loads and speaks ({speaker.task})")
    except MilpaError as error:
        return Finding("model", "bad", str(error), "fetch the file again; then test the memory of this machine")
    finally:
        speaker.engine.close()


def broker(settings: NodeSettings, *, running: dict[str, object]) -> Finding:
    """Whether the broker can be reached; a node works without."""
    host, number = settings.broker.host, settings.broker.port
    if not host:
        return Finding("broker", "good", "none configured: this node lives alone")
    told = running.get("broker")
    if isinstance(told, dict):
        if told.get("connected"):
            return Finding("broker", "good", f"connected to {host}:{number}")
        return Finding("broker", "warn", str(told.get("problem")), f"{told.get('outbox')} messages wait; answers go on")
    try:
        secret(settings.broker.password_file, what="broker.password_file")
        socket.create_connection((host, number), timeout=CONNECT_S).close()
    except BadInput as error:
        return Finding("broker", "bad", str(error))
    except OSError as error:
        return Finding("broker", "warn", f"{host}:{number} does not answer: {error}", "check the link; answers go on, questions wait")
    return Finding("broker", "good", f"{host}:{number} answers")


def release(settings: NodeSettings, now: float, *, running: dict[str, object]) -> Finding:
    """Whether updates still come."""
    if settings.model.path or (running.get("ready") and not running.get("release")):
        return Finding("release", "good", "a fixed model file; no updates")
    active = Slots(settings.state_dir, role=settings.node.role).active() if settings.state_dir.is_dir() else None
    if active is None:
        advice = "" if settings.update.url else "set update.url and update.root_file"
        return Finding("release", "warn" if settings.update.url else "bad", "none yet", advice)
    age = now - active.release.created
    days = int(max(0.0, age) // 86_400)
    if age > RELEASE_OLD_S:
        return Finding("release", "warn", f"{active.number}, {days} days old", "look whether the coordinator still publishes")
    return Finding("release", "good", f"{active.number}, {days} days old")


def _running(settings: NodeSettings) -> dict[str, object]:
    try:
        return daemon_status(settings) or {}
    except MilpaError:
        return {}  # somebody else listens there; `port` says so
