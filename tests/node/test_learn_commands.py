"""`milpa-node learn` and `milpa-node sync` as a service's units and an operator run them; what they start is not run here."""

import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from node.cli import complete
from node.learn import session
from node.learn.sync import SyncResult
from protocol.errors import BadInput, Unavailable


def run(*arguments: str) -> str:
    return CliRunner().invoke(complete(), arguments, catch_exceptions=False).output


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What a sync window was opened with."""
    opened: list[dict[str, Any]] = []

    def opens(state_dir: Path, node: str, superlink: str, **given: Any) -> SyncResult:
        opened.append({"superlink": superlink, **given})
        return SyncResult(node, True, ("adapter",), 0, 0.1)

    monkeypatch.setattr("node.learn.sync.sync", opens)
    return opened


def test_a_sync_window_reads_the_token_that_systemd_hands_over(
    windows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    (tmp_path / "milpa_fleet.token").write_text("handed over\n")
    (tmp_path / "node.toml").write_text('[learn]\nsuperlink = "10.8.0.1:8000"\nfleet_token_file = "credential:fleet.token"\n')

    told = run("sync", "--config", str(tmp_path / "node.toml"), "--state-dir", str(tmp_path / "state"))

    assert windows[0]["fleet_token"] == "handed over" and "adapter delivered" in told


def test_a_token_that_is_not_there_is_named_and_no_window_opens(windows: list[dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"cannot read learn\.fleet_token_file"):
        run("sync", "--superlink", "a:1", "--fleet-token-file", str(tmp_path / "none"), "--state-dir", str(tmp_path))

    assert windows == []


def test_a_site_without_a_superlink_is_no_failure_of_the_timer(windows: list[dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"set learn\.superlink"):
        run("sync", "--state-dir", str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "instead"),
    [
        (("learn",), "systemctl start milpa-learn"),
        (("sync", "--superlink", "a:1"), "systemctl start milpa-learn"),
        (("run",), "systemctl start milpa-node"),
    ],
)
def test_root_leaves_nothing_in_a_folder_of_the_services_user(
    arguments: tuple[str, ...], instead: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() != 0:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("giving a folder to another user needs root")
    state = tmp_path / "state"
    state.mkdir()
    os.chown(state, 65534, 65534)

    with pytest.raises(BadInput, match=f"belongs to user 65534.*{instead}"):
        run(*arguments, "--state-dir", str(state))

    assert list(state.iterdir()) == []


def test_without_the_libraries_of_a_training_the_command_says_how_they_get_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    with pytest.raises(BadInput, match=r"torch, transformers, gguf is not installed; run deploy/install-node\.sh again with --train"):
        run("learn", "--state-dir", str(tmp_path))


def test_without_anything_new_the_timer_trains_nothing_and_still_judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(session, "nothing_new", lambda *_: "0 examples more")
    monkeypatch.setattr(session, "train", lambda *_, **__: asked.append("trained"))
    monkeypatch.setattr(session, "judge", lambda *_, **__: asked.append("judged"))
    monkeypatch.setenv("MILPA_NODE_LEARN_SITE_ADAPTER", "true")

    told = run("learn", "--if-new", "--judge", "--state-dir", str(tmp_path))

    assert asked == ["judged"] and "nothing to train: 0 examples more" in told


@pytest.mark.parametrize(("wanted", "judged"), [("true", ["judged"]), ("false", [])])
def test_a_training_is_judged_where_the_site_answers_with_its_own_adapter(
    wanted: str, judged: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(session, "train", lambda *_, **__: {})
    monkeypatch.setattr(session, "judge", lambda *_, **__: asked.append("judged"))
    monkeypatch.setenv("MILPA_NODE_LEARN_SITE_ADAPTER", wanted)

    run("learn", "--judge", "--json", "--state-dir", str(tmp_path))

    assert asked == judged
