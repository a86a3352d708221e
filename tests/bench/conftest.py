from pathlib import Path

import pytest

from bench.settings import Settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Quick, of one thread; there is no data folder."""
    import torch

    torch.set_num_threads(1)
    return Settings(tmp_path / "no-data", tmp_path / "work", quick=True)
