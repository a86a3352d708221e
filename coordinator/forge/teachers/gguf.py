"""A GGUF as teacher, by llama.cpp: several sequences computed together, their common beginning read once.

Rules:
 * A batch is rows of (token, position, sequence). Many sequences in one batch share one pass over the weights, which is what a small
   batch on a CPU waits for; the prompt of n samples is read once and copied, and so is a beginning common to all prompts (few-shot
   examples), which stays in memory for the next call.
 * Draws come from the seed and the prompt (`torch_model.draws`): no matter what else is in the batch, and the same as in torch.
 * What shares a batch changes the last bits of the logits, so a near tie may fall otherwise than in `Engine`, which answers one by one.
Limits: prompt and answer within `context` tokens; the cells of all sequences are `slots * context`, so memory grows with both.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import llama_cpp
import numpy as np
import torch
from numpy.typing import NDArray

from coordinator.forge.targets.cache import Targets
from coordinator.forge.targets.score import likelihood_of, top_of
from coordinator.forge.teachers import CONTEXT, Said, check_request
from coordinator.forge.teachers.sampling import check_examples, chosen_log_probs, to_said
from protocol.digests import digest_file
from protocol.errors import BadInput, NotEnough, TooLarge, Unavailable
from protocol.models.engine import load_weights
from protocol.models.llama_log import forget, said
from protocol.models.tokenizer import Example, Tokenizer
from protocol.models.torch_model import drawn, draws

SLOTS = 16  # sequences side by side; what more gained is in docs/log.md
BATCH = 512  # tokens a call to llama.cpp
LOGITS_BYTES = 64 << 20  # of one batch's logits: at 262k tokens of vocabulary, 64 positions
COMMON = 16  # tokens; a shorter common beginning is not worth a copy


class _Cell(NamedTuple):
    """One token to read."""

    token: int
    position: int
    sequence: int
    wanted: bool  # its logits are


class GgufTeacher:
    """A model file in memory. Sequence 0 holds the common beginning, 1 to `slots` the answers.

    Raises:
        BadInput: the file is missing, not a GGUF or damaged.
        NotEnough: it does not fit this machine's free memory.
    """

    open = True
    reads: Literal["prompt", "source"] = "prompt"

    def __init__(self, path: Path, *, threads: int = 1, context: int = CONTEXT, slots: int = SLOTS) -> None:
        self.name, self.context, self.slots = path.name, context, slots
        self._context: Any = None
        self._model = load_weights(path)
        self._stack = contextlib.ExitStack()
        try:
            self._text = self._stack.enter_context(Tokenizer(path))
            self.digest = digest_file(path)
            self.vocabulary = self._text.size
            self.tokenizer = self._text.digest
            self._outputs = max(slots, min(BATCH, LOGITS_BYTES // (4 * self.vocabulary)))
            self._open_context(threads)
        except BaseException:
            self.close()
            raise
        self._common: list[int] = []
        self._ends: dict[int, bool] = {}

    def generate(self, prompts: Sequence[str], *, n: int, temperature: float, seed: int, max_new_tokens: int) -> list[list[Said]]:
        """See `Teacher`."""
        check_request(n=n, temperature=temperature, max_new_tokens=max_new_tokens)
        self._need_open()
        read = [self._read(prompt, max_new_tokens) for prompt in prompts]
        if not read:
            return []
        self._hold(read)
        uniform = draws(read, n, max_new_tokens, seed) if temperature > 0 else None  # (rows, tokens)
        answers: list[list[Said]] = [[] for _ in read]
        rows = [(prompt, prompt * n + sample) for prompt in range(len(read)) for sample in range(n)]
        for first in range(0, len(rows), self.slots):
            wave = rows[first : first + self.slots]
            drawn_in_wave = uniform[[row for _, row in wave]] if uniform is not None else None
            found = self._answer([read[prompt] for prompt, _ in wave], drawn_in_wave, temperature, max_new_tokens)
            for (prompt, _), one in zip(wave, found, strict=True):
                answers[prompt].append(one)
        return answers

    def score(self, examples: Sequence[Example], *, k: int) -> list[Targets]:
        """See `Teacher`."""
        return top_of(self._predictions(examples), k=k)

    def log_probs(self, examples: Sequence[Example]) -> list[NDArray[np.float32]]:
        """See `Teacher`."""
        return [one.numpy() for one in likelihood_of(self._predictions(examples), examples)]

    def close(self) -> None:
        """Free the memory. A second call does nothing."""
        if self._context:
            llama_cpp.llama_batch_free(self._batch)
            llama_cpp.llama_free(self._context)
        if self._model:
            llama_cpp.llama_model_free(self._model)
        self._context = self._model = None
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_context(self, threads: int) -> None:
        wanted = llama_cpp.llama_context_default_params()
        wanted.n_ctx = (self.slots + 1) * self.context
        wanted.n_batch = wanted.n_ubatch = BATCH
        wanted.n_seq_max = self.slots + 1
        wanted.n_outputs_max = self._outputs
        wanted.n_threads = wanted.n_threads_batch = threads
        wanted.offload_kqv = wanted.op_offload = False
        wanted.no_perf = True
        wanted.kv_unified = True  # one pool of cells: copies are free, and a fifth faster than one a sequence (docs/log.md)
        forget()
        self._context = llama_cpp.llama_init_from_model(self._model, wanted)
        if not self._context:
            raise NotEnough(f"no memory for {self.slots} sequences of {self.context} tokens with {self.name}; use fewer slots{said()}")
        self._memory: Any = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)

    def _need_open(self) -> None:
        if not self._context:
            raise Unavailable(f"the teacher {self.name} is closed; open it again")

    def _read(self, prompt: str, max_new_tokens: int) -> list[int]:
        ids = self._text.encode(prompt, bos=True)
        if not prompt or not ids:
            raise BadInput("the prompt is empty")
        if len(ids) + max_new_tokens > self.context:
            raise TooLarge(
                f"a prompt of {len(ids)} tokens and {max_new_tokens} new ones are over the teacher's context of {self.context}; "
                "open it with a larger one or shorten the record"
            )
        return ids

    def _hold(self, rows: Sequence[list[int]]) -> None:
        """Have the beginning that all rows share in sequence 0; each row keeps at least its last token for itself."""
        held = len(self._common)
        if held and all(len(row) > held and list(row[:held]) == self._common for row in rows):
            return
        common = common_beginning(rows) if len(rows) > 1 else []
        llama_cpp.llama_memory_clear(self._memory, False)
        self._common = []
        for _ in self._compute([_Cell(token, at, 0, False) for at, token in enumerate(common)]):
            pass
        self._common = common

    def _start(self, sequence: int) -> None:
        """Empty a sequence but for the common beginning."""
        llama_cpp.llama_memory_seq_rm(self._memory, sequence, -1, -1)
        if self._common:
            llama_cpp.llama_memory_seq_cp(self._memory, 0, sequence, -1, -1)

    def _answer(self, prompts: Sequence[list[int]], uniform: torch.Tensor | None, temperature: float, max_new_tokens: int) -> list[Said]:
        """Continue one prompt a slot; equal prompts side by side are read once."""
        logits = self._first_logits(prompts)  # (rows, V)
        alive = torch.arange(len(prompts))
        tokens: list[list[int]] = [[] for _ in prompts]
        totals = torch.zeros(len(prompts), dtype=torch.float64)
        for step in range(max_new_tokens):
            chosen = logits.argmax(-1) if uniform is None else drawn(logits / temperature, uniform[alive, step])
            totals[alive] += chosen_log_probs(logits, chosen).double()
            for row, token in zip(alive.tolist(), chosen.tolist(), strict=True):
                tokens[row].append(token)
            alive = torch.tensor([row for row in alive.tolist() if not self._is_end(tokens[row][-1])], dtype=torch.long)
            if not len(alive) or step == max_new_tokens - 1:
                break
            cells = [_Cell(tokens[row][-1], len(prompts[row]) + step, row + 1, True) for row in alive.tolist()]
            logits = torch.cat(list(self._compute(cells)))
        ends = {token for token, is_end in self._ends.items() if is_end}
        return [to_said(row, float(total), self._text.decode, ends) for row, total in zip(tokens, totals, strict=True)]

    def _first_logits(self, prompts: Sequence[list[int]]) -> torch.Tensor:
        """Read the prompts into sequences 1, 2, ...: logits (rows, V) after each."""
        cells: list[_Cell] = []
        leaders: list[int] = []  # row -> the first row with its prompt
        for row, prompt in enumerate(prompts):
            self._start(row + 1)
            leaders.append(leaders[-1] if row and prompt == prompts[row - 1] else row)
            if leaders[-1] == row:
                cells += self._cells(prompt, row + 1, wanted_from=len(prompt) - 1)
        logits = torch.cat(list(self._compute(cells)))
        for row, leader in enumerate(leaders):
            if leader != row:
                llama_cpp.llama_memory_seq_rm(self._memory, row + 1, -1, -1)
                llama_cpp.llama_memory_seq_cp(self._memory, leader + 1, row + 1, -1, -1)
        places = {leader: at for at, leader in enumerate(dict.fromkeys(leaders))}
        return logits[[places[leader] for leader in leaders]]

    def _cells(self, ids: Sequence[int], sequence: int, *, wanted_from: int) -> list[_Cell]:
        return [_Cell(ids[at], at, sequence, at >= wanted_from) for at in range(len(self._common), len(ids))]

    def _predictions(self, examples: Sequence[Example]) -> Iterator[tuple[int, torch.Tensor]]:
        """Place of each example and its logits at the target positions (n, V), in order."""
        self._need_open()
        check_examples(examples, vocabulary=self.vocabulary, room=self.context)
        if examples:
            self._hold([one.prompt for one in examples])
        for first in range(0, len(examples), self.slots):
            group = examples[first : first + self.slots]
            cells: list[_Cell] = []
            for slot, one in enumerate(group, start=1):
                self._start(slot)
                cells += self._cells([*one.prompt, *one.target[:-1]], slot, wanted_from=len(one.prompt) - 1)
            computed = self._compute(cells)
            held = torch.empty(0, self.vocabulary)
            for place, one in enumerate(group, start=first):
                while len(held) < len(one.target):
                    held = torch.cat((held, next(computed)))
                yield place, held[: len(one.target)]
                held = held[len(one.target) :]

    def _compute(self, cells: Sequence[_Cell]) -> Iterator[torch.Tensor]:
        """Read the cells; the logits (m, V) of the wanted ones, part by part."""
        begin = 0
        while begin < len(cells):
            end, outputs = begin, 0
            while end < len(cells) and end - begin < BATCH and outputs + cells[end].wanted <= self._outputs:
                outputs += cells[end].wanted
                end += 1
            part = cells[begin:end]
            self._decode(part)
            if outputs:
                yield torch.from_numpy(np.stack([self._logits(at) for at, cell in enumerate(part) if cell.wanted]))
            begin = end

    def _decode(self, cells: Sequence[_Cell]) -> None:
        batch = self._batch
        batch.n_tokens = len(cells)
        for at, cell in enumerate(cells):
            batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.logits[at] = cell.token, cell.position, 1, cell.wanted
            batch.seq_id[at][0] = cell.sequence
        forget()
        code = llama_cpp.llama_decode(self._context, batch)
        if code != 0:
            self._common = []
            llama_cpp.llama_memory_clear(self._memory, False)
            raise NotEnough(f"llama.cpp could not compute {len(cells)} tokens with {self.name} (code {code}){said()}")

    def _logits(self, at: int) -> NDArray[np.float32]:
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self._context, at), shape=(self.vocabulary,))

    def _is_end(self, token: int) -> bool:
        """An end token, or one with a line break in it."""
        if token not in self._ends:
            self._ends[token] = self._text.is_end(token) or b"\n" in self._text.piece(token)
        return self._ends[token]


def common_beginning(rows: Sequence[list[int]]) -> list[int]:
    """The longest beginning of all rows that leaves each a token of its own; [] when it is not worth a copy."""
    first, last = min(rows), max(rows)  # of sorted lists, the two that differ earliest
    room = min(len(row) for row in rows) - 1
    length = next((at for at in range(room) if first[at] != last[at]), room)
    return list(first[:length]) if length >= COMMON else []
