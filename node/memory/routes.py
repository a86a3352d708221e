"""What is remembered, over HTTP: for the node's page and the command line.

GET    /v1/memory?kind=&shareable=true&limit=   entries, patterns first
POST   /v1/memory                               a pattern: {when, verdict?, text?, task?, lang?, shareable?}
POST   /v1/memory/KEY                           {shareable}: let this pattern leave the site, or not any more
DELETE /v1/memory/KEY                           forget it, at once
"""

from collections.abc import Callable
from typing import Annotated

import msgspec
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from node.api.bodies import Json, number, read_as
from node.memory.recall import Memory
from protocol.tasks import SOURCE_LIMIT, task_named

LIST_LIMIT = 1_000  # entries a request

Text = Annotated[str, msgspec.Meta(max_length=SOURCE_LIMIT)]
Name = Annotated[str, msgspec.Meta(max_length=200)]


class PatternRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When you see this, it means that."""

    when: Text
    verdict: Name = ""
    text: Text = ""
    task: Name = ""  # empty: the node's own
    lang: str = "en"
    shareable: bool = False


class ShareRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whether a pattern may leave the site."""

    shareable: bool


def add(app: Starlette, memory: Memory, *, task: Callable[[], str]) -> None:
    """Offer the routes.

    Args:
        task: the node's own, for patterns that name none.
    """

    def entries(request: Request) -> Response:
        shareable, limit = (
            request.query_params.get("shareable", "") in ("1", "true"),
            number(request, "limit", 100, least=1, most=LIST_LIMIT),
        )
        return Json({"object": "list", "data": memory.listed(kind=request.query_params.get("kind", ""), shareable=shareable, limit=limit)})

    async def pattern(request: Request) -> Response:
        wanted = await read_as(request, PatternRequest)
        named = task_named(wanted.task or task())
        told = await run_in_threadpool(
            memory.add, named, lang=wanted.lang, when=wanted.when, verdict=wanted.verdict, text=wanted.text, shareable=wanted.shareable
        )
        return Json(told)

    async def share(request: Request) -> Response:
        wanted = await read_as(request, ShareRequest)
        return Json(await run_in_threadpool(memory.share, request.path_params["key"], shareable=wanted.shareable))

    def forget(request: Request) -> Response:
        return Json(memory.forget(request.path_params["key"]))

    app.add_route("/v1/memory", entries, methods=["GET"])
    app.add_route("/v1/memory", pattern, methods=["POST"])
    app.add_route("/v1/memory/{key}", share, methods=["POST"])
    app.add_route("/v1/memory/{key}", forget, methods=["DELETE"])
