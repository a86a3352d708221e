"""The node's page without a browser: what it says, whose taps count, who may come in."""

import re
from collections.abc import Callable
from datetime import UTC
from html import unescape
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import update
from starlette.applications import Starlette

from node.api import routes
from node.doctor import Finding
from node.page import door
from node.page import routes as page_routes
from node.page.html import Html, tag, text
from node.page.words import TEXTS, VERDICTS, Words
from node.store import AnswerRow
from protocol.tasks import RANCH_CODES
from tests.node.conftest import NOW, eventually, reply_to, settings
from tests.node.fake_engine import FakeEngine

HOME = {"origin": "http://127.0.0.1"}
KEY = "sesame"


def page(client: TestClient, path: str = "/", lang: str = "en") -> str:
    answer = client.get(path, headers={"accept-language": lang})
    assert answer.status_code == 200
    return unescape(answer.text)


def tap(client: TestClient, answer: str, headers: dict[str, str] = HOME, **fields: str) -> Any:
    return client.post(f"/page/answers/{answer}", data=fields, headers=headers, follow_redirects=False)


@pytest.fixture
def unsure_alone(make_node: Callable[..., Any]) -> Any:
    """A node whose model is never sure, and nobody to ask."""
    return make_node(FakeEngine(default=" leak: the pipe lost pressure", probability=0.3))


def with_key(node: Any) -> TestClient:
    app = routes.build(
        node.answering, node.metrics, default_task="ranch", deadline_s=5, status=dict, why_not_ready=lambda: "", key=KEY
    )  # fmt: skip
    return TestClient(app, base_url="http://10.0.0.5", follow_redirects=False)


# ---- what it says


def test_an_unsure_answer_is_the_card_and_a_sure_one_is_not(make_node: Callable[..., Any]) -> None:
    node = make_node(FakeEngine({"tank": " tank-low: little water"}, default=" normal: all is well", probability=0.99))
    sure = node.answer("soil 21 C")
    node.engine.probability = 0.3
    unsure = node.answer("tank 0.2 m")

    told = page(node.client())

    assert re.findall(r'data-card="(\w+)"', told) == [unsure.id]
    assert "tank 0.2 m" in told and "Tank low" in told and f"answer-{sure.id}" in told


def test_what_nobody_else_will_answer_is_asked_before_what_a_peer_may(unsure: Any) -> None:
    alone = unsure.answer("first")
    unsure.answering.unanswered(unsure.asking.questions[0].id)
    unsure.answer("second")

    assert re.findall(r'data-card="(\w+)"', page(unsure.client())) == [alone.id]


def test_an_open_card_stays_while_it_is_unsure_and_gives_way_once_it_is_not(unsure_alone: Any) -> None:
    first, second = unsure_alone.answer("first"), unsure_alone.answer("second")
    client = unsure_alone.client()

    before = re.findall(r'data-card="(\w+)"', page(client, f"/?keep={first.id}"))
    unsure_alone.answering.correct(first.id, verdict="leak")
    after = re.findall(r'data-card="(\w+)"', page(client, f"/?keep={first.id}"))

    assert (before, after) == ([first.id], [second.id])


def test_an_answer_left_for_later_makes_room_for_the_next_and_is_not_lost(unsure_alone: Any) -> None:
    first, second = unsure_alone.answer("first"), unsure_alone.answer("second")
    client = unsure_alone.client()

    cards = [re.findall(r'data-card="(\w+)"', page(client, path)) for path in ("/", "/?skip=1", "/?skip=2", "/")]

    assert cards == [[second.id], [first.id], [], [second.id]]
    assert "From the beginning" in page(client, "/?skip=2")


def test_yesterday_s_doubts_are_not_asked_any_more(unsure_alone: Any) -> None:
    unsure_alone.answer()
    unsure_alone.clock.now = NOW + 86_401

    assert "Nothing to check" in page(unsure_alone.client())


def test_the_page_speaks_the_reader_s_language_and_remembers_a_choice(unsure_alone: Any) -> None:
    unsure_alone.answer()
    client = unsure_alone.client()

    spanish = page(client, lang="es-NI,en;q=0.5")
    chosen = page(client, "/?lang=en", lang="es")

    assert '<html lang="es">' in spanish and "Fuga de agua" in spanish and "Por favor, revise" in spanish
    assert '<html lang="en">' in chosen and '<html lang="en">' in page(client, lang="es")


def test_why_the_node_says_so_is_in_the_reader_s_language(unsure_alone: Any) -> None:
    unsure_alone.answer()
    client = unsure_alone.client()

    english, spanish = page(client, lang="en"), page(client, lang="es-ES")

    assert "<p>verdict probability 0.30 below 0.50 (not calibrated; share budget 25%)</p>" in english
    assert "<p>probabilidad del veredicto 0,30, menor que 0,50 (sin calibrar; se puede preguntar el 25%)</p>" in spanish


def test_a_reason_stored_before_there_were_codes_is_shown_as_the_english_it_is(unsure_alone: Any) -> None:
    given = unsure_alone.answer()
    with unsure_alone.store.transaction() as session:
        session.execute(update(AnswerRow).where(AnswerRow.id == given.id).values(reason="verdict probability 0.31 below 0.50"))

    assert '<p lang="en">verdict probability 0.31 below 0.50</p>' in page(unsure_alone.client(), lang="es")


def test_what_a_record_says_is_text_and_never_markup(unsure_alone: Any) -> None:
    unsure_alone.answer("<script>alert(1)</script>\"'")

    told = unsure_alone.client().get("/").text

    assert "<script>alert" not in told and "&lt;script&gt;alert(1)" in told


def test_energy_and_data_are_shown_where_they_are_measured_and_said_not_to_be_where_not(sure: Any) -> None:
    energy = {"joules_today": {"answer": 7000.0, "idle": 200.0}, "source": "solar", "charge": 0.8}
    app, status = Starlette(), {"ready": True, "power": energy, "link": {"up_bytes": 1000, "down_bytes": 500, "bytes_a_day": 100_000}}
    page_routes.add(app, sure.answering, status=lambda: status)

    measured = page(TestClient(app))
    not_measured = page(sure.client())

    assert "2.0\u202fWh · sun, battery 80%" in measured and "1.5\u202fkB of 100.0\u202fkB" in measured
    assert not_measured.count("not measured") == 2


def test_what_the_doctor_found_is_said_in_plain_words_with_the_detail_beside(sure: Any) -> None:
    app = Starlette()
    findings = [
        Finding("clock", "bad", "it shows 1970-01-01", "set it"),
        Finding("disk", "good", "9 MiB free"),
        Finding("new", "warn", "x"),
    ]
    page_routes.add(app, sure.answering, status=dict, examine=lambda: findings)

    client = TestClient(app)
    eventually(lambda: "atender" in page(client, lang="es"))

    told = page(client, lang="es")

    assert "El reloj está mal" in told and "clock: it shows 1970-01-01; set it" in told
    assert "Algo necesita revisión: new" in told and "casi lleno" not in told


def test_a_node_without_a_model_says_that_it_does_not_answer_and_why(sure: Any) -> None:
    app = Starlette()
    page_routes.add(app, sure.answering, status=lambda: {"ready": False, "why": "no model yet: waiting for a release"})

    told = page(TestClient(app))

    assert "It does not answer yet." in told and "waiting for a release" in told


@pytest.mark.parametrize("code", RANCH_CODES)
def test_every_verdict_has_a_plain_name_in_both_languages(code: str) -> None:
    english, spanish = VERDICTS[code]

    assert english and spanish and "-" not in english + spanish


@pytest.mark.parametrize("key", TEXTS)
def test_a_text_takes_the_same_values_in_both_languages(key: str) -> None:
    english, spanish = (set(re.findall(r"{(\w+)}", told)) for told in TEXTS[key])

    assert english == spanish
    assert TEXTS[key][0].count("|") == TEXTS[key][1].count("|")


def test_every_state_of_an_answer_and_every_finding_of_the_doctor_has_words() -> None:
    from typing import get_args

    import node.doctor
    from node.store import State

    sources = Path(node.doctor.__file__).parent.glob("*.py")
    found = {
        "".join(what)
        for source in sources
        for what in re.findall(r'Finding\(\s*"([^"]+)"|"(\w+ certificate)"', source.read_text(encoding="utf-8"))
    }

    assert found and {f"find.{what}" for what in found} <= set(TEXTS)
    assert {f"state.{state}" for state in get_args(State)} <= set(TEXTS)


def test_numbers_follow_the_reader() -> None:
    spanish = Words(lang="es", comma=True, zone=UTC, now=int(NOW))

    assert spanish.size(1500) == "1,5\u202fkB"
    assert spanish.text("today", n=1, count=1) == "1 respuesta en las últimas 24 horas."


def test_a_whole_daemon_shows_its_energy_and_its_data(start: Callable[..., Any], tmp_path: Path) -> None:
    daemon = start(settings(tmp_path))

    told = httpx.get(daemon.server.url + "/", headers={"accept-language": "en"}).text

    assert "not measured" not in told and "Wh" in told


# ---- taps


def test_one_tap_on_right_confirms_and_teaches(unsure_alone: Any) -> None:
    given = unsure_alone.answer()

    answer = tap(unsure_alone.client(), given.id, verdict="leak")

    row = unsure_alone.row(given.id)
    assert (answer.status_code, answer.headers["location"]) == (303, f"/?done={given.id}")
    assert (row.state, row.by, row.text) == ("confirmed", "operator", "leak: the pipe lost pressure")
    assert [example.record.verdict for example in unsure_alone.store.examples("ranch")] == ["leak"]


def test_one_tap_on_another_verdict_corrects_and_the_sentence_is_optional(unsure_alone: Any) -> None:
    bare, told = unsure_alone.answer("first"), unsure_alone.answer("second")
    client = unsure_alone.client()

    tap(client, bare.id, verdict="dry-run", text="")
    tap(client, told.id, verdict="overflow", text="the float hangs")

    assert [unsure_alone.row(given.id).text for given in (bare, told)] == ["dry-run:", "overflow: the float hangs"]
    assert [example.partial for example in unsure_alone.store.examples("ranch")] == [True, False]


def test_a_tap_means_what_the_person_saw_even_when_a_peer_spoke_meanwhile(unsure: Any) -> None:
    given = unsure.answer()
    seen = unsure.client().get("/").text
    unsure.answering.apply(reply_to(unsure.asking.questions[0], "dry-run: no water"))

    assert '<button name="verdict" value="leak" type="submit" class="yes">' in seen
    tap(unsure.client(), given.id, verdict="leak")

    assert (unsure.row(given.id).verdict, unsure.row(given.id).by) == ("leak", "operator")


def test_after_a_tap_the_page_says_what_was_saved_and_offers_to_change_it(unsure_alone: Any) -> None:
    given = unsure_alone.answer()
    client = unsure_alone.client()

    told = page(client, tap(client, given.id, verdict="dry-run").headers["location"])
    changing = page(client, f"/?answer={given.id}")

    assert "Saved: Pump runs dry. Thank you." in told and f'href="/?answer={given.id}#check"' in told
    assert re.findall(r'data-card="(\w+)"', changing) == [given.id]


@pytest.mark.parametrize(
    "headers",
    [{}, {"origin": "null"}, {"origin": "http://evil.example"}, {"origin": "http://127.0.0.1:9"}, {"sec-fetch-site": "cross-site"},
     {"origin": "http://[", "sec-fetch-site": "same-origin"}],
    ids=str,
)  # fmt: skip
def test_a_tap_from_anywhere_else_changes_nothing(unsure_alone: Any, headers: dict[str, str]) -> None:
    given = unsure_alone.answer()

    answer = tap(unsure_alone.client(), given.id, headers, verdict="dry-run")

    assert answer.status_code == 403
    assert unsure_alone.row(given.id).state == "unconfirmed"


@pytest.mark.parametrize(
    ("fields", "status"),
    [({"verdict": "cook"}, 400), ({}, 400), ({"verdict": "leak", "text": "dry-run: x"}, 400), ({"text": "x" * 4001}, 400),
     ({str(n): "x" for n in range(9)}, 400)],
    ids=str,
)  # fmt: skip
def test_a_form_that_makes_no_sense_is_one_clear_line_on_the_page(unsure_alone: Any, fields: dict[str, str], status: int) -> None:
    given = unsure_alone.answer()

    answer = tap(unsure_alone.client(), given.id, **fields)

    assert answer.status_code == status
    assert 'role="alert">Not saved: ' in answer.text
    assert unsure_alone.row(given.id).state == "unconfirmed"


@pytest.mark.parametrize(
    ("fields", "told"),
    [({}, "no se escribió ni se eligió nada"), ({"verdict": "cook"}, "el nodo no lo entendió"), ({"text": "x" * 4001}, "4,000 caracteres")],
    ids=str,
)  # fmt: skip
def test_why_a_tap_was_not_saved_is_said_in_the_reader_s_language(unsure_alone: Any, fields: dict[str, str], told: str) -> None:
    given = unsure_alone.answer()

    answer = tap(unsure_alone.client(), given.id, HOME | {"accept-language": "es-NI"}, **fields)
    said = re.findall(r'role="alert">([^<]*)', answer.text)

    assert len(said) == 1 and said[0].startswith("No se guardó: ") and told in said[0]
    assert ('<p lang="en">unknown verdict' in answer.text) == ("verdict" in fields)


def test_a_tap_on_a_pruned_answer_says_so(sure: Any) -> None:
    answer = tap(sure.client(), "gone", verdict="leak")

    assert answer.status_code == 404
    assert "not kept here any more" in answer.text


def test_free_text_is_confirmed_as_seen_or_written_anew(make_node: Callable[..., Any]) -> None:
    from node.engine.worker import Speaker
    from protocol.tasks import Record

    node = make_node(FakeEngine(default=" ¿Dónde está el pozo?", probability=0.3))
    node.worker.swap_after_current_record(Speaker(node.engine, "translate-english-spanish", release=1))
    record = Record(id="r", task="translate-english-spanish", source="Where is the well?", lang="es")
    right, wrong = (node.answering.answer(record, deadline_s=10) for _ in range(2))
    client = node.client()

    told = page(client)
    tap(client, right.id, right="¿Dónde está el pozo?", text="half a thought")
    tap(client, wrong.id, text="¿Dónde queda el pozo?")

    assert 'name="right" value="¿Dónde está el pozo?"' in told and 'name="verdict"' not in told
    assert [(node.row(given.id).state, node.row(given.id).text) for given in (right, wrong)] == [
        ("confirmed", "¿Dónde está el pozo?"), ("corrected", "¿Dónde queda el pozo?"),
    ]  # fmt: skip


# ---- who may come in


def test_without_a_key_the_page_is_this_machine_s(sure: Any) -> None:
    client = sure.client()

    assert client.get("/").status_code == 200
    assert client.get("/", headers={"host": "evil.example"}).status_code == 421


def test_with_a_key_every_path_of_the_page_leads_to_the_door_but_its_own_files(sure: Any) -> None:
    app = Starlette()
    page_routes.add(app, sure.answering, status=dict, key=KEY)
    client = TestClient(with_key(sure).app, base_url="http://10.0.0.5", follow_redirects=False)
    ours = [(route.path, method) for route in app.routes for method in route.methods if method != "HEAD"]  # type: ignore[attr-defined]

    asked = {(path, method): client.request(method, path.format(answer_id="x", name="page.css")) for path, method in ours}

    assert len(ours) == 7
    for (path, method), answer in asked.items():
        if path in ("/login", "/page/{name}"):
            assert answer.status_code in (200, 403), (path, method)
        else:
            assert (answer.status_code, answer.headers.get("location")) == (303, "/login"), (path, method)


def test_the_key_typed_once_opens_the_page_and_the_browser_never_holds_it(unsure_alone: Any) -> None:
    given = unsure_alone.answer()
    client = with_key(unsure_alone)
    home = {"origin": "http://10.0.0.5"}

    answer = client.post("/login", data={"key": KEY}, headers=home)
    cookie = answer.headers["set-cookie"]
    opened, saved = client.get("/"), tap(client, given.id, home, verdict="leak")

    assert (answer.status_code, opened.status_code, saved.status_code) == (303, 200, 303)
    assert "HttpOnly" in cookie and "samesite=strict" in cookie.lower() and KEY not in cookie
    assert client.get("/v1/models").status_code == 401  # the pass opens the page and nothing else
    client.post("/logout", headers=home)
    assert client.get("/").status_code == 303


def test_a_wrong_key_is_said_to_be_wrong(sure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_routes, "WRONG_KEY_S", 0.0)
    client = with_key(sure)

    answer = client.post("/login", data={"key": "open"}, headers={"origin": "http://10.0.0.5"})

    assert answer.status_code == 403 and "That is not the key" in answer.text and "set-cookie" not in answer.headers


def test_a_pass_ends_and_is_worth_nothing_under_another_key() -> None:
    given = door.new_pass(KEY, NOW)

    assert door.is_good(given, KEY, NOW + door.PASS_S - 1)
    assert not door.is_good(given, KEY, NOW + door.PASS_S)
    assert not door.is_good(given, "another", NOW)
    for forged in ("", ".", f"{int(NOW) + 10**6}.{given.partition('.')[2]}", given[:-1], "²." + "0" * 64, "9" * 40 + ".x"):
        assert not door.is_good(forged, KEY, NOW)


def test_the_answer_forbids_what_the_page_does_not_need(sure: Any) -> None:
    headers = sure.client().get("/").headers

    assert "default-src 'none'" in headers["content-security-policy"] and "unsafe" not in headers["content-security-policy"]
    assert (headers["cache-control"], headers["x-content-type-options"]) == ("no-store", "nosniff")


# ---- html


def test_only_html_of_ours_is_not_escaped() -> None:
    assert tag("p", "<", Html("<b>"), None, ["&", False], class_='"', hidden=True, id=None) == '<p class="&quot;" hidden>&lt;<b>&amp;</p>'
    assert text(0) == "0" and tag("br") == "<br>"
