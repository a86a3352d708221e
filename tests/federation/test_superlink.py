"""Nobody gets past the guard without the right token; the real SuperLink sits behind it."""

import asyncio
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest

from coordinator.federation.superlink import Guard, Keys, keys, listen, read_key
from protocol.errors import BadInput, PortInUse
from tests.federation.conftest import SuperLink

KEYS = Keys(control="c" * 40, fleet="f" * 40, secret="s" * 40)


async def behind(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"behind the guard"})


def ask(path: str, headers: dict[str, str], *, given: Keys = KEYS) -> int:
    async def go() -> int:
        transport = httpx.ASGITransport(app=Guard(behind, given))
        async with httpx.AsyncClient(transport=transport, base_url="http://superlink") as client:
            return (await client.post(path, headers=headers)).status_code

    return asyncio.run(go())


CONTROL = {"authorization": f"Bearer {KEYS.control}"}
FLEET = {"x-milpa-fleet": KEYS.fleet}


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/health", {}, 200),
        ("/v1/fleet/pull-messages", FLEET, 200),
        ("/v1/fleet/pull-messages", {}, 403),
        ("/v1/fleet/pull-messages", CONTROL, 403),
        ("/v1/control/start-run", CONTROL, 200),
        ("/v1/control/start-run", {}, 401),
        ("/v1/control/start-run", FLEET, 401),
        ("/v1/control/start-run", {"authorization": KEYS.control}, 401),
        ("/v1/runtime/acquire-task", {}, 401),
        ("/docs", {}, 401),
        ("/openapi.json", {}, 401),
        ("/", {}, 401),
        ("/health/../v1/control/start-run", {}, 401),
        ("/v1/fleet", FLEET, 401),
        ("/v1/FLEET/pull-messages", FLEET, 401),
    ],
)
def test_each_path_needs_its_own_token(path: str, headers: dict[str, str], status: int) -> None:
    assert ask(path, headers) == status


def test_an_opened_fleet_needs_no_token_and_opens_nothing_else() -> None:
    opened = Keys(control=KEYS.control, fleet="", secret=KEYS.secret)

    assert ask("/v1/fleet/pull-messages", {}, given=opened) == 200
    assert ask("/v1/control/start-run", {}, given=opened) == 401


def test_a_websocket_is_closed() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def go() -> None:
        await Guard(behind, KEYS)({"type": "websocket", "path": "/v1/control/x", "headers": []}, None, send)  # type: ignore[arg-type]

    asyncio.run(go())

    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_keys_are_made_once_for_the_owner_alone(tmp_path: Path) -> None:
    first = keys(tmp_path / "state")

    again = keys(tmp_path / "state")

    assert first == again
    assert len({first.control, first.fleet, first.secret}) == 3
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "state").glob("*")} == {0o600}


def test_a_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    keys(tmp_path)
    (tmp_path / "control.token").chmod(0o644)

    with pytest.raises(BadInput, match="chmod 600"):
        read_key(tmp_path / "control.token")


def test_a_port_in_use_is_told_in_one_line() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()

        with pytest.raises(PortInUse, match="choose another --port"):
            listen("127.0.0.1", other.getsockname()[1])


@pytest.mark.flower
@pytest.mark.parametrize("path", ["/v1/control/start-run", "/v1/control/list-runs", "/v1/runtime/acquire-task", "/docs", "/openapi.json"])
def test_the_real_superlink_answers_its_control_and_runtime_only_with_the_token(superlink: SuperLink, path: str) -> None:
    get_or_post = httpx.get if path in ("/docs", "/openapi.json") else httpx.post
    right = {"authorization": f"Bearer {superlink.keys.control}"}

    refused = [get_or_post(f"http://{superlink.address}{path}", headers=headers).status_code for headers in ({}, CONTROL, FLEET)]
    passed = get_or_post(f"http://{superlink.address}{path}", headers=right).status_code

    assert refused == [401, 401, 401]
    assert passed not in (401, 403) or path == "/v1/runtime/acquire-task"  # past the guard, Flower still wants the request signed


@pytest.mark.flower
def test_the_real_superlink_lets_no_stranger_register_as_a_node(superlink: SuperLink) -> None:
    assert httpx.post(f"http://{superlink.address}/v1/fleet/register-node").status_code == 403


@pytest.mark.flower
def test_what_the_superlink_keeps_is_readable_by_its_owner_alone(superlink: SuperLink) -> None:
    kept = list(superlink.state.glob("superlink.db*"))

    assert kept
    assert all(path.stat().st_mode & 0o077 == 0 for path in kept)
