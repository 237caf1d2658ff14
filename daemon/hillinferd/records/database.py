"""The catalogue file: checksummed records in SQLite, and a counter beside it that shows a lost commit."""

from __future__ import annotations

import json
import os
import sqlite3
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from hillinfer_core.errors import DamagedCatalogue, DeviceUnavailable, PoolFull, VersionMismatch

from ..logs import get_logger

log = get_logger(__name__)

FORMAT = 1
"""Version of the records; a file of another version is refused."""

_SCHEMA = """
CREATE TABLE record (
    kind TEXT NOT NULL, context INTEGER NOT NULL, layer INTEGER NOT NULL, first INTEGER NOT NULL,
    body BLOB NOT NULL, crc INTEGER NOT NULL, PRIMARY KEY (kind, context, layer, first)
) WITHOUT ROWID
"""


_SEQUENCE = struct.Struct("<QI")


@dataclass(frozen=True)
class Key:
    """What names a record: its kind, and as far as they apply the context, the layer and the first token."""

    kind: str
    context: int = 0
    layer: int = 0
    first: int = 0


_META = Key("meta")


class Database:
    """Records by :class:`Key`, changed in transactions that survive a crash and a loss of power.

    ``path`` is made if it does not exist. Every record carries a CRC-32 of its key and body. SQLite does not
    check the pages of a database, nor can it tell a damaged end of its log from an unfinished write: the file
    ``path`` + ".sequence" holds the number of the last commit, and a database that is behind it is refused.

    With ``salvage`` lost commits and a lost counter are forgiven, and contexts with damaged records deleted:
    ``salvaged`` has their numbers. Files that root makes are given to ``owner``, a user and a group.

    Opening reads and checks all of it. One thread at a time; every method blocks and raises
    :class:`DamagedCatalogue`, :class:`PoolFull` or :class:`DeviceUnavailable`.
    """

    def __init__(self, path: Path, *, salvage: bool = False, owner: tuple[int, int] | None = None) -> None:
        self._path = path
        self._salvage = salvage
        self._owner = owner
        self._sequence_path = path.with_name(path.name + ".sequence")
        self.fresh = not os.path.exists(path) or path.stat().st_size == 0
        self.salvaged: set[int] = set()
        with self._typed():
            with suppress(OSError):  # SQLite says better what is wrong.
                os.close(self._made(path, os.O_RDWR | os.O_CLOEXEC))
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._sequence_fd = -1
            try:
                self._open()
            except BaseException as error:
                self._db.close()
                if self._sequence_fd >= 0:
                    os.close(self._sequence_fd)
                if isinstance(error, OSError):
                    raise self._damaged(f"{self._sequence_path.name}: {error.strerror}") from None
                raise

    @property
    def pool_id(self) -> str:
        """The pool that the records belong to, empty while there is none."""
        return self._pool_id

    def bind(self, pool_id: str) -> None:
        """Let the records belong to a pool from now on."""
        with self.transaction():
            self._pool_id = pool_id

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Make the changes inside durable together, or none of them."""
        with self._typed():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._sequence += 1
                self._write(_META, self._meta())
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                self._load_meta()
                raise
            try:
                self._write_sequence()
            except OSError as error:
                # A counter that lags refuses nothing; the commit is made.
                log.warning("the catalogue's counter was not written", path=self._sequence_path, error=error)

    def put(self, key: Key, body: bytes) -> None:
        """Write a record in place of any that is there; inside :meth:`transaction`."""
        if self._get(key) is None:
            self._records += 1
        self._write(key, body)

    def drop(self, key: Key) -> None:
        """Delete a record if there is one; inside :meth:`transaction`."""
        values = (key.kind, key.context, key.layer, key.first)
        query = "DELETE FROM record WHERE kind = ? AND context = ? AND layer = ? AND first = ?"
        self._records -= self._db.execute(query, values).rowcount

    def delete(self, context: int) -> None:
        """Delete all records of a context; inside :meth:`transaction`."""
        gone = self._db.execute("DELETE FROM record WHERE context = ?", (context,)).rowcount
        self._records -= gone

    def get(self, key: Key) -> bytes | None:
        """Return the body of a record, or None if there is none."""
        with self._typed():
            return self._get(key)

    def all(
        self, kind: str, context: int | None = None, layer: int | None = None
    ) -> Iterator[tuple[Key, bytes]]:
        """Yield the records of a kind, of one context and layer if they are named, ascending by key."""
        named = {"kind": kind, "context": context, "layer": layer}
        wanted = {name: value for name, value in named.items() if value is not None}
        # Equal, and not between: of several ranges SQLite's index serves only the first.
        terms = " AND ".join(f"{name} = :{name}" for name in wanted)
        query = (
            f"SELECT kind, context, layer, first, body, crc FROM record WHERE {terms} "
            "ORDER BY context, layer, first"
        )
        with self._typed():
            for *parts, body, crc in self._db.execute(query, wanted):
                yield Key(*parts), self._checked(Key(*parts), body, crc)

    def settle(self) -> None:
        """Move the log into the database file, so that later damage to the log can cost nothing."""
        with self._typed():
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        """Settle and close."""
        try:
            self.settle()
        finally:
            self._db.close()
            os.close(self._sequence_fd)

    def _open(self) -> None:
        for pragma in ("locking_mode = EXCLUSIVE", "journal_mode = WAL", "synchronous = FULL"):
            self._db.execute(f"PRAGMA {pragma}")
        self._sequence, self._records, self._pool_id = 0, 0, ""
        if not self._db.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
            # Its making may have been cut short.
            self.fresh = True
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        makes = self._made if self.fresh or self._salvage else os.open
        self._sequence_fd = makes(self._sequence_path, flags)
        if self.fresh:
            # Before the first commit: a catalogue without its counter would be refused.
            self._write_sequence()
            os.fsync(self._sequence_fd)
            self._db.execute("BEGIN IMMEDIATE")
            self._db.execute(_SCHEMA)
            self._write(_META, self._meta())
            self._db.execute("COMMIT")
            return
        problems = [row[0] for row in self._db.execute("PRAGMA integrity_check(1)") if row[0] != "ok"]
        if problems:
            raise self._damaged(str(problems[0]))
        self._load_meta()
        if self._salvage:
            self._salvage_records()
            self._write_sequence()
        count = sum(1 for _ in self._every())
        if count != self._records + 1:
            raise self._damaged(f"{count - 1} of {self._records} records are there")
        if self._sequence < self._read_sequence():
            raise self._damaged("its last commits are missing")

    def _made(self, path: Path, flags: int) -> int:
        """Open a file, made if there is none, for its owner alone: it holds rows. SQLite's log is like it."""
        try:
            fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            return os.open(path, flags | os.O_CREAT, 0o600)
        if self._owner and os.geteuid() == 0:
            try:
                os.fchown(fd, *self._owner)
            except OSError as error:
                log.warning("a file of the catalogue stays root's", path=path, error=error)
        return fd

    def _salvage_records(self) -> None:
        keys = "kind, context, layer, first"
        known = {row[0] for row in self._db.execute("SELECT context FROM record WHERE kind = 'context'")}
        for *parts, body, crc in self._db.execute(f"SELECT {keys}, body, crc FROM record"):
            key = Key(*parts)
            whole = isinstance(body, bytes) and _crc(key, body) == crc
            if key != _META and not (whole and key.context in known):
                self.salvaged.add(key.context)
        self._db.execute("BEGIN IMMEDIATE")
        for context in self.salvaged:
            self._db.execute("DELETE FROM record WHERE context = ? AND kind != 'meta'", (context,))
        self._records = self._db.execute("SELECT count(*) FROM record WHERE kind != 'meta'").fetchone()[0]
        self._write(_META, self._meta())
        self._db.execute("COMMIT")

    def _every(self) -> Iterator[tuple[Key, bytes]]:
        for *parts, body, crc in self._db.execute(
            "SELECT kind, context, layer, first, body, crc FROM record"
        ):
            yield Key(*parts), self._checked(Key(*parts), body, crc)

    def _meta(self) -> bytes:
        meta = {"format": FORMAT, "sequence": self._sequence, "records": self._records, "pool": self._pool_id}
        return json.dumps(meta).encode()

    def _load_meta(self) -> None:
        body = self._get(_META)
        if body is None:
            raise self._damaged("its first record is missing")
        meta = json.loads(body)  # written by us: its checksum has just been verified
        if meta["format"] != FORMAT:
            raise VersionMismatch(
                f"the catalogue {self._path} has format {meta['format']}, this daemon knows {FORMAT}; "
                "use the hillinfer that wrote it"
            )
        self._sequence, self._records, self._pool_id = meta["sequence"], meta["records"], meta["pool"]

    def _get(self, key: Key) -> bytes | None:
        row = self._db.execute(
            "SELECT body, crc FROM record WHERE kind = ? AND context = ? AND layer = ? AND first = ?",
            (key.kind, key.context, key.layer, key.first),
        ).fetchone()
        return None if row is None else self._checked(key, *row)

    def _write(self, key: Key, body: bytes) -> None:
        values = (key.kind, key.context, key.layer, key.first, body, _crc(key, body))
        self._db.execute("INSERT OR REPLACE INTO record VALUES (?, ?, ?, ?, ?, ?)", values)

    def _checked(self, key: Key, body: object, crc: object) -> bytes:
        if not isinstance(body, bytes) or _crc(key, body) != crc:
            raise self._damaged(f"a record of kind {key.kind!r} fails its checksum")
        return body

    def _write_sequence(self) -> None:
        number = struct.pack("<Q", self._sequence)
        os.pwrite(self._sequence_fd, _SEQUENCE.pack(self._sequence, zlib.crc32(number)), 0)

    def _read_sequence(self) -> int:
        try:
            number, crc = _SEQUENCE.unpack(os.pread(self._sequence_fd, 2 * _SEQUENCE.size, 0))
        except (OSError, struct.error):
            raise self._damaged(f"{self._sequence_path.name} cannot be read") from None
        if zlib.crc32(struct.pack("<Q", number)) != crc:
            raise self._damaged(f"{self._sequence_path.name} fails its checksum")
        return int(number)

    def _damaged(self, what: str) -> DamagedCatalogue:
        return DamagedCatalogue(
            f"the catalogue {self._path} is damaged: {what}; restore it together with its pool from a "
            "copy, or see what can be kept with `hillinferctl fsck`"
        )

    @contextmanager
    def _typed(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            # The lower byte is the class of an error, as sqlite.org/rescode.html has it.
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
            if code == sqlite3.SQLITE_FULL:
                raise PoolFull(f"no room for the catalogue {self._path}; free space there") from error
            if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR):
                raise self._damaged(str(error)) from error
            raise DeviceUnavailable(f"the catalogue {self._path} cannot be used: {error}") from error
        except UnicodeDecodeError as error:
            # SQLite's own message may quote damaged names.
            raise self._damaged("there are letters in it that nobody wrote") from error


def _crc(key: Key, body: bytes) -> int:
    return zlib.crc32(body, zlib.crc32(f"{key.kind}/{key.context}/{key.layer}/{key.first}/".encode()))
