"""Secrets of a fleet in containers: made once, on the machine that runs it, never in git.

`milpa-fleet secrets` writes `.env` for compose: the database's password. The `init` service of docker-compose.yml then runs
`milpa-fleet secrets --inside` once, and fills each service's own volume with what that service needs and no more:

    broker/        mosquitto.conf, access list, password hashes        coordinator/   broker and database password
    NAME/          broker password, API key, fleet token, root.json    superlink/     its three keys
    store/         the signed repository with its signing keys
"""

import os
import secrets
from collections.abc import Sequence
from pathlib import Path, PurePath

from coordinator.federation.superlink import keys
from coordinator.fleet.publishing import Publisher
from deploy.broker import COORDINATOR, Named, mosquitto_access, mosquitto_conf, password_line
from protocol.blobs import write_atomically
from protocol.errors import BadInput
from protocol.names import checked_name

ENV_FILE = ".env"
BROKER_PORT = 1883
BROKER_DATA = PurePath("/mosquitto/data")


def write_env(folder: Path) -> bool:
    """Write `.env` with a fresh database password; False where there is one already."""
    path = folder / ENV_FILE
    if path.exists():
        return False
    path.touch(mode=0o600)
    write_atomically(path, f"POSTGRES_PASSWORD={secrets.token_hex(24)}\n".encode())
    path.chmod(0o600)
    return True


def fill(root: Path, nodes: Sequence[str], *, database_password: str, groups: Named | None = None, gateways: Named | None = None) -> None:
    """Fill the folders under `root`; what is there already stays, so that a restart changes nothing but the broker's access list.

    Args:
        groups, gateways: see `mosquitto_access`.

    Raises:
        BadInput: no database password, or an unusable node name.
    """
    if not database_password:
        raise BadInput("POSTGRES_PASSWORD is not set; run `milpa-fleet secrets` beside docker-compose.yml first")
    users = {name: _secret(root / checked_name(name, what="node") / "broker.password") for name in (COORDINATOR, *nodes)}
    write_secret(root / COORDINATOR / "database.password", database_password)
    tokens = keys(root / "superlink")
    publisher = Publisher(root / "store" / "repository")
    if not publisher.exists:
        publisher.init()
    for name in nodes:
        _secret(root / name / "api.key")
        write_secret(root / name / "fleet.token", tokens.fleet)
        write_atomically(root / name / "root.json", publisher.root_bytes())
    broker = root / "broker"
    conf = mosquitto_conf(
        port=BROKER_PORT, host="", data=BROKER_DATA, passwords=PurePath("/mosquitto/config/passwords"),
        access=PurePath("/mosquitto/config/access"),
    )  # fmt: skip
    if not (broker / "passwords").exists():
        write_atomically(broker / "passwords", "".join(password_line(*pair) + "\n" for pair in sorted(users.items())).encode())
    write_atomically(broker / "access", mosquitto_access(groups, gateways).encode())
    write_atomically(broker / "mosquitto.conf", conf.encode())
    for file in broker.iterdir():
        file.chmod(0o644)  # hashes and rules only; the broker runs as another user


def named(text: str, nodes: Sequence[str], *, what: str) -> dict[str, list[str]]:
    """ "hills=base-1+base-2,coast=base-3" as names that belong to a name; "" is none.

    Raises:
        BadInput: not of that form, or with a node that is not one of `nodes`.
    """
    found: dict[str, list[str]] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, members = part.partition("=")
        names = [checked_name(one.strip(), what="node") for one in members.split("+")] if members.strip() else []
        if not names:
            raise BadInput(f"{what} {part!r} is not of the form NAME=NODE+NODE")
        if strange := [one for one in names if one not in nodes]:
            raise BadInput(f"{what} {name!r} names {', '.join(strange)}; the nodes are {', '.join(nodes)}")
        found[checked_name(name.strip(), what=what)] = names
    return found


def write_secret(path: Path, value: str) -> None:
    """Write one secret, readable by its owner alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".new")
    part.unlink(missing_ok=True)
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w", encoding="ascii") as file:
        file.write(value + "\n")
    part.replace(path)


def _secret(path: Path) -> str:
    if not path.exists():
        write_secret(path, secrets.token_urlsafe(24))
    return path.read_text(encoding="ascii").strip()
