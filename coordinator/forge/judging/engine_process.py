"""One engine in a process of its own: reads prompts from a job file, prints one JSON line per answer.

Why apart: its peak memory is the engine's own and not the coordinator's, several run side by side on one core each, and a crash inside
llama.cpp becomes a clear error instead of the end of the coordinator. Loads the engine and nothing else of ours but the contract.

Started by `evaluation.generate_all` as `python -m coordinator.forge.judging.engine_process JOB.json`. A library that prints would spoil the
lines, so stdout is moved away first and everything else goes to stderr.
"""

import os
import resource
import sys
from pathlib import Path

import msgspec

from protocol.confidence import features
from protocol.errors import MilpaError
from protocol.models.engine import Engine
from protocol.tasks import Form


class Job(msgspec.Struct, frozen=True):
    """What one process is to answer."""

    model: str
    adapter: str  # "" for none
    context: int  # tokens
    max_new_tokens: int
    prompts: tuple[str, ...]
    form: Form | None = None  # of the task, as the node gives it to its engine


class Loaded(msgspec.Struct, frozen=True, tag="loaded"):
    """The model is in memory."""

    model_digest: str
    adapter_digest: str


class Answered(msgspec.Struct, frozen=True, tag="answered"):
    """One answer, in the order of the job's prompts."""

    text: str
    features: tuple[float, ...]
    tokens: int  # generated, with the end token
    prompt_tokens: int
    seconds: float  # reading the prompt and generating
    stopped: str
    cpu_seconds: float = 0.0  # of this process, user and system, all its threads: what a busier machine does not change


class Finished(msgspec.Struct, frozen=True, tag="finished"):
    """All prompts are answered."""

    peak_rss_mb: float


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """One of protocol.errors; nothing follows."""

    kind: str  # class name
    message: str


Line = Loaded | Answered | Finished | Failed


def peak_rss_mb() -> float:
    """Most memory this process ever held, in MiB.

    Linux: VmHWM, because ru_maxrss survives exec and would report a big parent's memory as ours.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        scale = 1 << 20 if sys.platform == "darwin" else 1 << 10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


def cpu_seconds() -> float:
    """Processor time this process has used, user and system."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main(job_file: str) -> int:
    """Answer the prompts of `job_file`. Exit code 0, or 1 after a `Failed` line."""
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)

    def say(line: Line) -> None:
        out.write(msgspec.json.encode(line) + b"\n")

    job = msgspec.json.decode(Path(job_file).read_bytes(), type=Job)
    try:
        with Engine(Path(job.model), threads=1, context=job.context, adapter=Path(job.adapter) if job.adapter else None) as engine:
            say(Loaded(engine.model_digest, engine.adapter_digest))
            for prompt in job.prompts:
                before = cpu_seconds()
                made = engine.generate(prompt, max_new_tokens=job.max_new_tokens, form=job.form)
                used = cpu_seconds() - before
                say(Answered(made.text, features(made), len(made.tokens), made.prompt_tokens, made.seconds, made.stopped, used))
    except MilpaError as error:
        say(Failed(type(error).__name__, str(error)))
        return 1
    say(Finished(peak_rss_mb()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
