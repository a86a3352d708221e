"""The systemd units and the script that installs them: little exposure, no wait for a network, nothing of an operator's lost."""

import configparser
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from coordinator.settings import Web
from node.settings import read
from protocol.errors import NotEnough, Unavailable

ROOT = Path(__file__).parents[2]
UNITS = ROOT / "deploy" / "systemd"
SCRIPT = ROOT / "deploy" / "install-node.sh"
EXPOSURE_LIMIT = 2.0
SERVICES = ("milpa-node.service", "milpa-learn.service")


def analyzer() -> str:
    found = shutil.which("systemd-analyze")
    if found is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("systemd-analyze is not installed: apt install systemd")
    return str(found)


def unit(name: str) -> configparser.ConfigParser:
    class Lists(dict):  # type: ignore[type-arg]
        """A key said twice is a list, as systemd reads it."""

        def __setitem__(self, key: str, value: object) -> None:
            if key in self and isinstance(value, list):
                self[key].extend(value)
            else:
                super().__setitem__(key, value)

    parser = configparser.ConfigParser(dict_type=Lists, strict=False, interpolation=None, delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(UNITS / name)
    return parser


@pytest.mark.parametrize("name", SERVICES)
def test_a_units_exposure_is_at_most_2(name: str) -> None:
    command = [analyzer(), "security", "--offline=yes", "--no-pager", f"./{name}"]

    told = subprocess.run(command, cwd=UNITS, capture_output=True, text=True, timeout=60, check=False).stdout

    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", told)
    assert found and float(found[1]) <= EXPOSURE_LIMIT, told[-300:]


@pytest.mark.parametrize("name", [*SERVICES, "milpa-learn.timer"])
def test_systemd_understands_every_line_of_a_unit(name: str) -> None:
    told = subprocess.run([analyzer(), "verify", f"./{name}"], cwd=UNITS, capture_output=True, text=True, timeout=60, check=False).stderr

    complaints = [line for line in told.splitlines() if "milpa" in line and "is not executable" not in line]
    assert not complaints


@pytest.mark.parametrize("name", SERVICES)
def test_no_unit_waits_for_the_network(name: str) -> None:
    lines = [line for line in (UNITS / name).read_text().splitlines() if not line.startswith("#")]

    assert not [line for line in lines if "network-online" in line]


def test_a_node_is_watched_started_again_for_ever_and_reloaded_by_a_signal() -> None:
    service, general = unit("milpa-node.service")["Service"], unit("milpa-node.service")["Unit"]

    assert (service["Type"], service["Restart"], general["StartLimitIntervalSec"]) == ("notify", "always", "0")
    assert int(service["WatchdogSec"]) >= 3 * 30  # three looks, and the longest takes half a minute
    assert "kill -HUP" in service["ExecReload"]


def test_both_services_are_the_same_user_with_the_same_walls() -> None:
    node, learn = (dict(unit(name)["Service"]) for name in SERVICES)
    walls = {
        key for key in node if key.startswith(("Protect", "Private", "Restrict", "SystemCall", "Capability", "Dynamic", "State", "User"))
    }

    assert len(walls) > 20 and {key: node[key] for key in walls} == {key: learn.get(key) for key in walls}


def test_the_settings_that_are_laid_down_name_the_units_own_folder() -> None:
    settings, _ = read(UNITS / "node.toml", environment={})

    assert settings.node.state_dir == unit("milpa-node.service")["Service"]["Environment"].split("MILPA_NODE_NODE_STATE_DIR=")[1].split()[0]


def test_the_settings_offered_as_comments_can_be_taken(tmp_path: Path) -> None:
    offered = re.sub(r"(?m)^# (\w+ = )", r"\1", (UNITS / "node.toml").read_text())
    (tmp_path / "node.toml").write_text(offered)

    settings, _ = read(tmp_path / "node.toml", environment={})

    assert (settings.spool.enabled, settings.broker.password_file) == (True, "credential:broker-password")
    assert settings.update.url == f"http://coordinator:{Web().port}/repository"


def test_the_timers_training_is_judged_and_only_a_quiet_site_counts_as_success() -> None:
    service = unit("milpa-learn.service")["Service"]
    lines = service["ExecStart"].splitlines()

    assert [line.split()[1:4] for line in lines] == [["learn", "--if-new", "--judge"], ["sync", "--config", "/etc/milpa/node.toml"]]
    assert {int(code) for code in service["SuccessExitStatus"].split()} == {Unavailable.exit_code, NotEnough.exit_code}


@pytest.mark.parametrize("room", ["coordinator", "node", "protocol", "deploy", "docs", "tests", "README.md"])
def test_nothing_tells_to_install_milpa_from_a_public_index(room: str) -> None:
    """It is on none: whoever registers the name there would be installed."""
    files = (
        [ROOT / room]
        if "." in room
        else [path for path in (ROOT / room).rglob("*") if path.suffix in (".py", ".md", ".sh", ".html", ".toml")]
    )
    advice = re.compile(r"pip install (-\S+ )*['\"]?milpa\b")

    assert not [str(path) for path in files if advice.search(path.read_text(encoding="utf-8"))]


# ---- the script


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """A Python environment with the program, as the script makes one; here a link to this one."""
    folder = tmp_path / "environment"
    (folder / "bin").mkdir(parents=True)
    program = folder / "bin" / "milpa-node"
    program.write_text(f'#!/bin/sh\ncd {ROOT} && exec {sys.executable} -m node.cli "$@"\n')
    program.chmod(0o755)
    return folder


def install(root: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPT), "--root", str(root), *options]
    alone = os.environ | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(root.parent)}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=alone)


def wheel(folder: Path, version: str, *, training: tuple[str, ...] = ()) -> Path:
    """The program as a wheel of that version that needs no other package, but for training: what it runs is this checkout."""
    path, about = folder / f"milpa-{version}-py3-none-any.whl", f"milpa-{version}.dist-info"
    files = {
        "milpa_here.py": f"import os\ndef main():\n    os.chdir({str(ROOT)!r})\n"
        f"    os.execv({sys.executable!r}, [{sys.executable!r}, '-m', 'node.cli', *os.sys.argv[1:]])\n",
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: milpa\nVersion: {version}\n"
        f"Provides-Extra: train\n" + "".join(f"Requires-Dist: {name}; extra == 'train'\n" for name in training),
        f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{about}/entry_points.txt": "[console_scripts]\nmilpa-node = milpa_here:main\n",
    }
    return packed(path, about, files)


def packed(path: Path, about: str, files: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, text in files.items():
            file.writestr(name, text)
        file.writestr(f"{about}/RECORD", "".join(f"{name},,\n" for name in [*files, f"{about}/RECORD"]))
    return path


def library(folder: Path, name: str) -> Path:
    """A library of that name with nothing in it, in the version that constraints.txt asks for."""
    pinned = re.search(rf"(?m)^{name}==(\S+)", (ROOT / "constraints.txt").read_text())
    version = pinned[1] if pinned else "1"
    path, about = folder / f"{name}-{version}-py3-none-any.whl", f"{name}-{version}.dist-info"
    files = {
        f"{name}/__init__.py": "",
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    return packed(path, about, files)


def laid(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file() and not path.is_symlink()}


def test_installing_lays_units_settings_and_a_closed_folder_for_secrets(tmp_path: Path, environment: Path) -> None:
    done = install(tmp_path / "root", "--environment", str(environment))

    root = tmp_path / "root"
    assert done.returncode == 0, done.stderr
    assert set(laid(root)) == {
        "etc/milpa/node.toml", "etc/systemd/system/milpa-learn.service", "etc/systemd/system/milpa-learn.timer",
        "etc/systemd/system/milpa-node.service",
    }  # fmt: skip
    assert (root / "etc/milpa/secrets").stat().st_mode & 0o777 == 0o700
    assert (root / "usr/local/bin/milpa-node").readlink() == environment / "bin" / "milpa-node"


def test_installing_again_changes_nothing_and_keeps_what_the_operator_wrote(tmp_path: Path, environment: Path) -> None:
    root = tmp_path / "root"
    install(root, "--environment", str(environment))
    (root / "etc/milpa/node.toml").write_text("[model]\nbudget = 0.5\n")
    (root / "etc/milpa/secrets/broker-password").write_text("x")
    before = laid(root)

    again = install(root, "--environment", str(environment))

    assert again.returncode == 0 and "nothing to do" in again.stderr
    assert laid(root) == before


def test_the_script_makes_its_own_environment_and_calls_only_another_program_a_change(tmp_path: Path) -> None:
    options = ("--python", sys.executable, "--source")
    old, new = (wheel(tmp_path, version, training=("torch",)) for version in ("0.0.1", "0.0.2"))  # which is not here: nobody asked for it

    first, again, later = (install(tmp_path / "root", *options, str(source)) for source in (old, old, new))

    assert first.returncode == 0 and "was started" in first.stderr, first.stderr
    assert "nothing to do" in again.stderr, again.stderr
    assert later.returncode == 0 and "nothing to do" not in later.stderr
    assert (tmp_path / "root/usr/local/bin/milpa-node").readlink() == Path("/usr/local/lib/milpa/venv/bin/milpa-node")


def test_training_is_installed_when_asked_for_and_every_upgrade_keeps_it(tmp_path: Path) -> None:
    for name in ("torch", "newly_needed"):
        library(tmp_path, name)
    options = ("--python", sys.executable, "--source")
    old, new = wheel(tmp_path, "0.0.1", training=("torch",)), wheel(tmp_path, "0.0.2", training=("torch", "newly_needed"))

    def has() -> set[str]:
        (packages,) = (tmp_path / "root/usr/local/lib/milpa/venv/lib").glob("python3*/site-packages")
        return {"torch", "newly_needed"} & {path.name for path in packages.iterdir()}

    asked = install(tmp_path / "root", *options, str(old), "--train")
    with_it = has()
    later = install(tmp_path / "root", *options, str(new))

    assert (asked.returncode, later.returncode) == (0, 0), asked.stderr + later.stderr
    assert (with_it, has()) == ({"torch"}, {"torch", "newly_needed"})


def test_training_cannot_be_asked_for_where_nothing_is_installed(tmp_path: Path, environment: Path) -> None:
    done = install(tmp_path / "root", "--environment", str(environment), "--train")

    assert done.returncode == 1 and "install milpa with its extra 'train' there" in done.stderr


def test_a_unit_that_differs_is_replaced(tmp_path: Path, environment: Path) -> None:
    root = tmp_path / "root"
    install(root, "--environment", str(environment))
    laid_unit = root / "etc/systemd/system/milpa-node.service"
    laid_unit.write_text("old")

    again = install(root, "--environment", str(environment))

    assert laid_unit.read_bytes() == (UNITS / "milpa-node.service").read_bytes() and "wrote" in again.stderr


def test_settings_that_cannot_work_are_told_before_anything_is_started(tmp_path: Path, environment: Path) -> None:
    root = tmp_path / "root"
    (root / "etc/milpa").mkdir(parents=True)
    (root / "etc/milpa/node.toml").write_text("[model]\nbudget = 7\n")

    done = install(root, "--environment", str(environment))

    assert done.returncode == 1 and "model.budget is 7" in done.stderr and "correct" in done.stderr


def test_uninstalling_keeps_settings_secrets_and_data_and_can_be_repeated(tmp_path: Path, environment: Path) -> None:
    root = tmp_path / "root"
    install(root, "--environment", str(environment))
    (root / "var/lib/milpa").mkdir(parents=True)
    (root / "var/lib/milpa/node.db").write_text("answers")
    (root / "etc/milpa/secrets/broker-password").write_text("x")

    first, second = install(root, "--uninstall"), install(root, "--uninstall")

    assert (first.returncode, second.returncode) == (0, 0)
    assert set(laid(root)) == {"etc/milpa/node.toml", "etc/milpa/secrets/broker-password", "var/lib/milpa/node.db"}
    assert not (root / "usr/local/bin/milpa-node").is_symlink()


@pytest.mark.parametrize(("option", "says"), [("--colour", "unknown option"), ("--source", "needs a value")])
def test_a_wrong_option_is_one_clear_line(tmp_path: Path, option: str, says: str) -> None:
    done = install(tmp_path, option)

    assert done.returncode == 1 and says in done.stderr
