"""The one gate: what a teacher's text must pass before anything is learned from it. The first gate that refuses it says why.

In this order, because a likelihood alone loves untranslated copies (AUC 0.03, docs/log.md) and no score mends a wrong number:
 * finished     the text came to an end before its limit of tokens.
 * form         it is of the task's form.
 * truth        verdict tasks: it does not contradict a verdict that is known.
 * language     it is rather in the answer's language than in the source's, and not clearly in a third (needs `identify`).
 * copy         translation: its words are not the source's, names and numbers apart.
 * length       translation: its characters are between SHORTEST and LONGEST of the source's, with SPARE more or fewer.
 * repetition   no run of words follows itself more often than in the source, and no few letters go on and on.
 * numbers      translation: the source's numbers stand in it, and no others; in digits or in words.
 * names        translation: each name inside the source's sentence has something like it in the answer, and the other way round.
These two are between English and Spanish only: read by their words and capitals, good translations of other languages would be refused.

Limits are of alphabetic languages, measured on English to Spanish (docs/adr/0012): together they refuse 2% of human translations, most of
them for a name or a number that the translator put into other words. Numbers and names are read by `judging.categories`, so what a
gate demands is what the evidence later counts as kept. No I/O: who identifies languages comes in as an argument.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher

import msgspec

from coordinator.forge.judging.categories import BOTH_WAYS, WORD, names, numbers
from coordinator.forge.pairs import LANGUAGE_CODES, language_of, translated
from protocol.tasks import LANGUAGES, Record, Task

GATES = ("finished", "form", "truth", "language", "copy", "length", "repetition", "numbers", "names")
SHORTEST, LONGEST = 0.5, 2.0  # characters of an answer for one of its source
SPARE = 6  # characters; "Go." may become "Vete ya."
COPIED = 0.8  # of the words
FEWEST = 2  # words that are neither name nor number; with fewer there is nothing to tell a copy by
THIRD = 0.5  # probability of a third language, where that of the answer's is below UNLIKELY
UNLIKELY = 0.01  # the lowest of 1,000 human sentences was 0.037
LETTERS = 4  # of a text; with fewer it is of no language
REPEATS = 2  # times in a row that a run of words may stand where the source has no such run
LONGEST_RUN = 8  # words
ALIKE = 0.5  # share of letters in common that makes "Londres" London
STAMMER = re.compile(r"(\S{1,4}?)\1{7,}")  # the same letters eight times

Identify = Callable[[str], Mapping[str, float]]  # text -> probability by language code


class Refusal(msgspec.Struct, frozen=True):
    """Why a text was not kept."""

    gate: str  # one of GATES
    reason: str  # for people: "2 of 3 numbers are missing: 14, 7"


def refusal(task: Task, record: Record, text: str, *, finished: bool = True, identify: Identify | None = None) -> Refusal | None:
    """The first gate that refuses `text` as an answer to `record`; None: it passes all."""
    for gate, reason in _reasons(task, record, text, finished, identify):
        if reason:
            return Refusal(gate, reason)
    return None


def passes(task: Task, record: Record, text: str, *, finished: bool = True, identify: Identify | None = None) -> bool:
    """Whether no gate refuses `text`."""
    return refusal(task, record, text, finished=finished, identify=identify) is None


def languages_of(task: Task, record: Record) -> tuple[str, tuple[str, ...]]:
    """Code of the answer's language and of those it could be mistaken for; "" where the task's language has no code here."""
    if task.kind == "verdict":
        return record.lang, tuple(code for code in LANGUAGES if code != record.lang)
    _, source, _ = (*task.name.split("-"), "", "")[:3]
    return language_of(task, record), tuple(filter(None, [LANGUAGE_CODES.get(source, "")]))


def _reasons(task: Task, record: Record, text: str, finished: bool, identify: Identify | None) -> Iterator[tuple[str, str]]:
    """Gate after gate: its name and what it found wrong, "" for nothing. Later gates are not computed once one refused."""
    answer = task.parse(text)
    said, source = answer.sentence, record.source
    yield "finished", "" if finished else "cut off at the limit of tokens"
    yield "form", _form(task, answer.verdict, said)
    yield "truth", f"says {answer.verdict}, known to be {record.verdict}" if record.verdict not in ("", answer.verdict) else ""
    if identify is not None:
        yield "language", _language(said, *languages_of(task, record), identify)
    if task.kind == "text":
        yield "copy", _copy(said, source)
        yield "length", _length(said, source)
    yield "repetition", _repetition(said, source)
    if len(translated(task)) == 2:
        yield "numbers", _numbers(said, source)
        yield "names", _names(said, source)


def _form(task: Task, verdict: str, sentence: str) -> str:
    if task.codes and not verdict:
        return "no known verdict before a colon"
    return "" if any(character.isalnum() for character in sentence) else "no words"


def _language(said: str, wanted: str, others: Sequence[str], identify: Identify) -> str:
    if not wanted or sum(character.isalpha() for character in said) < LETTERS:
        return ""
    found = identify(said)
    mine = found.get(wanted, 0.0)
    likeliest = max(found, key=lambda code: found[code], default="")
    if any(found.get(other, 0.0) > mine for other in others) or (mine < UNLIKELY and found.get(likeliest, 0.0) >= THIRD):
        return f"rather {likeliest} ({found.get(likeliest, 0.0):.2f}) than {wanted} ({mine:.2f})"
    return ""


def _copy(said: str, source: str) -> str:
    known = {word.lower() for word in names(source)} | BOTH_WAYS
    mine = [word for word in _words(said) if word not in known]
    theirs = Counter(_words(source))
    same = sum((Counter(mine) & theirs).values())
    return f"{same} of {len(mine)} words are the source's" if len(mine) >= FEWEST and same >= COPIED * len(mine) else ""


def _length(said: str, source: str) -> str:
    low, high = SHORTEST * len(source) - SPARE, LONGEST * len(source) + SPARE
    return "" if low <= len(said) <= high else f"{len(said)} characters for a source of {len(source)}: not in {low:.0f} to {high:.0f}"


def _repetition(said: str, source: str) -> str:
    times, run = longest_repeat(_words(said))
    if times > max(REPEATS, longest_repeat(_words(source))[0]):
        return f"{' '.join(run)!r} stands {times} times in a row"
    stammer = STAMMER.search(said)
    return f"{stammer.group()[:24]!r} goes on and on" if stammer and not STAMMER.search(source) else ""


def _numbers(said: str, source: str) -> str:
    asked, given = numbers(source), numbers(said)
    lost, new = asked - given, given - asked
    if lost:
        return f"{lost.total()} of {asked.total()} numbers are missing: {', '.join(sorted(lost))}"
    return f"numbers that the source has not: {', '.join(sorted(new))}" if new else ""


def _names(said: str, source: str) -> str:
    theirs, mine = WORD.findall(source), WORD.findall(said)
    lost = [name for name in names(source) if not any(alike(name, word) for word in mine)]
    if lost:
        return f"nothing like {', '.join(lost)} stands in it"
    new = [name for name in names(said) if not any(alike(name, word) for word in theirs)]
    return f"names that the source has not: {', '.join(new)}" if new else ""


def alike(name: str, word: str) -> bool:
    """Whether `word` could be `name` in another language: the same first letter, and half of the letters in the same order."""
    one, other = _bare(name), _bare(word)
    return one == other or (one[:1] == other[:1] and SequenceMatcher(None, one, other, autojunk=False).ratio() >= ALIKE)


def longest_repeat(words: Sequence[str]) -> tuple[int, Sequence[str]]:
    """How often a run of at most LONGEST_RUN words follows itself, and the run; (1, ()) where none does."""
    best: tuple[int, Sequence[str]] = (1, ())
    for size in range(1, min(LONGEST_RUN, len(words) // 2) + 1):
        same = 0  # words in a row that equal the one `size` before
        for at in range(size, len(words)):
            same = same + 1 if words[at] == words[at - size] else 0
            if same // size + 1 > best[0]:
                best = same // size + 1, words[at - size + 1 : at + 1]
    return best


def _words(text: str) -> list[str]:
    return [word.lower() for word in WORD.findall(text)]


def _bare(word: str) -> str:
    """Lower case, without accents."""
    return "".join(character for character in unicodedata.normalize("NFD", word.lower()) if not unicodedata.combining(character))
