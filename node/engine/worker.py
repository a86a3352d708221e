"""The one thread that owns the model: records wait for it in a bounded queue, a new model takes its place between two records.

Rules:
 * Only this thread calls the engine's `generate`. Loading happens elsewhere, beside; the swap itself is one assignment.
 * A full queue is told at once (`Busy`), never waited for. A request past its deadline is dropped before the model reads it.
 * Swapping drops no request: what waits is answered by the new model.
Limits: `capacity` waiting requests; no batching, since one sequence already uses every thread it is given.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Protocol

import msgspec

from protocol.confidence import Calibration
from protocol.errors import BadInput, Unavailable
from protocol.models.engine import Generation

IDLE_S = 5.0  # seconds between looks at the stop flag when nothing is asked; `stop` wakes the thread anyway


class Busy(Unavailable):
    """The queue is full; ask again in a few seconds."""


class Late(Unavailable):
    """The deadline passed before there was an answer."""


class NoModel(Unavailable):
    """No model is active yet; the node waits for a release."""


class Speaks(Protocol):
    """What the worker needs of an engine; `protocol.models.engine.Engine` is the real one, tests bring a small one."""

    model_digest: str
    adapter_digest: str

    def generate(self, prompt: str, *, max_new_tokens: int) -> Generation:
        """Continue the prompt."""

    def close(self) -> None:
        """Free the memory."""


class Speaker(msgspec.Struct, frozen=True):
    """A model ready to answer, and what belongs to it."""

    engine: Speaks
    task: str
    release: int = 0  # 0: a fixed file from the settings
    calibration: Calibration | None = None  # None: none was shipped for exactly this model and adapter


class Spoken(msgspec.Struct, frozen=True):
    """A generation, and who made it."""

    generation: Generation
    speaker: Speaker


class _Job(msgspec.Struct):
    task: str
    prompt: str
    max_new_tokens: int
    deadline: float  # by the monotonic clock
    done: "Future[Spoken]"


class Worker:
    """Owns the speaker. `start`, `ask` from any thread, `stop`."""

    def __init__(self, *, capacity: int = 16, clock: Callable[[], float] = time.monotonic) -> None:
        self._jobs: queue.Queue[_Job | None] = queue.Queue(maxsize=capacity)
        self._clock = clock
        self._swap = threading.Lock()  # held while the model speaks and while it is exchanged
        self._speaker: Speaker | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="milpa-engine", daemon=True)

    @property
    def speaker(self) -> Speaker | None:
        """The active model, or None."""
        return self._speaker

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return self._jobs.qsize()

    @property
    def alive(self) -> bool:
        """Whether the owner thread runs."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the owner thread."""
        self._thread.start()

    def stop(self, *, timeout_s: float = 10.0) -> None:
        """Refuse what waits, finish the record under way, free the model."""
        self._stopping.set()
        with contextlib.suppress(queue.Full):  # a full queue needs no waking
            self._jobs.put_nowait(None)
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        while not self._jobs.empty():
            job = self._jobs.get_nowait()
            if job is not None and job.done.set_running_or_notify_cancel():
                job.done.set_exception(Unavailable("the node is stopping"))
        if not self._thread.is_alive():  # else the record under way still uses the model: the process ends soon, memory with it
            self.swap_after_current_record(None)

    def swap_after_current_record(self, speaker: Speaker | None) -> None:
        """Make `speaker` the active model as soon as the current record is answered, and free the one before."""
        with self._swap:
            before, self._speaker = self._speaker, speaker
        if before is not None and (speaker is None or before.engine is not speaker.engine):
            before.engine.close()

    def ask(self, task: str, prompt: str, *, max_new_tokens: int, deadline_s: float) -> Spoken:
        """Wait at most `deadline_s` seconds for the model's continuation of `prompt`.

        Raises:
            NoModel: nothing is active yet.
            Busy: the queue is full.
            Late: no answer within the deadline.
            BadInput: another task than the active model's, or a prompt the model cannot read.
        """
        if self._speaker is None:
            raise NoModel("no model is active yet: the node waits for its first release")
        job = _Job(task, prompt, max_new_tokens, self._clock() + deadline_s, Future())
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise Busy(f"{self._jobs.maxsize} requests already wait; try again in a few seconds") from None
        if self._stopping.is_set():
            raise Unavailable("the node is stopping")
        try:
            return job.done.result(timeout=deadline_s)
        except FutureTimeout:
            job.done.cancel()
            raise Late(f"no answer within {deadline_s:g} s") from None

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                job = self._jobs.get(timeout=IDLE_S)
            except queue.Empty:
                continue
            if job is None or not job.done.set_running_or_notify_cancel():
                continue  # woken, or its asker has gone
            try:
                job.done.set_result(self._speak(job))
            except Exception as error:  # the asker gets it; the owner thread must outlive any single prompt
                job.done.set_exception(error)

    def _speak(self, job: _Job) -> Spoken:
        if self._clock() > job.deadline:
            raise Late("the deadline passed while the request waited")
        with self._swap:
            speaker = self._speaker
            if speaker is None:
                raise NoModel("no model is active: the node waits for a release")
            if job.task != speaker.task:
                raise BadInput(f"this node answers {speaker.task!r}, not {job.task!r}")
            return Spoken(speaker.engine.generate(job.prompt, max_new_tokens=job.max_new_tokens), speaker)


def usable(calibration: Calibration | None, engine: Speaks) -> Calibration | None:
    """The calibration, if it was made for exactly this model and adapter."""
    if calibration is None or not calibration.fits(engine.model_digest, engine.adapter_digest):
        return None
    return calibration
