"""The one llama.cpp engine: nodes answer with it, and the coordinator's evidence is measured with it.

Rules:
 * `generate` is greedy, and the same prompt and form give the same bits: everything runs on the CPU, one sequence, and a prompt is always
   computed in the same batches. The part every prompt of a task begins with (`Form.opening`) is a batch of its own, so it makes no
   difference whether it is read again or still in the KV cache. Another adapter empties the cache.
 * With a form the answer begins with one of its codes and ":" (`spelling.py`), whole even where fewer tokens were asked for; a prompt that
   leaves no room for the longest way to say one is refused. What the model thought of each token stays the free model's.
 * The text ends at an end token, or before its first line break.
 * Log-probabilities, margins and entropies come from the logits of the same forward pass; they cost no second one.
 * One lock: one prompt at a time. More speed is more threads, not more callers.
Limits: one sequence, prompt and answer together within `context` tokens. No batching of prompts. `embed` opens a small context beside,
on first use (KV for EMBED_WINDOW tokens), and reads the bare model: vectors stay comparable when an adapter is exchanged.
llama.cpp and numpy only; the low-level API, because the high-level one keeps logits for every position and cannot swap adapters.
"""

import codecs
import ctypes
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Self

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from protocol.digests import digest_file
from protocol.errors import BadInput, DoesNotFit, NotEnough, Unavailable
from protocol.models.generation import Alternative, Ending, Generation, Piece
from protocol.models.header import check_file
from protocol.models.llama_log import forget, said
from protocol.models.logits import Figures, Logits, Tokens, drawn, figures, greedy, likeliest
from protocol.models.spelling import Spelling
from protocol.tasks import Form

PIECE_BYTES = 256  # longest token text read at first; a longer one is read again with the length llama.cpp asks for
UBATCH = 256  # tokens computed at once; larger costs memory and gains nothing on prompts of this size
EMBED_WINDOW = 256  # tokens read together for a vector; a longer text is read in windows
EMBED_UBATCH = 32  # tokens at once: each costs a row of logits, which nobody reads but llama.cpp computes
MAX_SAMPLES = 16
SPELLINGS_LIMIT = 4  # forms whose tables are kept; a node has one task

Choose = Callable[[Logits, Tokens | None], int]  # logits of a position and the ids allowed there (None: all) to an id

llama_cpp.llama_backend_init()


class Engine:
    """A GGUF in memory, with at most one LoRA adapter on it.

    Raises:
        BadInput: the model file is missing, not a GGUF or damaged.
        NotEnough: it does not fit this machine's free memory.
        DoesNotFit: the adapter was made for another base model.
    """

    def __init__(self, model: Path, *, threads: int = 1, context: int = 1024, adapter: Path | None = None) -> None:
        if threads < 1 or context < 16:
            raise BadInput(f"an engine needs at least 1 thread and 16 tokens of context, not {threads} and {context}")
        self._lock = threading.Lock()
        self._model: Any = None
        self._context: Any = None
        self._embedder: Any = None
        self._opening: list[int] = []  # the tokens at the beginning of the KV cache that the next prompt may share
        self._spellings: dict[tuple[str, ...], Spelling] = {}
        self._adapter: Any = None
        self.path = model
        self.context = context
        self.threads = threads
        self.adapter_digest = ""
        self._model = load_weights(model)
        self._vocab: Any = llama_cpp.llama_model_get_vocab(self._model)
        self._size = int(llama_cpp.llama_vocab_n_tokens(self._vocab))
        self.parameters = int(llama_cpp.llama_model_n_params(self._model))  # of the bare model, whatever the quantisation
        try:
            self.model_digest = digest_file(model)
            self._open_context()
            self.set_adapter(adapter)
        except BaseException:
            self.close()
            raise

    def _open_context(self) -> None:
        self._context = self._opened(self.context, ubatch=min(UBATCH, self.context), embeddings=False)
        self._memory: Any = llama_cpp.llama_get_memory(self._context)

    def _opened(self, tokens: int, *, ubatch: int, embeddings: bool) -> Any:
        """A context of `tokens` tokens: for answers with logits of the last position, for embeddings with every state of a batch."""
        wanted = llama_cpp.llama_context_default_params()
        wanted.n_ctx = wanted.n_batch = tokens
        wanted.n_ubatch = ubatch
        wanted.n_seq_max = 1
        wanted.n_outputs_max = ubatch if embeddings else 1  # one row of logits: at 262k tokens of vocabulary, 1 MiB and not 1 GiB
        wanted.n_threads = wanted.n_threads_batch = self.threads
        wanted.offload_kqv = wanted.op_offload = False
        wanted.no_perf = True
        wanted.embeddings = embeddings
        wanted.pooling_type = llama_cpp.LLAMA_POOLING_TYPE_NONE if embeddings else llama_cpp.LLAMA_POOLING_TYPE_UNSPECIFIED
        context = llama_cpp.llama_init_from_model(self._model, wanted)
        if not context:
            raise NotEnough(f"no memory for a context of {tokens} tokens for {self.path.name}; try a smaller one{said()}")
        return context

    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int,
        form: Form | None = None,
        on_piece: Callable[[Piece], None] | None = None,
        alternatives: int = 0,
    ) -> Generation:
        """Continue `prompt` greedily by at most `max_new_tokens` tokens; `seconds` is wall-clock time of the whole call.

        Args:
            form: what the task knows of its prompts and answers; None: free text, read whole.
            on_piece: called with every token as it is said; what it raises stops the generation and goes to the caller.
            alternatives: how many of the likeliest tokens to tell at each place.

        Raises:
            BadInput: an empty prompt, one that leaves no room for an answer in the context, or text that is not Unicode.
            DoesNotFit: the model's figures are not finite (a damaged adapter, or an instruction set it was not made for), or it cannot
                spell the form's codes.
            Unavailable: the engine is closed.
        """
        started = time.perf_counter()
        with self._lock:
            ids, limit, spelling = self._prepared(prompt, max_new_tokens, form)
            self._read(ids, form)
            speech = _Speech(self, spelling, greedy, alternatives, on_piece)
            return speech.run(self._logits(), limit, prompt_tokens=len(ids), started=started)

    def sample(
        self,
        prompt: str,
        *,
        n: int,
        temperature: float,
        seed: int,
        max_new_tokens: int,
        form: Form | None = None,
        on_piece: Callable[[Piece], None] | None = None,
    ) -> list[Generation]:
        """`n` answers drawn at `temperature`, the same ones for the same seed; the prompt is read once.

        `on_piece` is called with every token of every answer; what it raises stops them all. Figures are the model's at temperature 1.
        `seconds` of the first has the reading of the prompt in it.

        Raises:
            BadInput: n or the temperature is out of range; else as `generate`.
        """
        if not 1 <= n <= MAX_SAMPLES or not 0.0 < temperature <= 10.0:
            raise BadInput(f"samples are 1 to {MAX_SAMPLES} at a temperature above 0 and at most 10, not {n} at {temperature:g}")
        started = time.perf_counter()
        with self._lock:
            ids, limit, spelling = self._prepared(prompt, max_new_tokens, form)
            self._read(ids, form)
            first = self._logits().copy()  # each answer begins from the same place
            answers = []
            for index in range(n):
                uniform = np.random.default_rng([seed & 0xFFFFFFFF, index]).random
                speech = _Speech(self, spelling, partial(_draw, temperature=temperature, uniform=uniform), 0, on_piece)
                answers.append(speech.run(first, limit, prompt_tokens=len(ids), started=started))
                self._forget_from(len(ids))
                started = time.perf_counter()
            return answers

    def embed(self, text: str) -> NDArray[np.float32]:
        """The text as a vector of length 1: (hidden,), the mean of the last hidden states, without the begin token and without an adapter.

        Raises:
            BadInput: an empty text, or one that is not Unicode.
            NotEnough: no memory for the context this needs.
            DoesNotFit: the vector is not finite.
            Unavailable: the engine is closed.
        """
        with self._lock:
            self._need_open()
            forget()
            if not self._embedder:
                self._embedder = self._opened(EMBED_WINDOW, ubatch=EMBED_UBATCH, embeddings=True)
            begin = 1 if llama_cpp.llama_vocab_get_add_bos(self._vocab) else 0
            ids = self._tokenize(text)[begin:]
            total = np.zeros(int(llama_cpp.llama_model_n_embd(self._model)), dtype=np.float64)
            for start in range(0, len(ids), EMBED_WINDOW - 1):
                total += self._hidden(self._begin() + ids[start : start + EMBED_WINDOW - 1], begin, len(total))
        length = float(np.linalg.norm(total))
        if not np.isfinite(length) or length == 0.0:
            raise DoesNotFit(f"{self.path.name} computes a vector that is not finite, or zero; the model is damaged")
        return (total / length).astype(np.float32)

    def count(self, text: str) -> int:
        """How many tokens `text` has for this model, without a begin token.

        Raises:
            BadInput: an empty text, or one that is not Unicode.
            Unavailable: the engine is closed.
        """
        with self._lock:
            self._need_open()
            return len(self._tokenize(text)) - len(self._begin())

    def _hidden(self, ids: list[int], skip: int, size: int) -> NDArray[np.float64]:
        """Sum of the last hidden states of `ids` but the first `skip`: (hidden,)."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._embedder), False)
        total = np.zeros(size, dtype=np.float64)
        for start in range(0, len(ids), EMBED_UBATCH):
            part = ids[start : start + EMBED_UBATCH]
            self._decode(part, self._embedder)
            for place in range(skip if start == 0 else 0, len(part)):
                total += np.ctypeslib.as_array(llama_cpp.llama_get_embeddings_ith(self._embedder, place), shape=(size,))
        return total

    def _prepared(self, prompt: str, max_new_tokens: int, form: Form | None) -> tuple[list[int], int, Spelling | None]:
        """The prompt's ids, the room for an answer, and what it may begin with."""
        if max_new_tokens < 1:
            raise BadInput(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
        self._need_open()
        forget()
        ids, spelling = self._tokenize(prompt), self._spelling(form)
        most = self.context - (spelling.longest if spelling else 1)
        if len(ids) > most:
            room = f" and keeps {spelling.longest} for the verdict" if spelling else ""
            raise BadInput(f"the prompt has {len(ids)} tokens, the model reads at most {max(0, most)}{room}; shorten the record")
        return ids, min(max_new_tokens, self.context - len(ids)), spelling

    def _read(self, ids: list[int], form: Form | None) -> None:
        """Compute the prompt, its opening apart. The batches depend on the prompt and the form alone, never on what is still cached."""
        opening = ids[: self._shared(ids, form)]
        if not opening or opening != self._opening or not self._forget_from(len(opening)):
            llama_cpp.llama_memory_clear(self._memory, False)
            self._opening = []
            if opening:
                self._decode(opening)
                self._opening = opening
        self._decode(ids[len(opening) :])

    def _shared(self, ids: list[int], form: Form | None) -> int:
        """How many tokens of a prompt are the form's opening: text after it may change how its last letters are cut into tokens."""
        if form is None or not form.opening:
            return 0
        opening = self._tokenize(form.opening)
        alike = next((at for at, (mine, its) in enumerate(zip(ids, opening, strict=False)) if mine != its), min(len(ids), len(opening)))
        return min(alike, len(ids) - 1)

    def _forget_from(self, place: int) -> bool:
        """Drop what is cached from token `place` on."""
        return bool(llama_cpp.llama_memory_seq_rm(self._memory, 0, place, -1))

    def _spelling(self, form: Form | None) -> Spelling | None:
        if form is None or not form.codes:
            return None
        if form.codes not in self._spellings:
            while len(self._spellings) >= SPELLINGS_LIMIT:
                self._spellings.pop(next(iter(self._spellings)))
            self._spellings[form.codes] = Spelling(form.codes, map(self._sayable, range(self._size)))
        return self._spellings[form.codes]

    def _sayable(self, token: int) -> bytes:
        """The token's text; nothing for an end token, which would break off a code."""
        return b"" if llama_cpp.llama_vocab_is_eog(self._vocab, token) else self._piece(token)

    def set_adapter(self, path: Path | None) -> None:
        """Put the LoRA adapter in `path` on the model in place of the one before; None: the bare model again, bit-exactly.

        Raises:
            BadInput: the file is missing or not a GGUF.
            DoesNotFit: it was made for another base model. The adapter before stays on.
            Unavailable: the engine is closed.
        """
        with self._lock:
            self._need_open()
            digest, fresh = "", None
            if path is not None:
                check_gguf(path)
                digest = digest_file(path)
                forget()
                fresh = llama_cpp.llama_adapter_lora_init(self._model, str(path).encode())
                if not fresh:
                    raise DoesNotFit(f"adapter {path.name} is not for {self.path.name}{said()}")
            adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(fresh) if fresh else None
            scales = (ctypes.c_float * 1)(1.0) if fresh else None
            code = llama_cpp.llama_set_adapters_lora(self._context, adapters, 1 if fresh else 0, scales)
            if code != 0:
                if fresh:
                    llama_cpp.llama_adapter_lora_free(fresh)
                raise DoesNotFit(f"llama.cpp does not put adapter {path} on {self.path.name} (code {code}){said()}")
            if self._adapter:
                llama_cpp.llama_adapter_lora_free(self._adapter)
            self._adapter, self.adapter_digest = fresh, digest
            self._opening = []
            llama_cpp.llama_memory_clear(self._memory, True)  # the data too: what another adapter computed, NaN perhaps, must not stay

    def close(self) -> None:
        """Free the memory. A second call does nothing."""
        with self._lock:
            for context in filter(None, (self._context, self._embedder)):
                llama_cpp.llama_free(context)
            if self._adapter:
                llama_cpp.llama_adapter_lora_free(self._adapter)
            if self._model:
                llama_cpp.llama_model_free(self._model)
            self._context = self._embedder = self._adapter = self._model = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _need_open(self) -> None:
        if not self._context:
            raise Unavailable("the engine is closed; load a model first")

    def _tokenize(self, prompt: str) -> list[int]:
        """Ids of `prompt`, the begin token first where the model wants one. Control tokens written in the text stay text."""
        try:
            data = prompt.encode()
        except UnicodeEncodeError as error:
            raise BadInput(f"the prompt is not Unicode text: {error.reason}") from error
        room = len(data) + 2
        ids = (llama_cpp.llama_token * room)()
        count = llama_cpp.llama_tokenize(self._vocab, data, len(data), ids, room, False, False)
        if count <= 0:
            raise BadInput("the prompt is empty")
        return self._begin() + list(ids[:count])

    def _begin(self) -> list[int]:
        """The begin token, where the model wants one."""
        return [int(llama_cpp.llama_vocab_bos(self._vocab))] if llama_cpp.llama_vocab_get_add_bos(self._vocab) else []

    def _decode(self, ids: list[int], context: Any = None) -> None:
        array = (llama_cpp.llama_token * len(ids))(*ids)
        code = llama_cpp.llama_decode(context or self._context, llama_cpp.llama_batch_get_one(array, len(ids)))
        if code != 0:
            raise NotEnough(f"llama.cpp could not compute {len(ids)} tokens (code {code}){said()}")

    def _logits(self) -> NDArray[np.float32]:
        """Logits of the last position: (vocabulary,), a view that the next decode overwrites."""
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self._context, -1), shape=(self._size,))

    def _piece(self, token: int) -> bytes:
        buffer = ctypes.create_string_buffer(PIECE_BYTES)
        length = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, PIECE_BYTES, 0, False)
        if length < 0:
            buffer = ctypes.create_string_buffer(-length)
            length = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, -length, 0, False)
        return buffer.raw[:length]

    def _shown(self, token: int) -> str:
        """A token's text by itself; "" for an end token."""
        return self._sayable(token).decode("utf-8", "replace")


class _Speech:
    """One answer on its way out of an engine whose lock is held and whose cache ends with the prompt."""

    def __init__(
        self, engine: Engine, spelling: Spelling | None, choose: Choose, alternatives: int, on_piece: Callable[[Piece], None] | None
    ) -> None:
        self._engine, self._spelling, self._choose, self._count, self._on_piece = engine, spelling, choose, alternatives, on_piece
        self._state: bytes | None = b"" if spelling else None  # what is said of a code; None: all is free
        self._text = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._tokens: list[int] = []
        self._figures: list[Figures] = []
        self._pieces: list[str] = []
        self._others: list[tuple[Alternative, ...]] = []

    def run(self, logits: Logits, limit: int, *, prompt_tokens: int, started: float) -> Generation:
        """Say tokens until the answer ends; `logits` are those after the prompt."""
        stopped: Ending | None = None
        while stopped is None:
            stopped = self._say(logits, limit)
            if stopped is None:
                self._engine._decode(self._tokens[-1:])
                logits = self._engine._logits()
        return Generation(
            text="".join(self._pieces), tokens=tuple(self._tokens), logprobs=tuple(one.logprob for one in self._figures),
            margins=tuple(one.margin for one in self._figures), entropies=tuple(one.entropy for one in self._figures),
            pieces=tuple(self._pieces), prompt_tokens=prompt_tokens, seconds=time.perf_counter() - started, stopped=stopped,
            alternatives=tuple(self._others),
        )  # fmt: skip

    def _say(self, logits: Logits, limit: int) -> Ending | None:
        """Choose the next token and tell it; why the answer ends with it, or None. A code is finished past the limit."""
        allowed = self._spelling.allowed(self._state) if self._spelling and self._state is not None else None
        token = self._choose(logits, allowed)
        self._tokens.append(token)
        self._figures.append(figures(logits, token))
        ended = bool(llama_cpp.llama_vocab_is_eog(self._engine._vocab, token))
        raw = b"" if ended else self._engine._piece(token)
        if self._spelling and self._state is not None:
            self._state = self._spelling.after(self._state, raw)
        last = len(self._tokens) >= limit and self._state is None
        text, line_break, _rest = raw.partition(b"\n")
        stopped: Ending | None = "end" if ended else "line" if line_break else "length" if last else None
        self._pieces.append(self._text.decode(text, final=stopped is not None))  # an unfinished character becomes a sign of its own
        if self._count:
            found = likeliest(logits, self._count)
            self._others.append(tuple(Alternative(one, self._engine._shown(one), logprob) for one, logprob in found))
        if self._on_piece:
            self._on_piece(Piece(self._pieces[-1], token, self._figures[-1].logprob, self._others[-1] if self._count else ()))
        return stopped


def _draw(logits: Logits, allowed: Tokens | None, *, temperature: float, uniform: Callable[[], float]) -> int:
    return drawn(logits, allowed, temperature=temperature, uniform=uniform())


def load_weights(path: Path) -> Any:
    """llama.cpp's handle of a GGUF loaded for the CPU; `llama_model_free` frees it.

    Raises:
        BadInput: the file is missing, not a GGUF or damaged.
        NotEnough: it does not fit this machine's free memory.
    """
    check_gguf(path)
    _need_memory(path)
    wanted = llama_cpp.llama_model_default_params()
    wanted.n_gpu_layers = 0
    forget()
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), wanted)
    if not model:
        raise BadInput(f"{path} does not load as a model{said()}")
    return model


def check_gguf(path: Path) -> None:
    """Check that `path` is a whole GGUF, so that llama.cpp, which ends the process over some damages, sees no damaged one.

    Raises:
        BadInput: it is missing, something else or damaged.
    """
    check_file(path)


def _need_memory(model: Path) -> None:
    """Check that the weights fit the memory that is free now; Linux only, elsewhere llama.cpp finds out."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return
    free = next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), None)
    size = model.stat().st_size
    if free is not None and size > free:
        raise NotEnough(f"{model.name} needs {size >> 20} MiB of memory, {free >> 20} MiB are free; use a smaller model")
