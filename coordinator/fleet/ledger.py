"""What the coordinator knows about its fleet, in one database: SQLite by default, PostgreSQL by URL.

Rules:
 * Everything a node says is applied once: statuses by boot and sequence, events by id, adapters by round, node and digest.
 * No site text. Event details keep only the keys in DETAIL_KEYS, shortened; refused payloads are kept apart, bounded, never shown.
 * Whoever changes something on purpose (a release, a round, a user) leaves a row in `audit`, whose hash covers the row before it.
 * Several processes may write at once (serve, round, publish): each write is one transaction that takes the write lock first.
 * What grows with time has a limit (below); events and audit are the record itself and stay.

Reading for people is `coordinator/dashboard/views/`.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.util import CommandError

from coordinator.fleet.tables import adapters, audit, boots, events, nodes, refused, releases, rounds, sessions, statuses, users
from protocol import codec
from protocol.adapters import AdapterHeader
from protocol.digests import digest_bytes
from protocol.errors import BadInput, MilpaError, Unavailable
from protocol.messages import Event, Status
from protocol.names import checked_name
from protocol.releases import Release

STATUS_LIMIT = 10_000  # rows a node; 34 days at one heartbeat in five minutes
BOOT_LIMIT = 500  # boots a node that are remembered; a late death of an earlier one is no longer recognised
REFUSED_LIMIT = 1_000  # refused messages, all nodes together
PAYLOAD_LIMIT = 2_048  # bytes kept of each refused message
TEXT_LIMIT = 300  # characters of a reason or a detail
FIGURES_LIMIT = 32  # figures in one event
LARGEST = 2**53  # counters and times beyond this are not numbers a JSON reader can hold exactly
BUSY_S = 10.0  # seconds a writer waits for another writer
DETAIL_KEYS = frozenset({"state", "peer", "reason", "task", "site", "question", "model_digest", "adapter_digest"})
PATTERN_KEYS = DETAIL_KEYS | {"key", "lang", "when", "means"}  # of a `pattern`, the one event whose text its operator let go


class PublishedRelease(msgspec.Struct, frozen=True):
    """A release as the ledger holds it."""

    number: int
    digest: str  # SHA-256 of the manifest's bytes
    manifest: Release
    evidence: dict[str, Any] | None
    note: str
    published: int


class User(msgspec.Struct, frozen=True):
    """Someone who may log in."""

    name: str
    password: str  # argon2id, with its salt and parameters


class WebSession(msgspec.Struct, frozen=True):
    """A logged-in browser."""

    user: str
    csrf: str  # what every unsafe request must repeat
    created: int
    last_used: int
    expires: int


class Ledger:
    """The fleet's record. Safe to use from several threads; `close` gives the connections back."""

    def __init__(self, url: str, *, clock: Callable[[], float] = time.time) -> None:
        """Prepare the connection; nothing is opened before `migrate`.

        Args:
            url: "sqlite:////var/lib/milpa/ledger.db", "postgresql://milpa@host/milpa".

        Raises:
            BadInput: not a URL of one of the two.
        """
        self.clock = clock
        try:
            parsed = sa.engine.make_url(url)
        except sa.exc.ArgumentError as error:
            raise BadInput(f"ledger.url {url!r} is not a database URL; write sqlite:///FILE or postgresql://USER@HOST/NAME") from error
        if parsed.get_backend_name() not in ("sqlite", "postgresql"):
            raise BadInput(f"ledger.url names {parsed.get_backend_name()!r}; the ledger speaks sqlite and postgresql")
        self.where = parsed.render_as_string(hide_password=True)
        if parsed.get_backend_name() == "postgresql":
            # without a client encoding, a database made under the C locale (SQL_ASCII) would hand out bytes for text
            self.engine = sa.create_engine(
                parsed.set(drivername="postgresql+psycopg"), pool_pre_ping=True,
                connect_args={"connect_timeout": 10, "client_encoding": "utf8"},
            )  # fmt: skip
        else:
            self._file = Path(parsed.database or "")
            self.engine = sa.create_engine(parsed, connect_args={"check_same_thread": False, "timeout": BUSY_S})
            sa.event.listen(self.engine, "connect", _prepare_sqlite)
            sa.event.listen(self.engine, "begin", _begin_sqlite)

    @property
    def is_sqlite(self) -> bool:
        """Whether the ledger is a file of ours."""
        return self.engine.dialect.name == "sqlite"

    def close(self) -> None:
        """Give all connections back."""
        self.engine.dispose()

    def migrate(self) -> None:
        """Bring the tables to what this program expects. Safe to run at every start and by two processes at once.

        Raises:
            Unavailable: the database does not open.
            BadInput: it was written by a newer Milpa.
        """
        if self.is_sqlite:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.touch(mode=0o600)  # password and session hashes live in it
        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        config.set_main_option("path_separator", "os")
        try:
            with self.write() as connection:
                config.attributes["connection"] = connection
                command.upgrade(config, "head")
        except CommandError as error:
            raise BadInput(f"{self.where} was written by a newer Milpa ({error}); run that version") from error

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A connection that sees one consistent state.

        Raises:
            Unavailable: the database does not answer.
        """
        with self._answering(), self.engine.connect() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """A transaction that holds the write lock from its first line, so that what it read is still true when it writes.

        Raises:
            Unavailable: the database does not answer, or another writer holds it for longer than BUSY_S; nothing was written.
        """
        with self._answering(), self.engine.connect().execution_options(milpa_write=True) as connection, connection.begin():
            if not self.is_sqlite:
                connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7264261)")  # one writer at a time, as SQLite has it
            yield connection

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except sa.exc.OperationalError as error:
            raise Unavailable(f"the ledger {self.where} does not answer: {_first_line(error)}") from error

    def mark(self) -> tuple[int, ...]:
        """A cheap token that changes whenever something worth showing changed, in whatever process."""
        columns = [
            sa.select(sa.func.coalesce(sa.func.max(column), 0)).scalar_subquery()
            for column in (statuses.c.id, events.c.number, refused.c.id, audit.c.id, adapters.c.id)
        ]
        with self.read() as connection:
            return tuple(connection.execute(sa.select(*columns)).one())

    # -- what nodes say ---------------------------------------------------------------------------------------------

    def seen_status(self, status: Status, received: int) -> bool:
        """Apply a node's word about itself. Returns whether it changed anything.

        Ignored: any word of a boot before the current one (a late death), and within a boot a sequence that is not higher than the
        last one. A death ("lost") counts for the current boot and connection, whatever its sequence: the broker speaks it with the words of
        the connection's start. After a goodbye ("stopped", "sleeping") it says nothing new: a panel at night is no alarm.

        Raises:
            BadInput: a name, text or number out of bounds.
        """
        node = checked_name(status.node, what="node")
        boot = _short(status.boot, 64, "boot")
        row: dict[str, Any] = {
            "role": _short(status.role, 32, "role"), "state": status.state, "boot": boot, "sequence": _count(status.sequence),
            "connection": _count(status.connection),
            "release": _count(status.release), "model_digest": _short(status.model_digest, 64, "model_digest"),
            "adapter_digest": _short(status.adapter_digest, 64, "adapter_digest"), "at": _count(status.at),
            "sleeping_until": _count(status.sleeping_until), "answered": _count(status.answered), "escalated": _count(status.escalated),
            "waiting": _count(status.waiting), "version": _short(status.version, 64, "version"),
        }  # fmt: skip
        with self.write() as connection:
            known = connection.execute(sa.select(nodes).where(nodes.c.name == node)).mappings().one_or_none()
            if known is None:
                connection.execute(nodes.insert().values(name=node, first_seen=received, last_seen=received, **row))
            else:
                if not _follows(connection, known, node, status):
                    return False
                if status.state == "lost":  # the broker speaks: what the node last counted stays
                    row = {"state": "lost"} if known["boot"] == boot else {**row, "release": row["release"] or known["release"]}
                    row |= {"last_seen": known["last_seen"]}
                else:
                    row |= {"last_seen": received}
                connection.execute(nodes.update().where(nodes.c.name == node).values(**row))
            if known is None or known["boot"] != boot:
                connection.execute(boots.insert().values(node=node, boot=boot, first_seen=received))
                _keep_newest(connection, boots, BOOT_LIMIT, node=node)
            current = connection.execute(sa.select(nodes).where(nodes.c.name == node)).mappings().one()
            kept = {key: current[key] for key in ("boot", "sequence", "state", "release", "answered", "escalated", "waiting")}
            connection.execute(statuses.insert().values(node=node, received=received, **kept))
            if status.sequence % 64 == 0:
                _keep_newest(connection, statuses, STATUS_LIMIT, node=node)
            return True

    def add_event(self, event: Event, received: int) -> bool:
        """Keep what happened on a node. False: it was there already (a second delivery).

        Raises:
            BadInput: a name, text or figure out of bounds.
        """
        if len(event.figures) > FIGURES_LIMIT or not all(math.isfinite(value) for value in event.figures.values()):
            raise BadInput(f"event {event.id!r} of {event.node!r} has more than {FIGURES_LIMIT} figures or one that is not finite")
        keys = PATTERN_KEYS if event.kind == "pattern" else DETAIL_KEYS
        row = {
            "id": _short(event.id, 128, "id"), "node": checked_name(event.node, what="node"),
            "kind": checked_name(event.kind, what="kind of event"),
            "at": _count(event.at), "received": received,
            "figures": {_short(name, 64, "figure"): value for name, value in event.figures.items()},
            "detail": {key: _clean(value) for key, value in event.detail.items() if key in keys},
        }  # fmt: skip
        if not row["id"]:
            raise BadInput(f"an event of {event.node!r} has no id: it could not be told from its second delivery")
        with self.write() as connection:
            if connection.scalar(sa.select(events.c.number).where(events.c.id == row["id"])) is not None:
                return False
            connection.execute(events.insert().values(**row))
            return True

    def add_refused(self, topic: str, payload: bytes, reason: str, received: int) -> None:
        """Keep a message that could not be used: its first PAYLOAD_LIMIT bytes, and why. The oldest fall out."""
        with self.write() as connection:
            connection.execute(
                refused.insert().values(
                    topic=_clean(topic)[:255], payload=payload[:PAYLOAD_LIMIT], size=len(payload), reason=_clean(reason), received=received
                )
            )
            _keep_newest(connection, refused, REFUSED_LIMIT)

    # -- releases -----------------------------------------------------------------------------------------------------

    def add_release(self, release: Release, evidence: Mapping[str, Any] | None, published: int, *, actor: str = "coordinator") -> bool:
        """Keep a published release. False: it was there already; evidence that was missing then is added.

        Raises:
            BadInput: that number is taken by a release with other content.
        """
        manifest = codec.encode(release)
        digest = digest_bytes(manifest)
        plain = _plain(evidence) if evidence is not None else None
        with self.write() as connection:
            known = connection.execute(sa.select(releases).where(releases.c.number == release.number)).mappings().one_or_none()
            if known is not None:
                if known["digest"] != digest:
                    raise BadInput(f"release {release.number} is already in the ledger with other content; a number is never reused")
                if known["evidence"] is None and plain is not None:
                    connection.execute(releases.update().where(releases.c.number == release.number).values(evidence=plain))
                    self._audit(connection, actor, "evidence added", f"release {release.number}", {})
                return False
            connection.execute(
                releases.insert().values(
                    number=_count(release.number), task=_clean(release.task)[:128], digest=digest, manifest=msgspec.json.decode(manifest),
                    evidence=plain, note=_clean(release.note), published=published,
                )
            )  # fmt: skip
            self._audit(
                connection, actor, "release published", f"release {release.number}", {"digest": digest, "note": _clean(release.note)}
            )
            return True

    def releases(self) -> tuple[PublishedRelease, ...]:
        """All releases, oldest first."""
        with self.read() as connection:
            rows = connection.execute(sa.select(releases).order_by(releases.c.number)).mappings()
            return tuple(_published(row) for row in rows)

    def latest_release(self) -> PublishedRelease | None:
        """The release with the highest number, or None before the first."""
        with self.read() as connection:
            row = connection.execute(sa.select(releases).order_by(releases.c.number.desc()).limit(1)).mappings().one_or_none()
            return _published(row) if row is not None else None

    # -- rounds -------------------------------------------------------------------------------------------------------

    def open_round(
        self, release: int, asked: Sequence[str], deadline: int, *, opened: int | None = None, actor: str = "coordinator"
    ) -> int:
        """Note that a round asks `asked` (sites or nodes) what they have for `release`, until `deadline`. Returns the round's number."""
        names = [checked_name(name, what="site") for name in asked]
        with self.write() as connection:
            result = connection.execute(
                rounds.insert().values(release=_count(release), asked=names, opened=self._time(opened), deadline=_count(deadline))
            )
            number = int(result.inserted_primary_key[0])  # type: ignore[index]
            self._audit(connection, actor, "round opened", f"round {number}", {"release": release, "asked": names})
            return number

    def add_reply(
        self, round_id: int, node: str, header: AdapterHeader | None, digest: str, accepted: bool, reason: str, received: int
    ) -> bool:
        """Keep what a site sent to a round, accepted or refused with its reason. False: the same adapter was there already.

        Raises:
            BadInput: no such round, or a name that cannot be one.
        """
        name = checked_name(node, what="node")
        with self.write() as connection:
            if connection.scalar(sa.select(rounds.c.id).where(rounds.c.id == round_id)) is None:
                raise BadInput(f"round {round_id} is not in the ledger")
            same = (adapters.c.round == round_id) & (adapters.c.node == name) & (adapters.c.digest == digest)
            if connection.scalar(sa.select(adapters.c.id).where(same)) is not None:
                return False
            connection.execute(
                adapters.insert().values(
                    round=round_id, node=name, digest=_short(digest, 64, "digest"), header=_plain(header) if header is not None else None,
                    accepted=accepted, reason=_clean(reason), received=received,
                )
            )  # fmt: skip
            action = "adapter accepted" if accepted else "adapter refused"
            self._audit(
                connection, actor=name, action=action, subject=f"round {round_id}", detail={"digest": digest, "reason": _clean(reason)}
            )
            return True

    def refuse_reply(self, round_id: int, node: str, digest: str, reason: str) -> None:
        """Turn an accepted adapter into a refused one: some reasons show only when all have come. Nothing happens to an unknown one."""
        name = checked_name(node, what="node")
        same = (adapters.c.round == round_id) & (adapters.c.node == name) & (adapters.c.digest == digest) & adapters.c.accepted
        with self.write() as connection:
            if connection.execute(adapters.update().where(same).values(accepted=False, reason=_clean(reason))).rowcount:
                self._audit(connection, name, "adapter refused", f"round {round_id}", {"digest": digest, "reason": _clean(reason)})

    def close_round(self, round_id: int, result: Mapping[str, Any], *, closed: int | None = None, actor: str = "coordinator") -> None:
        """Note how a round ended: figures per site, the gate's decision. A round closes once; a second close is refused.

        Raises:
            BadInput: no such round, or it is closed.
        """
        with self.write() as connection:
            row = connection.execute(sa.select(rounds.c.closed).where(rounds.c.id == round_id)).one_or_none()
            if row is None or row.closed is not None:
                raise BadInput(f"round {round_id} is {'not in the ledger' if row is None else 'closed already'}")
            connection.execute(rounds.update().where(rounds.c.id == round_id).values(closed=self._time(closed), result=_plain(result)))
            self._audit(connection, actor, "round closed", f"round {round_id}", {"decision": _clean(str(result.get("decision", "")))})

    # -- people -------------------------------------------------------------------------------------------------------

    def has_users(self) -> bool:
        """Whether anybody may log in yet."""
        with self.read() as connection:
            return connection.scalar(sa.select(users.c.name).limit(1)) is not None

    def add_first_user(self, name: str, password: str) -> bool:
        """Create the first account. False: there is one already, and nothing changed."""
        checked_name(name, what="user")
        with self.write() as connection:
            if connection.scalar(sa.select(users.c.name).limit(1)) is not None:
                return False
            connection.execute(users.insert().values(name=name, password=password, created=self._time(None)))
            self._audit(connection, name, "account created", f"user {name}", {"how": "set-up token"})
            return True

    def user(self, name: str) -> User | None:
        """The account called `name`, or None."""
        with self.read() as connection:
            row = connection.execute(sa.select(users).where(users.c.name == name)).one_or_none()
            return User(name=row.name, password=row.password) if row is not None else None

    def open_session(self, token_hash: str, user: str, csrf: str, *, lifetime_s: int) -> None:
        """Remember a logged-in browser by the hash of its cookie. Expired ones are swept out."""
        now = self._time(None)
        with self.write() as connection:
            connection.execute(sessions.delete().where(sessions.c.expires <= now))
            connection.execute(
                sessions.insert().values(token_hash=token_hash, user=user, csrf=csrf, created=now, last_used=now, expires=now + lifetime_s)
            )
            self._audit(connection, user, "logged in", f"user {user}", {})

    def session(self, token_hash: str) -> WebSession | None:
        """The browser with that cookie, if its session has not expired."""
        now = self._time(None)
        with self.read() as connection:
            row = connection.execute(sa.select(sessions).where(sessions.c.token_hash == token_hash, sessions.c.expires > now)).one_or_none()
        if row is None:
            return None
        return WebSession(user=row.user, csrf=row.csrf, created=row.created, last_used=row.last_used, expires=row.expires)

    def close_session(self, token_hash: str) -> None:
        """Forget a browser."""
        with self.write() as connection:
            user = connection.scalar(sa.select(sessions.c.user).where(sessions.c.token_hash == token_hash))
            if user is not None:
                connection.execute(sessions.delete().where(sessions.c.token_hash == token_hash))
                self._audit(connection, user, "logged out", f"user {user}", {})

    def note(self, actor: str, action: str, subject: str, detail: Mapping[str, Any] | None = None) -> None:
        """Write one line into the audit."""
        with self.write() as connection:
            self._audit(connection, actor, action, subject, detail or {})

    def broken_audit(self) -> int | None:
        """The first audit row that does not follow from the one before it, or None when the chain is whole."""
        previous, expected = "", 1
        with self.read() as connection:
            for row in connection.execute(sa.select(audit).order_by(audit.c.id)):
                body = _audit_body(row.id, row.at, row.actor, row.action, row.subject, row.detail)
                if row.id != expected or row.previous != previous or row.hash != _chained(previous, body):
                    return int(row.id)
                previous, expected = row.hash, expected + 1
        return None

    def _audit(self, connection: sa.Connection, actor: str, action: str, subject: str, detail: Mapping[str, Any]) -> None:
        """Append to the chain: hash = SHA-256(previous hash, newline, canonical JSON of the row). Inside the caller's transaction."""
        last = connection.execute(sa.select(audit.c.id, audit.c.hash).order_by(audit.c.id.desc()).limit(1)).one_or_none()
        number, previous = (last.id + 1, last.hash) if last is not None else (1, "")
        at, plain = self._time(None), _plain(detail)
        actor, subject = _clean(actor)[:64], _clean(subject)[:255]
        connection.execute(
            audit.insert().values(
                id=number, at=at, actor=actor, action=action, subject=subject, detail=plain, previous=previous,
                hash=_chained(previous, _audit_body(number, at, actor, action, subject, plain)),
            )
        )  # fmt: skip

    def _time(self, given: int | None) -> int:
        return int(self.clock()) if given is None else given


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # SQLAlchemy's begin event opens transactions, not the driver
    for pragma in ("journal_mode = WAL", "synchronous = FULL", f"busy_timeout = {int(BUSY_S * 1000)}", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin_sqlite(connection: sa.Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get("milpa_write") else "BEGIN")


def _follows(connection: sa.Connection, known: sa.RowMapping, node: str, status: Status) -> bool:
    """Whether `status` is news after the row we hold."""
    if status.boot == known["boot"]:
        if status.state == "lost":
            return known["state"] not in ("lost", "stopped", "sleeping") and bool(status.connection >= known["connection"])
        return bool(status.sequence > known["sequence"])
    earlier = sa.select(boots.c.id).where(boots.c.node == node, boots.c.boot == status.boot)
    return connection.scalar(earlier) is None  # a boot we have seen before and left is over


def _keep_newest(connection: sa.Connection, table: sa.Table, limit: int, **where: str) -> None:
    mine = sa.and_(sa.true(), *(table.c[key] == value for key, value in where.items()))
    oldest_kept = sa.select(table.c.id).where(mine).order_by(table.c.id.desc()).offset(limit - 1).limit(1)
    number = connection.scalar(oldest_kept)
    if number is not None:
        connection.execute(table.delete().where(mine, table.c.id < number))


def _published(row: sa.RowMapping) -> PublishedRelease:
    try:
        manifest = msgspec.convert(row["manifest"], Release)
    except msgspec.ValidationError as error:
        raise MilpaError(f"release {row['number']} in the ledger does not read: {error}") from error
    return PublishedRelease(
        number=row["number"],
        digest=row["digest"],
        manifest=manifest,
        evidence=row["evidence"],
        note=row["note"],
        published=row["published"],
    )


def _plain(value: Any) -> Any:
    """Plain JSON values: structs as objects, tuples as lists, a NaN as null."""
    return msgspec.json.decode(msgspec.json.encode(value))


def _chained(previous: str, body: bytes) -> str:
    return hashlib.sha256(previous.encode() + b"\n" + body).hexdigest()


def _audit_body(number: int, at: int, actor: str, action: str, subject: str, detail: Any) -> bytes:
    return msgspec.json.encode([number, at, actor, action, subject, detail], order="deterministic")


def _clean(text: str) -> str:
    """Text from outside as one bounded line: PostgreSQL holds no NUL, a dashboard row no line breaks."""
    return "".join(sign if sign.isprintable() else " " for sign in text[:TEXT_LIMIT])


def _short(text: str, limit: int, what: str) -> str:
    if len(text) > limit or not text.isprintable():
        raise BadInput(f"{what} {text[:limit]!r} is longer than {limit} characters or not printable")
    return text


def _count(value: int) -> int:
    if not 0 <= value <= LARGEST:
        raise BadInput(f"{value} is not a count or a time between 0 and 2^53")
    return value


def _first_line(error: sa.exc.DBAPIError) -> str:
    return (str(error.orig).strip() or type(error).__name__).splitlines()[0]
