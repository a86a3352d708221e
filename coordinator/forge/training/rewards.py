"""What an answer is worth, and which of its tokens are to blame. No I/O, no models: what a teacher thinks comes in with the sample.

A reward looks at a group, all the answers a student drew for one record, and gives each a number in [0, 1]:
 * task         verdict tasks: 1 for the right code in form, IN_FORM for a wrong or unknown one in form, 0 otherwise; free text: chrF2
                against the reference / 100, or where there is none against the other answers (MBR utility, Eikema and Aziz 2020).
 * consistency  agreement with the other answers of the group: the same verdict, or mean chrF2 / 100.
 * language     probability that it is in the answer's language and not in the source's.
 * natural      exp(mean log p) under the teacher, the inverse perplexity; 0 where no teacher spoke.
 * length       shorter / longer of the answer and the reference (the group's median without one), in characters; 0 when cut off.

Several rewards become one advantage as follows (`advantages`): each is centred on its group's mean, which is GRPO's baseline (Shao et al.
2024) and RLOO's but for the factor G / (G - 1) (Ahmadian et al. 2024); then divided by its standard deviation over the whole round, not
the group's, and never by less than SPREAD: a group that hardly differs is not blown up, and a reward that hardly differs says hardly
anything. Their weighted sum is divided by its own deviation where that is above 1, so one reward or five make steps of one size.

On top of that a token inside an error span loses `penalty` (token-level advantages, as in TranslateGemma, arXiv 2601.09012; here the
spans come from rules, not from a judging model). Spans: `blamed`.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from coordinator.forge.judging.categories import BOTH_WAYS, DIGITS, WORD, names, numbers
from coordinator.forge.judging.metrics import sentence_chrf
from coordinator.forge.pairs import translated
from coordinator.forge.synthesis.gates import LONGEST_RUN, REPEATS, Identify, languages_of, longest_repeat
from protocol.errors import BadInput
from protocol.names import known
from protocol.tasks import Record, Task

IN_FORM = 0.2  # of a verdict answer that is wrong, but can be read
SPREAD = 0.05  # the least deviation that a reward is divided by
UNTRANSLATED = 3  # words in a row that are the source's

Floats = NDArray[np.float64]


class Sample(msgspec.Struct, frozen=True):
    """One answer of a group."""

    text: str
    finished: bool
    log_prob: float | None = None  # mean a token under the teacher, nats


Reward = Callable[[Task, Record, Sequence[Sample]], list[float]]


class Span(msgspec.Struct, frozen=True):
    """Characters `begin` to `end` of an answer that are wrong."""

    begin: int
    end: int
    kind: str  # "verdict", "repeated", "untranslated" or "number"


def task_reward(task: Task, record: Record, group: Sequence[Sample]) -> list[float]:
    """Right and in form, or near the reference."""
    answers = [task.parse(sample.text) for sample in group]
    if task.kind == "verdict":
        return [0.0 if not one.verdict or not one.sentence else 1.0 if one.verdict == record.verdict else IN_FORM for one in answers]
    if not record.target:
        return consistency(task, record, group)
    return [score / 100 for score in sentence_chrf([one.sentence for one in answers], [record.target] * len(answers))]


def consistency(task: Task, record: Record, group: Sequence[Sample]) -> list[float]:
    """Agreement with the rest of the group; 0 for an answer alone."""
    answers = [task.parse(sample.text) for sample in group]
    if len(answers) < 2:
        return [0.0] * len(answers)
    if task.kind == "verdict":
        verdicts = [one.verdict for one in answers]
        return [(verdicts.count(verdict) - 1) / (len(verdicts) - 1) if verdict else 0.0 for verdict in verdicts]
    said = [one.sentence for one in answers]
    found = []
    for place, mine in enumerate(said):
        others = [text for other, text in enumerate(said) if other != place]
        found.append(statistics.fmean(sentence_chrf([mine] * len(others), others)) / 100)
    return found


def language(identify: Identify) -> Reward:
    """The reward of being in the answer's language, by whoever identifies languages."""

    def reward(task: Task, record: Record, group: Sequence[Sample]) -> list[float]:
        wanted, others = languages_of(task, record)
        found = []
        for sample in group:
            chances = identify(task.parse(sample.text).sentence)
            mine, theirs = chances.get(wanted, 0.0), sum(chances.get(code, 0.0) for code in others)
            found.append(mine / (mine + theirs) if mine + theirs > 0 else 0.0)
        return found

    return reward


def natural(task: Task, record: Record, group: Sequence[Sample]) -> list[float]:
    """Inverse perplexity under the teacher."""
    return [float(np.exp(min(0.0, sample.log_prob))) if sample.log_prob is not None else 0.0 for sample in group]


def length(task: Task, record: Record, group: Sequence[Sample]) -> list[float]:
    """Neither longer nor shorter than it should be."""
    said = [len(sample.text.strip()) for sample in group]
    wanted = len(record.target) if record.target else statistics.median(said)
    return [
        min(mine, wanted) / max(mine, wanted) if sample.finished and min(mine, wanted) > 0 else 0.0
        for mine, sample in zip(said, group, strict=True)
    ]


def ensemble(identify: Identify | None = None) -> dict[str, Reward]:
    """All rewards by name; without `identify` there is none for the language."""
    found: dict[str, Reward] = {"task": task_reward, "consistency": consistency, "natural": natural, "length": length}
    return found | ({"language": language(identify)} if identify else {})


def chosen(weights: Mapping[str, float], rewards: Mapping[str, Reward]) -> dict[str, Reward]:
    """The rewards that `weights` names.

    Raises:
        UnknownName: one that there is not.
        BadInput: none is named.
    """
    if not weights:
        raise BadInput(f"polishing needs a reward: name at least one of {', '.join(rewards)}")
    return {known(name, tuple(rewards), what="reward"): rewards[name] for name in weights}


def advantages(scores: Mapping[str, Floats], weights: Mapping[str, float]) -> Floats:
    """Rewards by name, each (groups, G), to advantages (groups, G), as the module says."""
    total = sum(weights[name] * _centred(values) for name, values in scores.items())
    assert isinstance(total, np.ndarray)
    return np.asarray(total / max(1.0, float(total.std())), dtype=np.float64)


def _centred(values: Floats) -> Floats:
    centred = values - values.mean(axis=1, keepdims=True)
    return np.asarray(centred / max(SPREAD, float(centred.std())), dtype=np.float64)


def blamed(task: Task, record: Record, text: str) -> list[Span]:
    """What is wrong in an answer, as far as rules can point at it:

    * verdict       the code, where it is known to be another one, or can not be read.
    * repeated      every further copy of a run of words that stands more than REPEATS times in a row, and more often than in the source.
    * untranslated  UNTRANSLATED words or more in a row of the source, that are neither names nor in the reference.
    * number        digits that are neither in the source nor in the reference.

    The last two know English and Spanish: a translation from or into another language is not blamed by them.
    """
    found = [*_verdict(task, record, text), *_repeated(record, text)]
    if task.kind == "text" and len(translated(task)) < 2:
        return found
    return [*found, *_untranslated(task, record, text), *_wrong_numbers(record, text)]


def _verdict(task: Task, record: Record, text: str) -> Iterator[Span]:
    answer = task.parse(text)
    if not task.codes or (answer.verdict and record.verdict in ("", answer.verdict)):
        return
    begin = len(text) - len(text.lstrip())
    line = text[begin:].split("\n", 1)[0]
    code = line.partition(":")[0] if ":" in line else (line.split() or [""])[0]
    if code:
        yield Span(begin, begin + len(code), "verdict")


def _repeated(record: Record, text: str) -> Iterator[Span]:
    found = list(WORD.finditer(text))
    words = [match.group().lower() for match in found]
    allowed = max(REPEATS, longest_repeat([word.lower() for word in WORD.findall(record.source)])[0])
    for size in range(1, min(LONGEST_RUN, len(words) // 2) + 1):
        same = 0
        for at in range(size, len(words) + 1):
            if at < len(words) and words[at] == words[at - size]:
                same += 1
                continue
            if same // size + 1 > allowed:
                yield Span(found[at - same].start(), found[at - 1].end(), "repeated")
            same = 0


def _untranslated(task: Task, record: Record, text: str) -> Iterator[Span]:
    if task.kind != "text":
        return
    kept = {word.lower() for word in names(record.source)} | BOTH_WAYS | {word.lower() for word in WORD.findall(record.target)}
    source = [word.lower() for word in WORD.findall(record.source)]
    runs = {tuple(source[at : at + UNTRANSLATED]) for at in range(len(source) - UNTRANSLATED + 1)}
    found = list(WORD.finditer(text))
    words = [match.group().lower() for match in found]
    for at in range(len(words) - UNTRANSLATED + 1):
        run = tuple(words[at : at + UNTRANSLATED])
        if run in runs and not kept.issuperset(run):
            yield Span(found[at].start(), found[at + UNTRANSLATED - 1].end(), "untranslated")


def _wrong_numbers(record: Record, text: str) -> Iterator[Span]:
    allowed = {*numbers(record.source), *numbers(record.target)}
    for match in DIGITS.finditer(text):
        if not allowed.issuperset(numbers(match.group())):
            yield Span(match.start(), match.end(), "number")


def inside(spans: Sequence[Span], pieces: Sequence[bytes]) -> list[bool]:
    """Which tokens touch a span; `pieces` are the bytes of the answer's tokens, control tokens empty."""
    ends: list[int] = []
    so_far = b""
    for piece in pieces:
        so_far += piece
        ends.append(len(so_far.decode("utf-8", errors="replace")))
    begins = [0, *ends[:-1]]
    return [any(begin < span.end and end > span.begin for span in spans) for begin, end in zip(begins, ends, strict=True)]
