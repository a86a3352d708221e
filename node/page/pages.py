"""The page as HTML, from values. No I/O.

Order, for somebody with a telephone in the sun: does it work; what needs a person; one answer to check, with big buttons; what it answered
lately; the machine itself. Forms work without the script. Parts marked `data-live` are the ones that the script exchanges.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from node.page.html import Child, Html, tag
from node.page.views import Look, Shown, data, energy
from node.page.words import Words
from protocol.words import THIN

TYPED_LIMIT = 600  # characters somebody may type about one answer
LEAF = Html(
    '<svg viewBox="0 0 20 20" aria-hidden="true"><path d="M10 18V7M10 12C6 12 4 9.500 4 6c4 0 6 2.500 6 6M10 10c0-4 2-6.500 6-6.500 '
    '0 4-2 6.500-6 6.500"/></svg>'
)
LANGUAGE_NAMES = {"en": "English", "es": "Español"}


class Finding(msgspec.Struct, frozen=True):
    """What the doctor found, as the page needs it; `node.doctor.Finding` has the same fields."""

    what: str
    state: Literal["good", "warn", "bad"]
    found: str
    advice: str = ""


class Said(msgspec.Struct, frozen=True):
    """What the page has to say about the last tap: it was saved, or why not."""

    answer: Shown | None = None  # saved
    problem: str = ""  # not saved
    detail: str = ""  # of the problem, for the technician


def main_page(
    words: Words, status: Mapping[str, Any], seen: Look, findings: Sequence[Finding], *, said: Said, mark: str, with_key: bool, here: str
) -> Html:
    """The page.

    Args:
        status: GET /v1/status.
        mark: what GET /page/mark says while nothing changes.
        with_key: somebody logged in and may log out.
        here: path and query of this page without `lang`, for the other language's link.
    """
    name = str(status.get("site") or status.get("node") or "")
    parts = (
        _first_sentence(words, status, seen),
        _said(words, said),
        _attention(words, [finding for finding in findings if finding.state != "good"]),
        _check(words, seen),
        _latest(words, seen),
        _machine(words, status, findings),
    )
    return document(words, f"{name} · Milpa", parts, name=name, live=mark, with_key=with_key, here=here)


def login_page(words: Words, *, problem: str = "", here: str = "/login") -> Html:
    """The door."""
    form = tag(
        "form",
        tag("h1", words.text("door")),
        tag("p", problem, class_="problem", role="alert") if problem else None,
        tag("label", words.text("door.key"), for_="key"),
        tag(
            "input", id="key", name="key", type="password", required=True, autofocus=True, maxlength=400, autocomplete="current-password",
            autocapitalize="none", spellcheck="false", aria_describedby="told",
        ),
        tag("p", words.text("door.told"), class_="quiet", id="told"),
        tag("button", words.text("door.enter"), class_="yes"),
        method="post", action="/login", class_="door",
    )  # fmt: skip
    return document(words, "Milpa", form, name="", live=None, with_key=False, here=here)


def document(words: Words, title: str, main: Child, *, name: str, live: str | None, with_key: bool, here: str) -> Html:
    """A whole page around `main`. `live`: the mark of what it shows; None: nothing on it changes by itself."""
    other = "es" if words.lang == "en" else "en"
    link = tag(
        "a",
        LANGUAGE_NAMES[other],
        href=f"{here}{'&' if '?' in here else '?'}lang={other}",
        hreflang=other,
        lang=other,
        class_="button-like",
    )
    top = tag(
        "header",
        tag("a", LEAF, "Milpa", tag("span", name, class_="site") if name else None, href="/", class_="mark"),
        tag("div", link, _log_out(words) if with_key else None, class_="aside"),
        class_="top",
    )
    line = None
    if live is not None:
        as_of, cut = words.text("line.as-of", time=words.clock(words.now)), words.text("line.cut", time="{time}")
        line = tag(
            "p", as_of, class_="line", id="line", role="status", data_mark=live, data_on=words.text("line.on"), data_cut=cut,
            data_not_saved=words.text("not-saved"),
        )  # fmt: skip
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("link", rel="icon", href="/page/milpa.svg", type="image/svg+xml"),
        tag("link", rel="stylesheet", href="/page/page.css"),
        tag("script", src="/page/page.js", defer=True),
    )
    body = tag("body", tag("a", words.text("skip"), href="#main", class_="skip"), top, line, tag("main", main, id="main", tabindex="-1"))
    return Html("<!doctype html>\n" + tag("html", head, body, lang=words.lang))


def _log_out(words: Words) -> Html:
    return tag("form", tag("button", words.text("log-out"), class_="plain"), method="post", action="/logout")


def _live(name: str, *children: Child, **attributes: str | int | bool | None) -> Html:
    """A part that the script may exchange."""
    return tag("section", *children, id=name, data_live=True, **attributes)


def _first_sentence(words: Words, status: Mapping[str, Any], seen: Look) -> Html:
    ready = bool(status.get("ready"))
    today = words.text("today", n=seen.today, count=words.number(seen.today))
    why = str(status.get("why") or "")
    return _live(
        "first",
        tag("h1", words.text("works" if ready else "works-not"), class_=None if ready else "red"),
        tag("p", today, class_="lead") if ready or seen.today else None,
        _detail(words, why),
    )


def _said(words: Words, said: Said) -> Html:
    told: Child = None
    if said.problem:
        told = [tag("p", said.problem, class_="problem", role="alert"), _detail(words, said.detail)]
    elif said.answer:
        change = tag("a", words.text("saved.change"), href=f"/?answer={said.answer.id}#check", class_="button-like")
        told = tag("p", words.text("saved", answer=_name(words, said.answer)), " ", change, class_="saved", role="status")
    return _live("said", told, class_="said")


def _detail(words: Words, told: str) -> Html | None:
    """What only a technician needs, in English as logs and commands say it; the sentence above it is the reader's."""
    return tag("details", tag("summary", words.text("detail")), tag("p", told, lang="en")) if told else None


def _attention(words: Words, findings: Sequence[Finding]) -> Html:
    if not findings:
        return _live("attention", hidden=True)

    def line(finding: Finding) -> Html:
        keys = (f"find.{finding.what}.{finding.state}", f"find.{finding.what}")
        told = next((words.text(key) for key in keys if words.known(key)), words.text("find.other", what=finding.what))
        detail = f"{finding.what}: {finding.found}{'; ' + finding.advice if finding.advice else ''}"
        return tag("li", tag("strong", told), _detail(words, detail), class_="red" if finding.state == "bad" else "amber")

    return _live("attention", tag("h2", words.text("attention")), tag("ul", [line(finding) for finding in findings], class_="needs"))


def _check(words: Words, seen: Look) -> Html:
    """The one card. Its section carries the answer's id: the script keeps a card while it is unsure."""
    card = seen.card
    if card is None:
        told = words.text("check.seen-all" if seen.skip and seen.more else "check.none")
        again = tag("p", tag("a", words.text("check.again"), href="/#check", class_="button-like")) if seen.skip and seen.more else None
        return _live("check", tag("h2", words.text("check")), tag("p", told, class_="empty"), again)
    more = tag("p", words.text("check.more", n=seen.more, count=words.number(seen.more)), class_="quiet") if seen.more else None
    later = None if seen.asked_for else tag("a", words.text("check.later"), href=f"/?skip={seen.skip + 1}#check", class_="button-like")
    return _live(
        "check",
        tag("h2", words.text("check.change" if seen.asked_for else "check")),
        tag(
            "article",
            tag("p", _when(words, card), class_="quiet"),
            tag("blockquote", card.source, lang=card.lang, class_="source"),
            tag("p", words.text("check.thinks" if card.text else "check.nothing"), class_="quiet"),
            _answer(words, card, "h3"),
            tag("p", words.text("sure", share=words.percent(card.confidence, 0)), " · ", _state(words, card), class_="quiet"),
            _form(words, card, f"card-{card.id}"),
            class_="card",
        ),
        tag("div", later, more, class_="after") if later or more else None,
        data_card=card.id,
    )


def _latest(words: Words, seen: Look) -> Html:
    title = tag("h2", words.text("latest"))
    if not seen.latest:
        how = tag("p", words.text("latest.none-how"), " ", tag("code", 'milpa-node ask "..."'), class_="quiet")
        return _live("latest", title, tag("p", words.text("latest.none"), class_="empty"), how)

    def line(shown: Shown) -> Html:
        inside = (
            tag("p", words.text("asked"), class_="quiet"),
            tag("blockquote", shown.source, lang=shown.lang, class_="source"),
            tag("p", words.text("why"), class_="quiet"),
            tag("p", shown.why.told(words.lang, comma=words.comma), lang="en" if shown.why.code == "as-written" else None),
            tag("p", tag("a", words.text("check.change"), href=f"/?answer={shown.id}#check", class_="button-like")),
        )
        facts = f"{_when(words, shown)} · {_state(words, shown)}"
        summary = tag("summary", _answer(words, shown, "span"), tag("span", facts, class_="facts-line"))
        return tag("li", tag("details", summary, inside), id=f"answer-{shown.id}")

    return _live("latest", title, tag("ol", [line(shown) for shown in seen.latest], class_="answers"))


def _machine(words: Words, status: Mapping[str, Any], findings: Sequence[Finding]) -> Html:
    facts = [
        ("machine.model", _model(words, status)),
        ("machine.energy", _energy(words, status)),
        ("machine.data", _data(words, status)),
        ("machine.link", _link(words, status)),
        ("machine.learned", words.number(int(status.get("examples") or 0))),
        ("machine.up", words.span(float(status.get("uptime_s") or 0.0))),
    ]
    bad = sum(finding.state != "good" for finding in findings)
    if findings:
        count = bad or len(findings)
        facts.append(("machine.good", words.text("machine.some" if bad else "machine.all-good", n=count, count=count)))
    rows = [tag("div", tag("dt", words.text(key)), tag("dd", value)) for key, value in facts]
    return _live("machine", tag("h2", words.text("machine")), tag("dl", rows, class_="facts"))


def _model(words: Words, status: Mapping[str, Any]) -> str:
    model = status.get("model")
    if not isinstance(model, Mapping):
        return words.text("machine.none")
    digest = str(model.get("model_digest", ""))[:8]
    number = model.get("release") or 0
    return words.text("machine.release", number=number, digest=digest) if number else words.text("machine.fixed", digest=digest)


def _energy(words: Words, status: Mapping[str, Any]) -> str:
    joules, source, charge = energy(status)
    spent = words.text("machine.not-measured") if joules is None else words.number(joules / 3600.0, 1) + THIN + "Wh"
    key = f"power.{source}"
    if not words.known(key):
        return spent
    power = words.text(key)
    if charge is not None and source != "mains":
        power = words.text("power.charge", source=power, share=words.percent(charge, 0))
    return f"{spent} · {power}"


def _data(words: Words, status: Mapping[str, Any]) -> str:
    used, limit = data(status)
    if used is None:
        return words.text("machine.not-measured")
    return words.size(used) if limit is None else words.text("machine.of", used=words.size(used), limit=words.size(limit))


def _link(words: Words, status: Mapping[str, Any]) -> str:
    broker = status.get("broker")
    if not isinstance(broker, Mapping):
        return words.text("machine.alone")
    if broker.get("connected"):
        return words.text("machine.connected")
    waiting = int(broker.get("outbox") or 0)
    return words.text("machine.waiting", n=waiting, count=words.number(waiting))


def _form(words: Words, shown: Shown, name: str) -> Html:
    """Confirm or correct. Each button carries what it says, so a tap means what the person saw, whatever happened meanwhile."""
    return tag(
        "form", _verdicts(words, shown, name) if shown.task.codes else _free_text(words, shown, name), method="post",
        action=f"/page/answers/{shown.id}", autocomplete="off",
    )  # fmt: skip


def _verdicts(words: Words, shown: Shown, name: str) -> list[Html]:
    def button(code: str, label: str, **more: str) -> Html:
        return tag("button", label, name="verdict", value=code, type="submit", **more)

    others = [code for code in shown.task.codes if code != shown.verdict]
    parts = [button(shown.verdict, words.text("check.right"), class_="yes")] if shown.verdict else []
    return [
        *parts,
        tag(
            "fieldset",
            tag("legend", words.text("check.choose" if shown.verdict else "check.what")),
            tag("div", [button(code, words.verdict(code), class_="choice") for code in others], class_="choices"),
        ),
        tag("label", words.text("check.say"), for_=f"{name}-text"),
        tag("input", id=f"{name}-text", name="text", maxlength=TYPED_LIMIT, lang=shown.lang),
    ]


def _free_text(words: Words, shown: Shown, name: str) -> list[Html]:
    right = tag("button", words.text("check.right"), name="right", value=shown.text, type="submit", class_="yes")
    return [
        *([right] if shown.text else []),
        tag("label", words.text("check.text"), for_=f"{name}-text"),
        tag("textarea", shown.text, id=f"{name}-text", name="text", maxlength=TYPED_LIMIT, rows=3),
        tag("button", words.text("check.save"), type="submit", class_="choice"),
    ]


def _answer(words: Words, shown: Shown, element: str) -> Html:
    """The answer as a person says it: the verdict in the reader's words, the sentence as it was written."""
    name = words.verdict(shown.verdict) if shown.verdict else shown.text
    sentence = tag("span", shown.sentence, lang=shown.lang, class_="sentence") if shown.verdict and shown.sentence else None
    return tag(element, tag("b", name, lang=None if shown.verdict else shown.lang), " " if sentence else None, sentence, class_="answer")


def _name(words: Words, shown: Shown) -> str:
    return words.verdict(shown.verdict) if shown.verdict else shown.text


def _state(words: Words, shown: Shown) -> str:
    return words.text("state.confirmed-here" if (shown.state, shown.by) == ("confirmed", "operator") else f"state.{shown.state}")


def _when(words: Words, shown: Shown) -> str:
    return words.age(int(shown.created))
