"""Lossless vocabulary trimming: drop pieces a task never uses; each text of the counting corpus tokenises to the same pieces as before.

72% of the packaged Gemma are embeddings of 262,144 pieces. Kept are
 * pieces that the counting corpus uses (prompts with their template, targets, any general text given),
 * all intermediate merges of each kept piece: SentencePiece builds a piece from two shorter ones, and would not reach it without them,
 * control and byte pieces (any text still has a spelling), single Latin characters,
 * the `frequent` earliest Latin merges, so that an unseen word falls into syllables and not into letters.
Rows of the embedding are cut as stored; nothing is requantised.
"""

import itertools
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
import numpy as np

from protocol.models.checkpoint import TOKEN_BYTE, TOKEN_NORMAL, Checkpoint, Value, Vocabulary
from protocol.models.tokenizer import Tokenizer

SPECIALS = ("bos_token_id", "eos_token_id", "unknown_token_id", "padding_token_id")
FREQUENT = 3000  # pieces; about 2 MB at width 640 and 8 bits
_ALWAYS = "▁\n 0123456789.,:;!?¿¡'\"()[]{}<>%/+-=_*&#@|°~^$€"


class Coverage(msgspec.Struct, frozen=True):
    """What trimming changed, on texts that were not counted."""

    before: int  # pieces in the vocabulary
    after: int
    texts: int
    identical: float  # share of the texts that tokenise to the same pieces
    longer: float  # tokens after / tokens before - 1


def trim(source: Path, texts: Iterable[str], target: Path, *, frequent: int = FREQUENT) -> Checkpoint:
    """Write `source` with only the pieces that `texts` need (see above) to `target`."""
    checkpoint = Checkpoint.read(source)
    with Tokenizer(source) as tokenizer:
        used = Counter(token for text in texts for token in tokenizer.encode(text, bos=False))
    keep = keep_set(checkpoint, used, frequent=frequent)
    trimmed = cut_vocabulary(checkpoint, keep)
    trimmed.write(target)
    return trimmed


def keep_set(checkpoint: Checkpoint, used: Iterable[int], *, frequent: int = FREQUENT) -> list[int]:
    """Ids to keep, ascending."""
    vocabulary = checkpoint.vocabulary
    scores = dict(zip(vocabulary.tokens, vocabulary.scores.tolist(), strict=True))
    ids = {piece: i for i, piece in enumerate(vocabulary.tokens)}
    keep = {
        int(checkpoint.metadata[f"tokenizer.ggml.{name}"].value) for name in SPECIALS if f"tokenizer.ggml.{name}" in checkpoint.metadata
    }
    keep |= set(np.flatnonzero(vocabulary.types == TOKEN_BYTE).tolist())
    normal = vocabulary.types == TOKEN_NORMAL
    latin = [i for i in np.flatnonzero(normal).tolist() if _latin(vocabulary.tokens[i])]
    keep |= {i for i in latin if len(vocabulary.tokens[i]) == 1}
    keep |= {ids[character] for character in _ALWAYS if character in ids}
    merges = [i for i in latin if len(vocabulary.tokens[i]) > 1]
    wanted = set(used) | set(sorted(merges, key=lambda i: -vocabulary.scores[i])[:frequent])
    for i in wanted:
        keep.add(i)
        if normal[i]:
            keep |= {ids[piece] for piece in _steps(vocabulary.tokens[i], scores)}
    return sorted(keep)


def cut_vocabulary(checkpoint: Checkpoint, keep: Sequence[int]) -> Checkpoint:
    """The checkpoint with only those ids, renumbered in order."""
    old = checkpoint.vocabulary
    chosen = np.array(keep, dtype=np.int64)
    renumbered = {before: after for after, before in enumerate(keep)}
    metadata = dict(checkpoint.metadata)
    for name in list(metadata):
        if name.startswith("tokenizer.ggml.") and name.endswith("_token_id"):
            entry = metadata[name]
            if int(entry.value) in renumbered:
                metadata[name] = Value(renumbered[int(entry.value)], entry.kind)
            else:
                del metadata[name]
    tensors = dict(checkpoint.tensors)
    tensors["token_embd.weight"] = tensors["token_embd.weight"].rows(chosen)
    vocabulary = Vocabulary([old.tokens[i] for i in keep], old.scores[chosen], old.types[chosen])
    return Checkpoint(metadata, vocabulary, tensors)


def coverage(before: Path, after: Path, texts: Sequence[str]) -> Coverage:
    """Compare tokenisations of `texts`, best ones that were not counted."""
    with Tokenizer(before) as old, Tokenizer(after) as new:
        same = total = longer = 0
        for text in texts:
            first, second = old.encode(text, bos=False), new.encode(text, bos=False)
            same += [old.piece(i) for i in first] == [new.piece(i) for i in second]
            total += len(first)
            longer += len(second) - len(first)
        return Coverage(old.size, new.size, len(texts), same / max(1, len(texts)), longer / max(1, total))


def _latin(piece: str) -> bool:
    """Letters of the Latin script only, a word mark in front allowed."""
    letters = piece.removeprefix("▁")
    return bool(letters) and all(c.isalpha() and unicodedata.name(c, "").startswith("LATIN") for c in letters)


def _steps(piece: str, scores: dict[str, float]) -> set[str]:
    """Every piece that SentencePiece's merging passes through on the way from single characters to `piece`."""
    parts = list(piece)
    seen = {part for part in parts if part in scores}
    while len(parts) > 1:
        candidates = [(scores[left + right], -at) for at, (left, right) in enumerate(itertools.pairwise(parts)) if left + right in scores]
        if not candidates:
            break
        at = -max(candidates)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        seen.add(parts[at])
    return seen
