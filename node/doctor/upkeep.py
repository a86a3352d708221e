"""What the node lives on and learns: a battery that says nothing, one too small for its dark days, a training that cannot run."""

from pathlib import Path
from typing import Any

from node.doctor.finding import Finding
from node.energy import rules
from node.energy.readings import read
from node.learn import needs
from node.settings import NodeSettings
from protocol.errors import Unavailable


def power(settings: NodeSettings, *, running: dict[str, Any]) -> list[Finding]:
    """What feeds this node, and whether it is measured and enough; nothing on the mains."""
    plant = settings.power
    if plant.source == "mains":
        return []
    if plant.battery:
        try:
            charge = f"{read(Path(plant.battery).expanduser()).charge:.0%} by {plant.battery}"
        except Unavailable as error:
            return [Finding("power", "bad", str(error), "what can wait stands still until the battery tells its charge; answers go on")]
    else:
        told = running.get("power") or {}
        charge = f"{told['charge']:.0%} by the model" if "charge" in told else "not measured"
    kept = rules.reserve(plant, 0.0)
    start, _ = rules.edges(kept)
    if start > 1.0:
        enough = f"{plant.dark_days * 24 * plant.idle_w / 0.8:.0f} Wh"
        return [
            Finding(
                "power", "warn", f"a full battery carries {plant.dark_days / kept:.1f} dark days, power.dark_days is {plant.dark_days:g}",
                f"nothing that waits for sun will ever run: fit about {enough}, or lower power.dark_days",
            )
        ]  # fmt: skip
    found = f"{plant.source}, {charge}; {kept:.0%} are kept for {plant.dark_days:g} dark days"
    if plant.source == "solar" and not plant.battery:
        return [Finding("power", "warn", found, "set power.battery: without it nobody notices a covered panel")]
    if plant.source == "solar" and plant.longitude == 0.0 and not plant.curve:
        return [Finding("power", "warn", f"{found}; power.longitude is 0", "set latitude and longitude, or the sun rises at a wrong hour")]
    return [Finding("power", "good", found)]


def learning(settings: NodeSettings, *, running: dict[str, Any]) -> list[Finding]:
    """Whether what is confirmed can be learned from; nothing where that is not wanted."""
    if not settings.learn.auto or settings.node.role != "student" or settings.model.path:
        return []
    told = running.get("learn") or {}
    if told.get("failure"):
        return [Finding("learning", "warn", str(told["failure"]), "it is tried again by itself; the node's log shows more")]
    if missing := needs.missing():
        return [
            Finding(
                "learning", "warn", f"{', '.join(missing)} is not installed: this node answers and does not learn",
                f"{needs.CURE}, or set learn.auto = false",
            )
        ]  # fmt: skip
    return [Finding("learning", "good", str(told.get("reason") or "ready when enough is confirmed"))]
