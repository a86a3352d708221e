"""For every test: a node that is installed on this machine is none of theirs."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.settings.INSTALLED", Path("/nonexistent/node.toml"))
    monkeypatch.setenv("MILPA_NODE_CONFIG", "")  # for the processes that tests start
