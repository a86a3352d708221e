"""What the daemon starts and stops beside its core: each part is built by node/app.py and owns its threads, figures and words.

A part overrides what it has. Rules:
 * `start` returns at once and waits for nothing off the machine; `stop` ends every thread within its deadline.
 * `status` is part of GET /v1/status under the part's name; `figures` become gauges `milpa_node_NAME`, in base units.
 * `trouble` names what a restart of the process would mend (a dead thread), never what it would not (an absent broker).
 * `reload` is given new settings of which only the keys in node/reload.py differ.
"""

from collections.abc import Callable
from threading import Event, Thread
from typing import Any

from node.settings import NodeSettings

Figure = tuple[str, str, Callable[[], float]]  # name without `milpa_node_`, what it is, its value now


def dead(thread: Thread | None, stopping: Event) -> str:
    """A part's `trouble` with its thread: "" while it lives, was not started, or is to end."""
    lives = thread is None or thread.ident is None or thread.is_alive() or stopping.is_set()
    return "" if lives else "the thread is dead"


class Part:
    """Something that runs beside the core."""

    name = "part"  # key in the status

    def start(self) -> None:
        """Start its threads."""

    def stop(self) -> None:
        """End its threads; what was accepted is on disk."""

    def sweep(self) -> None:
        """Called about once a second by the daemon's own thread: expire, prune. Must be quick."""

    def reload(self, settings: NodeSettings) -> None:
        """Take what changed."""

    def status(self) -> dict[str, Any] | None:
        """For GET /v1/status; None leaves it out."""
        return None

    def figures(self) -> tuple[Figure, ...]:
        """Gauges for Prometheus."""
        return ()

    def trouble(self) -> str:
        """Why the supervisor should start this process again; "" when all is well."""
        return ""
