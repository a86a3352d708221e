"""For every test: a node that is installed on this machine is none of theirs."""

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def nothing_installed() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:  # its own: a test's `monkeypatch` is undone before the fixtures of the test end
        patch.setattr("node.settings.INSTALLED", Path("/nonexistent/node.toml"))
        patch.setenv("MILPA_NODE_CONFIG", "")  # for the processes that tests start
        yield
