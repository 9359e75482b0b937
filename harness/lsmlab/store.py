"""The outcome store: one SQLite file, one row an outcome, one transaction each; kill -9 loses nothing recorded."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from lsmlab import paths
from lsmlab.errors import DefinitionError, StoreError
from lsmlab.outcome import Outcome

VERSION = 1
APPLICATION = 0x6C736D6C
"""SQLite's application_id: a database without it is not ours."""
SCHEMA = """
CREATE TABLE outcomes (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    recorded TEXT NOT NULL,
    scenario TEXT NOT NULL,
    lab TEXT NOT NULL,
    framework TEXT NOT NULL,
    verdict TEXT NOT NULL,
    expected TEXT NOT NULL,
    document TEXT NOT NULL
) STRICT;
CREATE INDEX outcomes_by_scenario ON outcomes (scenario, lab, framework);
"""


class Store:
    """The store in `path`, or in the state folder. Made on first use. Safe for several processes and threads."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or paths.make(paths.state()) / "outcomes.sqlite"

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            # FULL: the row is on the disk before `add` returns (https://www.sqlite.org/pragma.html#pragma_synchronous)
            connection = sqlite3.connect(self.path, timeout=30, isolation_level=None)
            with contextlib.closing(connection):
                self._migrate(connection)
                if connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
                    # Needs the file alone for a moment; where another holds it, this once without: as durable, slower
                    with contextlib.suppress(sqlite3.OperationalError):
                        connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("PRAGMA synchronous=FULL")
                yield connection
        except sqlite3.Error as error:
            raise StoreError(
                f"{self.path}: {error}",
                hint="If the file is damaged, move it away; lsmlab then begins a new one. Nothing was overwritten.",
            ) from error

    def _migrate(self, connection: sqlite3.Connection) -> None:
        # In this order: both are set by one commit, which may come between the two
        owner, found = (connection.execute(f"PRAGMA {p}").fetchone()[0] for p in ("application_id", "user_version"))
        if (found, owner) == (VERSION, APPLICATION):
            return
        if owner == APPLICATION:
            raise StoreError(
                f"{self.path}: written by a newer lsmlab (store version {found}; this one knows {VERSION})",
                hint="Upgrade lsmlab.",
            )
        connection.execute("BEGIN IMMEDIATE")
        made_meanwhile = connection.execute("PRAGMA application_id").fetchone()[0] == APPLICATION
        empty = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0] == 0
        if not made_meanwhile and (found or owner or not empty):
            connection.execute("ROLLBACK")
            raise StoreError(
                f"{self.path}: a database of another program",
                hint="Move it away; lsmlab then begins a store of its own. Nothing was changed.",
            )
        if not made_meanwhile:
            for statement in SCHEMA.split(";"):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {VERSION}")
            connection.execute(f"PRAGMA application_id = {APPLICATION}")
        connection.execute("COMMIT")

    def add(self, outcome: Outcome) -> int:
        """Keep one outcome; its number. When this returns, the outcome survives a crash of machine and program."""
        with self._open() as connection:
            cursor = connection.execute(
                "INSERT INTO outcomes (id, recorded, scenario, lab, framework, verdict, expected, document)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    outcome.id,
                    outcome.recorded,
                    outcome.scenario,
                    outcome.lab,
                    outcome.framework.value,
                    outcome.verdict.value,
                    outcome.expected.value,
                    outcome.model_dump_json(exclude={"as_expected"}),
                ),
            )
            return int(cursor.lastrowid or 0)

    def update(self, outcome: Outcome) -> None:
        """Keep more of an outcome that is kept already: its record is replaced whole, or not at all."""
        with self._open() as connection:
            document = outcome.model_dump_json(exclude={"as_expected"})
            found = connection.execute("UPDATE outcomes SET document = ? WHERE id = ?", (document, outcome.id))
            if found.rowcount != 1:
                raise StoreError(f"{self.path}: outcome {outcome.id} is not there any more")

    def recent(self, limit: int = 20) -> list[tuple[int, Outcome]]:
        """The newest outcomes, newest first."""
        with self._open() as connection:
            rows = connection.execute(
                "SELECT number, document FROM outcomes ORDER BY number DESC LIMIT ?", (limit,)
            ).fetchall()
        return [(number, self._read(number, document)) for number, document in rows]

    def newest(self) -> list[Outcome]:
        """The newest outcome of each scenario, lab and framework, oldest first."""
        with self._open() as connection:
            rows = connection.execute(
                "SELECT number, document FROM outcomes WHERE number IN"
                " (SELECT max(number) FROM outcomes GROUP BY scenario, lab, framework) ORDER BY number"
            ).fetchall()
        return [self._read(number, document) for number, document in rows]

    def proven(self) -> dict[str, str]:
        """When an outcome of a lab was last as expected, ISO 8601, of each lab that has one."""
        with self._open() as connection:
            rows = connection.execute(
                "SELECT lab, max(recorded) FROM outcomes WHERE verdict = expected GROUP BY lab"
            ).fetchall()
        return dict(rows)

    def get(self, key: str) -> tuple[int, Outcome]:
        """The outcome with the number or id (or its beginning) `key`. Raises DefinitionError where there is none."""
        number = int(key) if key.isascii() and key.isdigit() and len(key) < 18 else -1
        queries = (
            ("number = ?1", number),
            ("id = ?1", key),
            ("length(?1) >= 4 AND substr(id, 1, length(?1)) = ?1", key),
        )
        rows: list[tuple[int, str]] = []
        with self._open() as connection:
            for condition, value in queries:
                statement = f"SELECT number, document FROM outcomes WHERE {condition} LIMIT 2"  # noqa: S608 - from above
                rows = rows or connection.execute(statement, (value,)).fetchall()
        if len(rows) != 1:
            problem = "no outcome" if not rows else "more than one outcome"
            raise DefinitionError(f"{problem} is called {key!r}", hint="`lsmlab show` lists the newest.")
        return rows[0][0], self._read(*rows[0])

    def count(self) -> int:
        """How many outcomes are kept."""
        with self._open() as connection:
            return int(connection.execute("SELECT count(*) FROM outcomes").fetchone()[0])

    def _read(self, number: int, document: str) -> Outcome:
        try:
            return Outcome.model_validate_json(document)
        except ValidationError as error:
            raise StoreError(f"{self.path}: outcome {number} cannot be read: {error.errors()[0]['msg']}") from error
