"""What both sides tell every process in which flwr is imported."""

from pathlib import Path


def offline(home: Path) -> dict[str, str]:
    """The variables that keep flwr off the network and inside `home`; set them before flwr is imported."""
    return {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }
