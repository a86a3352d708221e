"""Serves a release store over HTTP: signed metadata, manifests, and files by digest with ranges.

    GET /repository/metadata/timestamp.json       never cached: it is how a node learns of news
    GET /repository/metadata/<n>.<role>.json      immutable
    GET /repository/targets/releases/<sha256>.<n>.json
    GET /repository/targets/blobs/<sha256>.<sha256>   for any TUF client; the same bytes as
    GET /repository/blobs/<sha256>                    what our nodes resume from

No login: what is here is signed, and meant for every node. Names are matched whole against patterns, so no path from outside reaches the
file system. Nothing here may be compressed on the way (a range of a compressed body is not a range of the file): keep GZip middleware off.
"""

import re
from collections.abc import Callable
from pathlib import Path

from fastapi import APIRouter, HTTPException, Request
from starlette.responses import FileResponse, Response

from coordinator.fleet.publishing import Publisher

IMMUTABLE = "public, max-age=31536000, immutable"
FRESH = "no-cache"

_METADATA = re.compile(r"timestamp\.json|[1-9][0-9]{0,8}\.(?:root|targets|snapshot)\.json")
_MANIFEST = re.compile(r"releases/([0-9a-f]{64})\.[1-9][0-9]{0,8}\.json")
_BLOB_TARGET = re.compile(r"blobs/([0-9a-f]{64})\.\1")
_DIGEST = re.compile(r"[0-9a-f]{64}")


def routes(store: Publisher | Path) -> APIRouter:
    """Routes below /repository for the store, which may still be empty."""
    publisher = store if isinstance(store, Publisher) else Publisher(store)
    router = APIRouter(prefix="/repository", include_in_schema=False)

    def route(path: str) -> Callable[[Callable[..., Response]], Callable[..., Response]]:
        return router.api_route(path, methods=["GET", "HEAD"], response_class=Response)

    @route("/metadata/{name}")
    def metadata(name: str, request: Request) -> Response:
        if not _METADATA.fullmatch(name):
            raise HTTPException(404)
        path = publisher.metadata / name
        # replaced in place, so the file's time and size tell its versions apart; FileResponse makes its ETag from them
        return _serve(path, request, etag="", cache=FRESH if name == "timestamp.json" else IMMUTABLE)

    @route("/targets/{name:path}")
    def target(name: str, request: Request) -> Response:
        if found := _MANIFEST.fullmatch(name):
            return _serve(publisher.targets / name, request, etag=found[1], cache=IMMUTABLE)
        if found := _BLOB_TARGET.fullmatch(name):
            return _serve(publisher.blobs.path(found[1]), request, etag=found[1], cache=IMMUTABLE)
        raise HTTPException(404)

    @route("/blobs/{digest}")
    def blob(digest: str, request: Request) -> Response:
        if not _DIGEST.fullmatch(digest):
            raise HTTPException(404)
        return _serve(publisher.blobs.path(digest), request, etag=digest, cache=IMMUTABLE)

    return router


def _serve(path: Path, request: Request, *, etag: str, cache: str) -> Response:
    if not path.is_file():
        raise HTTPException(404)
    headers = {"cache-control": cache, "x-content-type-options": "nosniff"}
    if etag:
        headers["etag"] = f'"{etag}"'
        if request.headers.get("if-none-match") == headers["etag"]:
            return Response(status_code=304, headers=headers)
    kind = "application/json" if path.suffix == ".json" else "application/octet-stream"
    return FileResponse(path, headers=headers, media_type=kind)
