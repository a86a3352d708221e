"""Fuzzed inputs into every parser of the node (tests/fuzz): how many the least run one took, and that none crashed it.

A crash makes the figure the number of inputs before the first one. llama.cpp behind our check is fuzzed too, far fewer times (a process
an input); it is told and does not count. Goes on where it ended.
"""

from typing import Any

from bench.settings import Settings
from tests.fuzz.run import measured
from tests.fuzz.targets import NAMES

EXECUTIONS, QUICK = 1_000_000, 200
APART = ("llama",)


def measure(settings: Settings) -> dict[str, Any]:
    wanted, work = QUICK if settings.quick else EXECUTIONS, settings.folder("fuzz_executions")
    found = {name: measured(name, seed=settings.seed, executions=wanted, work=work) for name in NAMES}
    clean = {name: min([told["executions"], *(crash["number"] for crash in told["crashes"])]) for name, told in found.items()}
    counted = {name: count for name, count in clean.items() if name not in APART}
    return {
        "figure": min(counted.values()), "n": sum(counted.values()), "against": {},
        "executions": clean, "seconds_each": {name: told["seconds"] for name, told in found.items()},
        "crashes": {name: told["crashes"] for name, told in found.items() if told["crashes"]},
    }  # fmt: skip
