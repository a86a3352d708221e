"""A task: how a record becomes a prompt, and how a model's text becomes an answer. No I/O.

Two kinds are enough for everything Milpa does today:
 * verdict    "code: one sentence". The code is judged by equality, the sentence by chrF.
 * text       free text up to the first line break (translation). Judged by chrF and BLEU.

Prompt and target are tokenised apart and joined as ids, in training and on the node alike; so a prompt never ends in a space
and a target always begins with one (SentencePiece marks word starts).
"""

from string import Formatter
from typing import Literal

import msgspec

from protocol.errors import BadInput
from protocol.names import known

SOURCE_LIMIT = 4_000  # characters of one record; the ranch's longest is about 300
LANGUAGES = ("es", "en")

RANCH_CODES = (  # each begins with a token of its own under the teacher's tokenizer
    "normal", "irrigation-due", "saturated-soil", "leak", "dry-run", "clogged-filter", "valve-stuck", "tank-low", "overflow",
    "sensor-stuck", "gauge-blocked", "panel-soiled", "cold-battery", "aged-battery", "gateway-loss", "radio-weak",
)  # fmt: skip


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One thing to answer, with its reference answer where the truth is known."""

    id: str
    task: str
    source: str  # what the model reads: sensor window and note, or the sentence to translate
    lang: str = "en"  # language of the answer
    site: str = ""
    target: str = ""  # reference answer as the model should print it; empty when nobody knows
    verdict: str = ""  # verdict tasks: the code in `target`
    numbers: tuple[float, ...] = ()  # the raw figures behind the window, for the tabular baseline only


class Form(msgspec.Struct, frozen=True):
    """What is known of every prompt and answer of a task before any is read."""

    opening: str = ""  # every prompt begins with it; the engine reads it once
    codes: tuple[str, ...] = ()  # the answer begins with one of them and ":"; empty for free text


class Answer(msgspec.Struct, frozen=True):
    """What a model's text means."""

    text: str
    verdict: str = ""  # empty: the text is not of the task's form, or the task has no verdicts
    sentence: str = ""


class Task(msgspec.Struct, frozen=True):
    """A task's contract with the model.

    `template` has the fields {source} and {lang}; `codes` is empty for free text.
    """

    name: str
    kind: Literal["verdict", "text"]
    template: str
    codes: tuple[str, ...] = ()
    max_new_tokens: int = 64

    @property
    def form(self) -> Form:
        """What the engine is told beside every prompt of this task: on the node, in the evidence and in known answers alike."""
        opening = next((text for text, *_ in Formatter().parse(self.template)), "")
        return Form(opening=opening, codes=self.codes)

    def prompt(self, record: Record) -> str:
        """The text the model reads. Never ends in a space."""
        return self.template.format(source=record.source, lang=record.lang)

    def target(self, record: Record) -> str:
        """The text the model should continue with. Begins with a space; the end-of-sequence token follows it.

        Raises:
            BadInput: the record has no reference answer.
        """
        if not record.target:
            raise BadInput(f"record {record.id!r} has no target: it can be asked, not learned from")
        return " " + record.target

    def parse(self, text: str) -> Answer:
        """Read a model's continuation. A text that is not of the task's form has verdict '' and never raises."""
        line = text.strip().split("\n", 1)[0].strip()
        if self.kind == "text":
            return Answer(text=line, sentence=line)
        code, colon, sentence = line.partition(":")
        verdict = code.strip() if colon and code.strip() in self.codes else ""
        return Answer(text=line, verdict=verdict, sentence=sentence.strip() if verdict else "")

    def render(self, verdict: str, sentence: str) -> str:
        """The answer text for a verdict and its sentence; for free text, the sentence alone."""
        return f"{known(verdict, self.codes, what='verdict')}: {sentence}" if self.codes else sentence


RANCH = Task(name="ranch", kind="verdict", template="{source}\n{lang}:", codes=RANCH_CODES, max_new_tokens=48)


def translation(source: str, target: str) -> Task:
    """The task of translating from one language to another, both named in English ("English", "Spanish")."""
    for language in (source, target):
        if not language.isalpha() or len(language) > 32:
            raise BadInput(f"language {language!r} is not a plain name such as 'English'")
    name = f"translate-{source.lower()}-{target.lower()}"
    return Task(name=name, kind="text", template=f"{source}: {{source}}\n{target}:", max_new_tokens=128)


def task_named(name: str) -> Task:
    """The task called `name`: "ranch", or "translate-english-spanish" and its like.

    Raises:
        UnknownName: neither; the message lists the known ones.
    """
    parts = name.split("-")
    if len(parts) == 3 and parts[0] == "translate":
        return translation(parts[1].capitalize(), parts[2].capitalize())
    known(name, ("ranch", "translate-SOURCE-TARGET"), what="task")
    return RANCH
