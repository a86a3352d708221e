"""Ollama's bodies, for tools that speak it: generate, chat, embed, tags, show, ps, version; streams are lines of JSON, the default.

As in `openai.py` the prompt, or the last user message, is a record's source, and what is not offered is refused. `keep_alive` has no
effect: the node's model is always loaded. Times are nanoseconds, as Ollama has them.
"""

from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import msgspec

from node.answering import Given
from node.api.errors import Told
from node.api.openai import ChatMessage, last_user_message
from node.api.shapes import BATCH, Asked, Extras, Name, Stops, extras, model_name, refuse_what_we_do_not, stops, usage
from node.api.telling import Event, Said, Telling
from node.engine.worker import Embedded, Speaker

NANOSECONDS = 1_000_000_000
GREEDY = "answers here are greedy, as they were measured for the release; leave it out, or send 0"

Kind = Literal["generate", "chat"]


class Options(msgspec.Struct, frozen=True):
    """Ollama's options; those that cannot change a greedy answer are ignored."""

    temperature: float | None = None
    num_predict: int | None = None  # -1 and -2: as much as there is
    stop: Stops = None

    def max_tokens(self) -> int | None:
        """As OpenAI's."""
        return self.num_predict if self.num_predict and self.num_predict > 0 else None


class _Request(msgspec.Struct, frozen=True, kw_only=True):
    """What both share."""

    model: Name = ""
    stream: bool | None = None
    options: Options | None = None
    format: Any = None
    x_milpa: Extras = Extras()

    def _asked(self, source: str) -> Asked:
        options = self.options or Options()
        refuse_what_we_do_not(
            temperature=(bool(options.temperature), GREEDY),
            format=(bool(self.format), "an answer has its task's form: a verdict and a sentence, or a text"),
        )
        return Asked(
            (source,), model=self.model, stream=self.stream is not False, max_tokens=options.max_tokens(), stop=stops(options.stop),
            extras=self.x_milpa,
        )  # fmt: skip


class GenerateRequest(_Request, frozen=True, kw_only=True):
    """POST /api/generate. Without a prompt it only asks for the model to be loaded, which it is."""

    prompt: str = ""
    suffix: str | None = None
    template: str | None = None
    raw: bool | None = None
    images: list[Any] | None = None

    def asked(self) -> Asked | None:
        """What is wanted; None: nothing but a loaded model.

        Raises:
            BadInput: something this API does not do.
        """
        refuse_what_we_do_not(
            suffix=(bool(self.suffix), "answers are not fitted before a text"),
            template=(bool(self.template), "the task has its own template"),
            raw=(bool(self.raw), "the task has its own template"),
            images=(bool(self.images), "this node reads text only"),
        )
        return self._asked(self.prompt) if self.prompt else None


class ChatRequest(_Request, frozen=True, kw_only=True):
    """POST /api/chat."""

    messages: Annotated[list[ChatMessage], msgspec.Meta(max_length=1000)] = []
    tools: list[Any] | None = None

    def asked(self) -> Asked | None:
        """As `GenerateRequest.asked`."""
        refuse_what_we_do_not(tools=(bool(self.tools), "an answer has its task's form: a verdict and a sentence, or a text"))
        return self._asked(last_user_message(self.messages)) if self.messages else None


class EmbedRequest(msgspec.Struct, frozen=True):
    """POST /api/embed."""

    input: str | Annotated[list[str], msgspec.Meta(min_length=1, max_length=BATCH)]
    model: Name = ""

    def texts(self) -> list[str]:
        """What is to be embedded."""
        return [self.input] if isinstance(self.input, str) else self.input


class Dialect:
    """One request's answer as Ollama's bodies."""

    media_type = "application/x-ndjson"

    def __init__(self, asked: Asked, *, kind: Kind, created: float, name: str) -> None:
        self._kind, self._created, self._name = kind, created, asked.model or name
        self._telling = Telling(asked)

    def whole(self, answers: Sequence[Given]) -> dict[str, Any]:
        """The response body."""
        (given,) = answers
        return self._last(self._telling.whole(given).text, given)

    async def lines(self, events: AsyncIterator[Event]) -> AsyncIterator[bytes]:
        """The stream."""
        async for event in events:
            if isinstance(event, Said):
                if text := self._telling.hear(event.piece):
                    yield _line(self._body(text) | {"done": False})
            else:
                yield _line(self._last(self._telling.end(event.given), event.given))

    @staticmethod
    def broken(error: Told) -> bytes:
        """The last line of a stream that cannot go on."""
        return _line(error.ollama())

    def loaded(self) -> dict[str, Any]:
        """The answer to a request that asks nothing."""
        return self._body("") | {"done": True, "done_reason": "load"}

    def _body(self, text: str) -> dict[str, Any]:
        said: dict[str, Any] = {"response": text} if self._kind == "generate" else {"message": {"role": "assistant", "content": text}}
        return {"model": self._name, "created_at": datetime.fromtimestamp(self._created, UTC).isoformat()} | said

    def _last(self, text: str, given: Given) -> dict[str, Any]:
        tokens, spent = usage(given), int(given.seconds * NANOSECONDS)
        return self._body(text) | {
            "done": True, "done_reason": self._telling.finish, "total_duration": spent, "load_duration": 0,
            "prompt_eval_count": tokens["prompt_tokens"], "eval_count": tokens["completion_tokens"], "x_milpa": extras(given),
        }  # fmt: skip


def _line(body: dict[str, Any]) -> bytes:
    return msgspec.json.encode(body) + b"\n"


def embeddings(request: EmbedRequest, found: Sequence[Embedded]) -> dict[str, Any]:
    """The response to POST /api/embed."""
    speaker = found[0].speaker
    return {
        "model": request.model or model_name(speaker.task, speaker.release), "embeddings": [list(map(float, one.vector)) for one in found],
        "prompt_eval_count": sum(one.tokens for one in found),
    }  # fmt: skip


def tag(speaker: Speaker) -> dict[str, Any]:
    """The active model, as one of GET /api/tags."""
    name = model_name(speaker.task, speaker.release)
    return {
        "name": name, "model": name, "modified_at": "1970-01-01T00:00:00Z", "size": 0, "digest": speaker.model_digest,
        "details": {"format": "gguf", "family": "milpa", "families": ["milpa"], "parameter_size": _size(speaker), "quantization_level": ""},
    }  # fmt: skip


def show(speaker: Speaker) -> dict[str, Any]:
    """The answer to POST /api/show."""
    details = tag(speaker)["details"]
    info = {
        "general.parameter_count": speaker.engine.parameters, "milpa.task": speaker.task, "milpa.release": speaker.release,
        "milpa.model_digest": speaker.model_digest, "milpa.adapter_digest": speaker.adapter_digest,
    }  # fmt: skip
    return {"details": details, "model_info": info, "capabilities": ["completion", "embedding"], "template": "{{ .Prompt }}"}


def _size(speaker: Speaker) -> str:
    return f"{speaker.engine.parameters / 1e6:.1f}M" if speaker.engine.parameters else ""
