"""What the kill tests run in a process of its own: the real update or the real publish, ended by SIGKILL at a named step."""

import os
import signal
from pathlib import Path


def killer(at: str, log: Path | None = None):
    def step(name: str) -> None:
        if log is not None:
            with log.open("a") as file:
                file.write(name + "\n")
        if name == at:
            os.kill(os.getpid(), signal.SIGKILL)

    return step


def update(state: Path, url: str, root: bytes, now: float, at: str, log: Path | None = None, failing: str = "") -> None:
    from node.update.rules import Machine
    from node.update.updater import Updater

    def work(what: str):
        def run(candidate):
            if what == failing and candidate.number == 2:
                raise RuntimeError("gibberish")

        return run

    updater = Updater(
        state, url=url, root=root, self_test=work("test"), activate=work("switch"), machine=Machine(512), step=killer(at, log)
    )  # fmt: skip
    updater.slots.starting()
    updater.check(now)


def publish(store: Path, number: int, files: list, now: float, at: str, log: Path | None = None) -> None:
    from coordinator.fleet.publishing import Publisher, build_release

    publisher = Publisher(store, clock=lambda: now, step=killer(at, log))
    publisher.init()
    release, paths = build_release(number, "ranch", files, created=int(now))
    publisher.publish(release, paths)
