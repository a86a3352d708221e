"""What is remembered, over HTTP: for the node's page and the command line.

GET    /v1/memory?kind=&shareable=&limit=    entries, patterns first; the text stays on this machine's API
POST   /v1/memory                            a pattern: {when, verdict?, text?, task?, lang?, shareable?}
POST   /v1/memory/KEY                        {shareable}: let this pattern leave the site, or not any more
DELETE /v1/memory/KEY                        forget it, at once
"""

from collections.abc import Callable

import pydantic
from fastapi import FastAPI, Query
from fastapi.responses import JSONResponse

from node.memory.recall import Memory
from protocol.tasks import SOURCE_LIMIT, task_named

LIST_LIMIT = 1_000  # entries a request


class PatternRequest(pydantic.BaseModel):
    """When you see this, it means that."""

    model_config = pydantic.ConfigDict(extra="forbid")

    when: str = pydantic.Field(max_length=SOURCE_LIMIT)
    verdict: str = pydantic.Field(default="", max_length=200)
    text: str = pydantic.Field(default="", max_length=SOURCE_LIMIT)
    task: str = pydantic.Field(default="", max_length=200)  # empty: the node's own
    lang: str = "en"
    shareable: bool = False


class ShareRequest(pydantic.BaseModel):
    """Whether a pattern may leave the site."""

    model_config = pydantic.ConfigDict(extra="forbid")

    shareable: bool


def add(app: FastAPI, memory: Memory, *, task: Callable[[], str]) -> None:
    """Offer the routes.

    Args:
        task: the node's own, for patterns that name none.
    """

    @app.get("/v1/memory")
    def entries(kind: str = "", shareable: bool = False, limit: int = Query(100, ge=1, le=LIST_LIMIT)) -> JSONResponse:
        return JSONResponse({"object": "list", "data": memory.listed(kind=kind, shareable=shareable, limit=limit)})

    @app.post("/v1/memory")
    def pattern(request: PatternRequest) -> JSONResponse:
        named = task_named(request.task or task())
        return JSONResponse(
            memory.add(named, lang=request.lang, when=request.when, verdict=request.verdict, text=request.text, shareable=request.shareable)
        )

    @app.post("/v1/memory/{key}")
    def share(key: str, request: ShareRequest) -> JSONResponse:
        return JSONResponse(memory.share(key, shareable=request.shareable))

    @app.delete("/v1/memory/{key}")
    def forget(key: str) -> JSONResponse:
        return JSONResponse(memory.forget(key))
