"""Who teaches: one interface over GGUF files, transformers models, OpenAI-compatible servers and plain commands.

 * `generate` gives up to n answers a prompt; `score` gives the top k of every target token. The second is for open teachers only.
 * An answer is one line: it ends at an end token or before its first line break.
 * An open teacher answers in ids and log-probabilities over a vocabulary (`tokenizer` names it by the digest of its pieces); a student
   can learn from those if it has the same pieces. Any other teacher gives text, and `cost` says what falls away then.
 * Log-probabilities are the model's own, at temperature 1, whatever temperature the answers were drawn at.

gguf       llama.cpp, several sequences side by side: open
hf         transformers: our Gemma checkpoints and any folder with a causal model: open
server     OpenAI-compatible completions over HTTP: text, or open where the server's token ids are shown to be ours
command    a program such as Apertium, or a file of pairs: text
cost       what a teacher that only tells text costs
packaged   the teacher that comes with the pip packages

Limits: one caller at a time; nothing here downloads a model.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from coordinator.forge.targets.cache import Targets
from coordinator.forge.teachers.cost import cost_of_text_only
from protocol.errors import BadInput, UnknownName
from protocol.models.tokenizer import Example
from protocol.tasks import Record, Task

CONTEXT = 512  # tokens of a prompt and its answer; a few-shot prompt needs more
SAMPLES_LIMIT = 128  # answers a prompt; more says little new and costs a day
OTHER_VOCABULARY = (
    "log-probabilities over other ids say nothing to a student. Name a file with the teacher's vocabulary, or let it teach by its texts "
    "(milpa-coordinator synthesise)"
)
KEY_VARIABLE = "MILPA_TEACHER_KEY"  # environment: a server's API key; never in a command line, where others can read it


class Said(msgspec.Struct, frozen=True):
    """One answer."""

    text: str  # one line, without what ended it; begins with a space where the model said one
    tokens: tuple[int, ...] | None  # with the end token or line break where it came; None: the teacher only tells text
    log_prob: float | None  # of all tokens together, nats, at temperature 1; None where the teacher does not tell
    finished: bool  # False: cut off at max_new_tokens


class NoLogits(BadInput):
    """A teacher that only tells text was asked for log-probabilities; the message says what goes without."""

    def __init__(self, name: str, why: str = "") -> None:
        super().__init__(f"{name} tells text only{f' ({why})' if why else ''}: {cost_of_text_only(name).sentence}")


class Teacher(Protocol):
    """Something that answers prompts. `close` may be called twice."""

    name: str  # for people
    digest: str  # SHA-256 of what decides its answers: weights, or command and version, or a server's model
    open: bool  # gives ids and log-probabilities
    reads: Literal["prompt", "source"]  # the task's whole prompt, or the bare source sentence (see `asked`)
    tokenizer: str  # digest of the vocabulary's pieces, as in a target cache's header; "" when not open
    vocabulary: int  # its size; 0 when not open

    def generate(self, prompts: Sequence[str], *, n: int, temperature: float, seed: int, max_new_tokens: int) -> list[list[Said]]:
        """Up to `n` answers to each prompt, in order; temperature 0 is greedy and wants n = 1.

        Open teachers and servers give exactly n; a command gives the one it has, a file as many as it holds, which may be none.

        Raises:
            BadInput: a prompt or figure that cannot be used.
            Unavailable: something outside did not answer in time.
        """
        ...

    def score(self, examples: Sequence[Example], *, k: int) -> list[Targets]:
        """The top k and the tail at every target token, all in one reading an example.

        Raises:
            NoLogits: the teacher only tells text.
        """
        ...

    def log_probs(self, examples: Sequence[Example]) -> list[NDArray[np.float32]]:
        """log p of every target token (n,), nats, also where it is outside the top k: how likely a given text is.

        Raises:
            NoLogits: the teacher only tells text.
        """
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


def open_teacher(spec: str, *, threads: int = 1, context: int = CONTEXT, vocabulary: Path | None = None) -> Teacher:
    """The teacher that `spec` names.

    Args:
        spec: "MODEL.gguf" (llama.cpp), "hf:FOLDER" or "hf:MODEL.gguf" (transformers), "http://HOST:PORT/v1#MODEL" (a server),
            "command:PROGRAM ARGUMENTS" (texts in, texts out, blank lines between), "file:PAIRS.tsv".
        threads: for a model that runs here.
        context: tokens of one prompt and its answer, for a GGUF under llama.cpp; more for few-shot prompts, memory grows with it.
        vocabulary: a GGUF with the student's vocabulary; a server that shows the same token ids is then open, a folder speaks in them.

    Raises:
        UnknownName: not of these forms.
        BadInput: no such file, not a model, not a shared vocabulary; the message says what to do.
        Unavailable: the server does not answer.
    """
    kind, colon, rest = spec.partition(":")
    if colon and kind in ("http", "https"):
        from coordinator.forge.teachers.server import ServerTeacher

        return ServerTeacher(spec, key=os.environ.get(KEY_VARIABLE, ""), vocabulary=vocabulary)
    if colon and kind == "command":
        from coordinator.forge.teachers.command import CommandTeacher

        return CommandTeacher(rest)
    if colon and kind == "file":
        from coordinator.forge.teachers.command import FileTeacher

        return FileTeacher(Path(rest))
    if colon and kind == "hf":
        from coordinator.forge.teachers.hf import CheckpointTeacher, FolderTeacher

        if rest.endswith(".gguf"):
            return CheckpointTeacher(Path(rest), threads=threads)
        return FolderTeacher(Path(rest), threads=threads, vocabulary=vocabulary)
    if spec.endswith(".gguf"):
        from coordinator.forge.teachers.gguf import GgufTeacher

        return GgufTeacher(Path(spec), threads=threads, context=context)
    raise UnknownName(
        f"no teacher is called {spec!r}: say MODEL.gguf, hf:FOLDER, http://HOST:PORT/v1#MODEL, command:PROGRAM ARGUMENTS or file:PAIRS.tsv"
    )


def model_file(spec: str) -> Path | None:
    """The GGUF that `spec` names, whose vocabulary is the teacher's; None for teachers that are none."""
    kind, colon, rest = spec.partition(":")
    if not spec.endswith(".gguf") or (colon and kind in ("http", "https", "command", "file")):
        return None
    return Path(rest if colon and kind == "hf" else spec)


def asked(teacher: Teacher, task: Task, records: Sequence[Record]) -> list[str]:
    """What to hand to `teacher.generate` for these records: the task's prompts, or the bare sources."""
    return [record.source if teacher.reads == "source" else task.prompt(record) for record in records]


def check_request(*, n: int, temperature: float, max_new_tokens: int) -> None:
    """Check what every teacher's `generate` is asked for.

    Raises:
        BadInput: a figure out of range; the message says which.
    """
    if not 1 <= n <= SAMPLES_LIMIT:
        raise BadInput(f"{n} samples a prompt are not possible; ask for 1 to {SAMPLES_LIMIT}")
    if not 0.0 <= temperature <= 10.0:
        raise BadInput(f"temperature {temperature} is not usable; 0 is greedy, 1 the model's own distribution")
    if temperature == 0 and n > 1:
        raise BadInput(f"{n} greedy samples would be the same answer {n} times; use a temperature above 0, or n = 1")
    if max_new_tokens < 1:
        raise BadInput(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
