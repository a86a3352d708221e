"""The battery's own word: a folder of Linux's power_supply class, or a small file that a charge controller's script writes.

* A folder such as /sys/class/power_supply/BAT0: `capacity` (percent), or `energy_now`/`energy_full`, or `charge_now`/`charge_full`;
  `status` ("Charging", "Full", ...).
* A file: one number (percent), or JSON {"charge": percent, "watts_in": watts, "charging": true}. Older than STALE_S it says nothing.
"""

import time
from pathlib import Path

import msgspec

from protocol.errors import Unavailable

STALE_S = 900.0  # seconds; three readings of a script that runs every five minutes
FILE_LIMIT = 4_096  # bytes


class Reading(msgspec.Struct, frozen=True):
    """What was read."""

    charge: float  # in [0, 1]
    watts_in: float | None = None  # from the panel; None: nobody measures it
    charging: bool = False


class _Told(msgspec.Struct, frozen=True):
    charge: float  # percent
    watts_in: float | None = None
    charging: bool = False


def read(path: Path, *, now: float | None = None) -> Reading:
    """The battery at `path`.

    Args:
        now: by the clock that dates files; default: this machine's.

    Raises:
        Unavailable: missing, too old, or not a charge; the message says which.
    """
    try:
        return _folder(path) if path.is_dir() else _file(path, time.time() if now is None else now)
    except OSError as error:
        raise Unavailable(f"cannot read the battery {path}: {error.strerror}") from error
    except (ValueError, msgspec.MsgspecError) as error:
        raise Unavailable(f"{path} does not tell a charge: {error}") from error


def _folder(path: Path) -> Reading:
    def number(name: str) -> float | None:
        return float((path / name).read_text(encoding="ascii")) if (path / name).is_file() else None

    charge = number("capacity")
    for kind in ("energy", "charge"):
        have, whole = number(f"{kind}_now"), number(f"{kind}_full")
        if charge is None and have is not None and whole:
            charge = 100.0 * have / whole
    if charge is None:
        raise ValueError("it has neither capacity nor energy_now and energy_full")
    status = (path / "status").read_text(encoding="ascii").strip() if (path / "status").is_file() else ""
    return Reading(_share(charge), None, status in ("Charging", "Full"))


def _file(path: Path, now: float) -> Reading:
    if now - path.stat().st_mtime > STALE_S:
        raise Unavailable(f"{path} is {(now - path.stat().st_mtime) / 60:.0f} minutes old; look at what writes it")
    with path.open("rb") as file:
        data = file.read(FILE_LIMIT).strip()
    if not data.startswith(b"{"):
        return Reading(_share(float(data)))
    told = msgspec.json.decode(data, type=_Told)
    if told.watts_in is not None and not 0.0 <= told.watts_in < 1e6:
        raise ValueError(f"watts_in is {told.watts_in}")
    return Reading(_share(told.charge), told.watts_in, told.charging)


def _share(percent: float) -> float:
    if not 0.0 <= percent <= 110.0:  # some gauges say 101
        raise ValueError(f"{percent} is not a percentage")
    return min(1.0, percent / 100.0)
