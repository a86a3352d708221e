"""A teacher behind an OpenAI-compatible completions API: vLLM, Ollama, llama-server, llama-cpp-python's server.

Rules:
 * One request a sample, each with a seed of its own; at most AT_ONCE under way. The plain distribution is asked for: servers have
   defaults of their own (top-k 40, a repeat penalty), which would make greedy answers other than the model's.
 * A request has a deadline and a reply a size. 408, 429, 5xx and lost connections are tried again after a pause that doubles, with
   jitter, or for as long as `Retry-After` says; any other refusal is told at once, in the server's words.
 * Text only, unless a vocabulary is given and the server shows it is the same: `/tokenize` must give our ids for PROBES, and a prompt
   in ids must come back with log-probabilities by id (`prompt_logprobs`: vLLM has them). Then it generates and scores in ids.
Limits: completions, not chat; the server's word is taken for what it computes. `seed` repeats an answer only where the server keeps to it.
"""

import random
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal

import httpx
import msgspec
import numpy as np
from numpy.typing import NDArray

from coordinator.forge.targets.cache import Targets
from coordinator.forge.teachers import KEY_VARIABLE, NoLogits, Said, check_request
from coordinator.forge.teachers.sampling import check_examples
from protocol.digests import digest_value
from protocol.errors import BadInput, MalformedMessage, MilpaError, TooLarge, Unavailable
from protocol.models.tokenizer import Example, Tokenizer

DEADLINE_S = 180.0  # seconds for one request; 128 tokens of a 4B model on a slow processor
REPLY_LIMIT = 16 << 20  # bytes; the log-probabilities of 500 tokens with 50 candidates are 3 MB
ATTEMPTS = 5
PAUSE_S, PAUSE_LIMIT_S = 0.5, 30.0  # seconds before the second attempt, doubled each time
AT_ONCE = 4  # requests under way
ROOM = 1 << 20  # tokens of an example; the server's own limit is smaller, and it says so
AGAIN = frozenset({408, 429, 500, 502, 503, 504})
PLAIN = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0, "repetition_penalty": 1.0}  # llama.cpp's and vLLM's names
PROBES = (
    "The pump has been dry since 3 hours; tank at 12.5 %.", "¿Cuánta agua queda? Añádela, por favor.", "  two  spaces\n\ttab, x_y=[1]",
    "naïve façade Łódź Ελλάδα 中文 🌽 e\u0301",
)  # fmt: skip


class ServerTeacher:
    """A model at "http://HOST:PORT/v1#MODEL"; without "#MODEL" the only one that the server has.

    Raises:
        BadInput: not such an address, no such model, a refused key.
        Unavailable: nothing answers there.
    """

    reads: Literal["prompt", "source"] = "prompt"

    def __init__(
        self, spec: str, *, key: str = "", vocabulary: Path | None = None, deadline_s: float = DEADLINE_S, attempts: int = ATTEMPTS,
        at_once: int = AT_ONCE, pause: Callable[[float], None] = time.sleep,
    ) -> None:  # fmt: skip
        address, _, model = spec.partition("#")
        url = _checked(address)
        self._deadline_s, self._attempts, self._at_once, self._pause = deadline_s, attempts, at_once, pause
        self._client = httpx.Client(
            timeout=deadline_s, headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx.Limits(max_connections=at_once),
        )  # fmt: skip
        self._url = url.rstrip("/")
        self._text: Tokenizer | None = None
        try:
            self._model, told = self._find(model)
            self.name = f"{self._model} at {self._url}"
            self.digest = digest_value(["server", self._url, self._model, told])
            self._plain = self._taken(PLAIN)
            self.open, self._why = self._shares(vocabulary)
        except BaseException:
            self.close()
            raise
        self.tokenizer = self._text.digest if self.open and self._text else ""
        self.vocabulary = self._text.size if self.open and self._text else 0

    def generate(self, prompts: Sequence[str], *, n: int, temperature: float, seed: int, max_new_tokens: int) -> list[list[Said]]:
        """See `Teacher`."""
        check_request(n=n, temperature=temperature, max_new_tokens=max_new_tokens)
        if not all(prompts):
            raise BadInput("the prompt is empty")
        asked = [
            self._request(prompt, temperature=temperature, seed=_seed_of(seed, prompt, sample), max_new_tokens=max_new_tokens)
            for prompt in prompts
            for sample in range(n)
        ]
        said = self._all([partial(self._answer, body) for body in asked])
        return [said[first : first + n] for first in range(0, len(said), n)]

    def score(self, examples: Sequence[Example], *, k: int) -> list[Targets]:
        """See `Teacher`."""
        return [_top(rows, k) for rows in self._at_targets(examples, k)]

    def log_probs(self, examples: Sequence[Example]) -> list[NDArray[np.float32]]:
        """See `Teacher`."""
        rows = self._at_targets(examples, 1)  # besides the top k, a server tells the token that stands there
        return [
            np.array([by_id[token] for by_id, token in zip(row, one.target, strict=True)], dtype=np.float32)
            for row, one in zip(rows, examples, strict=True)
        ]

    def close(self) -> None:
        """Close the connections. A second call does nothing."""
        self._client.close()
        if self._text:
            self._text.close()

    def _find(self, model: str) -> tuple[str, Any]:
        """The model's name and what the server tells of it that does not change with time."""
        reply = self._send("GET", "/models", None, attempts=1)
        entries = {str(entry.get("id")): entry for entry in reply.get("data") or () if isinstance(entry, dict)}
        if model and model not in entries:
            raise BadInput(f"{self._url} has no model {model!r}; it has: {', '.join(entries) or 'none'}")
        if not model and len(entries) != 1:
            raise BadInput(f"{self._url} has {len(entries)} models, name one: {self._url}#MODEL ({', '.join(entries) or 'none loaded'})")
        name = model or next(iter(entries))
        return name, {key: entries[name][key] for key in ("root", "max_model_len", "meta") if key in entries[name]}

    def _taken(self, plain: dict[str, Any]) -> dict[str, Any]:
        """Those settings if the server takes them, else only what OpenAI's own API knows."""
        try:
            self._post("/completions", {"model": self._model, "prompt": "a", "max_tokens": 1, "temperature": 0.0, **plain})
        except BadInput:
            plain = {"top_p": 1.0}
            self._post("/completions", {"model": self._model, "prompt": "a", "max_tokens": 1, "temperature": 0.0, **plain})
        return plain

    def _shares(self, vocabulary: Path | None) -> tuple[bool, str]:
        """Whether its ids are those of `vocabulary`, and if not, why."""
        if vocabulary is None:
            return False, "no vocabulary was given to compare its token ids with"
        self._text = Tokenizer(vocabulary)
        root = self._url.removesuffix("/v1")
        try:
            for probe in PROBES:
                body = {"model": self._model, "prompt": probe, "content": probe, "add_special_tokens": False, "add_special": False}
                found = self._send("POST", "/tokenize", body, attempts=1, base=root).get("tokens")
                if found != self._text.encode(probe, bos=False):
                    return False, f"it does not tokenise as {vocabulary.name} does"
            self._at(Example(self._text.encode(PROBES[0], bos=True), [self._text.eos]), 1)
        except MilpaError as error:
            return False, f"it does not score a given text by token ids: {error}"
        return True, ""

    def _request(self, prompt: str, *, temperature: float, seed: int, max_new_tokens: int) -> dict[str, Any]:
        body = {
            "model": self._model, "prompt": prompt, "max_tokens": max_new_tokens, "temperature": temperature, "seed": seed, "stop": ["\n"],
            "stream": False, **self._plain,
        }  # fmt: skip
        if self.open and self._text:
            body |= {"prompt": self._text.encode(prompt, bos=True), "logprobs": 1, "return_tokens_as_token_ids": True}
        return body

    def _answer(self, body: dict[str, Any]) -> Said:
        reply = self._post("/completions", body)
        try:
            choice = reply["choices"][0]
            text, finished = str(choice["text"]).partition("\n")[0], choice.get("finish_reason") == "stop"
            if not self.open:
                return Said(text, None, None, finished)
            told = choice["logprobs"]
            tokens = tuple(int(token.removeprefix("token_id:")) for token in told["tokens"])
            return Said(text, tokens, float(sum(told["token_logprobs"])), finished)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise MalformedMessage(f"{self.name} sent a completion that is not of OpenAI's form: {error!r}") from error

    def _at_targets(self, examples: Sequence[Example], k: int) -> list[list[dict[int, float]]]:
        if not self.open:
            raise NoLogits(self.name, self._why)
        check_examples(examples, vocabulary=self.vocabulary, room=ROOM)
        return self._all([partial(self._at, one, k) for one in examples])

    def _at(self, example: Example, k: int) -> list[dict[int, float]]:
        """Token -> log p at every target position: the k likeliest, and the one that stands there."""
        ids = [*example.prompt, *example.target]
        body = {"model": self._model, "prompt": ids, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": k}
        reply = self._post("/completions", body)
        try:
            told = reply["choices"][0]["prompt_logprobs"][-len(example.target) :]
            rows = [{int(token): float(entry["logprob"]) for token, entry in row.items()} for row in told]
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise MalformedMessage(f"{self.name} sends no prompt_logprobs") from error
        if len(rows) != len(example.target) or any(
            token not in row or len(row) < k for row, token in zip(rows, example.target, strict=True)
        ):
            raise MalformedMessage(f"{self.name} left out log-probabilities: {len(rows)} positions for {len(example.target)} target tokens")
        return rows

    def _all(self, jobs: Sequence[Callable[[], Any]]) -> list[Any]:
        """Results in order, AT_ONCE under way; the first failure stops what has not begun."""
        with ThreadPoolExecutor(self._at_once, thread_name_prefix="teacher") as pool:
            futures = [pool.submit(job) for job in jobs]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._send("POST", path, body, attempts=self._attempts)

    def _send(self, method: str, path: str, body: Any, *, attempts: int, base: str = "") -> dict[str, Any]:
        """One reply, tried again while that may help."""
        url = (base or self._url) + path
        for attempt in range(1, attempts + 1):
            wait = min(PAUSE_LIMIT_S, PAUSE_S * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)
            try:
                status, data, after = self._once(method, url, body)
            except httpx.ConnectError as error:
                failure = Unavailable(f"nothing answers at {url}: start the server or mend the address ({error})")
            except httpx.HTTPError as error:
                failure = Unavailable(f"{url} gave no whole answer: {type(error).__name__} {error}".rstrip())
            else:
                if status == 200:
                    return _decoded(url, data)
                if status in (401, 403):
                    raise BadInput(f"{url} refuses the key; put the right one into the environment as {KEY_VARIABLE}")
                words = f"{url} answered {status}: {_words(data)}"
                if status not in AGAIN:
                    raise BadInput(words)
                failure, wait = Unavailable(words), after if after is not None else wait
            if attempt < attempts:
                self._pause(wait)
        raise failure

    def _once(self, method: str, url: str, body: Any) -> tuple[int, bytes, float | None]:
        """Status, body and what Retry-After says, in seconds; within the deadline and the size."""
        ends = time.monotonic() + self._deadline_s
        data = bytearray()
        with self._client.stream(method, url, json=body) as reply:
            for piece in reply.iter_bytes():
                data += piece
                if len(data) > REPLY_LIMIT:
                    raise TooLarge(f"{url} sends more than {REPLY_LIMIT >> 20} MiB; ask for fewer candidates a token")
                if time.monotonic() > ends:
                    raise httpx.ReadTimeout(f"no whole answer after {self._deadline_s:.0f} s")
            after = reply.headers.get("Retry-After", "")
            return reply.status_code, bytes(data), min(PAUSE_LIMIT_S, float(after)) if re.fullmatch(r"\d{1,6}", after) else None


def _checked(address: str) -> str:
    """The address, if it is one of a server and holds no secret."""
    try:
        url = httpx.URL(address)
    except httpx.InvalidURL as error:
        raise BadInput(f"{address} is no address: {error}") from error
    if not url.host:
        raise BadInput(f"{address} names no server; say http://HOST:PORT/v1#MODEL")
    if url.userinfo:
        raise BadInput(f"leave the password out of the address; put a key into the environment as {KEY_VARIABLE}")
    return str(url)


def _decoded(url: str, data: bytes) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(data)
    except msgspec.DecodeError as error:
        raise BadInput(f"{url} does not answer in JSON; is the address that of an OpenAI-compatible API (it often ends in /v1)?") from error
    if not isinstance(value, dict):
        raise BadInput(f"{url} does not answer with an object; is it an OpenAI-compatible API?")
    return value


def _words(data: bytes) -> str:
    """What a server says is wrong, in one short line."""
    text = data.decode("utf-8", "replace")
    found = re.search(r'"(?:message|detail|error)"\s*:\s*"((?:[^"\\]|\\.)+)"', text)
    return " ".join((found.group(1) if found else text).split())[:300] or "nothing more"


def _seed_of(seed: int, prompt: str, sample: int) -> int:
    """A sample's own seed, 31 bits: from the prompt too, so that it does not depend on what else is asked."""
    return int(digest_value([seed, prompt, sample])[:8], 16) >> 1


def _top(rows: Sequence[dict[int, float]], k: int) -> Targets:
    ranked = [sorted(row.items(), key=lambda entry: -entry[1])[:k] for row in rows]
    ids = np.array([[token for token, _ in row] for row in ranked], dtype=np.int64)
    log_probs = np.array([[value for _, value in row] for row in ranked], dtype=np.float32)
    outside = np.clip(1.0 - np.exp(log_probs.astype(np.float64)).sum(-1), 0.0, None)
    with np.errstate(divide="ignore"):
        return Targets(ids, log_probs, np.log(outside).astype(np.float32))
