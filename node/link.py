"""The node's link: its rules, its day's bytes, and who else may spend them. A part of the daemon, and the answer to "may I?".

Everything that goes over the link asks here: the session and the outbox (they count and obey by themselves), downloads, sync windows,
what a memory would share. `keep` runs in the daemon's sweep, so counting never waits for the disk.
"""

from typing import Any

from sqlalchemy import Engine

from node.parts import Figure, Part
from node.settings import NodeSettings
from protocol.links import Traffic, Verdict, may_travel
from protocol.meter import Meter


class Link(Part):
    """What the link allows now."""

    name = "link"

    def __init__(self, settings: NodeSettings, engine: Engine) -> None:
        self.rules = settings.link_rules
        self.meter = Meter(engine, self.rules)

    def may_travel(self, what: Traffic) -> Verdict:
        """Whether this class of link carries that at all."""
        return may_travel(self.rules, what)

    def may_spend(self, cost: int, what: Traffic = "bulk") -> Verdict:
        """Whether so many bytes may be spent today."""
        return self.meter.may_spend(cost, what)

    def reload(self, settings: NodeSettings) -> None:
        """Another number of bytes a day; the class stays, since sessions were opened by it."""
        self.rules = settings.link_rules
        self.meter.obey(self.rules)

    def sweep(self) -> None:
        """Remember what was spent."""
        self.meter.keep()

    def stop(self) -> None:
        """Remember it exactly."""
        self.meter.settle()

    def status(self) -> dict[str, Any]:
        """For GET /v1/status."""
        return self.meter.status()

    def figures(self) -> tuple[Figure, ...]:
        """Bytes of the running day and the limit."""
        return (
            ("link_up_bytes", "Bytes sent today, headers included", lambda: float(self.meter.day.up)),
            ("link_down_bytes", "Bytes received today, headers included", lambda: float(self.meter.day.down)),
            ("link_limit_bytes", "Bytes that may be spent a day; 0 for no limit", lambda: float(self.rules.bytes_a_day)),
        )
