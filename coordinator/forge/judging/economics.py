"""What an answer costs: bytes, memory, time, processor seconds, and joules by a stated model. No I/O.

* CPU-seconds are the engine process's own (getrusage), so a busy machine does not make a model dearer; loading is not counted.
* Joules are CPU-seconds times watts a busy core. That is a model and not a measurement: board, memory, radio and idle time are left out,
  and the watts are of the machine that ran it, not of a board in the field. The assumption goes wherever a joule goes.
* Ratios of two models are paired over the records, with their interval.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from coordinator.forge.judging.evaluation import Evaluation
from coordinator.forge.judging.metrics import paired_ratio
from protocol.confidence import quantile
from protocol.errors import BadInput

ANSWERS = 1_000  # that costs are given for


class PowerModel(msgspec.Struct, frozen=True):
    """From CPU-seconds to joules."""

    watts_per_core: float  # of one busy core
    source: str  # where the figure comes from, in words that are printed beside every joule

    def __post_init__(self) -> None:
        if not 0 < self.watts_per_core < 1000:
            raise ValueError(f"{self.watts_per_core} W a core is not a processor's")


ASSUMED = PowerModel(6.75, "assumed, not measured: a server processor's rated 270 W over its 40 cores (Xeon Platinum 8380)")


def given(watts: float | None) -> PowerModel:
    """The model with an operator's own figure; the stated assumption without one.

    Raises:
        BadInput: not a processor's power.
    """
    try:
        return ASSUMED if watts is None else PowerModel(watts, "as given by whoever ran it")
    except ValueError as error:
        raise BadInput(f"{error}; give the watts of one busy core, such as 6.75") from error


class Cost(msgspec.Struct, frozen=True):
    """One model on this machine, one thread."""

    file_bytes: int
    peak_rss_mb: float  # MiB, of the engine
    tokens_per_second: float
    latency_p50_ms: float
    latency_p95_ms: float
    cpu_seconds_per_1000: float
    joules_per_1000: float
    n: int  # answers measured


def cost(evaluation: Evaluation, power: PowerModel = ASSUMED) -> Cost | None:
    """A model's costs; None where no engine of ours was measured (a peer, answers that came as text)."""
    seconds = [answer.seconds for answer in evaluation.answers]
    cpu = sum(answer.cpu_seconds for answer in evaluation.answers)
    if not evaluation.model_digest or cpu <= 0:
        return None
    each = ANSWERS * cpu / len(seconds)
    return Cost(
        file_bytes=round(evaluation.file_mb * (1 << 20)), peak_rss_mb=evaluation.peak_rss_mb,
        tokens_per_second=sum(answer.tokens for answer in evaluation.answers) / sum(seconds),
        latency_p50_ms=1000 * quantile(seconds, 0.5), latency_p95_ms=1000 * quantile(seconds, 0.95),
        cpu_seconds_per_1000=each, joules_per_1000=each * power.watts_per_core, n=len(seconds),
    )  # fmt: skip


def share(teacher: Evaluation, student: Evaluation, *, seed: int) -> dict[str, Any] | None:
    """What share of the teacher's cost the student's is: `cpu` with its paired interval, `bytes` and `memory` as they are.

    Returns:
        {"cpu": {ratio, low, high, n}, "bytes": r, "memory": r}; None where one of them was not measured.
    """
    if cost(teacher) is None or cost(student) is None:
        return None
    cpu = paired_ratio(
        [answer.cpu_seconds for answer in teacher.answers], [answer.cpu_seconds for answer in student.answers], seed=seed
    )  # joules are the same ratio: one factor on both sides
    return cpu and {"cpu": cpu, "bytes": student.file_mb / teacher.file_mb, "memory": student.peak_rss_mb / teacher.peak_rss_mb}


def table(models: Mapping[str, Evaluation], power: PowerModel) -> dict[str, Any]:
    """Every measured model's costs as plain values."""
    return {name: msgspec.to_builtins(found) for name, each in models.items() if (found := cost(each, power)) is not None}
