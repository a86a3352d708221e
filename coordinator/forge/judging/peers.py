"""Systems a user might pick instead of ours, asked for the same answers on the same records.

Apertium is Debian's offline machine translation: a subprocess with a deadline, its version recorded beside its figures. Reference texts
are never given to it. (An uncorrected teacher is asked by `evaluation.few_shot`.)
"""

import shutil
import subprocess
import time
from collections.abc import Sequence

import msgspec

from protocol.errors import BadInput, MilpaError, Unavailable
from protocol.tasks import Record, Task

DEADLINE_S = 300.0  # seconds for all records; it does 5,000 words a second
BETWEEN = "\n\n"  # a blank line: with line breaks alone it joins sentences across records, and "-f line" drops their full stops
PAIRS = {"translate-english-spanish": "eng-spa", "translate-spanish-english": "spa-eng"}
NAMES = ("apertium",)


class NotInstalled(MilpaError):
    """A peer system is not on this machine; the message has the line that installs it."""

    exit_code = 4


class PeerAnswers(msgspec.Struct, frozen=True):
    """What a peer system answered."""

    texts: tuple[str, ...]  # one a record, in order
    name: str  # "apertium eng-spa"
    version: str
    seconds: float  # all records, wall clock


def apertium(records: Sequence[Record], task: Task) -> PeerAnswers:
    """Translate the records' sources with Apertium, unknown words without their mark.

    Raises:
        BadInput: not a language pair that Apertium's Debian packages have here.
        NotInstalled: the program or its language data is missing.
        Unavailable: it failed, took longer than DEADLINE_S, or lost a line.
    """
    pair = PAIRS.get(task.name)
    if pair is None:
        raise BadInput(f"there is no Apertium peer for task {task.name!r}; it has: {', '.join(PAIRS)}")
    program = shutil.which("apertium")
    if program is None or pair not in _run([program, "-l"], "").split():
        raise NotInstalled(f"the peer apertium {pair} is not installed: sudo apt-get install apertium-eng-spa")
    started = time.perf_counter()
    texts = answers_of([program, "-u", pair], [record.source for record in records])
    return PeerAnswers(tuple(texts), f"apertium {pair}", apertium_version(program), time.perf_counter() - started)


def answers_of(command: Sequence[str], sources: Sequence[str]) -> list[str]:
    """Run a program once: the sources go in, its answers come out, blank lines between.

    Raises:
        Unavailable: it failed, took longer than DEADLINE_S, or gave another number of answers.
    """
    said = _run(command, "".join(" ".join(source.split()) + BETWEEN for source in sources))
    texts = said.split(BETWEEN)
    if not texts[-1].strip():
        texts.pop()
    if len(texts) != len(sources):
        name = command[0].rpartition("/")[2]
        raise Unavailable(f"{name} answered {len(texts)} texts for {len(sources)} records; its texts cannot be told apart")
    return [" ".join(text.split()) for text in texts]


def _run(command: Sequence[str], text: str) -> str:
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=DEADLINE_S, check=False, encoding="utf-8")
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{command[0]} took longer than {DEADLINE_S:.0f} s") from error
    if done.returncode != 0:
        raise Unavailable(f"{command[0]} failed: {done.stderr.strip().splitlines()[-1:] or [f'exit code {done.returncode}']}")
    return done.stdout


def apertium_version(program: str) -> str:
    """What Debian says is installed, else what the program says of itself."""
    if shutil.which("dpkg-query"):
        command = ["dpkg-query", "-W", "-f", "${Package} ${Version}; ", "apertium", "apertium-eng-spa"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        if done.returncode == 0:
            return done.stdout.strip("; ")
    return " ".join(_run([program, "-V"], "").split("\n")[0].split())
