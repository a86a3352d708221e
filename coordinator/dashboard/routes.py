"""The dashboard's pages. Each route reads one view, and hands it to one template.

Every page but /login and /setup needs a session; without one it redirects there and comes back. Every unsafe method needs the CSRF token.
Pages are whole without scripts. With scripts, `static/milpa.js` listens on /events and asks for the page again when the ledger moved.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlencode
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import jinja2
import msgspec
from fastapi import APIRouter, FastAPI, Form, Query, Request
from fastapi.exception_handlers import http_exception_handler
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

from coordinator.dashboard import charts, proof
from coordinator.dashboard.auth import SESSION_S, Door, TooManyTries, WrongLogin, same
from coordinator.dashboard.views.books import audit_rows, refused_messages
from coordinator.dashboard.views.escalations import about_asking
from coordinator.dashboard.views.nodes import SHOWN, Happened, Node, all_nodes, node_named, timeline
from coordinator.dashboard.views.overview import first_page
from coordinator.dashboard.views.rounds import Round, all_rounds, round_numbered
from coordinator.dashboard.words import Words, language
from coordinator.fleet.ledger import Ledger, WebSession
from protocol.errors import BadInput, Unavailable
from protocol.web import SECURITY

log = logging.getLogger(__name__)

HERE = Path(__file__).parent
COOKIE, FORM_COOKIE, LANGUAGE_COOKIE = "milpa_session", "milpa_form", "milpa_lang"
PAGES = (
    ("overview", "/", "o"), ("nodes", "/nodes", "n"), ("releases", "/releases", "r"), ("rounds", "/rounds", "d"),
    ("escalations", "/escalations", "e"), ("audit", "/audit", "a"),
)  # fmt: skip
POLL_S = 1.0  # how often the ledger's mark is read while somebody watches
TICK_S = 15.0  # a word on the line at least so often, so that ages stay true and a cut is noticed
WATCHERS = 64  # open event streams
SORTS: dict[str, Callable[[Node], Any]] = {
    "name": lambda node: node.name, "state": lambda node: SHOWN.index(node.shown), "role": lambda node: node.role,
    "release": lambda node: node.release, "answered": lambda node: node.answered, "share": lambda node: node.share or 0.0,
    "waiting": lambda node: node.waiting, "seen": lambda node: -node.last_seen,
}  # fmt: skip


class NeedsLogin(Exception):
    """No session: to the door."""


class Forbidden(Exception):
    """No CSRF token, or another browser's."""


class NotHere(Exception):
    """Nothing of that name."""


class Changes:
    """Tells open pages that the ledger moved. One poller for all of them, and none while nobody watches."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._moved = asyncio.Condition()
        self._mark: tuple[int, ...] = ()
        self._version = 0
        self._watchers = 0
        self._closing = False

    @property
    def full(self) -> bool:
        """Whether one more watcher is too many."""
        return self._watchers >= WATCHERS

    async def close(self) -> None:
        """End all streams, so that the server can stop."""
        async with self._moved:
            self._closing = True
            self._moved.notify_all()

    async def run(self) -> None:
        """Poll until cancelled. A database that is away is asked again."""
        while True:
            await asyncio.sleep(POLL_S)
            if not self._watchers:
                continue
            try:
                mark = await asyncio.to_thread(self._ledger.mark)
            except Exception:  # the ledger is away; the pages say so, and the line must be live again when it is back
                log.exception("cannot see whether the ledger moved; asking again in %g s", TICK_S)
                await asyncio.sleep(TICK_S)
                continue
            if mark != self._mark:
                self._mark = mark
                async with self._moved:
                    self._version += 1
                    self._moved.notify_all()

    async def stream(self, alive: Callable[[], bool]) -> AsyncIterator[bytes]:
        """Server-sent events: `change` when something moved, `tick` now and then, until the session is over."""
        self._watchers += 1
        seen = self._version
        try:
            yield b"retry: 2000\nevent: tick\ndata: hello\n\n"
            while not self._closing:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(TICK_S), self._moved:
                        while not self._closing and self._version == seen:
                            await self._moved.wait()
                if self._closing or not await asyncio.to_thread(alive):
                    return
                name = b"change" if self._version != seen else b"tick"
                seen = self._version
                yield b"event: " + name + b"\ndata: " + str(seen).encode() + b"\n\n"
        finally:
            self._watchers -= 1


class SecurityHeaders:
    """Adds SECURITY to every response. Plain ASGI: event streams pass untouched."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass the request on."""

        async def sent(message: Any) -> None:
            if message["type"] == "http.response.start":
                there = {name for name, _ in message["headers"]}
                message["headers"] = [
                    *message["headers"], *((k.encode(), v.encode()) for k, v in SECURITY.items() if k.encode() not in there),
                ]  # fmt: skip
            await send(message)

        await self.app(scope, receive, sent if scope["type"] == "http" else send)


class Dashboard:
    """The pages over one ledger."""

    def __init__(
        self, ledger: Ledger, door: Door, *, timezone: str = "UTC", silent_after_s: int = 900, secure: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        """Args:
            timezone: of the times shown, as "America/Managua".
            secure: cookies only over https (TLS may end in a proxy that we do not see).

        Raises:
            BadInput: no such time zone.
        """
        try:
            self.zone = ZoneInfo(timezone)
        except (ZoneInfoNotFoundError, ValueError) as error:
            raise BadInput(f"web.timezone {timezone!r} is not known; write it as 'America/Managua'") from error
        self.ledger, self.door, self.clock = ledger, door, clock
        self.silent_after_s, self.secure = silent_after_s, secure
        self.changes = Changes(ledger)
        self.templates = jinja2.Environment(
            loader=jinja2.FileSystemLoader(HERE / "templates"), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
            lstrip_blocks=True,
        )  # fmt: skip

    def install(self, app: FastAPI) -> None:
        """Put pages, static files, error pages and headers on `app`."""
        app.include_router(self.router())
        app.mount("/static", StaticFiles(directory=HERE / "static"), name="static")
        app.add_middleware(SecurityHeaders)

        @app.exception_handler(NeedsLogin)
        async def to_the_door(request: Request, _: NeedsLogin) -> Response:
            if request.url.path == "/events":
                return JSONResponse({"detail": "log in first"}, status_code=401)
            here = request.url.path + (f"?{request.url.query}" if request.url.query else "")
            return RedirectResponse("/login" + (f"?{urlencode({'next': here})}" if here != "/" else ""), status_code=303)

        @app.exception_handler(Forbidden)
        async def forbidden(request: Request, _: Forbidden) -> Response:
            return await asyncio.to_thread(self._error, request, "forbidden", 403)

        @app.exception_handler(NotHere)
        async def not_here(request: Request, _: NotHere) -> Response:
            return await asyncio.to_thread(self._error, request, "not-found", 404)

        @app.exception_handler(Unavailable)
        async def no_ledger(request: Request, error: Unavailable) -> Response:
            log.error("%s %s: %s", request.method, request.url.path, error)
            return self._error(request, "ledger", 503, known=False)

        @app.exception_handler(HTTPException)
        async def plain(request: Request, error: HTTPException) -> Response:
            if error.status_code == 404 and "text/html" in request.headers.get("accept", ""):
                return await asyncio.to_thread(self._error, request, "not-found", 404)
            return await http_exception_handler(request, error)

    def router(self) -> APIRouter:
        """All routes of the dashboard."""
        router = APIRouter(include_in_schema=False)

        @router.get("/login")
        def login_page(request: Request, next: str = "") -> Response:
            if self.door.needs_setup:
                return RedirectResponse("/setup", status_code=303)
            if self._session(request) is not None:
                return RedirectResponse(_inside(next), status_code=303)
            return self._form(request, "login.html", problem="", name="", next=_inside(next))

        @router.post("/login")
        def log_in(
            request: Request, name: Annotated[str, Form(max_length=64)] = "", password: Annotated[str, Form(max_length=400)] = "",
            csrf: Annotated[str, Form(max_length=100)] = "", next: Annotated[str, Form(max_length=500)] = "",
        ) -> Response:  # fmt: skip
            self._check_form(request, csrf)
            try:
                token = self.door.log_in(name, password, address=_address(request))
            except TooManyTries:
                problem, status = "login.wait", 429
            except WrongLogin:
                problem, status = "login.wrong", 401
            else:
                return self._enter(request, token, _inside(next))
            told = self._words(request).text(problem)
            return self._form(request, "login.html", status=status, problem=told, name=name, next=_inside(next))

        @router.get("/setup")
        def setup_page(request: Request) -> Response:
            if not self.door.needs_setup:
                return RedirectResponse("/login", status_code=303)
            return self._form(request, "setup.html", problem="", name="admin", token_file=str(self.door.token_file))

        @router.post("/setup")
        def set_up(
            request: Request, token: Annotated[str, Form(max_length=100)] = "", name: Annotated[str, Form(max_length=64)] = "",
            password: Annotated[str, Form(max_length=400)] = "", csrf: Annotated[str, Form(max_length=100)] = "",
        ) -> Response:  # fmt: skip
            self._check_form(request, csrf)
            try:
                return self._enter(request, self.door.set_up(token, name, password, address=_address(request)), "/")
            except TooManyTries:
                problem, status = "login.wait", 429
            except WrongLogin:
                problem, status = "setup.wrong", 401
            except BadInput as error:
                problem, status = ("setup.bad-password" if str(error) == "password length" else "setup.bad-name"), 400
            told = self._words(request).text(problem)
            return self._form(request, "setup.html", status=status, problem=told, name=name, token_file=str(self.door.token_file))

        @router.post("/logout")
        def log_out(request: Request, csrf: Annotated[str, Form(max_length=100)] = "") -> Response:
            self._check_csrf(request, csrf)
            self.door.log_out(request.cookies.get(COOKIE, ""))
            response = RedirectResponse("/login", status_code=303)
            response.delete_cookie(COOKIE)
            return response

        @router.get("/")
        def overview(request: Request) -> Response:
            session, words = self._enter_page(request)
            view = first_page(self.ledger, now=words.now, silent_after_s=self.silent_after_s)
            return self._page(request, session, words, "overview", "overview.html", view=view, spoken=lambda values: _spoken(words, values))

        @router.get("/nodes")
        def nodes(
            request: Request, q: Annotated[str, Query(max_length=80)] = "", sort: Annotated[str, Query(max_length=16)] = "",
            order: Annotated[str, Query(max_length=4)] = "",
        ) -> Response:  # fmt: skip
            session, words = self._enter_page(request)
            found = all_nodes(self.ledger, now=words.now, silent_after_s=self.silent_after_s)
            rows = [node for node in found if _matches(node, q, words)]
            if sort in SORTS:
                rows.sort(key=SORTS[sort], reverse=order == "desc")
            counts = [(state, sum(node.shown == state for node in found)) for state in SHOWN]

            def query(**changes: str) -> str:
                kept = {"q": q, "sort": sort if sort in SORTS else "", "order": order} | changes
                return urlencode({key: value for key, value in kept.items() if value})

            return self._page(
                request, session, words, "nodes", "nodes.html", rows=rows, total=len(found), q=q, sort=sort, descending=order == "desc",
                counts=[(state, count) for state, count in counts if count], query=query,
            )  # fmt: skip

        @router.get("/nodes/{name}")
        def node(request: Request, name: str) -> Response:
            session, words = self._enter_page(request)
            found = node_named(self.ledger, name, now=words.now, silent_after_s=self.silent_after_s)
            if found is None:
                raise NotHere
            latest = self.ledger.latest_release()
            return self._page(
                request, session, words, "nodes", "node.html", node=found, lines=timeline(self.ledger, name),
                latest=latest.number if latest else 0, happened=lambda line: _happened(words, line),
            )  # fmt: skip

        @router.get("/releases")
        def releases(request: Request) -> Response:
            session, words = self._enter_page(request)
            found = all_nodes(self.ledger, now=words.now, silent_after_s=self.silent_after_s)
            rows = []
            for release in reversed(self.ledger.releases()):
                quality, gap = proof.summary(release, words)
                file = release.manifest.file("student", "model")
                rows.append({
                    "number": release.number, "note": release.note, "task": release.manifest.task, "quality": quality, "gap": gap,
                    "size": file.size if file else None, "nodes": sum(node.release == release.number for node in found),
                    "published": release.published,
                })  # fmt: skip
            return self._page(request, session, words, "releases", "releases.html", rows=rows, total=len(found))

        @router.get("/releases/{number}")
        def release(request: Request, number: str) -> Response:
            session, words = self._enter_page(request)
            kept = {str(one.number): one for one in self.ledger.releases()}
            if number not in kept:
                raise NotHere
            this = kept[number]
            before = kept.get(str(this.manifest.previous))
            found = all_nodes(self.ledger, now=words.now, silent_after_s=self.silent_after_s)
            older = [one for one in kept.values() if one.number < this.number]
            return self._page(
                request, session, words, "releases", "release.html", release=this, before=before, total=len(found),
                proof=proof.proof(this, before, words, earlier=older), lineage=proof.lineage(this, words),
                on_release=sum(node.release == this.number for node in found),
            )  # fmt: skip

        @router.get("/rounds")
        def rounds(request: Request) -> Response:
            session, words = self._enter_page(request)
            rows = all_rounds(self.ledger)
            return self._page(request, session, words, "rounds", "rounds.html", rows=rows, outcome=lambda one: _outcome(words, one))

        @router.get("/rounds/{number}")
        def round_(request: Request, number: str) -> Response:
            session, words = self._enter_page(request)
            found = round_numbered(self.ledger, int(number)) if number.isascii() and number.isdigit() and len(number) < 10 else None
            if found is None:
                raise NotHere
            return self._page(request, session, words, "rounds", "round.html", round=found, outcome=lambda one: _outcome(words, one))

        @router.get("/escalations")
        def escalations(request: Request) -> Response:
            session, words = self._enter_page(request)
            view = about_asking(self.ledger, now=words.now, silent_after_s=self.silent_after_s)
            latest = self.ledger.latest_release()
            return self._page(
                request, session, words, "escalations", "escalations.html", view=view, curve=proof.deferral(latest, view.asked, words),
                calibration=proof.calibration(latest, words),
            )  # fmt: skip

        @router.get("/audit")
        def audit(request: Request, before: Annotated[int | None, Query(ge=1, le=2**53)] = None) -> Response:
            session, words = self._enter_page(request)
            return self._page(
                request, session, words, "audit", "audit.html", rows=audit_rows(self.ledger, before=before),
                broken=self.ledger.broken_audit(), messages=refused_messages(self.ledger),
            )  # fmt: skip

        @router.get("/audit.jsonl")
        def audit_export(request: Request) -> Response:
            self._enter_page(request)

            def lines() -> Any:
                before: int | None = None
                while rows := audit_rows(self.ledger, before=before, limit=1_000):
                    for row in rows:
                        yield msgspec.json.encode(row) + b"\n"
                    before = rows[-1].id

            headers = {"content-disposition": 'attachment; filename="milpa-audit.jsonl"'}
            return StreamingResponse(lines(), media_type="application/x-ndjson", headers=headers)

        @router.get("/events")
        def events(request: Request) -> Response:
            self._enter_page(request)
            token = request.cookies.get(COOKIE, "")
            if self.changes.full:
                return JSONResponse({"detail": self._words(request).text("error.busy")}, status_code=503)
            stream = self.changes.stream(lambda: self.door.session(token) is not None)
            headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
            return StreamingResponse(stream, media_type="text/event-stream", headers=headers)

        return router

    # -- sessions and forms -------------------------------------------------------------------------------------------

    def _session(self, request: Request) -> WebSession | None:
        return self.door.session(request.cookies.get(COOKIE, ""))

    def _enter_page(self, request: Request) -> tuple[WebSession, Words]:
        session = self._session(request)
        if session is None:
            raise NeedsLogin
        return session, self._words(request)

    def _check_csrf(self, request: Request, csrf: str) -> None:
        session = self._session(request)
        if session is None or not same(csrf, session.csrf) or not _same_origin(request):
            raise Forbidden

    def _check_form(self, request: Request, csrf: str) -> None:
        """Before a session there is none to bind to: the form repeats a random cookie (double submit)."""
        if not same(csrf, request.cookies.get(FORM_COOKIE, "")) or not _same_origin(request):
            raise Forbidden

    def _enter(self, request: Request, token: str, where: str) -> Response:
        response = RedirectResponse(where, status_code=303)
        secure = self.secure or request.url.scheme == "https"
        response.set_cookie(COOKIE, token, max_age=SESSION_S, httponly=True, samesite="lax", secure=secure)
        response.delete_cookie(FORM_COOKIE)
        return response

    def _form(self, request: Request, template: str, *, status: int = 200, **values: Any) -> Response:
        form_token = request.cookies.get(FORM_COOKIE) or secrets.token_urlsafe(24)
        response = self._page(request, None, self._words(request), "", template, status=status, form_token=form_token, **values)
        secure = self.secure or request.url.scheme == "https"
        response.set_cookie(FORM_COOKIE, form_token, max_age=3_600, httponly=True, samesite="lax", secure=secure)
        return response

    # -- pages ------------------------------------------------------------------------------------------------------------

    def _words(self, request: Request) -> Words:
        asked, cookie = request.query_params.get("lang", ""), request.cookies.get(LANGUAGE_COOKIE, "")
        lang, comma = language(asked, cookie, request.headers.get("accept-language", ""))
        return Words(lang=lang, comma=comma, zone=self.zone, now=int(self.clock()))

    def _page(
        self, request: Request, session: WebSession | None, words: Words, here: str, template: str, *, status: int = 200, **values: Any
    ) -> Response:
        other = "es" if words.lang == "en" else "en"
        kept = [(key, value) for key, value in request.query_params.multi_items() if key != "lang"]
        html = self.templates.get_template(template).render(
            words=words, t=words.text, tb=words.strong, session=session, here=here, pages=PAGES, charts=charts, other_language=other,
            other_language_url="?" + urlencode([*kept, ("lang", other)]), **values,
        )  # fmt: skip
        response = HTMLResponse(html, status_code=status, headers={"cache-control": "no-store", "content-language": words.lang})
        if request.query_params.get("lang", "")[:2] in ("en", "es"):
            response.set_cookie(LANGUAGE_COOKIE, words.lang, max_age=365 * 86_400, samesite="lax")
        return response

    def _error(self, request: Request, key: str, status: int, *, known: bool = True) -> Response:
        words = self._words(request)
        title, told, action = words.text(f"error.{key}"), words.text(f"error.{key}-told"), words.text("error.home")
        session = self._session(request) if known else None
        return self._page(request, session, words, "", "error.html", status=status, title=title, told=told, href="/", action=action)


def _address(request: Request) -> str:
    return request.client.host if request.client else "unknown"


def _same_origin(request: Request) -> bool:
    """Browsers say where a form came from; programs may not, and hold no cookie either."""
    site = request.headers.get("sec-fetch-site")
    return site in (None, "same-origin", "none")


def _inside(where: str) -> str:
    """A path of ours to return to; anything else is the overview (no open redirect)."""
    return where if where.startswith("/") and not where.startswith(("//", "/\\")) and where.isprintable() else "/"


def _matches(node: Node, query: str, words: Words) -> bool:
    """Every word of the query is somewhere in what the row shows."""
    role = f"role.{node.role}"
    shown = " ".join(
        (
            node.name,
            words.text(f"state.{node.shown}"),
            words.word(role, node.role),
            str(node.release),
            node.refusal,
        )
    ).lower()
    return all(part in shown for part in query.lower().split())


def _spoken(words: Words, values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: words.clock(value) if key == "since" else value for key, value in values.items()}


def _outcome(words: Words, found: Round) -> str:
    if found.closed is None:
        return words.text("outcome.overdue" if words.now > found.deadline else "outcome.open")
    if found.published:
        return words.text("outcome.released", number=found.published)
    key = f"outcome.{found.decision.replace(' ', '-')}"
    return words.text(key) if words.known(key) else found.decision or words.text("outcome.closed")


def _happened(words: Words, line: Happened) -> str:
    """One line of a timeline in words. A kind that is newer than this program is shown by its name."""
    key = f"happened.{line.kind}"
    if not words.known(key):
        return line.kind
    values = line.values
    state = f"happened.{values.get('state', '')}"

    def figure(name: str, digits: int = 0) -> str:
        return words.number(charts.finite(values.get(name)), digits)

    return words.text(
        key, release=values.get("release", ""), number=figure("number"), reason=values.get("reason", ""), round=values.get("round", ""),
        peer=values.get("peer") or words.text("happened.some-peer"), outcome=words.word(state, ""),
        answered=figure("answered"), since=words.clock(int(values.get("since") or 0)), upgraded=figure("upgraded"),
        confirmed=figure("confirmed"), count=figure("count"), escalated=figure("escalated"), examples=figure("examples"),
        before=figure("loss_before", 2), after=figure("loss_after", 2), when=values.get("when", ""), means=values.get("means", ""),
    )  # fmt: skip
