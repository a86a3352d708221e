"""What the node offers over HTTP. Thin: each route reads a body, calls one use case, shapes the result.

POST /v1/completions, /v1/chat/completions   a record's source in, the answer out; OpenAI's bodies, ours under x_milpa
POST /v1/records                             a protocol record as it is; the answer as stored
GET  /v1/answers/ID, /v1/answers?since=N     answers as they stand now, with upgrades; N is the last `change` seen
POST /v1/feedback                            the operator's word: {id, verdict?, text?}
GET  /v1/models, /v1/status                  the active model; the node as a whole
GET  /healthz, /readyz, /metrics             alive; a model is active (else 503 and why); Prometheus
GET  /                                       the page for people; see node/page/
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from sqlalchemy import select
from sqlalchemy.exc import OperationalError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from node.answering import Answering, Given, NoSuchAnswer
from node.api import shapes
from node.api.guard import Guard, error_body
from node.api.metrics import Metrics
from node.engine.worker import Busy, Late
from node.page import routes as page
from node.store import AnswerRow, new_id, read_answers
from protocol import codec
from protocol.errors import BadInput, MilpaError, NotEnough, TooLarge

RETRY_AFTER_S = 2  # what a 429 suggests; a queue of 16 short answers is gone by then
PAGE_LIMIT = 1_000  # answers a request
STATUSES: tuple[tuple[type[MilpaError], int, str, str], ...] = (  # the first that fits
    (NoSuchAnswer, 404, "invalid_request_error", "not_found"),
    (TooLarge, 413, "invalid_request_error", "too_large"),
    (BadInput, 400, "invalid_request_error", "bad_input"),
    (Busy, 429, "rate_limit_error", "queue_full"),
    (Late, 504, "server_error", "deadline"),
    (NotEnough, 503, "server_error", "not_enough"),
    (MilpaError, 503, "server_error", "unavailable"),
)


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
) -> FastAPI:
    """The application.

    Args:
        default_task: of requests that name none while no model is active; else the model's own.
        deadline_s: seconds a request waits for its answer.
        status: what GET /v1/status says.
        why_not_ready: "" when the node can answer.
        examine: the doctor's findings, for the page.
        key: see `guard`.
    """
    app = FastAPI(title="Milpa node", openapi_url="/openapi.json", docs_url=None, redoc_url=None)

    def ask(request: shapes.CompletionRequest | shapes.ChatRequest) -> Given:
        speaker = answering.worker.speaker
        task = speaker.task if speaker else default_task
        record = shapes.to_record(request, task=task, site=answering.site, fresh_id=new_id())
        return answering.answer(record, deadline_s=deadline_s)

    @app.post("/v1/completions")
    def completions(request: shapes.CompletionRequest) -> JSONResponse:
        return JSONResponse(shapes.completion(ask(request), kind="text_completion", model=request.model, created=int(time.time())))

    @app.post("/v1/chat/completions")
    def chat(request: shapes.ChatRequest) -> JSONResponse:
        return JSONResponse(shapes.completion(ask(request), kind="chat.completion", model=request.model, created=int(time.time())))

    @app.post("/v1/records")
    async def records(request: Request) -> JSONResponse:
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise BadInput("send the record as application/json")
        body = await request.body()
        return await run_in_threadpool(record, body)

    def record(body: bytes) -> JSONResponse:
        try:
            read = codec.decode_record(body)
        except BadInput as error:
            answering.refuse(body.decode("utf-8", "replace"), reason=str(error), origin="api")
            raise
        given = answering.answer(read, deadline_s=deadline_s)
        return JSONResponse(shapes.extras(given) | {"usage": shapes.usage(given)})

    @app.get("/v1/answers/{answer_id}")
    def answer(answer_id: str) -> JSONResponse:
        with answering.store.transaction() as session:
            row = session.scalar(select(AnswerRow).where(AnswerRow.id == answer_id))
        if row is None:
            raise NoSuchAnswer(f"no answer {answer_id!r} here; it may have been pruned")
        return JSONResponse(shapes.stored(row))

    @app.get("/v1/answers")
    def answers(since: int = Query(0, ge=0), limit: int = Query(100, ge=1, le=PAGE_LIMIT), state: str = "") -> JSONResponse:
        with answering.store.transaction() as session:
            rows = read_answers(session, since=since, limit=limit, state=state)
        return JSONResponse({"object": "list", "data": [shapes.stored(row) for row in rows], "next": rows[-1].change if rows else since})

    @app.post("/v1/feedback")
    def feedback(request: shapes.FeedbackRequest) -> JSONResponse:
        return JSONResponse(shapes.stored(answering.correct(request.id, verdict=request.verdict, text=request.text)))

    @app.get("/v1/models")
    def models() -> JSONResponse:
        speaker = answering.worker.speaker
        data = []
        if speaker is not None:
            ours = {
                "model_digest": speaker.engine.model_digest,
                "adapter_digest": speaker.engine.adapter_digest,
                "release": speaker.release,
            }
            name = shapes.model_name(speaker.task, speaker.release)
            data = [{"id": name, "object": "model", "created": 0, "owned_by": "milpa", "x_milpa": ours | {"task": speaker.task}}]
        return JSONResponse({"object": "list", "data": data})

    @app.get("/v1/status")
    def whole() -> JSONResponse:
        return JSONResponse(status())

    @app.get("/healthz")
    async def alive() -> JSONResponse:
        return JSONResponse({"status": "alive"})

    @app.get("/readyz")
    async def ready() -> JSONResponse:
        reason = why_not_ready()
        return JSONResponse({"status": "waiting" if reason else "ready", "reason": reason}, 503 if reason else 200)

    @app.get("/metrics")
    def figures() -> Response:
        return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)

    page.add(app, answering, status=status, examine=examine, key=key, clock=clock)
    _tell_errors(app, answering)

    app.add_middleware(Guard, key=key, count=metrics.requested)
    return app


def _tell_errors(app: FastAPI, answering: Answering) -> None:
    """Every error in OpenAI's form; unusable input is kept with the reason."""

    @app.exception_handler(MilpaError)
    async def ours(_: Request, error: MilpaError) -> JSONResponse:
        status, kind, code = next((status, kind, code) for cls, status, kind, code in STATUSES if isinstance(error, cls))
        headers = {"Retry-After": str(RETRY_AFTER_S)} if status == 429 else None
        return JSONResponse(error_body(str(error), kind, code), status, headers)

    @app.exception_handler(RequestValidationError)
    async def body(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:]) or None
        message = f"{where}: {first['msg']}" if where else "send a JSON object, as application/json"
        if error.body is not None:
            await run_in_threadpool(answering.refuse, str(error.body), reason=message, origin="api")
        return JSONResponse(error_body(message, "invalid_request_error", "bad_input", where), 400)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(error_body(str(error.detail), "invalid_request_error", "http"), error.status_code, error.headers)

    @app.exception_handler(OperationalError)
    async def disk(_: Request, error: OperationalError) -> JSONResponse:
        message = f"the node cannot use its database ({error.orig}); is the disk full? run: milpa-node doctor"
        return JSONResponse(error_body(message, "server_error", "storage"), 503)
