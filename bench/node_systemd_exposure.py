"""systemd_exposure: what `systemd-analyze security --offline=yes` says of the unit that the install script lays, 0 (none) to 10.

Beside it the training unit, and a unit as model servers are usually shipped: a user of its own, Restart=always, no walls.
"""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from bench.settings import Settings
from protocol.errors import NotEnough

UNITS = Path(__file__).parents[1] / "deploy" / "systemd"
USUAL = "[Service]\nExecStart=/usr/local/bin/server serve\nUser=server\nGroup=server\nRestart=always\nRestartSec=3\n"


def measure(settings: Settings) -> dict[str, Any]:
    """The exposure of milpa-node.service."""
    usual = settings.folder("systemd_exposure") / "usual.service"
    usual.write_text(USUAL)
    return {
        "figure": exposure(UNITS / "milpa-node.service"),
        "against": {"milpa-learn.service": exposure(UNITS / "milpa-learn.service"), "a unit without walls": exposure(usual)},
        "n": 1,
    }


def exposure(unit: Path) -> float:
    """The overall level of a unit file.

    Raises:
        NotEnough: systemd-analyze is not installed.
    """
    program = shutil.which("systemd-analyze")
    if program is None:
        raise NotEnough("systemd-analyze is not installed: apt install systemd")
    command = [program, "security", "--offline=yes", "--no-pager", f"./{unit.name}"]
    told = subprocess.run(command, cwd=unit.parent, capture_output=True, text=True, timeout=60, check=False).stdout
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", told)
    if found is None:
        raise NotEnough(f"systemd-analyze said nothing of {unit.name}: {told[-200:]}")
    return float(found[1])
