"""OpenAI's bodies: completions, chat, models, embeddings, and the lines of a stream (server-sent events).

A record's source is the prompt of `/v1/completions`, or the last user message of `/v1/chat/completions`: the task's own template makes
the model's prompt out of it, so clients never see one, and older messages and system messages are not read.
What would change the answer and is not offered is refused (`_refuse`): answers are greedy, as the evidence of a release was measured.
"""

import base64
import struct
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

import msgspec

from node.answering import Given
from node.api.errors import BadBody, Told
from node.api.shapes import (
    BATCH,
    Asked,
    Extras,
    Name,
    Stops,
    answered_by,
    counted,
    extras,
    model_name,
    refuse_what_we_do_not,
    stops,
    usage,
)
from node.api.telling import Event, Said, Telling
from node.engine.worker import Embedded, Speaker
from protocol.errors import BadInput
from protocol.models.generation import Piece

Kind = Literal["text_completion", "chat.completion"]
AtLeastOne = Annotated[int, msgspec.Meta(ge=1)]
Figures = Sequence[float]


class StreamOptions(msgspec.Struct, frozen=True):
    """What a stream tells beyond the text."""

    include_usage: bool = False


class _Request(msgspec.Struct, frozen=True, kw_only=True):
    """What both completions share."""

    model: Name = ""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: AtLeastOne | None = None
    stop: Stops = None
    n: int | None = None
    temperature: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    x_milpa: Extras = Extras()

    def _refuse(self) -> None:
        greedy = "answers here are greedy, as they were measured for the release; leave it out, or send 0"
        refuse_what_we_do_not(
            n=(self.n not in (None, 1), "one answer a request: answers are greedy, so all would be equal"),
            temperature=(bool(self.temperature), greedy),
            presence_penalty=(bool(self.presence_penalty), greedy),
            frequency_penalty=(bool(self.frequency_penalty), greedy),
            logit_bias=(bool(self.logit_bias), "the task's form decides which tokens may come; leave it out"),
            stream_options=(self.stream_options is not None and not self.stream, "only with stream: true"),
        )

    def _asked(self, sources: Sequence[str], *, max_tokens: int | None, logprobs: bool, alternatives: int) -> Asked:
        return Asked(
            sources=tuple(sources), model=self.model, stream=bool(self.stream),
            usage=bool(self.stream_options and self.stream_options.include_usage), max_tokens=max_tokens, stop=stops(self.stop),
            logprobs=logprobs, alternatives=alternatives, extras=self.x_milpa,
        )  # fmt: skip


class CompletionRequest(_Request, frozen=True, kw_only=True):
    """POST /v1/completions."""

    prompt: str | Annotated[list[str], msgspec.Meta(min_length=1, max_length=BATCH)]
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=5)] | None = None
    best_of: int | None = None
    echo: bool | None = None
    suffix: str | None = None

    def asked(self) -> Asked:
        """What is wanted.

        Raises:
            BadInput: something this API does not do.
        """
        self._refuse()
        refuse_what_we_do_not(
            best_of=(self.best_of not in (None, 1), "answers are greedy: there is no best of many"),
            echo=(bool(self.echo), "the record is not repeated in the answer"),
            suffix=(bool(self.suffix), "answers are not fitted before a text"),
        )
        sources = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        return self._asked(
            sources,
            max_tokens=self.max_tokens,
            logprobs=self.logprobs is not None,
            alternatives=self.logprobs or 0,
        )


class Part(msgspec.Struct, frozen=True):
    """A piece of a message's content."""

    type: str
    text: str = ""


class ChatMessage(msgspec.Struct, frozen=True):
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


Messages = Annotated[list[ChatMessage], msgspec.Meta(min_length=1, max_length=1000)]


def last_user_message(messages: Sequence[ChatMessage]) -> str:
    """The record's source.

    Raises:
        BadInput: nobody asks anything.
    """
    for message in reversed(messages):
        if message.role == "user":
            return message.text()
    raise BadInput("there is no message with the role 'user'")


class ChatRequest(_Request, frozen=True, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: AtLeastOne | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    response_format: dict[str, Any] | None = None

    def asked(self) -> Asked:
        """What is wanted.

        Raises:
            BadInput: something this API does not do.
        """
        self._refuse()
        form = "an answer has its task's form: a verdict and a sentence, or a text"
        refuse_what_we_do_not(
            tools=(bool(self.tools), form),
            functions=(bool(self.functions), form),
            response_format=((self.response_format or {}).get("type", "text") != "text", form),
            top_logprobs=(bool(self.top_logprobs) and not self.logprobs, "only with logprobs: true"),
        )
        return self._asked(
            [last_user_message(self.messages)], max_tokens=self.max_completion_tokens or self.max_tokens, logprobs=bool(self.logprobs),
            alternatives=self.top_logprobs or 0,
        )  # fmt: skip


class EmbeddingRequest(msgspec.Struct, frozen=True):
    """POST /v1/embeddings."""

    input: str | Annotated[list[str], msgspec.Meta(min_length=1, max_length=BATCH)]
    model: Name = ""
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None

    def texts(self) -> list[str]:
        """What is to be embedded."""
        return [self.input] if isinstance(self.input, str) else self.input


class Dialect:
    """One request's answers as OpenAI's bodies: whole, or as the lines of a stream.

    Args:
        id: of the response; a stream's lines carry it before the answers have ids of their own.
        created: seconds since 1970.
    """

    media_type = "text/event-stream"

    def __init__(self, asked: Asked, *, kind: Kind, id: str, created: int, name: str) -> None:
        self._asked, self._kind, self._id, self._created, self._name = asked, kind, id, created, asked.model or name
        self._tellings = [Telling(asked) for _ in asked.sources]
        self._offsets = [0] * len(asked.sources)  # characters told of each text, for the completions' logprobs

    def whole(self, answers: Sequence[Given]) -> dict[str, Any]:
        """The response body."""
        choices = []
        for index, (given, telling) in enumerate(zip(answers, self._tellings, strict=True)):
            telling.whole(given)
            text = {"text": telling.text} if self._kind == "text_completion" else {"message": self._message(telling.text)}
            logprobs = self._logprobs(index, telling.sent) if given.spoken else None
            choices.append({"index": index, "finish_reason": telling.finish, "logprobs": logprobs} | text)
        ours = [extras(given) for given in answers]
        return self._body(self._kind, choices) | {
            "id": answers[0].id, "model": self._asked.model or answered_by(answers[0]), "usage": self._usage(answers),
            "x_milpa": ours[0] if len(ours) == 1 else ours,
        }  # fmt: skip

    async def lines(self, events: AsyncIterator[Event]) -> AsyncIterator[bytes]:
        """The stream."""
        answers: list[Given] = []
        if self._kind == "chat.completion":
            yield self._line(0, {"role": "assistant", "content": ""}, "", None)
        async for event in events:
            index, telling = event.index, self._tellings[event.index]
            if isinstance(event, Said):
                before = len(telling.sent)
                text = telling.hear(event.piece)
                logprobs = self._logprobs(index, telling.sent[before:])
                if text or (logprobs and len(telling.sent) > before):
                    yield self._line(index, self._delta(text), text, None, logprobs)
            else:
                text = telling.end(event.given)
                answers.append(event.given)
                if text:
                    yield self._line(index, self._delta(text), text, None)
                yield self._line(index, {}, "", telling.finish, ours=extras(event.given))
        if self._asked.usage:
            yield _sse(self._body(self._object, []) | {"usage": self._usage(answers)})
        yield b"data: [DONE]\n\n"

    @staticmethod
    def broken(error: Told) -> bytes:
        """The last line of a stream that cannot go on."""
        return _sse(error.openai())

    @property
    def _object(self) -> str:
        return self._kind if self._kind == "text_completion" else "chat.completion.chunk"

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._name, "choices": choices}

    def _line(
        self, index: int, delta: dict[str, Any], text: str, finish: str | None, logprobs: Any = None, ours: dict[str, Any] | None = None
    ) -> bytes:
        said: dict[str, Any] = {"text": text} if self._kind == "text_completion" else {"delta": delta}
        body = self._body(self._object, [{"index": index, "finish_reason": finish, "logprobs": logprobs} | said])
        if self._asked.usage:
            body["usage"] = None
        return _sse(body | ({"x_milpa": ours} if ours else {}))

    @staticmethod
    def _delta(text: str) -> dict[str, Any]:
        return {"content": text}

    @staticmethod
    def _message(text: str) -> dict[str, Any]:
        return {"role": "assistant", "content": text, "refusal": None}

    def _usage(self, answers: Sequence[Given]) -> dict[str, int]:
        each = [usage(given) for given in answers]
        return counted(sum(one["prompt_tokens"] for one in each), sum(one["completion_tokens"] for one in each))

    def _logprobs(self, index: int, sent: Sequence[Piece]) -> dict[str, Any] | None:
        if not self._asked.logprobs:
            return None
        if self._kind == "chat.completion":
            return {"content": [_of_chat(piece) for piece in sent], "refusal": None}
        offsets = []
        for piece in sent:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(piece.text)
        return {
            "tokens": [piece.text for piece in sent], "token_logprobs": [piece.logprob for piece in sent], "text_offset": offsets,
            "top_logprobs": [{one.text: one.logprob for one in piece.alternatives} for piece in sent] if self._asked.alternatives else None,
        }  # fmt: skip


def _of_chat(piece: Piece) -> dict[str, Any]:
    best = [{"token": one.text, "logprob": one.logprob, "bytes": list(one.text.encode())} for one in piece.alternatives]
    return {"token": piece.text, "logprob": piece.logprob, "bytes": list(piece.text.encode()), "top_logprobs": best}


def _sse(body: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


def embeddings(request: EmbeddingRequest, found: Sequence[Embedded]) -> dict[str, Any]:
    """The response to POST /v1/embeddings.

    Raises:
        BadBody: another number of dimensions than the model has.
    """
    size = len(found[0].vector)
    if request.dimensions not in (None, size):
        raise BadBody(f"dimensions: this model's vectors have {size}; leave it out", "dimensions")
    data = [
        {"object": "embedding", "index": index, "embedding": _packed(list(map(float, one.vector)), request.encoding_format)}
        for index, one in enumerate(found)
    ]
    read, speaker = sum(one.tokens for one in found), found[0].speaker
    return {
        "object": "list", "data": data, "model": request.model or model_name(speaker.task, speaker.release),
        "usage": {"prompt_tokens": read, "total_tokens": read}, "x_milpa": {"model_digest": speaker.model_digest},
    }  # fmt: skip


def _packed(vector: Figures, form: str) -> Figures | str:
    """Numbers, or little-endian float32 in base64."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode() if form == "base64" else vector


def model(speaker: Speaker) -> dict[str, Any]:
    """The active model, as one of GET /v1/models."""
    ours = {
        "model_digest": speaker.model_digest, "adapter_digest": speaker.adapter_digest, "release": speaker.release, "task": speaker.task,
    }  # fmt: skip
    return {"id": model_name(speaker.task, speaker.release), "object": "model", "created": 0, "owned_by": "milpa", "x_milpa": ours}
