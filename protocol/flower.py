"""What both sides tell every process in which flwr is imported, and whom they trust at the SuperLink's end of the wire."""

import ssl
from pathlib import Path

from protocol.errors import BadInput

FLEET_HEADER = "x-milpa-fleet"  # carries the fleet's token


def offline(home: Path) -> dict[str, str]:
    """The variables that keep flwr off the network and inside `home`; set them before flwr is imported."""
    return {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }


def authorities(ca: str) -> bytes | None:
    """What is in the PEM file `ca`, for a SuperLink with TLS; None for "", which means plain HTTP.

    Raises:
        BadInput: it cannot be read, or holds no certificate.
    """
    if not ca:
        return None
    try:
        found = Path(ca).read_bytes()
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=found.decode("ascii"))
    except (UnicodeDecodeError, ssl.SSLError) as error:
        raise BadInput(f"{ca} is no PEM file with certificates; bring that of who signed the SuperLink's certificate") from error
    except OSError as error:
        raise BadInput(f"cannot read {ca}: {error.strerror}; bring the file of who signed the SuperLink's certificate") from error
    return found
