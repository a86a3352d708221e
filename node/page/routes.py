"""The page's paths. Thin: a request comes in, one look or one use case, HTML goes out.

GET  /                    the page; ?answer=ID shows that answer's card, ?skip=N leaves N for later, ?lang=es remembers the language
POST /page/answers/ID     a tap: verdict=CODE, or right=TEXT, or text=TEXT; then back to /, which says what was saved
GET  /page/mark           changes with every answer and finding: an open page asks for it every few seconds
GET  /page/page.css, page.js, milpa.svg
GET, POST /login, POST /logout     only where the node has a key; see `door`

HTML is built by modules that are loaded at the first look: a node nobody looks at does not pay for its page.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlencode

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response

from node.answering import Answering, NoSuchAnswer
from node.page import door
from protocol import __version__
from protocol.errors import BadInput
from protocol.web import SECURITY

if TYPE_CHECKING:
    from node.page.pages import Finding, Said
    from node.page.words import Words

log = logging.getLogger("milpa.node")

STATIC = Path(__file__).parent / "static"
FILES = {"page.css": "text/css", "page.js": "text/javascript", "milpa.svg": "image/svg+xml"}
LANGUAGE_COOKIE = "milpa_lang"
YEAR_S = 365 * 86_400
FIELDS = 8  # of a form
TEXT_LIMIT = 4_000  # characters of a corrected text, as in POST /v1/feedback
SKIP_LIMIT = 10_000
WRONG_KEY_S = 1.0  # seconds until somebody hears that the key was wrong
FINDINGS_S = 30.0  # seconds the doctor's word is good


def add(
    app: Starlette,
    answering: Answering,
    *,
    status: Callable[[], dict[str, Any]],
    examine: Callable[[], Sequence[Any]] = tuple,
    key: str = "",
    clock: Callable[[], float] = time.time,
) -> None:
    """Put the page on `app`.

    Args:
        status: what GET /v1/status says.
        examine: the doctor's findings (`node.doctor.Finding`).
        key: what a person must type once; "" for none.
    """
    _Page(answering, status, examine, key, clock).add(app)


class _Page:
    def __init__(
        self,
        answering: Answering,
        status: Callable[[], dict[str, Any]],
        examine: Callable[[], Sequence[Any]],
        key: str,
        clock: Callable[[], float],
    ) -> None:
        self.answering, self.status, self.examine, self.key, self.clock = answering, status, examine, key, clock
        self._examining = threading.Lock()
        self._examined_at = -FINDINGS_S
        self._examined: list[Finding] = []
        self._rounds = 0  # of the doctor

    def add(self, app: Starlette) -> None:
        """All routes. Each asks `_enter` first, but for the door itself and the files."""
        app.add_route("/", self.page, methods=["GET"])
        app.add_route("/page/mark", self.mark, methods=["GET"])
        app.add_route("/page/answers/{answer_id}", self.tap, methods=["POST"])
        app.add_route("/page/{name}", self.file, methods=["GET"])
        app.add_route("/login", self.login, methods=["GET"])
        app.add_route("/login", self.knock, methods=["POST"])
        app.add_route("/logout", self.log_out, methods=["POST"])

    # ---- the page

    async def page(self, request: Request) -> Response:
        """GET /"""
        if refusal := self._enter(request):
            return refusal
        return await run_in_threadpool(self._page, request)

    async def mark(self, request: Request) -> Response:
        """GET /page/mark"""
        if refusal := self._enter(request):
            return refusal
        return PlainTextResponse(await run_in_threadpool(self._mark), headers={"cache-control": "no-store"})

    def _mark(self) -> str:
        from node.page import views

        return f"{views.mark(self.answering.store)}-{self._rounds}"

    async def tap(self, request: Request) -> Response:
        """POST /page/answers/ID"""
        if refusal := self._enter(request):
            return refusal
        body = await request.body()
        return await run_in_threadpool(self._tap, request, request.path_params["answer_id"], body)

    def _tap(self, request: Request, answer_id: str, body: bytes) -> Response:
        from node.page.pages import Said

        words = self._words(request)
        if not door.from_our_page(request.headers):
            return self._page(request, said=Said(problem=words.text("not-saved.elsewhere")), status=403)
        try:
            form = _form(body)
            text = form.get("right") or form.get("text", "")
            verdict = form.get("verdict", "")
            if len(text) > TEXT_LIMIT:
                return self._page(request, said=Said(problem=words.text("not-saved.long", limit=words.number(TEXT_LIMIT))), status=400)
            if not verdict and not text.strip():
                return self._page(request, said=Said(problem=words.text("not-saved.empty")), status=400)
            self.answering.correct(answer_id, verdict=verdict, text=text)
        except NoSuchAnswer:
            return self._page(request, said=Said(problem=words.text("not-saved.gone")), status=404)
        except BadInput as error:
            return self._page(request, said=Said(problem=words.text("not-saved.bad"), detail=str(error)), status=400)
        return _go(f"/?{urlencode({'done': answer_id})}")

    def _page(self, request: Request, *, said: "Said | None" = None, status: int = 200) -> Response:
        from node.page import pages, views

        words, asked = self._words(request), request.query_params
        store, done = self.answering.store, _short(asked.get("done", ""))
        if said is None:
            said = pages.Said(answer=views.one(store, done) if done else None)
        skip = asked.get("skip", "")
        seen = views.look(
            store, self.clock(), answer=_short(asked.get("answer", "")), keep=_short(asked.get("keep", "")),
            skip=min(int(skip), SKIP_LIMIT) if skip.isascii() and skip.isdigit() and len(skip) < 9 else 0,
        )  # fmt: skip
        rounds, findings = self._rounds, self._findings()  # in this order: a newer word is asked for again
        html = pages.main_page(
            words, self.status(), seen, findings, said=said, mark=f"{seen.mark}-{rounds}", with_key=bool(self.key),
            here=_here(asked, ("answer", "skip")),
        )  # fmt: skip
        return self._html(request, html, status)

    def _findings(self) -> "list[Finding]":
        """What the doctor said last. It may wait on a dead network: it looks in a thread of its own, and the open page asks again."""
        if time.monotonic() > self._examined_at + FINDINGS_S and self._examining.acquire(blocking=False):
            threading.Thread(target=self._look, name="milpa-page-doctor", daemon=True).start()
        return self._examined

    def _look(self) -> None:
        from node.page.pages import Finding

        try:
            found = [Finding(finding.what, finding.state, finding.found, finding.advice) for finding in self.examine()]
            self._rounds += found != self._examined
            self._examined, self._examined_at = found, time.monotonic()
        except Exception:  # a defect of the doctor's must not end his visits
            log.exception("the doctor could not look")
            self._examined_at = time.monotonic()
        finally:
            self._examining.release()

    # ---- the door

    async def login(self, request: Request) -> Response:
        """GET /login"""
        return _go("/") if self._may_enter(request) else await run_in_threadpool(self._door, request, "", 200)

    async def knock(self, request: Request) -> Response:
        """POST /login"""
        problem = "" if door.from_our_page(request.headers) else "door.elsewhere"
        try:
            form = _form(await request.body())
        except BadInput:
            form = {}
        if not problem and not door.same_key(form.get("key", ""), self.key):
            await asyncio.sleep(WRONG_KEY_S)
            problem = "door.wrong"
        if problem:
            return await run_in_threadpool(self._door, request, problem, 403)
        answer = _go("/")
        answer.set_cookie(
            door.COOKIE, door.new_pass(self.key, self.clock()), max_age=door.PASS_S, httponly=True, samesite="strict"
        )  # fmt: skip
        return answer

    async def log_out(self, request: Request) -> Response:
        """POST /logout"""
        answer = _go("/login" if self.key else "/")
        if door.from_our_page(request.headers):
            answer.delete_cookie(door.COOKIE, httponly=True, samesite="strict")
        return answer

    def _door(self, request: Request, problem: str, status: int) -> Response:
        from node.page.pages import login_page

        words = self._words(request)
        return self._html(request, login_page(words, problem=words.text(problem) if problem else ""), status)

    def _may_enter(self, request: Request) -> bool:
        return door.is_good(request.cookies.get(door.COOKIE, ""), self.key, self.clock())

    def _enter(self, request: Request) -> Response | None:
        return None if self._may_enter(request) else _go("/login")

    # ---- all of them

    async def file(self, request: Request) -> Response:
        """GET /page/page.css and the like: nothing of the site is in them, so they need no pass."""
        name = request.path_params["name"]
        if name not in FILES:
            return PlainTextResponse("Not Found", 404)
        tag = f'"{__version__}-{(STATIC / name).stat().st_mtime_ns:x}"'
        headers = {"cache-control": "no-cache", "etag": tag} | SECURITY
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response((STATIC / name).read_bytes(), media_type=FILES[name], headers=headers)

    def _words(self, request: Request) -> "Words":
        from node.page.words import Words
        from protocol.words import language

        asked = request.query_params.get("lang", "")
        lang, comma = language(asked, request.cookies.get(LANGUAGE_COOKIE, ""), request.headers.get("accept-language", ""))
        now = self.clock()
        zone = datetime.now().astimezone().tzinfo
        assert zone is not None
        return Words(lang=lang, comma=comma, zone=zone, now=int(now))

    def _html(self, request: Request, html: str, status: int) -> Response:
        answer = HTMLResponse(html, status, headers={"cache-control": "no-store"} | SECURITY)
        if asked := request.query_params.get("lang", ""):
            answer.set_cookie(LANGUAGE_COOKIE, "es" if asked == "es" else "en", max_age=YEAR_S, httponly=True, samesite="lax")
        return answer


def _go(where: str) -> RedirectResponse:
    return RedirectResponse(where, 303, headers={"cache-control": "no-store"} | SECURITY)


def _form(body: bytes) -> dict[str, str]:
    """The fields of a form.

    Raises:
        BadInput: not a form, or one of somebody else's.
    """
    try:
        told = parse_qs(body.decode("utf-8"), keep_blank_values=True, max_num_fields=FIELDS)
    except (UnicodeDecodeError, ValueError) as error:
        raise BadInput(f"the form does not decode: {error}") from error
    return {name: values[-1] for name, values in told.items()}


def _short(value: str) -> str:
    """An answer's id, or nothing: ids are at most 32 characters."""
    return value if len(value) <= 32 else ""


def _here(asked: Mapping[str, str], keep: Sequence[str]) -> str:
    told = {name: _short(asked[name]) for name in keep if asked.get(name)}
    return "/?" + urlencode(told) if told else "/"
