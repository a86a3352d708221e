"""What the node offers over HTTP. Thin: each route decodes a body, calls one use case, shapes the result.

POST /v1/completions, /v1/chat/completions   a record's source in, the answer out, at once or as it is said (`openai.py`)
POST /v1/embeddings                          texts as vectors of the node's own model
POST /api/generate, /api/chat, /api/embed    the same for tools that speak Ollama; GET /api/tags, /api/ps, /api/version, POST /api/show
POST /v1/records                             a protocol record as it is, or a list of them, each answered or refused on its own
GET  /v1/answers/ID, /v1/answers?since=N     answers as they stand now, with upgrades; N is the last `change` seen
POST /v1/feedback                            the operator's word: {id, verdict?, text?}
GET, POST /v1/memory, /v1/memory/KEY         what the site remembers; see node/memory/
GET  /v1/models, /v1/models/ID, /v1/status   the active model; the node as a whole
GET  /healthz, /readyz, /metrics             alive; a model is active (else 503 and why); Prometheus
GET  /                                       the page for people; see node/page/

Bodies are JSON and say so: a web page elsewhere cannot send one without asking us first. A deadline comes as `x_milpa.deadline_s` or in the
header X-Milpa-Deadline-S; the settings' own is the longest. Starlette and msgspec, not FastAPI: 13 MiB less in a daemon that has 90.
"""

import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST
from sqlalchemy import select
from sqlalchemy.exc import OperationalError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Scope

from node.answering import Answering, NoSuchAnswer
from node.api import ollama, openai, shapes
from node.api.bodies import Json, decode, number, read_bytes
from node.api.errors import BadBody, error_body, told
from node.api.guard import Guard
from node.api.metrics import Metrics
from node.api.telling import Answered, Stream, Talk, begun
from node.engine.worker import Embedded, Late, NoModel, Speaker
from node.memory import routes as memory_routes
from node.memory.recall import Memory
from node.page import routes as page
from node.store import AnswerRow, new_id, read_answers
from protocol import __version__, codec
from protocol.errors import BadInput, MilpaError, NotEnough
from protocol.tasks import SOURCE_LIMIT

PAGE_LIMIT = 1_000  # answers a request
RECORDS_LIMIT = 256  # records a request; the body's limit comes first when they are long

T = TypeVar("T")


def build(
    answering: Answering,
    metrics: Metrics,
    *,
    default_task: str,
    deadline_s: float,
    status: Callable[[], dict[str, Any]],
    why_not_ready: Callable[[], str],
    examine: Callable[[], Sequence[Any]] = tuple,
    key: str = "",
    clock: Callable[[], float] = time.time,
    memory: Memory | None = None,
) -> Starlette:
    """The application.

    Args:
        default_task: of requests that name none while no model is active; else the model's own.
        deadline_s: the longest a request waits for its answer.
        status: what GET /v1/status says.
        why_not_ready: "" when the node can answer.
        examine: the doctor's findings, for the page.
        key: see `guard`.
    """
    api = _Api(answering, metrics, default_task, deadline_s, status, why_not_ready, clock)
    names: dict[str, str] = {}  # of our functions to the path they answer
    app = Starlette(
        routes=api.routes(),
        middleware=[
            Middleware(Guard, key=key, count=lambda scope, status: metrics.requested(names.get(_endpoint(scope), "other"), status))
        ],
        exception_handlers={MilpaError: api.refused, HTTPException: _http, OperationalError: api.refused},
    )
    if memory is not None:
        memory_routes.add(app, memory, task=api.task)
    page.add(app, answering, status=status, examine=examine, key=key, clock=clock)
    names.update((_name(route.endpoint), route.path) for route in app.routes if isinstance(route, Route))
    return app


class _Api:
    def __init__(
        self, answering: Answering, metrics: Metrics, default_task: str, deadline_s: float, status: Callable[[], dict[str, Any]],
        why_not_ready: Callable[[], str], clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self.answering, self.metrics, self.default_task, self.deadline_s = answering, metrics, default_task, deadline_s
        self.status, self.why_not_ready, self.clock = status, why_not_ready, clock

    def routes(self) -> list[Route]:
        """All paths."""
        posts: dict[str, Callable[[Request], Awaitable[Response]]] = {
            "/v1/completions": self.completions, "/v1/chat/completions": self.chat, "/v1/embeddings": self.embeddings,
            "/v1/records": self.records, "/v1/feedback": self.feedback,
            "/api/generate": self.generate, "/api/chat": self.ollama_chat, "/api/embed": self.embed, "/api/show": self.show,
        }  # fmt: skip
        gets: dict[str, Callable[[Request], Response]] = {
            "/v1/answers/{answer_id}": self.answer, "/v1/answers": self.answers, "/v1/models": self.models, "/v1/models/{name}": self.model,
            "/v1/status": self.whole, "/metrics": self.figures, "/api/tags": self.tags, "/api/ps": self.tags, "/api/version": self.version,
        }  # fmt: skip
        return [
            *(Route(path, endpoint, methods=["POST"]) for path, endpoint in posts.items()),
            *(Route(path, endpoint, methods=["GET"]) for path, endpoint in gets.items()),
            Route("/healthz", self.alive, methods=["GET"]),
            Route("/readyz", self.ready, methods=["GET"]),
        ]

    # ---- answers

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions"""
        asked = (await self._read(request, openai.CompletionRequest)).asked()
        return await self._talk(request, asked, self._openai(asked, "text_completion"))

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions"""
        asked = (await self._read(request, openai.ChatRequest)).asked()
        return await self._talk(request, asked, self._openai(asked, "chat.completion"))

    async def generate(self, request: Request) -> Response:
        """POST /api/generate"""
        return await self._ollama(request, await self._read(request, ollama.GenerateRequest), "generate")

    async def ollama_chat(self, request: Request) -> Response:
        """POST /api/chat"""
        return await self._ollama(request, await self._read(request, ollama.ChatRequest), "chat")

    def _openai(self, asked: shapes.Asked, kind: openai.Kind) -> openai.Dialect:
        return openai.Dialect(asked, kind=kind, id=new_id(), created=int(self.clock()), name=self._name())

    async def _ollama(self, request: Request, body: ollama.GenerateRequest | ollama.ChatRequest, kind: ollama.Kind) -> Response:
        asked = body.asked()
        dialect = ollama.Dialect(asked or shapes.Asked((), model=body.model), kind=kind, created=self.clock(), name=self._name())
        if asked is None:
            self._speaker()
            return Json(dialect.loaded())
        return await self._talk(request, asked, dialect)

    async def _talk(self, request: Request, asked: shapes.Asked, dialect: openai.Dialect | ollama.Dialect) -> Response:
        """Answer what is asked, whole or as a stream; a client that hangs up stops it."""
        records = asked.records(task=self.task(), site=self.answering.site, fresh_id=new_id())
        if len(records) > 1:  # a batch is refused before any of it is answered
            for record in records:
                codec.checked_record(record)
        seconds = shapes.deadline(asked.extras.deadline_s, request.headers.get(shapes.DEADLINE_HEADER, ""), limit_s=self.deadline_s)
        events = await begun(Talk(self.answering, asked, records, deadline_s=seconds, receive=request.receive).events())
        if asked.stream:
            return Stream(dialect.lines, dialect.broken, events, media_type=dialect.media_type)
        return Json(dialect.whole([event.given async for event in events if isinstance(event, Answered)]))

    async def records(self, request: Request) -> Response:
        """POST /v1/records"""
        body = await read_bytes(request)
        seconds = shapes.deadline(0.0, request.headers.get(shapes.DEADLINE_HEADER, ""), limit_s=self.deadline_s)
        if body.lstrip()[:1] != b"[":
            return Json(await run_in_threadpool(self._record, body, seconds))
        each = decode(body, list[msgspec.Raw])
        if not 1 <= len(each) <= RECORDS_LIMIT:
            raise BadInput(f"a request carries 1 to {RECORDS_LIMIT} records, not {len(each)}")
        return Json({"object": "list", "data": await run_in_threadpool(self._each, each, seconds)})

    def _each(self, bodies: Sequence[msgspec.Raw], seconds: float) -> list[dict[str, Any]]:
        """Every record answered or refused on its own, those past `seconds` unread; a full queue or disk refuses the rest one by one."""
        found, ends = [], time.monotonic() + seconds
        for body in bodies:
            left = ends - time.monotonic()
            try:
                if left <= 0:
                    raise Late(f"the request's {seconds:.3g} s were over before this record; send it again")
                found.append(self._record(bytes(body), left))
            except (MilpaError, OperationalError) as error:
                refusal = told(error)
                found.append(refusal.openai() | {"status": refusal.status})
        return found

    def _record(self, body: bytes, seconds: float) -> dict[str, Any]:
        try:
            read = codec.decode_record(body)
        except BadInput as error:
            self.answering.refuse(body.decode("utf-8", "replace"), reason=str(error), origin="api")
            raise
        given = self.answering.answer(read, deadline_s=seconds)
        return shapes.extras(given) | {"usage": shapes.usage(given)}

    def answer(self, request: Request) -> Response:
        """GET /v1/answers/ID"""
        wanted = request.path_params["answer_id"]
        with self.answering.store.transaction() as session:
            row = session.scalar(select(AnswerRow).where(AnswerRow.id == wanted))
        if row is None:
            raise NoSuchAnswer(f"no answer {wanted!r} here; it may have been pruned")
        return Json(shapes.stored(row))

    def answers(self, request: Request) -> Response:
        """GET /v1/answers"""
        since, limit = number(request, "since", 0, least=0), number(request, "limit", 100, least=1, most=PAGE_LIMIT)
        with self.answering.store.transaction() as session:
            rows = read_answers(session, since=since, limit=limit, state=request.query_params.get("state", ""))
        return Json({"object": "list", "data": [shapes.stored(row) for row in rows], "next": rows[-1].change if rows else since})

    async def feedback(self, request: Request) -> Response:
        """POST /v1/feedback"""
        word = await self._read(request, shapes.FeedbackRequest)
        row = await run_in_threadpool(self.answering.correct, word.id, verdict=word.verdict, text=word.text)
        return Json(shapes.stored(row))

    # ---- vectors

    async def embeddings(self, request: Request) -> Response:
        """POST /v1/embeddings"""
        wanted = await self._read(request, openai.EmbeddingRequest)
        return Json(openai.embeddings(wanted, await self._embed(request, wanted.texts())))

    async def embed(self, request: Request) -> Response:
        """POST /api/embed"""
        wanted = await self._read(request, ollama.EmbedRequest)
        return Json(ollama.embeddings(wanted, await self._embed(request, wanted.texts())))

    async def _embed(self, request: Request, texts: list[str]) -> list[Embedded]:
        seconds = shapes.deadline(0.0, request.headers.get(shapes.DEADLINE_HEADER, ""), limit_s=self.deadline_s)
        if long := next((text for text in texts if len(text) > SOURCE_LIMIT), None):
            raise BadInput(f"a text has {len(long)} characters, the limit is {SOURCE_LIMIT}")
        ends = time.monotonic() + seconds
        worker = self.answering.worker
        found = await run_in_threadpool(lambda: [worker.embed(text, deadline_s=max(0.0, ends - time.monotonic())) for text in texts])
        if len({one.speaker.model_digest for one in found}) > 1:
            raise NotEnough("the model was exchanged meanwhile, and vectors of two models are not comparable; ask again")
        return found

    # ---- the model and the node

    def models(self, request: Request) -> Response:
        """GET /v1/models"""
        speaker = self.answering.worker.speaker
        return Json({"object": "list", "data": [openai.model(speaker)] if speaker else []})

    def model(self, request: Request) -> Response:
        """GET /v1/models/ID"""
        speaker, name = self._speaker(), request.path_params["name"]
        if openai.model(speaker)["id"] != name:
            raise HTTPException(404, f"no model {name!r} here; GET /v1/models lists what there is")
        return Json(openai.model(speaker))

    def tags(self, request: Request) -> Response:
        """GET /api/tags, GET /api/ps: what there is, is loaded"""
        speaker = self.answering.worker.speaker
        return Json({"models": [ollama.tag(speaker)] if speaker else []})

    async def show(self, request: Request) -> Response:
        """POST /api/show"""
        await read_bytes(request)
        return Json(ollama.show(self._speaker()))

    def version(self, request: Request) -> Response:
        """GET /api/version"""
        return Json({"version": __version__})

    def whole(self, request: Request) -> Response:
        """GET /v1/status"""
        return Json(self.status())

    async def alive(self, request: Request) -> Response:
        """GET /healthz"""
        return Json({"status": "alive"})

    async def ready(self, request: Request) -> Response:
        """GET /readyz"""
        reason = self.why_not_ready()
        return Json({"status": "waiting" if reason else "ready", "reason": reason}, 503 if reason else 200)

    def figures(self, request: Request) -> Response:
        """GET /metrics"""
        return Response(self.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    def task(self) -> str:
        """Of requests that name none."""
        speaker = self.answering.worker.speaker
        return speaker.task if speaker else self.default_task

    def _speaker(self) -> Speaker:
        if (speaker := self.answering.worker.speaker) is None:
            raise NoModel("no model is active yet: the node waits for its first release")
        return speaker

    def _name(self) -> str:
        speaker = self.answering.worker.speaker
        return shapes.model_name(speaker.task, speaker.release) if speaker else ""

    # ---- what cannot be used

    async def _read(self, request: Request, kind: type[T]) -> T:
        """The body, kept with the reason when it cannot be used."""
        body = await read_bytes(request)
        try:
            return decode(body, kind)
        except BadBody as error:
            await run_in_threadpool(self.answering.refuse, body.decode("utf-8", "replace"), reason=str(error), origin="api")
            raise

    async def refused(self, request: Request, error: Exception) -> Response:
        """Every error in the words of the path's dialect."""
        refusal = told(error)
        body = refusal.ollama() if request.scope["path"].startswith("/api/") else refusal.openai()
        return Json(body, refusal.status, refusal.headers)


async def _http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return Json(error_body(str(error.detail), "invalid_request_error", "http"), error.status_code, error.headers)


def _endpoint(scope: Scope) -> str:
    """Which of our functions answered; a path unknown here has none, and must not become a label of the metrics."""
    return _name(scope.get("endpoint"))


def _name(endpoint: Any) -> str:
    return f"{getattr(endpoint, '__qualname__', '')}"
