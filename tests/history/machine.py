"""Random histories of a real fleet (`world`), checked by `rules`: hypothesis tells them, dice with a seed choose what happens next.

    python -m tests.history.machine --seed 41 --steps 40        one history
    python -m tests.history.machine --seed 1 --seconds 3600     one after another, seeds 1, 2, 3, ...; `make soak`
    python -m tests.history.machine --seed 1 --steps 12 --paper 200     what 200 histories would hold, in seconds: for choosing seeds

A history that breaks a rule prints the rule, what happened, and the command that tells it again. Processes and wires have timing of their
own, so the same seed makes the same decisions and nearly the same history.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import ClassVar, NamedTuple

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from tests.history.rules import wrong
from tests.history.world import MODELS, World

DAY_S = 86_400.0
JUMPS = (-56 * 365 * DAY_S, -DAY_S, 0.0, 7_200.0, 40 * DAY_S)  # to 1970, a day back, right, two hours on, past the metadata
VERDICTS = ("leak", "normal", "dry-run")
STEPS = {
    "records_come": 3, "operator_speaks": 3, "broker_is_cut_off": 2, "store_is_cut_off": 1, "wires_heal": 3, "node_is_killed": 2,
    "peer_is_killed": 1, "broker_is_killed": 2, "clock_jumps": 2, "release_comes": 2, "release_is_revoked": 1, "release_is_spoiled": 1,
    "access_is_revoked": 1, "access_comes_back": 1, "a_moment_passes": 2,
}  # fmt: skip


class Told(NamedTuple):
    """A history that broke no rule."""

    held: str  # how many of what, in words
    log: list[str]  # what happened to the fleet, without its beginning and its end: lines of `World.log`


class Fleet(RuleBasedStateMachine):
    """Everything that happens to a fleet is one of STEPS, each as likely as its weight; requests come between, whatever the weather.

    One rule and not one for each: hypothesis switches rules off at random in each history, and then nothing meets anything. And dice of our
    own: hypothesis also draws numbers it finds in whatever modules are loaded, so that a seed told one history in pytest and another here.
    """

    number: ClassVar[int] = 0  # the seed, for the wires' own dice
    on_paper: ClassVar[bool] = False  # nothing is done, only drawn
    drawn: ClassVar[list[str]]  # the steps of the last history
    told: ClassVar[Told]

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="milpa-history-"))
        self.world: World | None = None
        self.asked = 0
        self.dice = random.Random(self.number)
        self.steps: list[str] = []
        self.begun = 0  # lines of the log before the first step

    @initialize(start=st.integers(0, 1_000_000))
    def begin(self, start: int) -> None:
        if start and not self.on_paper:  # hypothesis tries the simplest history first, the same for every seed: it is not played
            self.world = World(self.folder, seed=self.number)
            self.begun = len(self.world.log)
            self._ask(self.world)

    @rule()
    def happens(self) -> None:
        (what,), number = self.dice.choices(list(STEPS), list(STEPS.values())), self.dice.randint(0, 1_000)
        self.steps.append(what)
        if self.world is None:
            return
        getattr(self, what)(self.world, number)
        self._ask(self.world)

    def _ask(self, world: World) -> None:
        self.asked += 1
        world.ask(f"window {self.asked}: soil {self.asked % 40} C")

    def records_come(self, world: World, number: int) -> None:
        for _ in range(1 + number % 3):
            self._ask(world)

    def operator_speaks(self, world: World, number: int) -> None:
        world.correct(number, VERDICTS[number % len(VERDICTS)])

    def broker_is_cut_off(self, world: World, _: int) -> None:
        world.partition()

    def store_is_cut_off(self, world: World, _: int) -> None:
        world.lose_store()

    def wires_heal(self, world: World, _: int) -> None:
        world.heal()

    def node_is_killed(self, world: World, _: int) -> None:
        world.kill("esteli")

    def peer_is_killed(self, world: World, _: int) -> None:
        world.kill("base")

    def broker_is_killed(self, world: World, _: int) -> None:
        world.kill_broker()

    def clock_jumps(self, world: World, number: int) -> None:
        world.clock("esteli", JUMPS[number % len(JUMPS)])

    def release_comes(self, world: World, number: int) -> None:
        world.publish(number % MODELS)

    def release_is_revoked(self, world: World, number: int) -> None:
        if len(world.published) == 1:  # there is nothing to go back to
            world.publish(1 + number % (MODELS - 1))
        world.revoke()

    def release_is_spoiled(self, world: World, number: int) -> None:
        world.publish(number % MODELS)
        world.spoil()

    def access_is_revoked(self, world: World, _: int) -> None:
        world.revoke_access(back=False)

    def access_comes_back(self, world: World, _: int) -> None:
        world.revoke_access(back=True)

    def a_moment_passes(self, _: World, __: int) -> None:
        time.sleep(1.0)

    def teardown(self) -> None:
        type(self).drawn = self.steps
        if self.world is None:
            self.folder.rmdir()
            return
        try:
            self._ask(self.world)
            happened = self.world.log[self.begun :]
            seen = self.world.settle()
            found = wrong(seen)
            assert not found, "\n".join(found)
            peers = sum(change.by.startswith("peer:") for change in seen.changes)
            held = f"{len(seen.given)} answers, {peers} replies, {len(seen.corrected)} corrections, {len(self.world.published)} releases"
            type(self).told = Told(held, happened)
        except BaseException:
            print(f"what happened (all of it in {self.folder}):", *self.world.log, sep="\n  ", file=sys.stderr)
            self.world.close()
            raise
        self.world.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def history(number: int, *, steps: int) -> Told:
    """One history, and what it held. Raises what is wrong with it."""
    return _played(number, steps=steps).told


def plan(number: int, *, steps: int) -> list[str]:
    """The steps of a history, none of them taken."""
    return _played(number, steps=steps, on_paper=True).drawn


def _played(number: int, *, steps: int, on_paper: bool = False) -> type[Fleet]:
    class Seeded(Fleet):
        pass

    Seeded.number, Seeded.on_paper = number, on_paper
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        seed(number)(Seeded),
        settings=settings(
            max_examples=2,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            phases=(Phase.generate,),
            print_blob=False,
            suppress_health_check=list(HealthCheck),
        ),
        _min_steps=steps,
    )
    return Seeded


def main() -> None:
    """Histories until the time is over; 1 at the first that breaks a rule."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=0.0, help="0: this one history")
    parser.add_argument("--paper", type=int, default=0, metavar="COUNT", help="only say what so many histories would hold")
    said = parser.parse_args()
    for number in range(said.seed, said.seed + said.paper):
        print(f"history {number}: {', '.join(plan(number, steps=said.steps))}")
    if said.paper:
        return
    end, number = time.monotonic() + said.seconds, said.seed
    while True:
        began = time.monotonic()
        try:
            held = history(number, steps=said.steps).held
        except Exception:
            traceback.print_exc()
            sys.exit(f"history {number} breaks a rule; again: python -m tests.history.machine --seed {number} --steps {said.steps}")
        print(f"history {number}: all rules held; {said.steps} steps, {held}, {time.monotonic() - began:.0f} s", flush=True)
        number += 1
        if time.monotonic() >= end:
            return


if __name__ == "__main__":
    main()
