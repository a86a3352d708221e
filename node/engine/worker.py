"""The one thread that owns the model: work waits for it in a bounded queue, a new model takes its place between two pieces of work.

Rules:
 * Only this thread computes with the engine. Loading happens elsewhere, beside; the swap itself is one assignment.
 * A full queue is told at once (`Busy`, with the seconds that what waits will take), never waited for.
 * A request past its deadline, or whose asker has gone, is dropped before the model reads it and stopped between two tokens after that.
 * Answers and vectors first. `sample` is spare work: refused while anything waits, given up as soon as an answer is wanted.
 * Swapping drops no request: what waits is answered by the new model.
Limits: `capacity` waiting requests; no batching, since one sequence already uses every thread it is given.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from protocol.confidence import Calibration
from protocol.errors import BadInput, Unavailable
from protocol.models.generation import Generation, Piece
from protocol.tasks import Form, Record, Task

if TYPE_CHECKING:  # a daemon without a model must not pay for llama.cpp and numpy: 20 MiB
    import numpy as np
    from numpy.typing import NDArray

IDLE_S = 5.0  # seconds between looks at the stop flag when nothing is asked; `stop` wakes the thread anyway
FIRST_GUESS_S = 0.1  # seconds a record takes, before any was answered
REMEMBERED = 0.2  # weight of the latest record in the running mean of seconds a record
FIRST, SPARE, LAST = 0, 1, 2  # order in the queue: answers, sampling, nothing

OnPiece = Callable[[Piece], None]
OnWorked = Callable[[float, bool], None]  # seconds the model computed, and whether it was spare work; must be quick


class Busy(Unavailable):
    """The queue is full; ask again in `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Late(Unavailable):
    """The deadline passed before there was an answer."""


class Gone(Unavailable):
    """Whoever asked has hung up; nothing was stored."""


class NoModel(Unavailable):
    """No model is active yet; the node waits for a release."""


class Speaks(Protocol):
    """What the worker needs of an engine; `protocol.models.engine.Engine` is the real one, tests bring a small one."""

    model_digest: str
    adapter_digest: str
    parameters: int  # of the model; 0: not known

    def generate(
        self, prompt: str, *, max_new_tokens: int, form: Form | None = None, on_piece: OnPiece | None = None, alternatives: int = 0
    ) -> Generation:
        """Continue the prompt."""

    def sample(
        self, prompt: str, *, n: int, temperature: float, seed: int, max_new_tokens: int, form: Form | None = None,
        on_piece: OnPiece | None = None,
    ) -> list[Generation]:  # fmt: skip
        """Continue the prompt `n` times, by chance."""

    def embed(self, text: str) -> NDArray[np.float32]:
        """The text as a vector of length 1."""

    def count(self, text: str) -> int:
        """How many tokens the text has for this model."""

    def set_adapter(self, path: Path | None) -> None:
        """Put that adapter on the model; None: the bare model."""

    def close(self) -> None:
        """Free the memory."""


class Speaker(msgspec.Struct, frozen=True):
    """A model ready to answer, and what belongs to it. It keeps the digests it began with: the engine may be given another adapter."""

    engine: Speaks
    task: str
    release: int = 0  # 0: a fixed file from the settings
    calibration: Calibration | None = None  # None: none was shipped for exactly this model and adapter
    model_digest: str = ""  # these two are the engine's
    adapter_digest: str = ""

    def __post_init__(self) -> None:
        """Note what the engine is now."""
        msgspec.structs.force_setattr(self, "model_digest", self.engine.model_digest)
        msgspec.structs.force_setattr(self, "adapter_digest", self.engine.adapter_digest)


class Spoken(msgspec.Struct, frozen=True):
    """A generation, and who made it."""

    generation: Generation
    speaker: Speaker


class Embedded(msgspec.Struct, frozen=True):
    """A text as a vector, and whose: vectors of two models are not comparable."""

    vector: NDArray[np.float32]  # (hidden,), of length 1
    speaker: Speaker
    tokens: int = 0  # read


class Listening(msgspec.Struct, frozen=True):
    """Who hears an answer while it is said."""

    on_piece: OnPiece | None = None  # called in the owner thread with every token; must not block
    alternatives: int = 0  # likeliest tokens to tell at each place
    max_tokens: int | None = None  # fewer than the task's own are enough
    gone: threading.Event = msgspec.field(default_factory=threading.Event)  # set when nobody wants the answer any more


class _Job(msgspec.Struct):
    task: str  # "": any
    work: Callable[[Speaker, OnPiece], Any]  # what to compute; the second is called at every token and raises when it is to stop
    deadline: float  # by the monotonic clock
    rank: int
    done: Future[Any]
    gone: threading.Event  # set by an asker who no longer waits


class Worker:
    """Owns the speaker. `start`, `ask` from any thread, `stop`."""

    def __init__(
        self, *, capacity: int = 16, clock: Callable[[], float] = time.monotonic, on_worked: OnWorked = lambda seconds, spare: None
    ) -> None:
        self._on_worked = on_worked
        self._jobs: queue.PriorityQueue[tuple[int, int, _Job | None]] = queue.PriorityQueue(maxsize=capacity)
        self._order = itertools.count()
        self._seconds = FIRST_GUESS_S  # running mean of what a record takes
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
    def retry_after_s(self) -> int:
        """Whole seconds until what waits now is answered, at the speed of the latest records."""
        return max(1, math.ceil((self.waiting + 1) * self._seconds))

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
            self._jobs.put_nowait((LAST, next(self._order), None))
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        while not self._jobs.empty():
            _, _, job = self._jobs.get_nowait()
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

    def readapt(self, change: Callable[[Speaker], Speaker]) -> None:
        """Let `change` put another adapter on the active model between two pieces of work; what it returns answers from then on.

        Raises:
            NoModel: nothing is active.
            whatever `change` raises: the speaker before goes on, so `change` must leave its engine as it was.
        """
        with self._swap:
            if self._speaker is None:
                raise NoModel("no model is active: there is nothing to put an adapter on")
            self._speaker = change(self._speaker)

    def ask(
        self,
        task: str,
        prompt: str,
        *,
        max_new_tokens: int,
        deadline_s: float,
        form: Form | None = None,
        listening: Listening | None = None,
    ) -> Spoken:
        """Wait at most `deadline_s` seconds for the model's continuation of `prompt`.

        Args:
            form: see `Engine.generate`.
            listening: who hears it meanwhile.

        Raises:
            NoModel: nothing is active yet.
            Busy: the queue is full.
            Late: no answer within the deadline.
            Gone: the listener is.
            BadInput: another task than the active model's, or a prompt the model cannot read.
        """
        heard = listening or Listening()
        limit = min(max_new_tokens, heard.max_tokens or max_new_tokens)

        def work(speaker: Speaker, check: OnPiece) -> Spoken:
            def each(piece: Piece) -> None:
                check(piece)
                if heard.on_piece is not None:
                    heard.on_piece(piece)

            said = speaker.engine.generate(prompt, max_new_tokens=limit, form=form, on_piece=each, alternatives=heard.alternatives)
            return Spoken(said, speaker)

        spoken: Spoken = self._wait_for(work, task=task, deadline_s=deadline_s, gone=heard.gone)
        return spoken

    def sample(
        self, task: str, prompt: str, *, n: int, temperature: float, seed: int, max_new_tokens: int, deadline_s: float,
        form: Form | None = None,
    ) -> list[Generation]:  # fmt: skip
        """`Engine.sample` when there is nothing better to do.

        Raises:
            Busy: an answer is wanted; the samples are given up.
            NoModel, Late, BadInput: as `ask`.
        """

        def work(speaker: Speaker, check: OnPiece) -> list[Generation]:
            return speaker.engine.sample(
                prompt, n=n, temperature=temperature, seed=seed, max_new_tokens=max_new_tokens, form=form, on_piece=check
            )

        if self.waiting:
            raise Busy("answers are waiting: no samples now", self.retry_after_s)
        samples: list[Generation] = self._wait_for(work, task=task, deadline_s=deadline_s, rank=SPARE)
        return samples

    def embed(self, text: str, *, deadline_s: float) -> Embedded:
        """The text as a vector of the active model, adapter or not.

        Raises:
            NoModel, Busy, Late, BadInput: as `ask`.
        """
        vector: Embedded = self._wait_for(
            lambda speaker, _: Embedded(speaker.engine.embed(text), speaker, speaker.engine.count(text)), task="", deadline_s=deadline_s
        )
        return vector

    def _wait_for(
        self,
        work: Callable[[Speaker, OnPiece], Any],
        *,
        task: str,
        deadline_s: float,
        rank: int = FIRST,
        gone: threading.Event | None = None,
    ) -> Any:
        if self._speaker is None:
            raise NoModel("no model is active yet: the node waits for its first release")
        job = _Job(task, work, self._clock() + deadline_s, rank, Future(), gone or threading.Event())
        try:
            self._jobs.put_nowait((rank, next(self._order), job))
        except queue.Full:
            after = self.retry_after_s
            raise Busy(f"{self._jobs.maxsize} requests already wait; try again in {after} s", after) from None
        if self._stopping.is_set():
            raise Unavailable("the node is stopping")
        try:
            return job.done.result(timeout=deadline_s)
        except FutureTimeout:
            job.gone.set()
            job.done.cancel()
            raise Late(f"no answer within {deadline_s:.3g} s") from None

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                _, _, job = self._jobs.get(timeout=IDLE_S)
            except queue.Empty:
                continue
            if job is None or not job.done.set_running_or_notify_cancel():
                continue  # woken, or its asker has gone
            try:
                job.done.set_result(self._work(job))
            except Exception as error:  # the asker gets it; the owner thread must outlive any single prompt
                job.done.set_exception(error)

    def _work(self, job: _Job) -> Any:
        def check(_: Piece | None = None) -> None:
            if job.gone.is_set():
                raise Gone("whoever asked has hung up")
            if self._clock() > job.deadline:
                raise Late("the deadline passed before there was a whole answer")
            if job.rank == SPARE and self.waiting:
                raise Busy("an answer is wanted: no samples now", self.retry_after_s)

        check()
        with self._swap:
            speaker = self._speaker
            if speaker is None:
                raise NoModel("no model is active: the node waits for a release")
            if job.task and job.task != speaker.task:
                raise BadInput(f"this node answers {speaker.task!r}, not {job.task!r}")
            started = time.perf_counter()
            try:
                found = job.work(speaker, check)
            finally:
                seconds = time.perf_counter() - started
                self._on_worked(seconds, job.rank == SPARE)
            if job.rank == FIRST and job.task:
                self._seconds += REMEMBERED * (seconds - self._seconds)
            return found


def probe(task: Task) -> str:
    """A prompt that only asks whether the model computes: any text does."""
    return task.prompt(Record(id="probe", task=task.name, source="soil 21 C"))


def usable(calibration: Calibration | None, engine: Speaks) -> Calibration | None:
    """The calibration, if it was made for exactly this model and adapter."""
    if calibration is None or not calibration.fits(engine.model_digest, engine.adapter_digest):
        return None
    return calibration
