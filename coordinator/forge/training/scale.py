"""Several processes, one training: the `World` of `protocol.models.training` over accelerate's launcher, on CPUs (gloo) and GPUs (nccl).

    accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no \
        -m coordinator.cli distill ... --accumulate 2

is the command for both: accelerate 1.15 starts that many processes where there is no GPU too, and with its `--cpu` it starts one.

Rules:
 * A step is `accumulate` batches whatever the number of processes, so 1 and N make the same steps; N has to divide it.
 * The first process alone writes files; the others wait for it, at most `WAIT`. A process that dies ends them all (the launcher's doing).
 * Budgets of seconds are the first process's: all stop after the same step.
Limits: all processes see the same work folder; trimming, capture and export use one process (capture shares its records by `--shard`).
"""

import datetime
import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch

from protocol.models.training import Alone, World

WAIT = datetime.timedelta(hours=12)  # for the first process's longest stage, a capture; a hang ends here, a crash at once

T = TypeVar("T")


class Together(World, Protocol):
    """A world whose processes can wait for each other."""

    device: torch.device  # of this process's model

    def wait(self) -> None:
        """Until all are here."""
        ...


class OneProcess(Alone):
    """No launcher: everything is this process's."""

    device = torch.device("cpu")

    def wait(self) -> None:
        """Nobody to wait for."""

    def close(self) -> None:
        """No group to leave."""


class Launched:
    """One of several processes that a launcher started."""

    def __init__(self) -> None:
        from accelerate import Accelerator, InitProcessGroupKwargs

        self._accelerator: Any = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[InitProcessGroupKwargs(timeout=WAIT)])
        self.rank: int = self._accelerator.process_index
        self.size: int = self._accelerator.num_processes
        self.device: torch.device = self._accelerator.device

    def add(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each, in place, by its sum over all processes."""
        for handle in [torch.distributed.all_reduce(tensor, async_op=True) for tensor in tensors]:
            handle.wait()

    def agree(self, number: float) -> float:
        """The first process's number."""
        told = torch.tensor([number], dtype=torch.float64, device=self.device)
        torch.distributed.broadcast(told, src=0)
        return float(told)

    def wait(self) -> None:
        """Until all are here."""
        self._accelerator.wait_for_everyone()

    def close(self) -> None:
        """Leave the group; the last call of a process."""
        torch.distributed.destroy_process_group()


def world() -> OneProcess | Launched:
    """This process's world, as its launcher described it; alone without one."""
    return Launched() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else OneProcess()


def first(together: Together, make: Callable[[], T]) -> T:
    """`make` by the first process while the others wait; then by them, which find on disk what it left."""
    made = make() if together.rank == 0 else None
    together.wait()
    return make() if made is None else made
