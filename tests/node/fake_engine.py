"""A small engine without a model: it answers from a table, and is held to the real one by tests/contracts/test_engine_contract.py."""

import math
import threading
from collections.abc import Mapping

from protocol.digests import digest_bytes
from protocol.errors import BadInput, Unavailable
from protocol.models.engine import Generation

CONTEXT = 512


class FakeEngine:
    """Answers `answers[key]` to a prompt that contains `key`, each token with `probability`; else `default`."""

    def __init__(
        self, answers: Mapping[str, str] | None = None, *, default: str = " normal: todo bien", probability: float = 0.9, name: str = "fake"
    ) -> None:
        self.answers, self.default, self.probability = dict(answers or {}), default, probability
        self.model_digest = digest_bytes(name.encode())
        self.adapter_digest = ""
        self.prompts: list[str] = []
        self.closed = False
        self.gate = threading.Event()  # cleared: generate waits for it, so that a test can fill the queue
        self.gate.set()
        self.started = threading.Event()

    def generate(self, prompt: str, *, max_new_tokens: int) -> Generation:
        if self.closed:
            raise Unavailable("the engine is closed; load a model first")
        if max_new_tokens < 1:
            raise BadInput("max_new_tokens must be at least 1")
        if not prompt:
            raise BadInput("the prompt is empty")
        if len(prompt.split()) >= CONTEXT:
            raise BadInput("the prompt is too long; shorten the record")
        self.started.set()
        if not self.gate.wait(30):
            raise RuntimeError("the test never opened the gate")
        self.prompts.append(prompt)
        text = next((answer for key, answer in self.answers.items() if key in prompt), self.default)
        line, line_break, _ = text.partition("\n")
        pieces = [" " + word for word in line.split(" ") if word] if line.startswith(" ") else line.split(" ")
        pieces = [half for piece in pieces for half in ((piece[:-1], ":") if piece.endswith(":") else (piece,))]
        pieces.append("")
        stopped = "line" if line_break else "end"
        if len(pieces) > max_new_tokens:
            pieces, stopped = pieces[:max_new_tokens], "length"
        count, p = len(pieces), self.probability
        entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
        return Generation(
            text="".join(pieces), tokens=tuple(range(count)), logprobs=(math.log(p),) * count,
            margins=(abs(math.log(p) - math.log(1 - p)),) * count, entropies=(entropy,) * count, pieces=tuple(pieces),
            prompt_tokens=len(prompt.split()), seconds=0.001, stopped=stopped,
        )  # fmt: skip

    def close(self) -> None:
        self.closed = True
