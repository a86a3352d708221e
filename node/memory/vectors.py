"""Remembered records as vectors: memory.db, sqlite-vec through apsw. The only home of both libraries, imported at first use.

Rules:
 * A file of its own. apsw brings its own SQLite; a second SQLite in the same process on the node's database would drop the first one's
   locks whenever it closes the file (docs/adr/0025): two libraries, two files.
 * Nothing is lost with this file: all of it can be made again from the table. So a damaged one is thrown away and begun anew, and a power
   cut may cost the last vectors (synchronous NORMAL; WAL keeps the file whole).
 * It holds the vectors of one model at a time. Those of another mean nothing beside them: the table is emptied when the model changes.
Limits: search is exact and looks at every vector of a scope, about 14 ms for 10,000 of 640 figures on one x86 core; a chunk of CHUNK
vectors is allotted at once.
"""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from protocol.errors import Unavailable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vector = NDArray[np.float32]  # (hidden,), of length 1

CHUNK = 128  # vectors; sqlite-vec's own 1,024 writes ten times slower, one by one, and as much more to the SD card
BUSY_MS = 2_000  # nobody else should hold this file; a command line may look
CACHE_KIB = 1_024
SCHEMA = 1  # user_version of the file
CURE = 'run deploy/install-node.sh again, or on a board without wheels of them set memory.use = "exact"'


class NoVectors(Unavailable):
    """There is no search by likeness now; exact answers go on. The message says what to do."""


class Vectors:
    """The file at `path`, opened at the first call. Any thread may call; one at a time.

    Every method raises NoVectors when the extension is missing or the file cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.remade = 0  # times a damaged file was begun anew
        self._lock = threading.RLock()
        self._connection: Any = None
        self._for = ""  # the model whose vectors the table holds

    def keys(self, model: str, size: int) -> set[str]:
        """Which entries have a vector of this model; opens the table for vectors of `size` figures, empty if it was another model's."""
        with self._using(model, size) as connection:
            return {key for (key,) in connection.execute("SELECT key FROM vectors")}

    def put(self, model: str, entries: Sequence[tuple[str, str, "Vector"]]) -> int:
        """Add (key, scope, vector)s of this model in one transaction; how many were new. A key's vector never changes."""
        if not entries:
            return 0
        new = 0
        with self._using(model, entries[0][2].size) as connection, connection:
            for key, scope, vector in entries:
                if not connection.execute("SELECT 1 FROM vectors WHERE key = ?", (key,)).fetchall():
                    blob = vector.astype("float32").tobytes()
                    connection.execute("INSERT INTO vectors (key, scope, vector) VALUES (?, ?, ?)", (key, scope, blob))
                    new += 1
        return new

    def nearest(self, model: str, vector: "Vector", *, scope: str, count: int) -> list[tuple[str, float]]:
        """The `count` most similar entries of the scope as (key, cosine), nearest first."""
        blob = vector.astype("float32").tobytes()
        query = "SELECT key, distance FROM vectors WHERE scope = ? AND vector MATCH ? AND k = ? ORDER BY distance"
        with self._using(model, vector.size) as connection:
            return [(key, 1.0 - distance) for key, distance in connection.execute(query, (scope, blob, count))]

    def one(self, model: str, size: int, key: str) -> "Vector | None":
        """The vector of an entry."""
        import numpy as np

        with self._using(model, size) as connection:
            found = connection.execute("SELECT vector FROM vectors WHERE key = ?", (key,)).fetchall()
        return np.frombuffer(found[0][0], dtype=np.float32) if found else None

    def drop(self, keys: Sequence[str]) -> None:
        """Forget these entries' vectors."""
        with self._lock:
            if not keys or (self._connection is None and not self.path.exists()):
                return
            with self._checked() as connection, connection:
                if self._for:
                    connection.executemany("DELETE FROM vectors WHERE key = ?", [(key,) for key in keys])

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection, self._for = None, ""

    @contextlib.contextmanager
    def _using(self, model: str, size: int) -> Iterator[Any]:
        """The connection, its table fit for this model."""
        with self._lock, self._checked() as connection:
            name = f"{model}/{size}"
            if self._for != name:
                with connection:
                    connection.execute("DROP TABLE IF EXISTS vectors")
                    connection.execute(
                        "CREATE VIRTUAL TABLE vectors USING vec0(key TEXT PRIMARY KEY, scope TEXT PARTITION KEY, "
                        f"vector FLOAT[{int(size)}] DISTANCE_METRIC=cosine, chunk_size={CHUNK})"
                    )
                    connection.execute("INSERT OR REPLACE INTO about VALUES ('model', ?)", (name,))
                self._for = name
            yield connection

    @contextlib.contextmanager
    def _checked(self) -> Iterator[Any]:
        """The open connection; a damaged file is closed and removed, so that the next call begins anew."""
        if self._connection is None:
            self._open()
        import apsw

        try:
            yield self._connection
        except (apsw.CorruptError, apsw.NotADBError) as error:
            self._throw_away()
            raise NoVectors(f"{self.path.name} is damaged and is made anew; exact answers go on") from error
        except apsw.Error as error:
            raise NoVectors(f"cannot use {self.path}: {error}; exact answers go on, is the disk full?") from error

    def _open(self) -> None:
        try:
            import apsw
            import sqlite_vec
        except ImportError as error:
            raise NoVectors(f"near answers and examples need apsw and sqlite-vec: {CURE}; exact answers go on") from error
        try:
            self._connect(apsw, sqlite_vec)
        except (apsw.CorruptError, apsw.NotADBError):
            self._throw_away()
            try:
                self._connect(apsw, sqlite_vec)
            except apsw.Error as error:
                raise NoVectors(f"cannot make {self.path}: {error}; exact answers go on") from error
        except apsw.Error as error:
            raise NoVectors(f"cannot open {self.path}: {error}; exact answers go on") from error

    def _connect(self, apsw: Any, sqlite_vec: Any) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        connection = apsw.Connection(str(self.path))
        try:
            connection.set_busy_timeout(BUSY_MS)
            connection.enable_load_extension(True)
            connection.load_extension(sqlite_vec.loadable_path())
            connection.enable_load_extension(False)
            for pragma in ("journal_mode = WAL", "synchronous = NORMAL", f"cache_size = -{CACHE_KIB}", "journal_size_limit = 4194304"):
                connection.execute(f"PRAGMA {pragma}").fetchall()
            with connection:
                if connection.execute("PRAGMA user_version").fetchall() != [(SCHEMA,)]:
                    for table in ("vectors", "about"):
                        connection.execute(f"DROP TABLE IF EXISTS {table}")
                    connection.execute(f"PRAGMA user_version = {SCHEMA}")
                connection.execute("CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID")
                kept = connection.execute("SELECT value FROM about WHERE name = 'model'").fetchall()
        except BaseException:
            connection.close()
            raise
        self._connection, self._for = connection, kept[0][0] if kept else ""

    def _throw_away(self) -> None:
        self.close()
        self.remade += 1
        for suffix in ("", "-wal", "-shm"):
            self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)


def size_on_disk(path: Path) -> int:
    """Bytes of the file and its journal."""
    files = (path.with_name(path.name + suffix) for suffix in ("", "-wal", "-shm"))
    return sum(file.stat().st_size for file in files if file.is_file())


def room_for(max_bytes: int, size: int) -> int:
    """How many vectors of `size` figures fit into `max_bytes`, journal and tables included."""
    journal, per_row = 8 << 20, 4 * size + 320  # measured: 10,000 of 640 are 26 MiB
    return max(0, (max_bytes - journal) // per_row)
