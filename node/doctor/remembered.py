"""Whether the memory is of use: exact answers need nothing, near ones and examples need two libraries and a whole file."""

import importlib.util
from typing import Any

from node.doctor.finding import Finding
from node.memory.vectors import CURE
from node.settings import NodeSettings

FILE = "memory.db"
MAGIC = b"SQLite format 3\0"  # how a whole file begins


def memory(settings: NodeSettings, *, running: dict[str, Any]) -> Finding:
    """What the memory does, and what keeps it from more."""
    use, told = settings.memory.use, running.get("memory")
    if use in ("off", "exact"):
        return Finding("memory", "good", "not used" if use == "off" else "the same records are answered from memory")
    if missing := [name for name in ("apsw", "sqlite_vec") if importlib.util.find_spec(name) is None]:
        return Finding(
            "memory", "warn", f"memory.use is {use}, but {' and '.join(missing)} cannot be loaded", f"{CURE}; exact answers go on"
        )
    if isinstance(told, dict):
        if told.get("problem"):
            return Finding("memory", "warn", str(told["problem"]), "exact answers go on; give the node disk space: vectors are made anew")
        if use == "near" and not told.get("trusted") and not told.get("to_make"):
            return Finding("memory", "good", f"no similarity is trusted yet, of {told.get('answers')} confirmed answers")
        return Finding("memory", "good", f"{told.get('vectors')} vectors, {told.get('to_make')} to make")
    file = settings.state_dir / FILE
    try:
        with file.open("rb") as opened:
            whole = opened.read(len(MAGIC)) == MAGIC
    except FileNotFoundError:
        return Finding("memory", "good", "no vectors yet")
    except PermissionError:
        raise  # the folder is closed to whoever asks: `examine` says so
    except OSError as error:
        return Finding("memory", "warn", f"cannot read {file}: {error.strerror}", "delete it: the node makes it anew when it runs")
    if not whole:
        return Finding("memory", "warn", f"{file} is damaged", "nothing is lost: the node makes it anew when it runs")
    return Finding("memory", "good", f"vectors in {file}")
