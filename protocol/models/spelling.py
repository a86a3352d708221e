"""Which tokens may come next so that an answer begins with one of a task's codes and ":". No I/O, no model: bytes of tokens in, ids out.

Rules:
 * The beginning is "code:" or " code:", letter for letter; a token may end inside it, at the colon or beyond it. After it all is free.
 * Exact: a token is allowed if and only if some row of tokens leads on from it to a whole beginning. No dead ends.
 * Which way a code is cut into tokens is the model's choice, as in free text: only letters are forced, never a tokenisation.
Limits: built once for a model and its codes (one pass over the vocabulary, 20 ms for 10k tokens, 0.5 s for 262k), then a table look-up
a token. Why not llama.cpp's grammar sampler: docs/adr/0020.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from protocol.errors import DoesNotFit

Tokens = NDArray[np.int32]


class Spelling:
    """The codes of a task in the tokens of one model. A state is what has been said so far; `None`: the beginning is whole.

    `longest` is how many tokens a beginning may take, cut as small as the vocabulary lets the model cut it.

    Raises:
        DoesNotFit: the vocabulary cannot spell one of the codes.
    """

    def __init__(self, codes: Iterable[str], vocabulary: Iterable[bytes]) -> None:
        words = [f"{code}:".encode() for code in codes]
        self._beginnings = (*words, *(b" " + word for word in words))
        useful = self._useful(vocabulary)
        self._allowed: dict[bytes, Tokens] = {}
        most: dict[bytes, int] = {}  # tokens that the rest of a beginning may take
        for state in sorted({word[:cut] for word in self._beginnings for cut in range(len(word))}, key=len, reverse=True):
            ends = tuple(word[len(state) :] for word in self._beginnings if word.startswith(state))
            # longer states are known by now
            ways = [(token, piece) for token, piece in useful if piece.startswith(ends) or state + piece in self._allowed]
            if ways:
                self._allowed[state] = np.array([token for token, _ in ways], dtype=np.int32)
                most[state] = 1 + max(most.get(state + piece, 0) for _, piece in ways)  # 0: the piece ends the beginning
        for word in words:
            if not (_spells(word, useful) or _spells(b" " + word, useful)):
                raise DoesNotFit(f"the model's vocabulary cannot spell {word.decode()!r}; it was trimmed for another task")
        self.longest = most[b""]

    def allowed(self, state: bytes) -> Tokens:
        """Ids that may follow `state`."""
        return self._allowed[state]

    def after(self, state: bytes, piece: bytes) -> bytes | None:
        """The state after an allowed piece."""
        said = state + piece
        return None if said.startswith(self._beginnings) else said

    def _useful(self, vocabulary: Iterable[bytes]) -> list[tuple[int, bytes]]:
        """Tokens that occur inside a beginning or go past the end of one: some hundreds of a vocabulary."""
        everything = b"\n".join(self._beginnings)
        return [
            (token, piece)
            for token, piece in enumerate(vocabulary)
            if piece and b"\n" not in piece and (piece in everything or (b":" in piece and piece[: piece.index(b":") + 1] in everything))
        ]


def _spells(word: bytes, useful: list[tuple[int, bytes]]) -> bool:
    """Whether some row of tokens says `word`."""
    reached = {0}
    for cut in range(len(word)):
        if cut in reached:
            reached |= {cut + len(piece) for _, piece in useful if word.startswith(piece, cut) or piece.startswith(word[cut:])}
    return max(reached) >= len(word)
