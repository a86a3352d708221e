"""A small engine without a model: it answers from a table, and is held to the real one by tests/contracts/test_engine_contract.py."""

import math
import random
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from protocol.digests import digest_bytes, digest_file
from protocol.errors import BadInput, Unavailable
from protocol.models.generation import Alternative, Generation, Piece
from protocol.tasks import Form

CONTEXT = 512
HIDDEN = 16  # figures of a vector

OnPiece = Callable[[Piece], None]


class FakeEngine:
    """Answers `answers[key]` to a prompt that contains `key`, each token with `probability`; else `default`.

    With a form, an answer that does not begin with a code gets the form's first one, as unlikely as the rest is likely.
    """

    def __init__(
        self, answers: Mapping[str, str] | None = None, *, default: str = " normal: todo bien", probability: float = 0.9, name: str = "fake"
    ) -> None:
        self.answers, self.default, self.probability = dict(answers or {}), default, probability
        self.model_digest = digest_bytes(name.encode())
        self.adapter_digest = ""
        self.parameters = 0
        self.prompts: list[str] = []
        self.said: list[str] = []  # every piece of every answer
        self.closed = False
        self.gate = threading.Event()  # cleared: generate waits for it, so that a test can fill the queue
        self.gate.set()
        self.pace_s = 0.0  # seconds a token, so that a test can hang up between two
        self.started = threading.Event()

    def generate(
        self, prompt: str, *, max_new_tokens: int, form: Form | None = None, on_piece: OnPiece | None = None, alternatives: int = 0
    ) -> Generation:
        self._check(prompt, max_new_tokens)
        self.started.set()
        if not self.gate.wait(30):
            raise RuntimeError("the test never opened the gate")
        self.prompts.append(prompt)
        text = next((answer for key, answer in self.answers.items() if key in prompt), self.default)
        return self._say(text, prompt, max_new_tokens, form, on_piece, alternatives)

    def sample(
        self, prompt: str, *, n: int, temperature: float, seed: int, max_new_tokens: int, form: Form | None = None,
        on_piece: OnPiece | None = None,
    ) -> list[Generation]:  # fmt: skip
        self._check(prompt, max_new_tokens)
        if n < 1 or temperature <= 0:
            raise BadInput("samples are at least 1, at a temperature above 0")
        texts = [*self.answers.values(), self.default]
        drawn = random.Random(seed).choices(texts, k=n)
        return [self._say(text, prompt, max_new_tokens, form, on_piece, 0) for text in drawn]

    def embed(self, text: str) -> NDArray[np.float32]:
        self._check(text, 1)
        total = np.zeros(HIDDEN)
        for word in text.lower().split():  # texts that share words are near each other
            total += np.random.default_rng(list(word.encode())).standard_normal(HIDDEN)
        return (total / np.linalg.norm(total)).astype(np.float32)

    def set_adapter(self, path: Path | None) -> None:
        if path is not None and not path.is_file():
            raise BadInput(f"cannot read the model file {path}: there is none")
        self.adapter_digest = digest_file(path) if path else ""

    def count(self, text: str) -> int:
        return len(text.split())

    def close(self) -> None:
        self.closed = True

    def _check(self, prompt: str, max_new_tokens: int) -> None:
        if self.closed:
            raise Unavailable("the engine is closed; load a model first")
        if max_new_tokens < 1:
            raise BadInput("max_new_tokens must be at least 1")
        if not prompt.strip():
            raise BadInput("the prompt is empty")
        if len(prompt.split()) >= CONTEXT:
            raise BadInput("the prompt is too long; shorten the record")

    def _say(self, text: str, prompt: str, limit: int, form: Form | None, on_piece: OnPiece | None, alternatives: int) -> Generation:
        line, line_break, _ = text.partition("\n")
        forced = (
            [] if form is None or not form.codes or line.strip().startswith(tuple(f"{code}:" for code in form.codes)) else form.codes[:1]
        )
        line = "".join(f" {code}: {line.strip()}" for code in forced) or line
        p = self.probability
        pieces = [(piece, p) for piece in _cut(line)]
        for index in range(2 * len(forced)):
            pieces[index] = (pieces[index][0], (1 - p) / 100)
        pieces.append(("", p))
        stopped = "line" if line_break else "end"
        if form is not None and form.codes:
            limit = max(limit, 2)  # a code and its colon are two pieces here
        if len(pieces) > limit:
            pieces, stopped = pieces[:limit], "length"
        others = (Alternative(0, pieces[0][0], math.log(p)), Alternative(1, " other", math.log(1 - p)))[:alternatives]
        for place, (piece, chance) in enumerate(pieces):
            threading.Event().wait(self.pace_s)
            self.said.append(piece)
            if on_piece:
                on_piece(Piece(piece, place, math.log(chance), others))
        texts, logprobs = tuple(piece for piece, _ in pieces), tuple(math.log(chance) for _, chance in pieces)
        count = len(pieces)
        entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
        return Generation(
            text="".join(texts), tokens=tuple(range(count)), logprobs=logprobs, margins=(abs(math.log(p) - math.log(1 - p)),) * count,
            entropies=(entropy,) * count, pieces=texts, prompt_tokens=len(prompt.split()), seconds=0.001, stopped=stopped,
            alternatives=(others,) * count if alternatives else (),
        )  # fmt: skip


def _cut(line: str) -> list[str]:
    """Words with the space before them; a colon at a word's end is a piece of its own."""
    words = [" " + word for word in line.split(" ") if word] if line.startswith(" ") else line.split(" ")
    return [half for word in words for half in ((word[:-1], ":") if word.endswith(":") else (word,))]
