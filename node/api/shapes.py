"""What both dialects share: what a request wants, what Milpa adds under `x_milpa`, an answer as it stands. `openai.py` and `ollama.py` have
the rest. Unknown fields are ignored, as clients of both send many; inside `x_milpa` they are refused.
"""

from typing import Annotated, Any

import msgspec

from node.answering import Given
from node.api.errors import BadBody
from node.memory.rules import Recalled
from node.store import AnswerRow
from protocol import reasons
from protocol.errors import BadInput
from protocol.tasks import Record

FROM_MEMORY = "milpa-memory"  # named as the model where none spoke
LENGTH = 4_000  # characters of ids, names and texts; a record's own limit is checked in codec
BATCH = 64  # prompts or texts a request
STOPS = 16  # stop strings a request
DEADLINE_HEADER = "x-milpa-deadline-s"

Name = Annotated[str, msgspec.Meta(max_length=LENGTH)]
Id = Annotated[str, msgspec.Meta(max_length=200)]
Stops = str | Annotated[list[str], msgspec.Meta(max_length=STOPS)] | None


class Extras(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What Milpa needs to know beyond a dialect's fields."""

    task: str = ""  # empty: the node's own
    lang: str = "en"
    site: str = ""
    record_id: Id = ""
    deadline_s: float = 0.0  # seconds; 0: the node's own, which no request exceeds


class FeedbackRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """POST /v1/feedback: the operator's word on an answer."""

    id: Id
    verdict: Id = ""
    text: Name = ""


class Asked(msgspec.Struct, frozen=True):
    """What a request wants, whichever dialect it came in."""

    sources: tuple[str, ...]
    model: str = ""
    stream: bool = False
    usage: bool = False  # a stream ends with the token counts
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    alternatives: int = 0
    extras: Extras = Extras()

    def records(self, *, task: str, site: str, fresh_id: str) -> tuple[Record, ...]:
        """The records the request stands for; in a batch each has its place in its id."""
        ours = self.extras
        base = ours.record_id or fresh_id
        names = [base] if len(self.sources) == 1 else [f"{base}-{index}" for index in range(len(self.sources))]
        return tuple(
            Record(id=name, task=ours.task or task, source=source, lang=ours.lang, site=ours.site or site)
            for name, source in zip(names, self.sources, strict=True)
        )


def stops(given: Stops) -> tuple[str, ...]:
    """Stop strings as a tuple; an empty one would stop everything.

    Raises:
        BadInput: one is empty.
    """
    found = (given,) if isinstance(given, str) else tuple(given or ())
    if "" in found:
        raise BadInput("stop: an empty stop string would stop every answer before it begins")
    return found


def refuse_what_we_do_not(**wanted: tuple[bool, str]) -> None:
    """An honest no to fields that would change the answer and are not offered; each is (asked for, what to do instead).

    Raises:
        BadBody: of the first that was asked for.
    """
    for name, (asked, advice) in wanted.items():
        if asked:
            raise BadBody(f"{name}: {advice}", name)


def deadline(asked: float, header: str, *, limit_s: float) -> float:
    """Seconds a request may take: the smallest of what body, header and settings say.

    Raises:
        BadInput: not a number of seconds above 0.
    """
    try:
        named = [value for value in (float(header) if header else 0.0, asked) if value != 0.0]
    except ValueError as error:
        raise BadInput(f"{DEADLINE_HEADER}: {header[:40]!r} is not a number of seconds") from error
    if any(not value > 0.0 for value in named):
        raise BadInput("a deadline is a number of seconds above 0")
    return min(limit_s, *named) if named else limit_s


def usage(given: Given) -> dict[str, int]:
    """Tokens read and written; none where memory answered."""
    generation = given.spoken.generation if given.spoken else None
    prompt, generated = (generation.prompt_tokens, len(generation.tokens)) if generation else (0, 0)
    return counted(prompt, generated)


def counted(prompt: int, generated: int) -> dict[str, int]:
    """OpenAI's `usage`."""
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}


def extras(given: Given) -> dict[str, Any]:
    """What Milpa says about an answer when it is given."""
    speaker = given.spoken.speaker if given.spoken else None
    return {
        "id": given.id, "record_id": given.record.id, "task": given.record.task, "text": given.answer.text, "verdict": given.answer.verdict,
        "sentence": given.answer.sentence, "confidence": given.judgement.confidence, "reason": given.judgement.reason, "state": given.state,
        "provisional": given.provisional, "escalation": given.question, "release": speaker.release if speaker else 0,
        "model_digest": speaker.model_digest if speaker else "", "adapter_digest": speaker.adapter_digest if speaker else "",
        "seconds": given.seconds, "memory": remembered(given.recalled),
    }  # fmt: skip


def remembered(recalled: Recalled | None) -> dict[str, Any] | None:
    """Where an answer from memory comes from; None when the model spoke."""
    if recalled is None:
        return None
    return {"match": recalled.match, "key": recalled.key, "answer": recalled.source, "similarity": recalled.similarity}


def stored(row: AnswerRow) -> dict[str, Any]:
    """An answer as it stands now."""
    return {
        "id": row.id, "change": row.change, "created": row.created, "record_id": row.record, "task": row.task, "site": row.site,
        "lang": row.lang, "source": row.source, "text": row.text, "verdict": row.verdict, "local": row.local, "state": row.state,
        "provisional": row.state == "provisional", "by": row.by, "confidence": row.confidence, "reason": str(reasons.read(row.reason)),
        "escalation": row.question or "", "release": row.release, "model_digest": row.model_digest, "adapter_digest": row.adapter_digest,
        "seconds": row.seconds, "changed": row.upgraded,
    }  # fmt: skip


def answered_by(given: Given) -> str:
    """Who is named as the model of an answer."""
    return model_name(given.spoken.speaker.task, given.spoken.speaker.release) if given.spoken else FROM_MEMORY


def model_name(task: str, release: int) -> str:
    """How the active model is called in the API: "milpa-ranch-2"; 0 is a fixed file."""
    return f"milpa-{task}-{release}"
