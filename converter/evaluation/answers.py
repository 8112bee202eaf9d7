"""The answers that a model has given, kept so that none is asked for twice."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from converter.errors import OutputError, said


class Answers:
    """Answers by question, both of them JSON: what is read from the file can be wrong, but it cannot run code."""

    def __init__(self, path: Path) -> None:
        """Open the file; one that is damaged is begun anew.

        Raises:
            OutputError: when it cannot be written.
        """
        self.path = path
        with self._told():
            try:
                self.database = _opened(path)
            except sqlite3.OperationalError:  # it is another's at the moment, or the disk is full
                raise
            except sqlite3.DatabaseError:
                for part in ("", "-wal", "-shm"):
                    path.with_name(f"{path.name}{part}").unlink(missing_ok=True)
                self.database = _opened(path)

    def __enter__(self) -> Answers:
        """Return itself."""
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self.database.close()

    def __contains__(self, question: Any) -> bool:
        """Return whether the answer is known."""
        return self._row(question) is not None

    def __getitem__(self, question: Any) -> Any:
        """Return the answer, tuples as lists."""
        row = self._row(question)
        if row is None:
            raise KeyError(question)
        return json.loads(row[0])

    def __setitem__(self, question: Any, answer: Any) -> None:
        """Keep the answer, at once.

        Raises:
            OutputError: when it cannot be written.
        """
        row = (_digest(question), json.dumps(answer))
        with self._told():
            self.database.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", row)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise OutputError(
                f"{self.path}: must be a file that can be written, got {said(error)}. Free some space, or set HF_HOME."
            ) from error

    def _row(self, question: Any) -> Any:
        rows = self.database.execute("SELECT answer FROM answers WHERE question = ?", (_digest(question),))
        return rows.fetchone()


def _opened(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, isolation_level=None)  # each statement is a transaction
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = NORMAL")
    database.execute("CREATE TABLE IF NOT EXISTS answers (question TEXT PRIMARY KEY, answer TEXT NOT NULL)")
    return database


def _digest(question: Any) -> str:
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()
