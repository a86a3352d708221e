"""What one can set about the coordinator: TOML, environment (MILPA_COORDINATOR_<SECTION>_<KEY>), flags. See `protocol.settings`.

No secret stands in a setting: keys ending in `_file` name the file that holds it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import sqlalchemy as sa

from protocol.errors import BadInput
from protocol.settings import Origin, load

SECRET_LIMIT = 4_096  # bytes of a password file


class Store(msgspec.Struct, frozen=True):
    """Where the coordinator keeps what it owns: the ledger's file, the signed repository, keys."""

    dir: str = "milpa-store"  # the folder; made at the first start


class LedgerSection(msgspec.Struct, frozen=True):
    """The database. Empty `url`: SQLite in the store."""

    url: str = ""  # of another database, "postgresql+psycopg://milpa@host/milpa"
    password_file: str = ""  # PostgreSQL's password, apart from the URL


class Web(msgspec.Struct, frozen=True):
    """The dashboard, the repository and the health pages: one HTTP port."""

    host: str = "127.0.0.1"  # address to listen on
    port: int = 8080  # 0: any free one, printed at the start
    tls_elsewhere: bool = False  # a reverse proxy ends TLS in front: cookies are Secure, no warning about an open bind
    timezone: str = "UTC"  # for times on the dashboard: "America/Managua"
    silent_after_s: int = 900  # a node that said nothing for so long is silent: three heartbeats of five minutes


class Broker(msgspec.Struct, frozen=True):
    """The MQTT 5 broker. Empty `host`: none, the dashboard shows what the ledger has."""

    host: str = "127.0.0.1"  # name or address; empty: none
    port: int = 1883
    username: str = ""  # "coordinator", by the access list of deploy/broker.py
    password_file: str = ""  # a file with the password, one line
    ca_file: str = ""  # who signs the broker's certificate (PEM); empty: no TLS
    cert_file: str = ""  # the coordinator's own certificate (PEM), where the broker wants one
    key_file: str = ""  # and its key


class Repository(msgspec.Struct, frozen=True):
    """Where nodes find releases."""

    public_url: str = ""  # as nodes reach it, "http://10.0.0.2:8080/repository"; empty: the web host and port


class CoordinatorSettings(msgspec.Struct, frozen=True):
    """All sections."""

    store: Store = Store()
    ledger: LedgerSection = LedgerSection()
    web: Web = Web()
    broker: Broker = Broker()
    repository: Repository = Repository()

    @property
    def store_dir(self) -> Path:
        """The store's folder."""
        return Path(self.store.dir).expanduser()

    @property
    def ledger_url(self) -> str:
        """The ledger's URL, with its password from `ledger.password_file`.

        Raises:
            BadInput: the password file does not read.
        """
        if not self.ledger.url:
            return f"sqlite:///{self.store_dir.absolute() / 'ledger.db'}"
        if not self.ledger.password_file:
            return self.ledger.url
        try:
            url = sa.engine.make_url(self.ledger.url)
        except sa.exc.ArgumentError as error:
            raise BadInput(f"ledger.url {self.ledger.url!r} is not a database URL") from error
        password = read_secret(self.ledger.password_file, setting="ledger.password_file")
        return url.set(password=password).render_as_string(hide_password=False)

    @property
    def public_url(self) -> str:
        """The repository's address as nodes reach it."""
        return self.repository.public_url.rstrip("/") or f"http://{self.web.host}:{self.web.port}/repository"


def read_secret(file: str, *, setting: str) -> str:
    """One line from a secret's file; "" for no file.

    Raises:
        BadInput: the file does not read, or is too long to be a password.
    """
    if not file:
        return ""
    try:
        data = Path(file).expanduser().read_bytes()
    except OSError as error:
        raise BadInput(f"{setting}: cannot read {file}: {error.strerror}") from error
    if len(data) > SECRET_LIMIT:
        raise BadInput(f"{setting}: {file} has {len(data)} bytes; a password has at most {SECRET_LIMIT}")
    return data.decode("utf-8", errors="strict").strip()


def load_settings(file: Path | None = None, *, flags: Mapping[str, Any] | None = None) -> tuple[CoordinatorSettings, tuple[Origin, ...]]:
    """The coordinator's settings and who set each. Without `file`, MILPA_COORDINATOR_CONFIG may name one.

    Raises:
        BadInput, UnknownName: as `protocol.settings.load`.
    """
    import os

    named = os.environ.get("MILPA_COORDINATOR_CONFIG")
    return load(CoordinatorSettings, side="coordinator", file=file or (Path(named) if named else None), flags=flags)
