"""An answer on its way to the client: what of its text is sent, piece by piece, and a talk that ends when the client hangs up.

Rules:
 * A streamed answer is the same answer: stored, judged and escalated like any other. `max_tokens` ends the generation, but never inside a
   verdict: half of one would be judged broken and asked of a peer. `stop` cuts what is sent, not what is stored.
 * Streamed or not, the same text goes out: without the white space around it, nothing of a stop string, no half character.
 * A client that hangs up, or a deadline that passes, stops the generation between two tokens; nothing of it is stored.
Limits: the pieces of one request wait in memory for a slow reader; a task's longest answer bounds them (128 tokens, 64 prompts).
"""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import msgspec
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from node.answering import Answering, Given
from node.api.errors import Told, told
from node.api.shapes import Asked
from node.engine.worker import Gone, Listening
from protocol.models.generation import Generation, Piece
from protocol.tasks import Record


class Said(msgspec.Struct, frozen=True):
    """The model said a piece of answer number `index`."""

    index: int
    piece: Piece


class Answered(msgspec.Struct, frozen=True):
    """Answer number `index` is whole, judged and stored."""

    index: int
    given: Given


Event = Said | Answered


class Telling:
    """One answer's text as the client gets it."""

    def __init__(self, asked: Asked) -> None:
        self._stop, self._limit = asked.stop, asked.max_tokens
        self._held = ""  # may be white space at the end, or the beginning of a stop string
        self._begun = False
        self.text = ""  # all that was sent
        self.sent: list[Piece] = []  # the tokens of it
        self.finish = ""  # "stop" or "length" once nothing more is sent

    def hear(self, piece: Piece) -> str:
        """What may be sent now."""
        if not self.finish and len(self.sent) == self._limit:
            self.finish = "length"
        if self.finish:
            return ""
        self.sent.append(piece)
        return self._send(piece.text)

    def end(self, given: Given) -> str:
        """What is left to send when the answer is whole. An answer from memory comes in one piece."""
        rest = "" if given.spoken else self._send(given.answer.text)
        if self.finish != "stop":
            rest += self._held.rstrip()
            self.text += self._held.rstrip()
        self.finish = self.finish or ("length" if given.spoken and given.spoken.generation.stopped == "length" else "stop")
        return rest

    def whole(self, given: Given) -> "Telling":
        """The answer told at once."""
        if given.spoken:
            for piece in pieces(given.spoken.generation):
                self.hear(piece)
        self.end(given)
        return self

    def _send(self, text: str) -> str:
        self._held += text if self._begun else text.lstrip()
        self._begun = self._begun or bool(self._held)
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.finish = "stop"
            ready, self._held = self._held[: min(found)], ""
        else:
            ready = self._held[: self._safe()]
            self._held = self._held[len(ready) :]
        self.text += ready
        return ready

    def _safe(self) -> int:
        """How many characters cannot become part of a stop string, or white space at the end."""
        safe = len(self._held.rstrip())
        for stop in self._stop:
            begun = next((size for size in range(min(len(stop) - 1, len(self._held)), 0, -1) if self._held.endswith(stop[:size])), 0)
            safe = min(safe, len(self._held) - begun)
        return safe


def pieces(generation: Generation) -> Iterator[Piece]:
    """A generation as the pieces it was said in."""
    others = generation.alternatives or ((),) * len(generation.tokens)
    for text, token, logprob, other in zip(generation.pieces, generation.tokens, generation.logprobs, others, strict=True):
        yield Piece(text, token, logprob, other)


class Talk:
    """A request's records being answered in a thread, in turn; `events` tells of it in the event loop.

    Args:
        deadline_s: for all of them together.
        receive: the client's side, whose end stops the generation.
    """

    def __init__(self, answering: Answering, asked: Asked, records: tuple[Record, ...], *, deadline_s: float, receive: Receive) -> None:
        self._answering, self._asked, self._records, self._deadline_s = answering, asked, records, deadline_s
        self._gone = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | Exception | None] = asyncio.Queue()
        self._tasks = (self._loop.create_task(run_in_threadpool(self._answer)), self._loop.create_task(self._watch(receive)))

    async def events(self) -> AsyncIterator[Event]:
        """What happens, until the last answer.

        Raises:
            MilpaError: why there is no (further) answer.
        """
        try:
            while (event := await self._events.get()) is not None:
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            self._gone.set()
            self._tasks[1].cancel()

    def _answer(self) -> None:
        ends = time.monotonic() + self._deadline_s
        try:
            for index, record in enumerate(self._records):
                listening = Listening(
                    self._said(index) if self._asked.stream else None, self._asked.alternatives, self._asked.max_tokens, self._gone
                )
                given = self._answering.answer(record, deadline_s=max(0.0, ends - time.monotonic()), listening=listening)
                self._tell(Answered(index, given))
            self._tell(None)
        except Exception as error:  # raised again where the response is made
            self._tell(error)

    def _said(self, index: int) -> Callable[[Piece], None]:
        return lambda piece: self._tell(Said(index, piece))

    def _tell(self, event: Event | Exception | None) -> None:
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._gone.set()


class Stream(Response):
    """A response of many lines. Its first event has happened before the status is sent, so that a refusal has a status of its own."""

    def __init__(
        self, lines: Callable[[AsyncIterator[Event]], AsyncIterator[bytes]], broken: Callable[[Told], bytes], events: AsyncIterator[Event],
        *, media_type: str,
    ) -> None:  # fmt: skip
        self._lines, self._broken, self._events = lines, broken, events
        self.status_code, self.background = 200, None
        self.media_type = media_type
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send every line as it comes; an error becomes the last line."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for line in self._lines(self._events):
                await send({"type": "http.response.body", "body": line, "more_body": True})
        except Gone:
            return  # nobody reads
        except Exception as error:  # the status has been sent: the error travels in the stream
            await send({"type": "http.response.body", "body": self._broken(told(error)), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def begun(events: AsyncIterator[Event]) -> AsyncIterator[Event]:
    """The same events, the first of which has happened.

    Raises:
        MilpaError: the request is refused before anything was said.
    """
    first: Any = await anext(events)

    async def all_of_them() -> AsyncIterator[Event]:
        yield first
        async for event in events:
            yield event

    return all_of_them()
