"""Power as the rest of the node sees it: how it stands, what may run, what was spent. Any thread may ask.

Rules:
 * The battery is read and the counts are written in the daemon's sweep. Who asks gets the last word; only where nobody has looked for
   OLD_S does asking look, and never while another thread does: a gauge that hangs, or a slow disk, holds nobody up.
 * A gauge that has hung for SILENT_S is bad news, as one that says nothing.

Joules come from a stated model (`rules.watts_of`), not from a meter; the charge is read where a battery can be, and modelled elsewhere.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from node.energy import rules
from node.energy.book import Book
from node.energy.readings import Reading, read
from node.energy.rules import DAY_S, SEEN_DARK_S, STEP_S, WORKS, Duty, Kind, Plant, PowerState, Work
from node.parts import Figure, Part
from node.update.rules import BUILT_AT
from protocol.errors import Unavailable
from protocol.links import Verdict

if TYPE_CHECKING:
    from node.settings import NodeSettings

LOOK_S = 5.0  # seconds between two looks at the battery
OLD_S = 30.0  # seconds; the sweep looks more often
SILENT_S = 900.0  # seconds; as a file that is not written any more
BOOK = "energy.json"


class Power(Part):
    """The node's power. A part of the daemon, and complete without one: it has no thread.

    Args:
        folder: where the counts are kept; None: nowhere.
        reading: the battery's own word, or None where nothing is measured. Raises Unavailable when it says nothing.
        clock: seconds since 1970, right or wrong.
        cores: of this machine.
        threads: that an answer uses.
    """

    name = "power"

    def __init__(
        self,
        plant: Plant,
        *,
        folder: Path | None = None,
        reading: Callable[[], Reading] | None = None,
        clock: Callable[[], float] = time.time,
        cores: int = os.cpu_count() or 1,
        threads: int = 1,
    ) -> None:
        self.plant = plant
        self._reading, self._clock = reading, clock
        self._cores, self._threads = cores, threads
        self._lock = threading.Lock()  # held for moments: arithmetic only
        self._looking = threading.Lock()  # held while the battery is read and the counts are written
        self._book = Book(folder / BOOK if folder else None)
        self._duty = Duty()
        self._looked = 0.0
        self._begun = False
        self._out_joules = 0.0  # spent since the last look, idling left out
        self._history: deque[tuple[float, float, float]] = deque(maxlen=256)  # (time, charge read, joules out so far)
        self._out_so_far = 0.0
        self._state = PowerState(plant.source, self._book.charge, 0.0, plant.source == "mains")

    def reload(self, settings: "NodeSettings") -> None:
        """Other figures of the plant; what was counted stays."""
        with self._lock:
            self.plant = settings.power

    def now(self) -> PowerState:
        """How it stands."""
        self._look(OLD_S)
        with self._lock:
            silent = self._reading is not None and self._begun and self._clock() - self._looked > SILENT_S
            if not silent:
                return self._state
        return msgspec.structs.replace(self._state, surplus=False, problem="reading the battery has not ended; look at what it hangs on")

    def may(self, work: Work) -> Verdict:
        """Whether this work may run now. Answering does not ask."""
        return rules.may(self.plant, self.now(), work)

    def sleeping_until(self) -> int:
        """When this node is of use to others again, seconds since 1970; 0 while it is awake."""
        return rules.sleeping_until(self.plant, self.now(), self._clock())

    def spent(self, kind: Kind, seconds: float, *, threads: int = 1) -> None:
        """Count work that was done."""
        joules = rules.watts_of(self.plant, kind, cores=threads / self._cores) * seconds
        with self._lock:
            self._out_joules += joules
            self._book.add(kind, joules, self._clock())

    def worked(self, seconds: float, spare: bool) -> None:
        """The model computed: for somebody who asked, or spare samples."""
        self.spent("agree" if spare else "answer", seconds, threads=self._threads)

    def watts(self, kind: Kind, *, threads: int = 1) -> float:
        """What a kind of work takes."""
        return rules.watts_of(self.plant, kind, cores=threads / self._cores)

    def joules(self) -> dict[Kind, float]:
        """By kind, since counting began."""
        with self._lock:
            return dict(self._book.totals)

    def joules_today(self, kind: Kind) -> float:
        """Of the day by the node's clock, UTC."""
        with self._lock:
            return self._book.today(self._clock()).get(kind, 0.0)

    def status(self) -> dict[str, Any]:
        """For GET /v1/status."""
        found, now = self.now(), self._clock()
        waits = {work: verdict.reason for work in WORKS if not (verdict := self.may(work)).ok}
        with self._lock:
            today = self._book.today(now)
        told: dict[str, Any] = {"source": found.source, "surplus": found.surplus, "waits": waits, "sleeping_until": self.sleeping_until()}
        if found.source != "mains":
            told |= {
                "charge": round(found.charge, 3), "measured": found.measured, "watts_in": round(found.watts_in, 2),
                "reserve": round(found.reserve, 3),
            }  # fmt: skip
        return told | {"joules_today": {kind: round(joules, 1) for kind, joules in sorted(today.items())}}

    def sweep(self) -> None:
        """Look, so that idling is counted and the battery followed when nobody asks."""
        self._look(LOOK_S)

    def stop(self) -> None:
        """Write the counts down."""
        self._look(0.0, save=True)

    def figures(self) -> tuple[Figure, ...]:
        """The battery, where there is one. Joules are counters: see `joules`."""
        if self.plant.source == "mains":
            return ()
        return (
            ("battery_ratio", "Charge of the battery, 0 to 1", lambda: self.now().charge),
            ("battery_reserve_ratio", "Charge kept for days without sun", lambda: self.now().reserve),
            ("panel_watts", "Power from the panel, measured or by the model", lambda: self.now().watts_in),
            ("power_surplus", "1 while what waits for sun may run", lambda: float(self.now().surplus)),
        )

    def _look(self, every_s: float, *, save: bool = False) -> None:
        """Look, if the last look is older than that and nobody else is looking; write the counts, if it is time."""
        if self._begun and 0.0 <= self._clock() - self._looked < every_s:
            return
        if not self._looking.acquire(blocking=False):
            return  # somebody looks: the last word stands
        try:
            reading, problem = self._read()
            with self._lock:
                now = self._clock()
                self._take(now, reading, problem)
                data = self._book.to_save(now, at_once=save)
            if data:
                self._book.write(data)
        finally:
            self._looking.release()

    # ---- with the lock held

    def _take(self, now: float, reading: Reading | None, problem: str) -> None:
        self._account(now, now - self._looked)
        if self.plant.source == "solar" and now < BUILT_AT and (reading is None or reading.watts_in is None):
            problem = problem or "the clock is not set, so nobody knows where the sun stands"
        if problem:
            self._history.clear()
        watts_in = self._watts_in(now, reading)
        charge = reading.charge if reading else self._book.charge
        kept = rules.reserve(self.plant, self._book.answering_wh(now))
        self._duty = rules.next_duty(self._duty, self.plant, charge=charge, watts_in=watts_in, kept=kept)
        self._state = rules.state(
            self.plant, self._duty, charge=charge, watts_in=watts_in, kept=kept, measured=reading is not None,
            charging=reading is not None and reading.charging, problem=problem,
        )  # fmt: skip
        self._book.charge, self._book.at = charge, now
        self._looked, self._begun = now, True

    def _account(self, now: float, passed: float) -> None:
        """Idling, and the modelled charge, since the last look. A clock that was set counts as no time."""
        before = self._book.at
        if not self._begun:  # at start: how long was nobody here?
            if before and now > before:
                self._book.charge = rules.charge_over_gap(self.plant, self._book.charge, before, now)
            return
        if not 0.0 < passed < DAY_S:
            return
        self._book.add("idle", self.plant.idle_w * passed, now)
        self._out_so_far += self.plant.idle_w * passed + self._out_joules
        watts_out = self.plant.idle_w + self._out_joules / passed
        self._out_joules = 0.0
        coming = self.plant.clearness * self._clear(now - passed / 2)
        self._book.charge = rules.charge_after(self.plant, self._book.charge, coming, watts_out, passed)

    def _read(self) -> tuple[Reading | None, str]:
        if self._reading is None:
            return None, ""
        try:
            return self._reading(), ""
        except Unavailable as error:
            return None, str(error)

    def _watts_in(self, now: float, reading: Reading | None) -> float:
        """As measured; else what the charge of the last hour tells; else the sky that is counted on."""
        clear = self._clear(now)
        if reading is None:
            return self.plant.clearness * clear
        if reading.watts_in is not None:
            return reading.watts_in
        self._remember(now, reading.charge)
        began, before, out = self._history[0]
        if reading.charge >= rules.FULL or now - began < SEEN_DARK_S / 2:
            return clear
        seconds = now - began
        told = rules.watts_by_balance(self.plant, before, reading.charge, seconds, (self._out_so_far - out) / seconds)
        return min(clear, told)

    def _remember(self, now: float, charge: float) -> None:
        if self._history and (now < self._history[-1][0] or now - self._history[-1][0] > STEP_S * 3):
            self._history.clear()  # the clock was set, or nobody looked
        if not self._history or now - self._history[-1][0] >= 60.0:
            self._history.append((now, charge, self._out_so_far))
        while now - self._history[0][0] > SEEN_DARK_S:
            self._history.popleft()

    def _clear(self, now: float) -> float:
        """The clear sky; none where the clock is not set, since nobody knows where the sun stands."""
        return rules.clear_watts(self.plant, now) if now >= BUILT_AT else 0.0


def power_of(settings: "NodeSettings", clock: Callable[[], float] = time.time) -> Power:
    """The power that the settings describe."""
    battery = Path(settings.power.battery).expanduser() if settings.power.battery else None
    reading = (lambda: read(battery)) if battery else None
    return Power(settings.power, folder=settings.state_dir, reading=reading, clock=clock, threads=settings.model.threads)
