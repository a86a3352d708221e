"""Bodies of the API. Requests as OpenAI clients send them, what Milpa adds under `x_milpa`; unknown fields are ignored outside it and
refused in it.

A record's source is the prompt of `/v1/completions`, or the last user message of `/v1/chat/completions`: the task's own template makes
the model's prompt out of it, so clients never see one. Sampling parameters are accepted and have no effect: answers are greedy.
"""

from typing import Any, Literal

import pydantic

from node.answering import Given
from node.store import AnswerRow
from protocol.errors import BadInput
from protocol.tasks import Record

LENGTH = 4_000  # characters of ids, names and texts; a record's own limit is checked in codec


class Extras(pydantic.BaseModel):
    """What Milpa needs to know beyond OpenAI's fields."""

    model_config = pydantic.ConfigDict(extra="forbid")

    task: str = ""  # empty: the node's own
    lang: str = "en"
    site: str = ""
    record_id: str = pydantic.Field(default="", max_length=200)


class CompletionRequest(pydantic.BaseModel):
    """POST /v1/completions."""

    model: str = pydantic.Field(default="", max_length=LENGTH)
    prompt: str | list[str]
    stream: bool = False
    n: int = 1
    x_milpa: Extras = Extras()

    def source(self) -> str:
        """The record's source."""
        if isinstance(self.prompt, str):
            return self.prompt
        if len(self.prompt) != 1:
            raise BadInput(f"one prompt a request, not {len(self.prompt)}; send them one after the other")
        return self.prompt[0]


class Part(pydantic.BaseModel):
    """A piece of a message's content."""

    type: str
    text: str = ""


class ChatMessage(pydantic.BaseModel):
    """One message."""

    role: str
    content: str | list[Part] | None = None

    def text(self) -> str:
        """The message's text.

        Raises:
            BadInput: it carries something else, such as an image.
        """
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        if other := next((part.type for part in self.content if part.type != "text"), ""):
            raise BadInput(f"a message carries {other!r}; this node reads text only")
        return "".join(part.text for part in self.content)


class ChatRequest(pydantic.BaseModel):
    """POST /v1/chat/completions."""

    model: str = pydantic.Field(default="", max_length=LENGTH)
    messages: list[ChatMessage] = pydantic.Field(min_length=1, max_length=1000)
    stream: bool = False
    n: int = 1
    x_milpa: Extras = Extras()

    def source(self) -> str:
        """The record's source: the last user message."""
        for message in reversed(self.messages):
            if message.role == "user":
                return message.text()
        raise BadInput("there is no message with the role 'user'")


class FeedbackRequest(pydantic.BaseModel):
    """POST /v1/feedback: the operator's word on an answer."""

    model_config = pydantic.ConfigDict(extra="forbid")

    id: str = pydantic.Field(max_length=200)
    verdict: str = pydantic.Field(default="", max_length=200)
    text: str = pydantic.Field(default="", max_length=LENGTH)


def to_record(request: CompletionRequest | ChatRequest, *, task: str, site: str, fresh_id: str) -> Record:
    """The record a request stands for.

    Raises:
        BadInput: it asks for something this API does not do.
    """
    if request.stream:
        raise BadInput("streaming is not offered: answers are one short line; set stream to false")
    if request.n != 1:
        raise BadInput(f"one answer a request, not {request.n}: answers are greedy, so all would be equal")
    extras = request.x_milpa
    return Record(
        id=extras.record_id or fresh_id, task=extras.task or task, source=request.source(), lang=extras.lang, site=extras.site or site
    )


def completion(given: Given, *, kind: Literal["text_completion", "chat.completion"], model: str, created: int) -> dict[str, Any]:
    """The response body of both completions."""
    generation = given.spoken.generation
    reason = "length" if generation.stopped == "length" else "stop"
    name = model or model_name(given.spoken.speaker.task, given.spoken.speaker.release)
    choice: dict[str, Any] = {"index": 0, "finish_reason": reason, "logprobs": None}
    if kind == "chat.completion":
        choice["message"] = {"role": "assistant", "content": given.answer.text}
    else:
        choice["text"] = given.answer.text
    return {
        "id": given.id, "object": kind, "created": created, "model": name, "choices": [choice], "usage": usage(given),
        "x_milpa": extras(given),
    }  # fmt: skip


def usage(given: Given) -> dict[str, int]:
    """Token counts."""
    prompt, generated = given.spoken.generation.prompt_tokens, len(given.spoken.generation.tokens)
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}


def extras(given: Given) -> dict[str, Any]:
    """What Milpa says about an answer when it is given."""
    engine = given.spoken.speaker.engine
    return {
        "id": given.id, "record_id": given.record.id, "task": given.record.task, "text": given.answer.text, "verdict": given.answer.verdict,
        "sentence": given.answer.sentence, "confidence": given.judgement.confidence, "reason": given.judgement.reason, "state": given.state,
        "provisional": given.provisional, "escalation": given.question, "release": given.spoken.speaker.release,
        "model_digest": engine.model_digest, "adapter_digest": engine.adapter_digest, "seconds": given.spoken.generation.seconds,
    }  # fmt: skip


def stored(row: AnswerRow) -> dict[str, Any]:
    """An answer as it stands now."""
    return {
        "id": row.id, "change": row.change, "created": row.created, "record_id": row.record, "task": row.task, "site": row.site,
        "lang": row.lang, "source": row.source, "text": row.text, "verdict": row.verdict, "local": row.local, "state": row.state,
        "provisional": row.state == "provisional", "by": row.by, "confidence": row.confidence, "reason": row.reason,
        "escalation": row.question or "", "release": row.release, "model_digest": row.model_digest, "adapter_digest": row.adapter_digest,
        "seconds": row.seconds, "changed": row.upgraded,
    }  # fmt: skip


def model_name(task: str, release: int) -> str:
    """How the active model is called in the API: "milpa-ranch-2"; 0 is a fixed file."""
    return f"milpa-{task}-{release}"
