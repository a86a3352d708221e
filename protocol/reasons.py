"""Why an answer is as it is: a code with its figures, and its words in English and Spanish. No I/O.

Whoever decides says `Why("below", {"what": Why("right-verdict"), "sure": 0.41, "limit": 0.63})`. The store keeps it so (`kept`, `read`);
programs and the command line are told in English (`str(why)`), the node's page in its reader's language (`told`). One place, so that
neither language falls behind: mypy holds whoever decides to `Code`, a test holds the words to it.
"""

import string
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from protocol.words import LANGUAGES

Code = Literal[
    # the answer of the model, against the threshold
    "not-in-form", "below", "not-below", "at", "audited",
    # what the confidence is the probability of
    "verdict-probability", "token-probability", "right-verdict", "good-answer",
    # notes on it
    "not-calibrated", "refitted", "budget", "fixed-threshold", "share-budget", "bytes-spent", "joules-spent", "bytes-pay", "joules-pay",
    "examples-shown",
    # the answer of the memory, and who had confirmed it
    "same-record", "alike", "pattern", "operator", "somebody",
    # what was stored before there were codes
    "as-written",
]  # fmt: skip

TEXTS: dict[Code, tuple[str, str]] = {  # code -> the text in each of LANGUAGES; {name:.2f} is filled in as `str.format` does
    "not-in-form": ("the answer is not of the task's form", "la respuesta no tiene la forma de la tarea"),
    "below": ("{what} {sure:.2f} below {limit:.2f}", "{what} {sure:.2f}, menor que {limit:.2f}"),
    "not-below": ("{what} {sure:.2f} not below {limit:.2f}", "{what} {sure:.2f}, no menor que {limit:.2f}"),
    "at": ("{what} {sure:.2f} at {limit:.2f}", "{what} {sure:.2f}, en el límite de {limit:.2f}"),
    "audited": (
        "{what} {sure:.2f} not below {limit:.2f}; one of the {audit:.0%} asked to check",
        "{what} {sure:.2f}, no menor que {limit:.2f}; es del {audit:.0%} que se pregunta para comprobar",
    ),
    "verdict-probability": ("verdict probability", "probabilidad del veredicto"),
    "token-probability": ("mean token probability", "probabilidad media de las palabras"),
    "right-verdict": ("probability of a right verdict", "probabilidad de que el veredicto sea correcto"),
    "good-answer": ("probability of a good answer", "probabilidad de que la respuesta sea buena"),
    "not-calibrated": ("not calibrated", "sin calibrar"),
    "refitted": ("refitted here", "ajustado aquí"),
    "budget": ("budget {share:.0%}", "presupuesto {share:.0%}"),
    "fixed-threshold": ("fixed threshold", "umbral fijo"),
    "share-budget": ("share budget {share:.0%}", "se puede preguntar el {share:.0%}"),
    "bytes-spent": ("the day's {a_day:.0f} bytes are spent", "los {a_day:.0f} bytes del día ya se gastaron"),
    "joules-spent": ("the day's {a_day:.0f} joules are spent", "los {a_day:.0f} julios del día ya se gastaron"),
    "bytes-pay": ("{a_day:.0f} bytes a day pay for {share:.1%}", "{a_day:.0f} bytes al día alcanzan para el {share:.1%}"),
    "joules-pay": ("{a_day:.0f} joules a day pay for {share:.1%}", "{a_day:.0f} julios al día alcanzan para el {share:.1%}"),
    "examples-shown": ("{count} remembered records shown", "registros recordados que se le mostraron: {count}"),
    "same-record": (
        "remembered: the same record, confirmed by {whom} (answer {answer})",
        "recordado: el mismo registro, confirmado por {whom} (respuesta {answer})",
    ),
    "alike": (
        "remembered: {count} similar records mean this, the nearest {similarity:.3f} alike (answer {answer}, confirmed by {whom}); "
        "such answers are right {right:.0%} of the time here, or more",
        "recordado: {count} registros parecidos dicen esto, el más cercano con parecido {similarity:.3f} (respuesta {answer}, confirmada "
        "por {whom}); tales respuestas aciertan aquí el {right:.0%} de las veces, o más",
    ),
    "pattern": ("remembered: the operator's pattern {pattern!r} ({key})", "recordado: el patrón {pattern!r} del operador ({key})"),
    "operator": ("the operator", "el operador"),
    "somebody": ("somebody", "alguien"),
    "as-written": ("{text}", "{text}"),
}


class Why(msgspec.Struct, frozen=True, array_like=True):
    """A reason. A figure may be a reason itself, so that it is told in the same language."""

    code: Code
    figures: Mapping[str, "int | float | str | Why"] = {}  # as the text of the code names them
    notes: tuple["Why", ...] = ()  # in brackets behind it

    def noting(self, *notes: "Why") -> "Why":
        """The same with further notes."""
        return Why(self.code, self.figures, (*self.notes, *notes))

    def told(self, lang: str = "en", *, comma: bool = False) -> str:
        """In words.

        Args:
            lang: of LANGUAGES.
            comma: 0,41 instead of 0.41.
        """
        values = {
            name: figure.told(lang, comma=comma) if isinstance(figure, Why) else figure for name, figure in self.figures.items()
        }  # fmt: skip
        head = _Filler(comma).vformat(TEXTS[self.code][LANGUAGES.index(lang)], (), values)
        notes = "; ".join(note.told(lang, comma=comma) for note in self.notes)
        return f"{head} ({notes})" if notes else head

    def __str__(self) -> str:
        """In English."""
        return self.told()


class _Filler(string.Formatter):
    """`str.format`, with the reader's decimal sign."""

    def __init__(self, comma: bool) -> None:
        self._comma = comma

    def format_field(self, value: Any, format_spec: str) -> str:
        told = format(value, format_spec)
        return told.replace(".", ",") if self._comma and isinstance(value, float) else told


def kept(why: Why) -> str:
    """A reason as the store keeps it: JSON."""
    return msgspec.json.encode(why).decode()


def read(text: str) -> Why:
    """A reason out of the store. A sentence, from before there were codes or from a newer program, is told as it was written."""
    try:
        return msgspec.json.decode(text, type=Why)
    except msgspec.MsgspecError:
        return Why("as-written", {"text": text})
