"""Vocabulary trimming: drop the pieces that a task does not use; what stays is built of the same merges as before.

72% of the packaged Gemma are embeddings of 262,144 pieces. Always kept are
 * control and byte pieces (any text still has a spelling), single Latin characters, every single character of the counted texts,
 * the `frequent` earliest Latin merges, so that an unseen word falls into syllables and not into letters,
 * with `general` languages: common punctuation.
Then, in this order,
 * pieces that the counting corpus uses (prompts with their template, targets, any general text given), the most used first,
 * with `general` languages: the pieces of those languages' words (`general_weights`), heaviest first.
Each comes with all its intermediate merges: SentencePiece builds a piece from two shorter ones, and would not reach it without them.
With `general` languages there are never more than `pieces`: where the counted texts use more, what they use least is spelled in shorter
pieces. Without them nothing limits what is counted, and each counted text tokenises to the same pieces as before.
Rows of the embedding are cut as stored; nothing is requantised. How many pieces buy which coverage: docs/adr/0014.
"""

import itertools
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from protocol.errors import BadInput
from protocol.models.checkpoint import TOKEN_BYTE, TOKEN_NORMAL, Checkpoint, Value, Vocabulary
from protocol.models.tokenizer import Tokenizer
from protocol.names import known

SPECIALS = ("bos_token_id", "eos_token_id", "unknown_token_id", "padding_token_id")
FREQUENT = 3000  # pieces; about 2 MB at width 640 and 8 bits
PIECES = 30_000  # at most, with general languages; with more, the `small` student is over 40 MB in Q4_K_M
PUNCTUATION = 300  # pieces
RAREST = 3e-7  # of all words: what is rarer is in no vocabulary as one piece
UNSPACED = 0.03  # of words have no space before them: first of a line, after a quotation mark
_ALWAYS = "▁\n 0123456789.,:;!?¿¡'\"()[]{}<>%/+-=_*&#@|°~^$€"


class Coverage(msgspec.Struct, frozen=True):
    """What trimming changed, on texts that were not counted."""

    before: int  # pieces in the vocabulary
    after: int
    texts: int
    identical: float  # share of the texts that tokenise to the same pieces
    same: float  # share of the text that does: tokens that are still there, at the same place
    longer: float  # tokens after / tokens before - 1


def trim(
    source: Path,
    texts: Iterable[str],
    target: Path,
    *,
    frequent: int = FREQUENT,
    general: Sequence[str] = (),
    pieces: int = PIECES,
) -> Checkpoint:
    """Write `source` with only the pieces that `texts` and the `general` languages ("en", "es") need (see above) to `target`.

    Args:
        pieces: the most there may be, with `general` languages; without any it is not looked at.

    Raises:
        UnknownName: a language without a word list.
        BadInput: `pieces` is less than what always stays.
    """
    checkpoint = Checkpoint.read(source)
    with Tokenizer(source) as tokenizer:
        used = Counter(token for text in texts for token in tokenizer.encode(text, bos=False))
        weights = general_weights(checkpoint.vocabulary, tokenizer, general) if general else {}
    keep = keep_set(checkpoint, used, frequent=frequent, weights=weights, pieces=pieces)
    trimmed = cut_vocabulary(checkpoint, keep)
    trimmed.write(target)
    return trimmed


def keep_set(
    checkpoint: Checkpoint,
    used: Mapping[int, int],
    *,
    frequent: int = FREQUENT,
    weights: Mapping[int, float] | None = None,
    pieces: int = PIECES,
) -> list[int]:
    """Ids to keep, ascending; at most `pieces` where there are `weights` of general words.

    Args:
        used: how often the counted texts have each id.

    Raises:
        BadInput: `pieces` is less than what always stays.
    """
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
    keep |= {ids[character] for character in {*_ALWAYS, *(c for i in used if normal[i] for c in vocabulary.tokens[i])} if character in ids}
    merges = [i for i in latin if len(vocabulary.tokens[i]) > 1]

    def whole(i: int) -> set[int]:
        """The piece and all it is merged from."""
        return {i, *(ids[piece] for piece in _steps(vocabulary.tokens[i], scores))} if normal[i] else {i}

    always = sorted(merges, key=lambda i: -vocabulary.scores[i])[:frequent] + (_punctuation(vocabulary)[:PUNCTUATION] if weights else [])
    keep.update(*map(whole, always))
    limit = pieces if weights else len(vocabulary.tokens)
    if len(keep) > limit:
        raise BadInput(f"{limit:,} pieces are too few: {len(keep):,} always stay (bytes, single characters, the most frequent merges)")
    general = weights or {}
    for i in (*sorted(used, key=lambda i: (-used[i], i)), *sorted(general, key=lambda i: (-general[i], i))):
        more = whole(i) - keep
        if len(keep) + len(more) > limit:
            break
        keep |= more
    return sorted(keep)


def general_weights(vocabulary: Vocabulary, tokenizer: Tokenizer, languages: Sequence[str]) -> dict[int, float]:
    """How often each piece occurs in general text of the languages, by word lists with frequencies (package `wordfreq`, offline).

    The lists are in lower case. How common "Boston" is against "boston" the vocabulary itself knows: pieces are numbered in the order they
    were merged, the most frequent first, so spellings that are one piece share the word's frequency as 1 / rank (Zipf).

    Raises:
        UnknownName: a language without a word list.
    """
    import wordfreq

    ranks = {piece: rank for rank, piece in enumerate(vocabulary.tokens, start=1) if vocabulary.types[rank - 1] == TOKEN_NORMAL}
    weights: defaultdict[int, float] = defaultdict(float)

    def spell(forms: Sequence[str], weight: float) -> None:
        """Share the weight among forms that are one piece; without any, among the pieces of each."""
        whole = [form for form in forms if form.replace(" ", "▁") in ranks]
        shares = {form: 1.0 / ranks[form.replace(" ", "▁")] if whole else 1.0 for form in (whole or forms[:2])}
        for form, share in shares.items():
            found = [ranks[form.replace(" ", "▁")] - 1] if whole else tokenizer.encode(form, bos=False)
            for i in found:
                weights[i] += weight * share / sum(shares.values())

    for language in languages:
        known(language, wordfreq.available_languages("large"), what="language with a word list")
        for word, frequency in wordfreq.get_frequency_dict(language, "large").items():
            if frequency < RAREST:
                break  # the most frequent come first
            forms = dict.fromkeys((word, word.capitalize(), word.upper()))
            spell([f" {form}" for form in forms], (1 - UNSPACED) * frequency)
            if frequency * UNSPACED >= RAREST:
                spell([form for form in forms if form != word] or [word], UNSPACED * frequency)
    return dict(weights)


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
        identical = same = total = longer = 0
        for text in texts:
            first, second = _places(old, text), _places(new, text)
            identical += first == second
            same += len(set(first) & set(second))
            total += len(first)
            longer += len(second) - len(first)
        return Coverage(old.size, new.size, len(texts), identical / max(1, len(texts)), same / max(1, total), longer / max(1, total))


def _places(tokenizer: Tokenizer, text: str) -> list[tuple[int, bytes]]:
    """Tokens of a text, each with the byte where it begins."""
    pieces = [tokenizer.piece(token) for token in tokenizer.encode(text, bos=False)]
    return list(zip(itertools.accumulate(map(len, pieces), initial=0), pieces, strict=False))


def _punctuation(vocabulary: Vocabulary) -> list[int]:
    """Pieces of 2 and 3 signs, a word mark among them perhaps, the most frequent (first merged) first."""
    signs = set("▁.,:;!?¿¡'\"()[]{}%/-–—…“”‘’«»*&€$£")
    return [
        i
        for i, piece in enumerate(vocabulary.tokens)
        if 1 <= len(piece) <= 3 and set(piece) <= signs and vocabulary.types[i] == TOKEN_NORMAL
    ]


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
