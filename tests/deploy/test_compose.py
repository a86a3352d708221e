"""The compose file: what it promises, read from it; and the same fleet in real containers, asked, escalating and running a round.

The container test runs `MILPA_COMPOSE` (default "docker compose"; "podman-compose" works), after the images were built:
    docker compose build
"""

import json
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from deploy.broker import password_line
from deploy.secrets import fill, named, write_env
from protocol import codec
from protocol.errors import BadInput

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
SERVICES = COMPOSE["services"]
NODES = ("base-station", "esteli", "malacatoya")


@pytest.mark.parametrize("name", ["broker", "database", "superlink", "coordinator", *NODES])
def test_every_daemon_has_a_health_check(name: str) -> None:
    assert SERVICES[name]["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")


@pytest.mark.parametrize("name", [name for name in SERVICES if SERVICES[name]["image"].startswith("milpa-")])
def test_our_services_have_no_privileges_to_lose(name: str) -> None:
    assert name == "init" or (SERVICES[name]["cap_drop"] == ["ALL"] and SERVICES[name]["security_opt"] == ["no-new-privileges:true"])


def test_our_images_run_as_an_ordinary_user() -> None:
    lines = (ROOT / "deploy/images/Dockerfile").read_text(encoding="utf-8").splitlines()
    users = [line.split()[1] for line in lines if line.startswith("USER ")]

    assert users[-1] == "milpa"
    assert lines[-1].startswith("CMD") and users.count("root") < users.count("milpa")


def test_only_the_loopback_interface_is_published() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]

    assert len(ports) == 3
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_every_volume_is_named_and_each_node_sees_only_its_own_secrets() -> None:
    for name in NODES:
        mounted = [volume.split(":")[0] for volume in SERVICES[name]["volumes"]]
        assert mounted == [name, f"{name}-secrets"]
    used = {volume.split(":")[0] for service in SERVICES.values() for volume in service["volumes"]}
    assert used == set(COMPOSE["volumes"])


def test_no_secret_is_in_the_compose_file() -> None:
    for service in SERVICES.values():
        for key, value in service.get("environment", {}).items():
            if "PASSWORD" in key or "KEY" in key or "TOKEN" in key:
                assert str(value).startswith(("/run/milpa/", "${")), key


def test_settings_in_the_compose_file_are_settings_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    import coordinator.settings
    import node.settings

    esteli, _ = node.settings.read(environment=SERVICES["esteli"]["environment"])
    for key, value in SERVICES["coordinator"]["environment"].items():
        monkeypatch.setenv(key, value)
    coordinator_settings, _ = coordinator.settings.load_settings()

    assert (esteli.node.name, esteli.peers.ask) == ("esteli", ("base-station",))
    assert coordinator_settings.repository.public_url == SERVICES["esteli"]["environment"]["MILPA_NODE_UPDATE_URL"]


def test_secrets_are_made_once_and_each_is_its_owners_alone(tmp_path: Path) -> None:
    fill(tmp_path, NODES, database_password="of-the-database")
    first = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and "metadata" not in path.parts}

    fill(tmp_path, NODES, database_password="of-the-database")

    assert all(path.read_bytes() == data for path, data in first.items())
    assert all(not path.stat().st_mode & 0o077 for path in first if path.suffix in (".password", ".key", ".token"))
    hashes = (tmp_path / "broker" / "passwords").read_text()
    for name in NODES:
        plain = (tmp_path / name / "broker.password").read_text().strip()
        assert plain not in hashes
        assert password_line(name, plain).split("$")[0] in hashes


def test_groups_and_gateways_reach_the_brokers_access_list_and_a_second_start_keeps_them(tmp_path: Path) -> None:
    groups = named("hills=base-station + esteli, ", NODES, what="group")
    gateways = named("esteli=malacatoya", NODES, what="gateway")
    for _ in range(2):
        fill(tmp_path, NODES, database_password="of-the-database", groups=groups, gateways=gateways)

    access = (tmp_path / "broker" / "access").read_text()
    assert groups == {"hills": ["base-station", "esteli"]}
    assert access.count("topic read milpa/v1/group/hills/question/+") == 2
    assert "user esteli\ntopic read milpa/v1/radio/malacatoya/up" in access


@pytest.mark.parametrize("text", ["hills", "hills=", "hills=base-station+nobody", "a b=esteli"])
def test_a_group_that_is_none_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(BadInput, match="group"):
        named(text, NODES, what="group")


def test_without_a_database_password_one_is_told_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="milpa-fleet secrets"):
        fill(tmp_path, NODES, database_password="")


def test_an_env_file_is_never_overwritten(tmp_path: Path) -> None:
    assert write_env(tmp_path)
    before = (tmp_path / ".env").read_bytes()

    assert not write_env(tmp_path)
    assert (tmp_path / ".env").read_bytes() == before
    assert (tmp_path / ".env").stat().st_mode & 0o777 == 0o600


# --- real containers ----------------------------------------------------------------------------------------------------


class Containers:
    """The fleet of docker-compose.yml, under a project name of its own."""

    def __init__(self, command: Sequence[str]) -> None:
        self.command = [*command, "-p", "milpatest", "-f", str(ROOT / "docker-compose.yml")]
        self.environment = {**os.environ, "POSTGRES_PASSWORD": "for-this-test-only", "MILPA_DASHBOARD_PORT": "18080",
                            "MILPA_ESTELI_PORT": "18101", "MILPA_MALACATOYA_PORT": "18102"}  # fmt: skip

    def compose(self, *arguments: str, deadline_s: float = 600.0, check: bool = True) -> str:
        done = subprocess.run(
            [*self.command, *arguments], env=self.environment, capture_output=True, text=True, timeout=deadline_s, cwd=ROOT
        )
        assert not check or done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        return done.stdout

    def run(self, service: str, *arguments: str, deadline_s: float = 600.0) -> str:
        return self.compose("exec", "-T", service, *arguments, deadline_s=deadline_s)

    def put(self, service: str, name: str, data: bytes) -> None:
        """A file into the container's /tmp, through its standard input."""
        done = subprocess.run(
            [*self.command, "exec", "-T", service, "python", "-c", f"import sys; open('/tmp/{name}', 'wb').write(sys.stdin.buffer.read())"],
            input=data, env=self.environment, capture_output=True, timeout=120, cwd=ROOT,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]

    def api(self, node: str) -> httpx.Client:
        key = self.run(node, "cat", "/run/milpa/api.key").strip()
        port = self.environment[f"MILPA_{node.upper()}_PORT"]
        return httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {key}"}, timeout=60)


def wait_until(true: Any, *, deadline_s: float, what: str) -> None:
    end = time.monotonic() + deadline_s
    while not true():
        assert time.monotonic() < end, f"{what} not within {deadline_s:.0f} s"
        time.sleep(1)


def ready(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="module")
def containers() -> Iterator[Containers]:
    command = shlex.split(os.environ.get("MILPA_COMPOSE", "docker compose"))
    if shutil.which(command[0]) is None:
        pytest.skip("no container engine: set MILPA_COMPOSE to a compose command, such as 'podman-compose'")
    fleet = Containers(command)
    fleet.compose("down", "-v", check=False)
    try:
        fleet.compose("up", "-d", "--no-build")
        yield fleet
    finally:
        (ROOT / "runs").mkdir(exist_ok=True)
        (ROOT / "runs" / "containers.log").write_text(fleet.compose("logs", check=False))
        fleet.compose("down", "-v", check=False)


@pytest.mark.container
@pytest.mark.timeout(1800)
def test_a_fleet_in_containers_escalates_and_runs_a_round(containers: Containers, tmp_path: Path) -> None:
    from tests.fleet import toy

    student = toy.trained(tmp_path / "student.gguf", kinds=(0, 1))
    teacher = toy.trained(tmp_path / "teacher.gguf", kinds=(0, 1, 2), seed=1)
    start = toy.start_adapter(student, tmp_path / "initial.gguf")
    for path in (student, teacher, start):
        containers.put("coordinator", path.name, path.read_bytes())
    for name, kinds, first in (("general", (0, 1), 700), ("heldout", (0, 1, 2), 400), ("dev", (0, 1, 2), 300)):
        rows = toy.records(60, kinds=kinds, start=first, prefix=name)
        containers.put("coordinator", f"{name}.jsonl", b"".join(codec.encode(row) + b"\n" for row in rows))
    containers.run(
        "coordinator", "milpa-coordinator", "publish", "--store", "/var/lib/milpa/store", "--task", "ranch", "--model", "/tmp/student.gguf",
        "--teacher", "/tmp/teacher.gguf", "--initial-adapter", "/tmp/initial.gguf",
    )  # fmt: skip

    clients = {name: containers.api(name) for name in ("esteli", "malacatoya")}
    answers: dict[str, list[dict[str, Any]]] = {}
    for name, client in clients.items():
        wait_until(lambda client=client: ready(client), deadline_s=180, what=f"{name} ready")
        answers[name] = []
        for row in toy.records(60, start=0):
            body = codec.encode(toy.record(int(row.id[1:]), int(row.id[1:]) % 3))
            blind = {**json.loads(body), "target": "", "verdict": ""}
            given = client.post("/v1/records", json=blind)
            assert given.status_code == 200, given.text
            answers[name].append({**given.json(), "truth": row.target})
    unsure = [row for rows in answers.values() for row in rows if row["escalation"]]
    for name, client in clients.items():
        for row in answers[name]:
            client.post("/v1/feedback", json={"id": row["id"], "text": row["truth"]}).raise_for_status()
        containers.run(name, "milpa-node", "learn", "--epochs", "30", "--rate", "0.01", "--json")

    result = json.loads(
        containers.run(
            "coordinator", "milpa-coordinator", "round", "--store", "/var/lib/milpa/store", "--superlink", "superlink:8000",
            "--superlink-keys", "/var/lib/milpa/superlink", "--deadline", "180", "--eta", "1,2", "--heldout", "general=/tmp/general.jsonl",
            "--heldout", "esteli=/tmp/heldout.jsonl", "--heldout", "malacatoya=/tmp/heldout.jsonl", "--dev", "esteli=/tmp/dev.jsonl",
            "--json",
        )
    )  # fmt: skip

    assert {row["site"] for row in result["accepted"]} == {"esteli", "malacatoya"}
    assert result["release"] == 2, result["reasons"]
    for client in clients.values():
        wait_until(
            lambda client=client: client.get("/v1/models").json()["data"][0]["x_milpa"]["release"] == 2, deadline_s=120, what="release 2"
        )
    assert unsure, "no answer was escalated"
    dashboard = httpx.get("http://127.0.0.1:18080/healthz", timeout=10)
    assert dashboard.status_code == 200
