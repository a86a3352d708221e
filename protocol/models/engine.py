"""The one llama.cpp engine: nodes answer with it, and the coordinator's evidence is measured with it.

Rules:
 * Greedy, and the same prompt gives the same answer: the KV cache is emptied before each prompt (a reused prefix changes the batch
   shapes and with them the last bits of the logits), and everything runs on the CPU.
 * The text ends at an end token, or before its first line break.
 * Log-probabilities, margins and entropies come from the logits of the same forward pass; they cost no second one.
 * One lock: one prompt at a time. More speed is more threads, not more callers.
Limits: one sequence, prompt and answer together within `context` tokens. No sampling, no grammar, no batching of prompts.
llama.cpp and numpy only; the low-level API, because the high-level one keeps logits for every position and cannot swap adapters.
"""

import codecs
import ctypes
import threading
import time
from pathlib import Path
from typing import Any, Literal, Self

import llama_cpp
import msgspec
import numpy as np
from numpy.typing import NDArray

from protocol.digests import digest_file
from protocol.errors import BadInput, DoesNotFit, NotEnough, Unavailable
from protocol.models.llama_log import forget, said

PIECE_BYTES = 256  # longest token text read at first; a longer one is read again with the length llama.cpp asks for
UBATCH = 256  # tokens computed at once; larger costs memory and gains nothing on prompts of this size
FLOOR = np.float32(-100.0)  # log-probabilities below the top by more than this are exp() == 0 in float32

llama_cpp.llama_backend_init()


class Generation(msgspec.Struct, frozen=True):
    """What the model said and how sure it was of each token. The five tuples have one entry a token, the end token included."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]  # natural log of the chosen token's probability
    margins: tuple[float, ...]  # top-1 minus top-2, in log-probability
    entropies: tuple[float, ...]  # of the whole next-token distribution, nats
    pieces: tuple[str, ...]  # text of each token, "" for the end token; a character split over tokens belongs to its last one
    prompt_tokens: int
    seconds: float
    stopped: Literal["end", "line", "length"]


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
        self._adapter: Any = None
        self.path = model
        self.context = context
        self.threads = threads
        self.adapter_digest = ""
        self._model = load_weights(model)
        self._vocab: Any = llama_cpp.llama_model_get_vocab(self._model)
        self._size = int(llama_cpp.llama_vocab_n_tokens(self._vocab))
        try:
            self.model_digest = digest_file(model)
            self._open_context()
            self.set_adapter(adapter)
        except BaseException:
            self.close()
            raise

    def _open_context(self) -> None:
        wanted = llama_cpp.llama_context_default_params()
        wanted.n_ctx = wanted.n_batch = self.context
        wanted.n_ubatch = min(UBATCH, self.context)
        wanted.n_seq_max = 1
        wanted.n_outputs_max = 1  # logits for the last position only: at 262k tokens of vocabulary, 1 MiB and not 1 GiB
        wanted.n_threads = wanted.n_threads_batch = self.threads
        wanted.offload_kqv = wanted.op_offload = False
        wanted.no_perf = True
        self._context = llama_cpp.llama_init_from_model(self._model, wanted)
        if not self._context:
            raise NotEnough(f"no memory for a context of {self.context} tokens for {self.path.name}; try a smaller one{said()}")
        self._memory: Any = llama_cpp.llama_get_memory(self._context)

    def generate(self, prompt: str, *, max_new_tokens: int) -> Generation:
        """Continue `prompt` greedily by at most `max_new_tokens` tokens; `seconds` is wall-clock time of the whole call.

        Raises:
            BadInput: an empty prompt, one longer than the context, or text that is not Unicode.
            DoesNotFit: the model's figures are not finite (a damaged adapter, or an instruction set it was not made for).
            Unavailable: the engine is closed.
        """
        started = time.perf_counter()
        if max_new_tokens < 1:
            raise BadInput(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
        with self._lock:
            self._need_open()
            forget()
            ids = self._tokenize(prompt)
            if len(ids) >= self.context:
                raise BadInput(f"the prompt has {len(ids)} tokens, the model reads at most {self.context - 1}; shorten the record")
            return self._continue(ids, min(max_new_tokens, self.context - len(ids)), started)

    def _continue(self, ids: list[int], limit: int, started: float) -> Generation:
        llama_cpp.llama_memory_clear(self._memory, False)
        tokens: list[int] = []
        figures: list[tuple[float, float, float]] = []
        pieces: list[str] = []
        text = codecs.getincrementaldecoder("utf-8")(errors="replace")
        stopped: Literal["end", "line", "length"] = "length"
        batch = ids
        for _ in range(limit):
            self._decode(batch)
            token, *sure = _read(self._logits())
            tokens.append(token)
            figures.append((sure[0], sure[1], sure[2]))
            if llama_cpp.llama_vocab_is_eog(self._vocab, token):
                pieces.append(text.decode(b"", final=True))  # "" but for a character the model left unfinished
                stopped = "end"
                break
            raw, line_break, _rest = self._piece(token).partition(b"\n")
            pieces.append(text.decode(raw, final=bool(line_break)))
            if line_break:
                stopped = "line"
                break
            batch = [token]
        else:
            pieces[-1] += text.decode(b"", final=True)
        logprobs, margins, entropies = zip(*figures, strict=True)
        return Generation(
            text="".join(pieces), tokens=tuple(tokens), logprobs=logprobs, margins=margins, entropies=entropies, pieces=tuple(pieces),
            prompt_tokens=len(ids), seconds=time.perf_counter() - started, stopped=stopped,
        )  # fmt: skip

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
            llama_cpp.llama_memory_clear(self._memory, True)  # the data too: what another adapter computed, NaN perhaps, must not stay

    def close(self) -> None:
        """Free the memory. A second call does nothing."""
        with self._lock:
            if self._context:
                llama_cpp.llama_free(self._context)
            if self._adapter:
                llama_cpp.llama_adapter_lora_free(self._adapter)
            if self._model:
                llama_cpp.llama_model_free(self._model)
            self._context = self._adapter = self._model = None

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
        begin = [int(llama_cpp.llama_vocab_bos(self._vocab))] if llama_cpp.llama_vocab_get_add_bos(self._vocab) else []
        if count <= 0:
            raise BadInput("the prompt is empty")
        return begin + list(ids[:count])

    def _decode(self, ids: list[int]) -> None:
        array = (llama_cpp.llama_token * len(ids))(*ids)
        code = llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(array, len(ids)))
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
    """Check that `path` begins like a GGUF.

    Raises:
        BadInput: it is missing or something else.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise BadInput(f"cannot read the model file {path}: {error.strerror}") from error
    if magic != b"GGUF":
        raise BadInput(f"{path} is not a GGUF file")


def _read(logits: NDArray[np.float32]) -> tuple[int, float, float, float]:
    """Greedy token, its log-probability, its margin over the second, and the entropy of all: log-softmax over (vocabulary,)."""
    token = int(logits.argmax())
    others = logits.copy()
    others[token] = -np.inf
    second = float(others.max())  # a copy and a maximum are ten times faster than np.partition
    below = np.maximum(logits - logits[token], FLOOR)  # (vocabulary,), all <= 0
    weights = np.exp(below)
    total = float(weights.sum(dtype=np.float64))
    if not np.isfinite(total):
        raise DoesNotFit("the model computes figures that are not finite; the model or its adapter is damaged")
    entropy = np.log(total) - float(np.dot(weights, below)) / total
    return token, -float(np.log(total)), float(logits[token]) - second, float(entropy)


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
