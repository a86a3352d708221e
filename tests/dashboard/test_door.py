"""Who gets in: the first account, passwords, sessions, CSRF, the brake."""

import re

import pytest
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from starlette.routing import BaseRoute

from coordinator.dashboard import auth
from coordinator.dashboard.auth import Door
from coordinator.fleet import tables
from protocol.web import SECURITY
from tests.dashboard.conftest import PASSWORD, enter, form_token

OPEN = {"/login", "/setup", "/healthz", "/readyz", "/metrics"}


def flat(routes: list[BaseRoute]) -> list[APIRoute]:
    """Every route of an app, those of included routers too."""
    found: list[APIRoute] = []
    for route in routes:
        inner = getattr(route, "original_router", None) or getattr(route, "router", None)
        if isinstance(route, APIRoute):
            found.append(route)
        elif inner is not None:
            found += flat(inner.routes)
    return found


def log_in(client: TestClient, password: str, name: str = "ana"):
    page = client.get("/login")
    return client.post("/login", data={"csrf": form_token(page.text), "name": name, "password": password})


def test_without_a_session_every_page_leads_to_the_door_and_back(client, coordinator):
    paths = {route.path for route in flat(coordinator.app.routes) if "GET" in route.methods and not route.path.startswith("/repository")}
    assert {"/", "/nodes", "/nodes/{name}", "/releases/{number}", "/audit.jsonl", "/events"} <= paths
    client.cookies.clear()

    for path in paths - OPEN - {"/events"}:
        answer = client.get(re.sub(r"{\w+}", "1", path), follow_redirects=False)
        assert (answer.status_code, answer.headers["location"].split("?")[0]) == (303, "/login"), path
    assert client.get("/events").status_code == 401


def test_every_unsafe_route_refuses_a_request_without_its_csrf_token(client, coordinator):
    unsafe = [(method, route.path) for route in flat(coordinator.app.routes) for method in route.methods - {"GET", "HEAD", "OPTIONS"}]
    assert sorted(unsafe) == [("POST", "/login"), ("POST", "/logout"), ("POST", "/setup")]

    for method, path in unsafe:
        for data in ({}, {"csrf": "guess"}, {"csrf": ""}):
            assert client.request(method, path, data=data).status_code == 403, path
    assert client.get("/nodes", follow_redirects=False).status_code == 200, "still logged in"


def test_a_form_sent_from_another_site_is_refused_even_with_the_token(client):
    token = form_token(client.get("/").text)

    assert client.post("/logout", data={"csrf": token}, headers={"sec-fetch-site": "cross-site"}).status_code == 403


def test_the_first_account_needs_the_token_of_a_private_file_and_there_is_no_second(stranger, coordinator):
    file = coordinator.door.token_file
    assert file.stat().st_mode & 0o777 == 0o600
    page = stranger.get("/login")
    assert page.url.path == "/setup", "before the first account there is nobody to log in"
    wrong = stranger.post("/setup", data={"csrf": form_token(page.text), "token": "guess", "name": "eve", "password": PASSWORD})
    assert wrong.status_code == 401 and coordinator.door.needs_setup

    enter(stranger, coordinator)

    assert not file.exists()
    stranger.cookies.clear()
    assert stranger.get("/setup").url.path == "/login"


def test_the_token_is_in_the_log_for_whoever_starts_the_coordinator(coordinator, caplog):
    with caplog.at_level("WARNING"), TestClient(coordinator.app):
        token = coordinator.door.token_file.read_text().strip()

    assert token in caplog.text


@pytest.mark.parametrize("name,password", [("ana", "short"), ("Ana Sol", PASSWORD), ("ana", "x" * 201), ("", PASSWORD)])
def test_a_name_or_password_that_cannot_be_one_is_refused_and_the_token_stays(stranger, coordinator, name, password):
    token = coordinator.door.token_file.read_text().strip()
    page = stranger.get("/setup")

    answer = stranger.post("/setup", data={"csrf": form_token(page.text), "token": token, "name": name, "password": password})

    assert answer.status_code == 400 and coordinator.door.needs_setup and coordinator.door.token_file.exists()


def test_passwords_are_kept_as_argon2id_and_sessions_as_hashes(client, coordinator):
    cookie = client.cookies["milpa_session"]

    assert coordinator.ledger.user("ana").password.startswith("$argon2id$")
    with coordinator.ledger.read() as connection:
        stored = connection.execute(tables.sessions.select()).one()
    assert cookie not in tuple(stored)


def test_the_real_hasher_costs_what_argon2id_should(coordinator, tmp_path):
    hasher = Door(coordinator.ledger, tmp_path / "token")._hasher

    assert (hasher.type.name, hasher.memory_cost >= 19 * 1_024, hasher.time_cost >= 2) == ("ID", True, True)  # OWASP's floor


def test_a_right_password_opens_and_a_wrong_one_or_name_says_the_same(client):
    client.cookies.clear()

    wrong, nobody = log_in(client, "not the password"), log_in(client, PASSWORD, name="eve")
    assert (wrong.status_code, nobody.status_code) == (401, 401)
    assert re.findall(r'role="alert">([^<]+)', wrong.text) == re.findall(r'role="alert">([^<]+)', nobody.text)
    assert log_in(client, PASSWORD).url.path == "/"


def test_after_five_wrong_passwords_the_right_one_waits_too(client, clock):
    client.cookies.clear()
    for _ in range(auth.FAILURES):
        assert log_in(client, "wrong password").status_code == 401

    assert log_in(client, PASSWORD).status_code == 429
    clock.now += auth.WINDOW_S + 1
    assert log_in(client, PASSWORD).url.path == "/"


def test_a_session_ends_after_its_time_and_at_logout(client, clock):
    assert client.get("/nodes").url.path == "/nodes"
    clock.now += auth.SESSION_S + 1
    assert client.get("/nodes").url.path == "/login"

    log_in(client, PASSWORD)
    cookie = client.cookies["milpa_session"]
    client.post("/logout", data={"csrf": form_token(client.get("/").text)})
    client.cookies.set("milpa_session", cookie)
    assert client.get("/nodes").url.path == "/login", "the cookie of an ended session opens nothing"


def test_the_cookie_is_out_of_reach_of_scripts_and_other_sites_and_of_plain_http_behind_tls(client, coordinator):
    client.cookies.clear()
    coordinator.dashboard.secure = True
    page = client.get("/login")
    client.cookies.set("milpa_form", form_token(page.text))

    answer = client.post(
        "/login", data={"csrf": form_token(page.text), "name": "ana", "password": PASSWORD}, follow_redirects=False
    )  # fmt: skip

    cookie = next(value for value in answer.headers.get_list("set-cookie") if value.startswith("milpa_session="))
    assert {"HttpOnly", "SameSite=lax", "Secure"} <= {part.strip() for part in cookie.split(";")}


@pytest.mark.parametrize("where", ["//evil.example", "https://evil.example", "/\\evil.example", "javascript:alert(1)"])
def test_login_returns_only_to_pages_of_ours(client, where):
    client.cookies.clear()
    page = client.get("/login", params={"next": where})

    answer = client.post(
        "/login", data={"csrf": form_token(page.text), "name": "ana", "password": PASSWORD, "next": where}, follow_redirects=False
    )  # fmt: skip
    assert answer.headers["location"] == "/"


@pytest.mark.parametrize("path", ["/", "/login", "/static/milpa.js", "/nowhere", "/healthz"])
def test_every_answer_carries_the_security_headers(client, path):
    answer = client.get(path)

    assert {name: answer.headers.get(name) for name in SECURITY} == SECURITY
    assert "unsafe" not in answer.headers["content-security-policy"]


def test_logins_refused_and_granted_are_in_the_audit(client, coordinator):
    client.cookies.clear()
    log_in(client, "wrong password")
    log_in(client, PASSWORD)

    with coordinator.ledger.read() as connection:
        actions = [row.action for row in connection.execute(tables.audit.select().order_by(tables.audit.c.id))]
    assert actions == ["account created", "logged in", "login refused", "logged in"]
