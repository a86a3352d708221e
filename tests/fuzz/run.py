"""Damaged inputs into every parser: `python -m tests.fuzz.run --executions 1000000`, or `make fuzz`.

    python -m tests.fuzz.run --only gguf,http --seed 7 --executions 20000
    python -m tests.fuzz.run --only gguf --seed 7 --at 4711            that one input again, its bytes and its error
    python -m tests.fuzz.run --work var/fuzz                           goes on where it ended

A crash is anything but a MilpaError: another exception, a hang over SLOW_S, a process that dies. Its input goes to WORK/crashes (with the
command that repeats it on stderr); once mended it belongs into tests/fuzz/vectors/NAME/. Each target runs in a process of its own with a
limit on memory, so that a length that is believed before it is checked shows.
"""

import argparse
import contextlib
import faulthandler
import json
import logging
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from protocol.blobs import write_atomically
from protocol.errors import MilpaError
from tests.fuzz.mutate import mutated
from tests.fuzz.targets import NAMES, Target, opened

SLOW_S = 5.0  # seconds for one input of at most 80 kB
HUNG_S = 120.0  # seconds until a hang ends the process, with every thread's stack
MEMORY = 1 << 30  # bytes beyond what the process has when it begins
SAVE_EVERY = 5_000  # executions
CRASHES_KEPT = 20  # a target; then something is broken altogether


class Crash(NamedTuple):
    """An input that something else than a MilpaError came of."""

    number: int
    data: bytes
    error: str


def attempt(target: Target, data: bytes) -> str:
    """What went wrong with this input; "" when nothing did."""
    began = time.monotonic()
    try:
        with contextlib.suppress(MilpaError):
            target.parse(data)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:500]
    took = time.monotonic() - began
    return f"took {took:.1f} s" if took > SLOW_S else ""


def crashes(target: Target, *, seed: int, start: int, stop: int) -> Iterator[Crash | int]:
    """Every crash among the inputs from `start` to `stop`; and now and then the number of inputs that are done."""
    for number in range(start, stop):
        data = mutated(seed, target.name, number, target.corpus)
        if error := attempt(target, data):
            yield Crash(number, data, error)
        if (number + 1) % SAVE_EVERY == 0:
            yield number + 1
    yield stop


def main() -> None:
    """Run, and exit with 1 when something crashed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="targets, with commas: " + ", ".join(NAMES))
    parser.add_argument("--executions", type=int, default=1_000_000, help="inputs a target; the slow ones make their share of it")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("var/fuzz"), help="progress and crashes, kept between runs")
    parser.add_argument("--at", type=int, help="only this input, told in full")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    said = parser.parse_args()
    names = [name for name in said.only.split(",") if name] or list(NAMES)
    if unknown := set(names) - set(NAMES):
        sys.exit(f"no target is called {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    if said.at is not None:
        sys.exit(_again(names[0], said.seed, said.at))
    if said.child:
        _limited(names[0], said.seed, said.executions, said.work)
        return
    found = {name: measured(name, seed=said.seed, executions=said.executions, work=said.work) for name in names}
    for name, told in found.items():
        print(f"{name:<12} {told['executions']:>9} inputs  {len(told['crashes'])} crashes  {told['seconds']:.0f} s")
    sys.exit(1 if any(told["crashes"] for told in found.values()) else 0)


def measured(name: str, *, seed: int, executions: int, work: Path) -> dict:  # type: ignore[type-arg]
    """Fuzz one target in a process of its own, from where an earlier run ended; its progress file as a value."""
    command = [sys.executable, "-m", "tests.fuzz.run", "--child", "--only", name, "--seed", str(seed), "--executions", str(executions)]
    done = subprocess.run([*command, "--work", str(work)], check=False)
    told = _progress(work, name, seed)
    if done.returncode:  # it died: what it was doing is the first input after the last word
        told["crashes"].append({"number": told["executions"], "error": f"the process ended with {done.returncode}, here or soon after"})
        print(f"{name}: the process ended with {done.returncode} after input {told['executions']}", file=sys.stderr)
    return told


def _limited(name: str, seed: int, executions: int, work: Path) -> None:
    told = _progress(work, name, seed)
    logging.disable()  # a parser that sets a file aside says so, a million times
    with opened(name) as target:
        used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
        began, before = time.monotonic(), told["seconds"]
        stop = max(1, round(executions * target.share))
        faulthandler.dump_traceback_later(HUNG_S, exit=True)
        for event in crashes(target, seed=seed, start=told["executions"], stop=stop):
            if isinstance(event, Crash):
                _tell(work, name, seed, event)
                told["crashes"].append({"number": event.number, "error": event.error})
            else:
                told["executions"] = max(event, told["executions"])
            told["seconds"] = round(before + time.monotonic() - began, 1)
            write_atomically(_file(work, name, seed), json.dumps(told).encode())
            faulthandler.dump_traceback_later(HUNG_S, exit=True)
            if len(told["crashes"]) >= CRASHES_KEPT:
                break
        faulthandler.cancel_dump_traceback_later()


def _tell(work: Path, name: str, seed: int, crash: Crash) -> None:
    file = work / "crashes" / name / f"{seed}-{crash.number}.bin"
    write_atomically(file, crash.data)
    print(f"{name}: {crash.error}\n  {file}\n  python -m tests.fuzz.run --only {name} --seed {seed} --at {crash.number}", file=sys.stderr)


def _again(name: str, seed: int, number: int) -> int:
    with opened(name) as target:
        data = mutated(seed, name, number, target.corpus)
        print(data[:2_000])
        with contextlib.suppress(MilpaError):
            target.parse(data)  # its traceback is what was asked for
    return 0


def _file(work: Path, name: str, seed: int) -> Path:
    return work / f"{name}-{seed}.json"


def _progress(work: Path, name: str, seed: int) -> dict:  # type: ignore[type-arg]
    file = _file(work, name, seed)
    if file.is_file():
        return dict(json.loads(file.read_bytes()))
    return {"executions": 0, "seconds": 0.0, "crashes": []}


if __name__ == "__main__":
    main()
