"""A training as the daemon starts it: `python -m node.learn.process`, its job as one line of JSON on stdin, its words as lines on stdout.

It gives way to everything else on the machine, ends at the next step when told to (SIGTERM, or the daemon's end of stdin), and leaves on
disk where it was. An end without a last word is a kill: harmless too, it costs half a minute of work.
"""

import os
import signal
import threading
from typing import Literal

import msgspec

from node.learn import session
from node.settings import NodeSettings
from protocol.errors import MilpaError, Unavailable
from protocol.lines import first_line
from protocol.logs import is_safe

TOLD_EVERY = 10  # steps


class Job(msgspec.Struct, frozen=True):
    """What the process is to do: train if there is something to train, then judge what nobody judged yet."""

    settings: NodeSettings
    train: bool
    humble: bool = True  # give way to everything else; a test cannot wait for that


class Said(msgspec.Struct, frozen=True):
    """A line to the daemon."""

    kind: Literal["step", "trained", "judged", "interrupted", "failed"]
    text: str = ""
    share: float = 0.0  # of the training's budget


def main() -> None:
    """Do the job, say how it went."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a library may print; the real stdout is ours
    job = msgspec.json.decode(first_line(), type=Job)
    if job.humble:
        session.humble()
    end = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: end.set())
    threading.Thread(target=_end_with_parent, args=(end,), daemon=True).start()

    def say(kind: Literal["step", "trained", "judged", "interrupted", "failed"], text: str = "", share: float = 0.0) -> None:
        try:
            out.write(msgspec.json.encode(Said(kind, text, share)) + b"\n")
            out.flush()
        except BrokenPipeError:
            end.set()  # the daemon is gone

    from protocol.models.training import Interrupted  # torch, only now

    try:
        if job.train:
            result = session.train(
                job.settings, interrupted=end.is_set,
                progress=lambda step: say("step", f"loss {step.loss:.3f}", step.share) if step.step % TOLD_EVERY == 1 else None,
            )  # fmt: skip
            fell = f"held-out loss {result.loss_before:.4f} to {result.loss_after:.4f} on {result.examples} examples"
            say("trained", fell if result.stored else f"not stored: {result.reason}")
        verdict = session.judge(job.settings, interrupted=end.is_set) if job.settings.learn.site_adapter else None
        if verdict is not None:
            say("judged", verdict.reason)
    except (Interrupted, Unavailable) as error:  # the second: another training runs here, by hand perhaps
        say("interrupted", str(error))
    except MilpaError as error:
        say("failed", str(error))
    except Exception as error:  # the daemon tells the operator; the traceback goes to our stderr
        told = f": {error}" if is_safe(error) else ""  # an example's text must not reach the daemon's log
        say("failed", type(error).__name__ + told)
        raise


def _end_with_parent(end: threading.Event) -> None:
    while os.read(0, 4096):  # nothing comes; it ends when the parent closed its side or died
        pass
    end.set()


if __name__ == "__main__":
    main()
