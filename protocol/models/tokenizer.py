"""The node's own tokeniser, for training too: llama.cpp loads only the vocabulary of the GGUF, so ids cannot differ.

Prompt and target are tokenised apart and joined as ids (see `protocol.tasks`). Loads no torch.
"""

import ctypes
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import llama_cpp

import protocol.models.llama_log  # noqa: F401  # keeps llama.cpp off stderr
from protocol.digests import digest_value
from protocol.errors import BadInput, MalformedMessage
from protocol.tasks import Record, Task


class Example(NamedTuple):
    """What a model learns from: ids to read and ids to say. `prompt` starts with bos, `target` ends in eos."""

    prompt: list[int]
    target: list[int]


class Tokenizer:
    """Text <-> ids by the vocabulary in a GGUF file."""

    def __init__(self, model: Path) -> None:
        """Load the vocabulary only (no tensors).

        Raises:
            BadInput: there is no such file.
            MalformedMessage: llama.cpp cannot read it.
        """
        if not model.is_file():
            raise BadInput(f"model file {model} does not exist")
        parameters = llama_cpp.llama_model_default_params()
        parameters.vocab_only = True
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(model), parameters)
        if not self._model:
            raise MalformedMessage(f"llama.cpp cannot read the vocabulary of {model}")
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.bos = int(llama_cpp.llama_vocab_bos(self._vocab))
        self.eos = int(llama_cpp.llama_vocab_eos(self._vocab))
        self.size = int(llama_cpp.llama_vocab_n_tokens(self._vocab))

    def encode(self, text: str, *, bos: bool) -> list[int]:
        """Ids of `text`; control words inside it are plain text."""
        data = text.encode()
        room = len(data) + 2  # never more ids than bytes, and bos
        ids = (llama_cpp.llama_token * room)()
        count = llama_cpp.llama_tokenize(self._vocab, data, len(data), ids, room, bos, False)
        if count < 0:
            raise BadInput(f"text of {len(data)} bytes does not tokenise into {room} ids")
        return list(ids[:count])

    def piece(self, token: int) -> bytes:
        """The bytes of one token; empty for control tokens."""
        buffer = ctypes.create_string_buffer(256)
        count = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, 256, 0, False)
        return buffer.raw[: max(0, count)]

    def is_end(self, token: int) -> bool:
        """Whether the model means by it that the answer is over: `eos` and its like (the end of a turn)."""
        return bool(llama_cpp.llama_vocab_is_eog(self._vocab, token))

    @cached_property
    def pieces(self) -> list[str]:
        """All pieces by id, as `Checkpoint.vocabulary` holds them."""
        return [llama_cpp.llama_vocab_get_text(self._vocab, token).decode() for token in range(self.size)]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all pieces in order: two models with the same one share their ids."""
        return digest_value(self.pieces)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; control tokens vanish, bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.piece(token) for token in ids).decode("utf-8", errors="replace")

    def close(self) -> None:
        """Free the vocabulary; closing twice does nothing."""
        if self._model:
            llama_cpp.llama_model_free(self._model)
            self._model = None

    def __enter__(self) -> "Tokenizer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def make_example(tokenizer: Tokenizer, task: Task, record: Record) -> Example:
    """Prompt and target of a record, tokenised apart.

    Raises:
        BadInput: the record has no target.
    """
    target = tokenizer.encode(task.target(record), bos=False)
    return Example(tokenizer.encode(task.prompt(record), bos=True), [*target, tokenizer.eos])
