"""The ledger's tables, as SQLAlchemy Core sees them. No queries here; those are in `ledger` (writes) and `dashboard/views/` (reads).

Every change needs a migration in `migrations/versions`; a test compares what the migrations build with what stands here.
Times are seconds since 1970, UTC, on the coordinator's clock, but for columns called `at`, which a node wrote and may be wrong.
"""

from sqlalchemy import JSON, BigInteger, Boolean, Column, ForeignKey, Index, Integer, LargeBinary, MetaData, String, Table, UniqueConstraint

metadata = MetaData()

Big = BigInteger().with_variant(Integer, "sqlite")  # SQLite counts rows up by itself only for INTEGER
Name = String(48)
Digest = String(64)

nodes = Table(
    "nodes", metadata,
    Column("name", Name, primary_key=True),
    Column("role", String(32), nullable=False),
    Column("state", String(32), nullable=False),
    Column("boot", String(64), nullable=False),
    Column("sequence", BigInteger, nullable=False),
    Column("connection", BigInteger, nullable=False, server_default="0"),
    Column("release", BigInteger, nullable=False),
    Column("model_digest", Digest, nullable=False),
    Column("adapter_digest", Digest, nullable=False),
    Column("at", BigInteger, nullable=False),
    Column("sleeping_until", BigInteger, nullable=False),
    Column("answered", BigInteger, nullable=False),
    Column("escalated", BigInteger, nullable=False),
    Column("waiting", BigInteger, nullable=False),
    Column("version", String(64), nullable=False),
    Column("first_seen", BigInteger, nullable=False),
    Column("last_seen", BigInteger, nullable=False),
)  # fmt: skip

boots = Table(
    "boots", metadata,
    Column("id", Big, primary_key=True, autoincrement=True),
    Column("node", Name, ForeignKey("nodes.name"), nullable=False),
    Column("boot", String(64), nullable=False),
    Column("first_seen", BigInteger, nullable=False),
    UniqueConstraint("node", "boot", name="boots_node_boot"),
)  # fmt: skip

statuses = Table(
    "statuses", metadata,
    Column("id", Big, primary_key=True, autoincrement=True),
    Column("node", Name, ForeignKey("nodes.name"), nullable=False),
    Column("boot", String(64), nullable=False),
    Column("sequence", BigInteger, nullable=False),
    Column("state", String(32), nullable=False),
    Column("release", BigInteger, nullable=False),
    Column("answered", BigInteger, nullable=False),
    Column("escalated", BigInteger, nullable=False),
    Column("waiting", BigInteger, nullable=False),
    Column("received", BigInteger, nullable=False),
    Index("statuses_node", "node", "id"),
    sqlite_autoincrement=True,
)  # fmt: skip

events = Table(
    "events", metadata,
    Column("number", Big, primary_key=True, autoincrement=True),
    Column("id", String(128), nullable=False, unique=True),
    Column("node", Name, nullable=False),
    Column("kind", String(48), nullable=False),
    Column("at", BigInteger, nullable=False),
    Column("received", BigInteger, nullable=False),
    Column("figures", JSON, nullable=False),
    Column("detail", JSON, nullable=False),
    Index("events_kind", "kind", "received"),
    Index("events_node", "node", "number"),
    sqlite_autoincrement=True,
)  # fmt: skip

releases = Table(
    "releases", metadata,
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("task", String(128), nullable=False),
    Column("digest", Digest, nullable=False),
    Column("manifest", JSON, nullable=False),
    Column("evidence", JSON(none_as_null=True), nullable=True),
    Column("note", String(500), nullable=False),
    Column("published", BigInteger, nullable=False),
)  # fmt: skip

rounds = Table(
    "rounds", metadata,
    Column("id", Big, primary_key=True, autoincrement=True),
    Column("release", BigInteger, nullable=False),
    Column("asked", JSON, nullable=False),
    Column("opened", BigInteger, nullable=False),
    Column("deadline", BigInteger, nullable=False),
    Column("closed", BigInteger, nullable=True),
    Column("result", JSON(none_as_null=True), nullable=True),
)  # fmt: skip

adapters = Table(
    "adapters", metadata,
    Column("id", Big, primary_key=True, autoincrement=True),
    Column("round", Big, ForeignKey("rounds.id"), nullable=False),
    Column("node", Name, nullable=False),
    Column("digest", Digest, nullable=False),
    Column("header", JSON(none_as_null=True), nullable=True),
    Column("accepted", Boolean, nullable=False),
    Column("reason", String(500), nullable=False),
    Column("received", BigInteger, nullable=False),
    UniqueConstraint("round", "node", "digest", name="adapters_round_node_digest"),
)  # fmt: skip

refused = Table(
    "refused", metadata,
    Column("id", Big, primary_key=True, autoincrement=True),
    Column("topic", String(255), nullable=False),
    Column("payload", LargeBinary, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("reason", String(500), nullable=False),
    Column("received", BigInteger, nullable=False),
    sqlite_autoincrement=True,
)  # fmt: skip

users = Table(
    "users", metadata,
    Column("name", Name, primary_key=True),
    Column("password", String(255), nullable=False),
    Column("created", BigInteger, nullable=False),
)  # fmt: skip

sessions = Table(
    "sessions", metadata,
    Column("token_hash", Digest, primary_key=True),
    Column("user", Name, ForeignKey("users.name"), nullable=False),
    Column("csrf", String(64), nullable=False),
    Column("created", BigInteger, nullable=False),
    Column("last_used", BigInteger, nullable=False),
    Column("expires", BigInteger, nullable=False),
)  # fmt: skip

audit = Table(
    "audit", metadata,
    Column("id", Big, primary_key=True, autoincrement=False),
    Column("at", BigInteger, nullable=False),
    Column("actor", String(64), nullable=False),
    Column("action", String(64), nullable=False),
    Column("subject", String(255), nullable=False),
    Column("detail", JSON, nullable=False),
    Column("previous", Digest, nullable=False),
    Column("hash", Digest, nullable=False),
)  # fmt: skip
