"""The model: whether it fits, loads and speaks; and whether new ones still come."""

import time
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from node.client import load_any
from node.doctor.finding import Finding
from node.doctor.machine import Places, free_memory
from node.settings import NodeSettings
from node.update.rules import Seen
from node.update.slots import Slots
from protocol.codec import UNREADABLE
from protocol.errors import MilpaError

RELEASE_OLD_S = 120 * 86_400  # seconds; a season
EXPIRES_SOON_S = 7 * 86_400
CACHE_BYTES = 40 * 1024  # of keys and values a token: 18 layers of 256, in half precision, and a margin
WORK_BYTES = 64 << 20  # llama.cpp's buffers and the node itself
METADATA = ("timestamp", "snapshot", "targets", "root")


def memory(settings: NodeSettings, *, places: Places, running: dict[str, Any]) -> Finding:
    """Whether the model fits in what is free: its files, the context's cache, the buffers."""
    if running.get("ready"):
        return Finding("free memory", "good", f"the model is loaded; {free_memory(places) >> 20} MiB are free")
    files = [path for path in model_files(settings) if path.is_file()]
    if not files:
        return Finding("free memory", "good", f"{free_memory(places) >> 20} MiB are free; there is no model yet")
    need = sum(path.stat().st_size for path in files) + settings.model.context * CACHE_BYTES + WORK_BYTES
    free = free_memory(places)
    if free and need > free:
        missing = (need - free + (1 << 20) - 1) >> 20
        return Finding(
            "free memory", "bad", f"the model needs about {need >> 20} MiB, {free >> 20} MiB are free: {missing} MiB are missing",
            f"close other programs, lower model.context (now {settings.model.context}), or take a smaller model",
        )  # fmt: skip
    return Finding("free memory", "good", f"the model needs about {need >> 20} MiB, {free >> 20} MiB are free")


def model_files(settings: NodeSettings) -> list[Path]:
    """The files that would be loaded."""
    if settings.model.path:
        return [Path(name).expanduser() for name in (settings.model.path, settings.model.adapter) if name]
    active = Slots(settings.state_dir, role=settings.node.role).active() if settings.state_dir.is_dir() else None
    return [path for path in (active.model, active.adapter) if path] if active else []


def speaks(settings: NodeSettings, *, running: dict[str, Any]) -> Finding:
    """Whether there is a model and it says something."""
    if running:
        if running.get("ready"):
            number = running.get("release")
            return Finding("model", "good", f"release {number} is loaded" if number else "the fixed model is loaded")
        return Finding("model", "bad", str(running.get("why")), "look at the coordinator's rollout, or set model.path")
    from node.engine.loading import prove  # llama.cpp, only now

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


def release(settings: NodeSettings, now: float, *, running: dict[str, Any]) -> Finding:
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


def trust(settings: NodeSettings, now: float) -> list[Finding]:
    """When the coordinator's signatures run out. Expired ones stop updates, never answers."""
    folder = settings.state_dir / "trust" / "metadata"
    found = [(when, name) for name in METADATA if (when := expiry(folder / f"{name}.json")) is not None]
    if not found:
        return []
    when, name = min(found)
    day = time.strftime("%Y-%m-%d", time.gmtime(when))
    if when < now:
        advice = "updates wait until the coordinator signs again (or this clock is set); answers go on"
        return [Finding("trust", "warn", f"the signed {name} expired on {day}", advice)]
    if when - now < EXPIRES_SOON_S:
        advice = "it is renewed by itself while the coordinator runs and this node reaches it"
        return [Finding("trust", "warn", f"the signed {name} expires on {day}", advice)]
    return [Finding("trust", "good", f"the signed {name} is the first to expire, on {day}")]


def expiry(path: Path) -> float | None:
    """`signed.expires` of a TUF file, in seconds since 1970; None when there is none."""
    try:
        told = msgspec.json.decode(path.read_bytes())["signed"]["expires"]
        return datetime.fromisoformat(str(told)).timestamp()
    except (OSError, *UNREADABLE, KeyError, TypeError, ValueError):
        return None


def newest_signed_time(settings: NodeSettings) -> float:
    """The newest time the coordinator signed, as this node remembers it; 0 without one."""
    try:
        return float(msgspec.json.decode((settings.state_dir / "trust" / "seen.json").read_bytes(), type=Seen).floor)
    except (OSError, *UNREADABLE):
        return 0.0
