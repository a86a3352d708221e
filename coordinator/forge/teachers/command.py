"""Teachers that are no language models: a program that turns texts into texts, and a file of pairs that people made.

 * A program is run once for many texts: sources on its input, answers on its output, blank lines between (Apertium's way).
   It has one answer to a source, whatever temperature and number of samples are asked for.
 * A file (SOURCE<tab>TARGET) knows its own sources only; a source that stands in several lines has several answers, in the file's order.
Both read the bare source, not the task's prompt (`asked` in this room), and tell text only.
"""

import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from coordinator.forge.judging.peers import answers_of, apertium_version
from coordinator.forge.pairs import read_pairs
from coordinator.forge.targets.cache import Targets
from coordinator.forge.teachers import NoLogits, Said, check_request
from protocol.digests import digest_file, digest_value
from protocol.errors import BadInput
from protocol.models.tokenizer import Example
from protocol.tasks import translation

TEXTS_A_RUN = 1_000  # so that the deadline of a run does not depend on how many texts there are in all
ANY_LANGUAGES = translation("Source", "Target")  # a file of pairs does not say which languages it holds


class _TextTeacher:
    """What text-only teachers cannot do, and how they say so."""

    open = False
    reads: Literal["prompt", "source"] = "source"
    name: str
    digest: str
    tokenizer = ""
    vocabulary = 0

    def score(self, examples: Sequence[Example], *, k: int) -> list[Targets]:
        """See `Teacher`."""
        raise NoLogits(self.name)

    def log_probs(self, examples: Sequence[Example]) -> list[NDArray[np.float32]]:
        """See `Teacher`."""
        raise NoLogits(self.name)

    def close(self) -> None:
        """Nothing is held."""


class CommandTeacher(_TextTeacher):
    """A program and its arguments, such as "apertium -u eng-spa". No shell reads them.

    Raises:
        BadInput: there is no such program on this machine.
    """

    def __init__(self, line: str) -> None:
        try:
            words = shlex.split(line)
        except ValueError as error:
            raise BadInput(f"command:{line} cannot be read: {error}") from error
        program = shutil.which(words[0]) if words else None
        if program is None:
            raise BadInput(f"there is no program {words[0] if words else ''!r} on this machine; install it or mend command:{line}")
        self._command = [program, *words[1:]]
        self.name = shlex.join(words)
        version = apertium_version(program) if Path(program).name == "apertium" else digest_file(Path(program))
        self.digest = digest_value(["command", words, version])

    def generate(self, prompts: Sequence[str], *, n: int, temperature: float, seed: int, max_new_tokens: int) -> list[list[Said]]:
        """See `Teacher`; one answer each."""
        check_request(n=n, temperature=temperature, max_new_tokens=max_new_tokens)
        if not all(prompt.strip() for prompt in prompts):
            raise BadInput("the prompt is empty")
        texts: list[str] = []
        for first in range(0, len(prompts), TEXTS_A_RUN):
            texts += answers_of(self._command, prompts[first : first + TEXTS_A_RUN])
        return [[Said(text, None, None, finished=True)] for text in texts]


class FileTeacher(_TextTeacher):
    """Pairs that people made.

    Raises:
        BadInput: the file cannot be read, or a line is no pair; the message names the line.
    """

    def __init__(self, path: Path) -> None:
        self._answers: dict[str, dict[str, None]] = {}  # source -> its answers, once each, in order
        for record in read_pairs(path, ANY_LANGUAGES):
            self._answers.setdefault(" ".join(record.source.split()), {})[record.target] = None
        self.name, self.digest = path.name, digest_file(path)

    def generate(self, prompts: Sequence[str], *, n: int, temperature: float, seed: int, max_new_tokens: int) -> list[list[Said]]:
        """See `Teacher`; as many as the file holds, at most n."""
        check_request(n=n, temperature=temperature, max_new_tokens=max_new_tokens)
        if not all(prompt.strip() for prompt in prompts):
            raise BadInput("the prompt is empty")
        held = [list(self._answers.get(" ".join(prompt.split()), {})) for prompt in prompts]
        return [[Said(text, None, None, finished=True) for text in texts[:n]] for texts in held]
