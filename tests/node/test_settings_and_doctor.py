import datetime
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from deploy.broker import Broker, Tls, find_mosquitto
from node import doctor
from node.doctor import Finding, certificates, machine, outside
from node.doctor import model as models
from node.doctor.machine import Places
from node.reload import LIVE, LIVE_SECTIONS, NEVER, changes, is_live, merged
from node.settings import NodeSettings, located, read, secret
from node.update.rules import BUILT_AT
from protocol.errors import BadInput, UnknownName
from protocol.ports import free_port
from tests.certificates import Authority
from tests.node.conftest import ROOT, settings


def test_a_node_starts_with_no_settings_at_all() -> None:
    given, origins = read(environment={})

    assert (given.api.host, given.broker.host, given.update.url, given.site) == ("127.0.0.1", "", "", "node")
    assert {origin.origin for origin in origins} == {"default"}


def test_the_environment_wins_over_the_file_and_a_flag_over_both(tmp_path: Path) -> None:
    (tmp_path / "node.toml").write_text('[node]\nname = "esteli"\n[api]\nport = 1\nqueue = 4\n')

    given, origins = read(
        tmp_path / "node.toml", flags={"api.port": 3}, environment={"MILPA_NODE_API_PORT": "2", "MILPA_NODE_API_QUEUE": "5"}
    )

    assert (given.node.name, given.api.port, given.api.queue) == ("esteli", 3, 5)
    assert {o.name: o.origin for o in origins}["api.queue"] == "environment MILPA_NODE_API_QUEUE"


def test_the_installed_file_is_read_where_nothing_else_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed, named, flag = (tmp_path / f"{name}.toml" for name in ("installed", "named", "flag"))
    for file in (installed, named, flag):
        file.write_text(f'[node]\nname = "{file.stem}"\n')
    monkeypatch.setattr("node.settings.INSTALLED", installed)

    def name(file: Path | None, environment: dict[str, str]) -> str:
        return read(file, environment=environment)[0].node.name

    assert name(None, {}) == "installed"
    assert name(None, {"MILPA_NODE_CONFIG": str(named)}) == "named"
    assert name(None, {"MILPA_NODE_CONFIG": ""}) == "node"
    assert name(flag, {"MILPA_NODE_CONFIG": str(named)}) == "flag"
    installed.unlink()
    assert name(None, {}) == "node"


def as_another_user(program: str, *arguments: str) -> str:
    """What a program prints that may not look where root may. It begins as this user, so that its imports are found: `drop()` ends that."""
    begins = "import os, sys\ndef drop():\n    if os.geteuid() == 0:\n        os.setgroups([]), os.setgid(65534), os.setuid(65534)\n"
    command = [sys.executable, "-c", begins + program, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.fixture
def closed(tmp_path: Path) -> Iterator[Path]:
    """A folder that only root may look into, as systemd's /var/lib/private is."""
    folder = tmp_path / "private"
    (folder / "milpa").mkdir(parents=True)
    (folder / "node.toml").write_text("")
    folder.chmod(0)
    yield folder
    folder.chmod(0o700)


def test_an_installed_file_that_this_user_may_not_read_is_said_with_what_to_do(closed: Path) -> None:
    program = """
import node.settings
from pathlib import Path
from protocol.errors import BadInput
node.settings.INSTALLED = Path(sys.argv[1])
drop()
try:
    node.settings.read(environment={})
except BadInput as error:
    print(error)
"""
    told = as_another_user(program, str(closed / "node.toml"))

    assert f"cannot read {closed / 'node.toml'}: Permission denied; run it with sudo" in told


def test_a_reload_that_may_not_see_the_node_does_not_say_that_none_runs(closed: Path) -> None:
    program = """
import node.client
from node.settings import read
from protocol.errors import Unavailable
node.client.daemon_status = lambda settings: {"node": "esteli"}  # one answers on its port
drop()
try:
    node.client.reload_daemon(read(flags={"node.state_dir": sys.argv[1]}, environment={})[0])
except Unavailable as error:
    print(error)
"""
    assert "closed to this user; use sudo" in as_another_user(program, str(closed / "milpa"))


def test_the_doctor_says_that_a_folder_is_closed_to_this_user_and_goes_on_with_the_rest(closed: Path, tmp_path: Path) -> None:
    program = """
import msgspec
from node.doctor import examine
from node.settings import read
def look(folder):
    return examine(read(flags={"node.state_dir": folder, "memory.use": "near", "api.port": 0}, environment={})[0])
look(sys.argv[1])  # what is imported late is imported now
drop()
print(msgspec.json.encode(look(sys.argv[2])).decode())
"""
    told = as_another_user(program, str(tmp_path / "open"), str(closed / "milpa"))

    found = {finding["what"]: finding for finding in msgspec.json.decode(told)}
    shut = {what for what, finding in found.items() if finding["advice"] == "run it with sudo"}
    assert shut == {"disk", "free memory", "memory", "release"}
    assert {"clock", "wear", "temperature", "files", "port", "learning"} <= set(found) - shut
    assert found["disk"]["state"] == "bad" and str(tmp_path) in found["disk"]["found"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"node.name": "Estelí"}, "node.name"),
        ({"api.queue": 1000}, "between 1 and 32"),
        ({"model.budget": 1.5}, "model.budget"),
        ({"model.task": "cook"}, "unknown task"),
        ({"peers.ask": ["base"]}, "broker.host is empty"),
        ({"model.path": "a.gguf", "update.url": "http://x"}, "set one of them"),
        ({"api.prot": 1}, "did you mean 'port'"),
    ],
)
def test_a_setting_that_cannot_work_is_named(flags: dict[str, Any], says: str) -> None:
    with pytest.raises((BadInput, UnknownName), match=says):
        read(flags=flags, environment={})


def test_an_empty_secret_is_refused(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("\n")

    with pytest.raises(BadInput, match="is empty"):
        secret(str(tmp_path / "key"), what="api.key_file")


def test_a_secret_may_be_handed_over_by_systemd_or_lie_where_root_put_it() -> None:
    handed = located("credential:broker-password", {"CREDENTIALS_DIRECTORY": "/run/credentials/milpa-node.service"})

    assert handed == Path("/run/credentials/milpa-node.service/milpa_broker-password")
    assert located("credential:broker-password", {}) == Path("/etc/milpa/secrets/broker-password")
    assert located("/etc/key", {}) == Path("/etc/key")


# ---- what may change while the node runs


def test_a_live_setting_is_taken_and_another_is_named_and_left() -> None:
    old, new = NodeSettings(), read(flags={"model.budget": 0.1, "api.port": 1, "limits.answers": 500}, environment={})[0]

    found = changes(old, new)
    taken = merged(old, found)

    assert {change.name: change.live for change in found} == {"api.port": False, "limits.answers": True, "model.budget": True}
    assert (taken.model.budget, taken.limits.answers, taken.api.port) == (0.1, 500, old.api.port)


def test_every_live_setting_is_one_there_is() -> None:
    names = {origin.name for origin in read(environment={})[1]}

    assert names >= (LIVE | NEVER) and {f"{section}." for section in LIVE_SECTIONS} <= {name.partition(".")[0] + "." for name in names}


def test_a_running_node_goes_by_what_it_was_told_anew(start: Any, tmp_path: Path) -> None:
    daemon = start(settings(tmp_path, link__bytes_a_day=1_000_000))
    given = {"link__bytes_a_day": 9_000, "link__class": "cellular", "power__idle_w": 2.25, "update__poll_s": 9_999.0, "model__budget": 0.01}

    daemon.reload(settings(tmp_path, **given))

    told = daemon.status()
    assert (daemon.link.meter.rules.bytes_a_day, daemon.power.plant.idle_w, daemon.updated._poll_s) == (9_000, 2.25, 9_999.0)
    assert told["settings"]["restart"] == ("link.class",) and told["link"]["class"] == "lan"
    assert told["confidence"]["plan"] == 0.01


def test_what_was_built_at_start_never_counts_as_live() -> None:
    fixed = ("node.name", "node.state_dir", "api.host", "broker.host", "link.class", "model.path", "power.source", "spool.enabled")

    assert not any(is_live(name) for name in fixed)


# ---- the doctor's looks, on machines built for it


@pytest.fixture
def board(tmp_path: Path) -> Callable[..., Places]:
    """A machine as the kernel would tell of it: {"sys/class/...": "text"}."""

    def make(files: dict[str, str] | None = None) -> Places:
        root = tmp_path / "board"
        for name, text in ({"proc/mounts": "/dev/mmcblk0p2 / ext4 rw 0 0\n"} | (files or {})).items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        return Places(root / "proc", root / "sys", root / "run", root / "kmsg")

    return make


CHIP = {"sys/class/rtc/rtc0/name": "rtc-ds3231"}


@pytest.mark.parametrize(
    ("now", "floor", "files", "state", "says"),
    [
        (12.0, 0.0, CHIP, "bad", "before this program was made"),
        (BUILT_AT + 100.0, BUILT_AT + 86_400.0, CHIP, "bad", "the coordinator signed"),
        (BUILT_AT + 40 * 365 * 86_400.0, 0.0, CHIP, "bad", "it shows 2066"),
        (BUILT_AT + 100.0, 0.0, {}, "warn", "no clock chip"),
        (BUILT_AT + 100.0, 0.0, {"run/systemd/timesync/synchronized": ""}, "good", "set by a time server"),
        (BUILT_AT + 100.0, 0.0, CHIP, "good", "kept by a clock chip"),
    ],
)
def test_the_doctor_finds_a_wrong_clock(
    board: Callable[..., Places], now: float, floor: float, files: dict[str, str], state: str, says: str
) -> None:
    found = machine.clock(now, floor=floor, places=board(files))

    assert found.state == state and says in found.found


def test_the_doctor_finds_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = machine.shutil.disk_usage(tmp_path)

    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))

    assert machine.disk(tmp_path / "not" / "made" / "yet").state == "bad"


def test_the_doctor_finds_a_disk_that_the_kernel_made_read_only(board: Callable[..., Places], tmp_path: Path) -> None:
    places = board({"proc/mounts": f"/dev/sda1 / ext4 rw 0 0\n/dev/mmcblk0p2 {tmp_path} ext4 ro,errors=remount-ro 0 0\n"})

    found = machine.disk(tmp_path, places=places)

    assert (found.state, found.found) == ("bad", "/dev/mmcblk0p2 is mounted read-only")


def test_the_doctor_finds_a_disk_without_inodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs(tmp_path)
    told = os.statvfs_result((*real[:5], 100_000, 3, 3, *real[8:]))

    monkeypatch.setattr(machine.os, "statvfs", lambda _: told)

    assert "inodes" in machine.disk(tmp_path).found


def test_the_doctor_finds_a_disk_that_fails_to_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(machine.os, "fsync", fails)

    found = machine.disk(tmp_path)

    assert (found.state, "(EIO)" in found.found) == ("bad", True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.namespace
def test_the_doctor_finds_a_disk_that_is_really_full_and_leaves_nothing_on_it(tmp_path: Path) -> None:
    mounting = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True, check=False)
    if mounting.returncode:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("mounting needs root")
    try:
        found = machine.disk(tmp_path)
        left = list(tmp_path.iterdir())
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)

    assert (found.state, "MiB free" in found.found, left) == ("bad", True, [])


@pytest.mark.parametrize(
    ("files", "state", "says"),
    [
        ({}, "good", "nothing wrong"),
        ({"sys/fs/ext4/mmcblk0p2/errors_count": "3"}, "bad", "counted 3 errors"),
        ({"kmsg": "3,1,2,-;I/O error, dev mmcblk0, sector 5\n"}, "bad", "I/O error, dev mmcblk0"),
        ({"kmsg": "3,1,2,-;I/O error, dev sdb, sector 5\n"}, "good", "nothing wrong"),
        ({"kmsg": "2,1,2,-;EXT4-fs error (device mmcblk0p2): bad header\n"}, "bad", "EXT4-fs error"),
        ({"sys/block/mmcblk0/device/life_time": "0x02 0x0b"}, "bad", "past its estimated life"),
        ({"sys/block/mmcblk0/device/life_time": "0x09 0x01"}, "warn", "90%"),
        ({"sys/block/mmcblk0/device/pre_eol_info": "0x02"}, "warn", "of its estimated life"),
        ({"sys/block/mmcblk0/device/life_time": "0x02 0x03"}, "good", "30% of its life"),
        ({"sys/block/mmcblk0/device/ioerr_cnt": "0x7"}, "warn", "7 failed commands"),
    ],
)
def test_the_doctor_finds_a_failing_card(board: Callable[..., Places], files: dict[str, str], state: str, says: str) -> None:
    places = board(files)
    nested = places.sys / "devices/platform/mmcblk0/mmcblk0p2"
    nested.mkdir(parents=True)
    (nested / "partition").write_text("2")
    (places.sys / "class/block").mkdir(parents=True)
    (places.sys / "class/block/mmcblk0p2").symlink_to(nested)

    found = machine.wear(Path("/var/lib/milpa"), places=places)

    assert found.state == state and says in found.found


@pytest.mark.parametrize(
    ("files", "state"),
    [
        ({}, "good"),
        ({"sys/class/hwmon/hwmon1/name": "rpi_volt\n", "sys/class/hwmon/hwmon1/in0_lcrit_alarm": "1\n"}, "bad"),
        ({"sys/class/hwmon/hwmon1/name": "rpi_volt\n", "sys/class/hwmon/hwmon1/in0_lcrit_alarm": "0\n"}, "good"),
        ({"sys/devices/platform/soc/soc:firmware/get_throttled": "50005\n"}, "bad"),
        ({"sys/devices/platform/soc/soc:firmware/get_throttled": "50000\n"}, "warn"),
    ],
)
def test_the_doctor_finds_a_supply_that_is_too_weak(board: Callable[..., Places], files: dict[str, str], state: str) -> None:
    assert machine.supply(board(files)).state == state


@pytest.mark.parametrize(("milli", "state"), [("45000", "good"), ("79000", "warn"), ("86000", "bad")])
def test_the_doctor_finds_a_board_that_is_too_hot(board: Callable[..., Places], milli: str, state: str) -> None:
    assert machine.temperature(board({"sys/class/thermal/thermal_zone0/temp": milli})).state == state


def test_the_doctor_says_how_much_memory_a_model_lacks(board: Callable[..., Places], tmp_path: Path) -> None:
    with (tmp_path / "large.gguf").open("wb") as file:
        file.truncate(300 << 20)  # sparse
    given = settings(tmp_path, model__path=str(tmp_path / "large.gguf"), model__context=1024)

    found = models.memory(given, places=board({"proc/meminfo": "MemTotal: 524288 kB\nMemAvailable: 204800 kB\n"}), running={})

    assert (found.state, "needs about 404 MiB, 200 MiB are free: 204 MiB are missing" in found.found) == ("bad", True)


def test_a_containers_limit_counts_as_memory(board: Callable[..., Places]) -> None:
    places = board(
        {"proc/meminfo": "MemAvailable: 8000000 kB\n", "sys/fs/cgroup/memory.max": str(100 << 20), "sys/fs/cgroup/memory.current": "0"}
    )

    assert machine.free_memory(places) == 100 << 20


@pytest.mark.parametrize(
    ("days", "state", "says"), [(-1, "warn", "the signed timestamp expired"), (3, "warn", "expires on"), (20, "good", "first to expire")]
)
def test_the_doctor_finds_signatures_that_run_out(tmp_path: Path, days: int, state: str, says: str) -> None:
    now, folder = float(BUILT_AT), tmp_path / "state" / "trust" / "metadata"
    folder.mkdir(parents=True)
    for name, left in (("timestamp", days), ("root", 300)):
        expires = datetime.datetime.fromtimestamp(now + left * 86_400, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        (folder / f"{name}.json").write_bytes(msgspec.json.encode({"signed": {"expires": expires}}))

    (found,) = models.trust(settings(tmp_path), now)

    assert found.state == state and says in found.found


def test_the_doctor_finds_a_clock_that_differs_from_the_coordinators(tmp_path: Path) -> None:
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    class Quiet(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing."""

    with HTTPServer(("127.0.0.1", 0), Quiet) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        given = settings(tmp_path, update__url=f"http://127.0.0.1:{server.server_port}/repository")
        late, right = outside.coordinator(given, time.time() - 3 * 86_400), outside.coordinator(given, time.time())
        server.shutdown()

    assert (late[0].state, "3.0 days behind" in late[0].found, right[0].state) == ("warn", True, "good")


@pytest.mark.parametrize(("state", "judged"), [("waiting", "warn"), ("refused", "bad"), ("current", "good"), ("activated", "good")])
def test_the_doctor_inside_a_node_connects_to_nothing_and_takes_its_word(tmp_path: Path, state: str, judged: str) -> None:
    nobody = settings(tmp_path, update__url="http://192.0.2.1/repository", broker__host="192.0.2.1")
    running = {"update": {"url": "u", "state": state, "reason": "why"}, "broker": {"connected": False, "problem": "timed out"}}

    began = time.monotonic()
    found = {f.what: f.state for f in doctor.examine(nobody, running=running)}

    assert (found["coordinator"], found["broker"]) == (judged, "warn")
    assert time.monotonic() - began < outside.HTTP_S


def test_the_doctor_finds_a_taken_port(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        found = outside.port(settings(tmp_path, api__port=taken.getsockname()[1]), running=False)

    assert (found.state, "in use" in found.found) == ("bad", True)


def test_the_doctor_takes_an_absent_broker_calmly_and_an_absent_model_not(tmp_path: Path) -> None:
    found = {f.what: f for f in doctor.examine(settings(tmp_path, broker__host="127.0.0.1", broker__port=free_port()))}

    assert (found["broker"].state, found["model"].state, found["release"].state) == ("warn", "bad", "bad")
    assert not (tmp_path / "state").exists()  # it looks, and changes nothing


@pytest.mark.llama
def test_the_doctor_makes_a_fixed_model_speak(tmp_path: Path, tiny: Path) -> None:
    found = {f.what: f for f in doctor.examine(settings(tmp_path, model__path=str(tiny)))}

    assert (found["free memory"].state, found["model"].state, found["release"].state) == ("good", "good", "good")
    assert not (tmp_path / "state").exists()


# ---- certificates and brokers, real ones


@pytest.fixture
def ours(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ours")


@pytest.mark.parametrize(
    ("issued", "state", "says"),
    [
        ({"days": 300}, "good", "valid until"),
        ({"days": 20}, "warn", "expires in"),
        ({"days": -0.5}, "bad", "expired on"),
        ({"since": 2, "days": 9}, "bad", "is valid from"),
        ({"name": "another"}, "bad", "is for 'another'"),
    ],
)
def test_the_doctor_finds_a_certificate_that_runs_out_or_is_anothers(
    ours: Authority, issued: dict[str, Any], state: str, says: str
) -> None:
    cert, key = ours.issue(issued.pop("name", "esteli"), **issued)

    found = certificates.look("c", ours.ca, cert, key, user="esteli", now=time.time())

    assert found.state == state and says in found.found


def test_the_doctor_finds_a_key_of_another_certificate_or_open_to_others(ours: Authority) -> None:
    cert, key = ours.issue("esteli")
    _, other = ours.issue("base")
    key.chmod(0o644)

    assert "not the key of" in certificates.look("c", ours.ca, cert, other, user="", now=time.time()).found
    assert "other users" in certificates.look("c", ours.ca, cert, key, user="", now=time.time()).found


def test_an_old_authority_may_stay_beside_the_new_one(ours: Authority, tmp_path: Path) -> None:
    old = Authority(tmp_path / "old", days=-0.5)
    (tmp_path / "both.pem").write_bytes(old.ca.read_bytes() + ours.ca.read_bytes())

    assert certificates.look("c", tmp_path / "both.pem", None, None, user="", now=time.time()).state == "good"
    assert certificates.look("c", old.ca, None, None, user="", now=time.time()).state == "bad"


def test_the_doctor_looks_at_who_signs_the_superlinks_certificate(tmp_path: Path) -> None:
    old = Authority(tmp_path / "old", days=9)

    (found,) = certificates.every(settings(tmp_path, learn__superlink="10.8.0.1:8000", learn__superlink_ca_file=str(old.ca)), time.time())

    assert (found.what, found.state) == ("SuperLink certificate", "warn")
    assert certificates.every(settings(tmp_path, learn__superlink="10.8.0.1:8000"), time.time()) == []


def test_the_doctor_finds_a_file_that_is_no_certificate(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("milk, nails, seed")

    assert "not a PEM certificate" in certificates.look("c", tmp_path / "ca.pem", None, None, user="", now=time.time()).found


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Broker]]:
    if find_mosquitto() is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("mosquitto is not installed: apt install mosquitto")
    running: list[Broker] = []

    def start(tls: Tls | None = None) -> Broker:
        running.append(Broker(tmp_path / "broker", port=free_port(), users={"esteli": "right"}, program="mosquitto", tls=tls).start())
        return running[-1]

    yield start
    for one in running:
        one.stop()


def told(tmp_path: Path, port: int, **broker: str) -> Finding:
    flags = {f"broker__{key}": value for key, value in broker.items()}
    return outside.broker(settings(tmp_path, node__name="esteli", broker__host="127.0.0.1", broker__port=port, **flags), running={})


@pytest.mark.broker
@pytest.mark.parametrize(
    ("user", "password", "state", "says"),
    [("esteli", "right", "good", "takes us as 'esteli'"), ("esteli", "wrong", "bad", "authori"), ("nobody", "right", "bad", "authori")],
)
def test_the_doctor_asks_the_broker_and_hears_a_refusal(
    serve: Callable[..., Broker], tmp_path: Path, user: str, password: str, state: str, says: str
) -> None:
    (tmp_path / "password").write_text(password)

    found = told(tmp_path, serve().port, username=user, password_file=str(tmp_path / "password"))

    assert found.state == state and says in found.found
    assert state == "good" or "password" in found.advice


@pytest.mark.broker
def test_the_doctor_tells_a_wrong_authority_from_a_wrong_name_and_from_a_certificate_the_broker_does_not_take(
    serve: Callable[..., Broker], ours: Authority, tmp_path: Path
) -> None:
    theirs = Authority(tmp_path / "theirs")
    port = serve(Tls(ours.ca, *ours.issue("broker"))).port
    cert, key = map(str, ours.issue("esteli"))
    strange_cert, strange_key = map(str, theirs.issue("esteli"))

    good = told(tmp_path, port, ca_file=str(ours.ca), cert_file=cert, key_file=key)
    authority = told(tmp_path, port, ca_file=str(theirs.ca), cert_file=cert, key_file=key)
    strange = told(tmp_path, port, ca_file=str(ours.ca), cert_file=strange_cert, key_file=strange_key)
    plain = told(tmp_path, port)

    assert good.state == "good"
    assert (authority.state, "ca_file is not of the authority" in authority.advice) == ("bad", True)
    assert (strange.state, "certificate" in strange.advice) == ("bad", True)
    assert (plain.state, "wants TLS" in plain.advice) == ("bad", True)


@pytest.mark.broker
def test_the_doctor_tells_a_broker_whose_certificate_is_for_another_address(
    serve: Callable[..., Broker], ours: Authority, tmp_path: Path
) -> None:
    port = serve(Tls(ours.ca, *ours.issue("broker", address="10.9.9.9"))).port

    found = told(tmp_path, port, ca_file=str(ours.ca), **dict(zip(("cert_file", "key_file"), map(str, ours.issue("esteli")), strict=True)))

    assert (found.state, "another address" in found.advice) == ("bad", True)


@pytest.mark.broker
def test_the_doctor_tells_a_broker_that_expired(serve: Callable[..., Broker], ours: Authority, tmp_path: Path) -> None:
    port = serve(Tls(ours.ca, *ours.issue("broker", days=-0.1))).port

    found = told(tmp_path, port, ca_file=str(ours.ca), **dict(zip(("cert_file", "key_file"), map(str, ours.issue("esteli")), strict=True)))

    assert (found.state, "expired" in found.advice) == ("bad", True)


def test_what_a_running_node_meets_is_diagnosed_without_knocking_again(tmp_path: Path) -> None:
    given = settings(tmp_path, broker__host="127.0.0.1", broker__port=free_port())

    found = outside.broker(given, running={"broker": {"connected": False, "problem": "refuses: Bad user name or password", "outbox": 7}})

    assert (found.state, found.advice.startswith("7 messages wait; the password is wrong")) == ("bad", True)
