"""A database that holds studies: SQLite in the search's folder, or a server such as PostgreSQL.

Optuna creates the tables and checks their version. Passwords are used and never shown.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.storages import RDBStorage
from sqlalchemy import Connection, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import (
    ArgumentError,
    IntegrityError,
    InterfaceError,
    NoSuchModuleError,
    OperationalError,
    SQLAlchemyError,
)

from evolve.errors import SearchFileError, StorageError

T = TypeVar("T")

# A server that is not there is asked again after so many seconds, then twice as many, up to a limit.
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0
# A server that does not answer for so long is given up: the search ends as it would at a pause.
PATIENCE_S = 300.0
# A server behind a broken line is noticed within about a minute (options of libpq).
_LIBPQ = {
    "connect_timeout": 10,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,
}


class TakenError(StorageError):
    """What is there once only is there already."""


class Database:
    """A database, open.

    Args:
        folder: of study.db, where `url` is None.

    Attributes:
        optuna: Optuna's own view of it.
        shown: its URL, without passwords.

    Raises:
        SearchFileError: the URL is none, or its driver is missing.
        StorageError: it cannot be reached.
    """

    def __init__(self, folder: Path, url: str | None) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        made = parsed(folder, url)
        self.shown = without_secrets(made)
        self._is_server = made.get_backend_name() != "sqlite"
        whole = made.render_as_string(hide_password=False)
        try:
            # Optuna takes braces for a template.
            self.optuna = RDBStorage(
                whole.replace("{", "{{").replace("}", "}}"), engine_kwargs=_engine_options(made)
            )
        except ImportError as error:
            raise SearchFileError(
                f"--storage is {self.shown}, whose driver is missing ({error.__cause__ or error}); "
                f"install it, for PostgreSQL: pip install 'evolve-merge[postgresql]'"
            ) from error
        except (SQLAlchemyError, RuntimeError, ValueError) as error:
            raise StorageError(
                f"{self.shown} cannot be opened: {_reason(error)}; check that it is reachable"
            ) from error
        self.engine = self.optuna.engine
        if not self._is_server:
            event.listen(self.engine, "connect", _flush_every_commit)
            self.engine.dispose()  # of connections from before

    def let_read(self) -> None:
        """Let others read while this one writes: SQLite's write-ahead log, which stays on."""
        if not self._is_server:
            with self.engine.connect() as connection:
                connection.exec_driver_sql("PRAGMA journal_mode = WAL")

    def close(self) -> None:
        """Close every connection; a later transaction opens another."""
        self.engine.dispose()

    def transaction(self, work: Callable[[Connection], T], patience_s: float | None = None) -> T:
        """Do work in one transaction; where a server is not there, again after a while.

        The server may fall silent after it has committed: work must bear being done again.

        Args:
            patience_s: how long to wait for the server; None = PATIENCE_S.

        Raises:
            StorageError: it cannot be done, or the server did not come back.
        """
        wait = _FIRST_WAIT_S
        until = time.monotonic() + (PATIENCE_S if patience_s is None else patience_s)
        while True:
            try:
                with self.engine.begin() as connection:
                    return work(connection)
            except IntegrityError as error:
                raise TakenError(f"{self.shown}: {_reason(error)}") from error
            except SQLAlchemyError as error:
                # A file is there or it is not.
                is_away = self._is_server and isinstance(error, (OperationalError, InterfaceError))
                if not is_away or time.monotonic() + wait > until:
                    raise StorageError(
                        f"{self.shown}: {_reason(error)}; what was finished before is recorded, run the "
                        f"same command again once the storage is back"
                    ) from error
            time.sleep(wait)
            wait = min(2 * wait, _LONGEST_WAIT_S)


def without_secrets(url: URL) -> str:
    """Spell a URL without password: not with stars for it, so that the driver's own ways work."""
    secrets = [key for key in url.query if "pass" in key.lower() and key.lower() != "passfile"]
    return url._replace(password=None).difference_update_query(secrets).render_as_string()


def parsed(folder: Path, url: str | None) -> URL:
    """Read the URL of a database; None is study.db in the folder.

    Raises:
        SearchFileError: it is none.
    """
    if url is None:
        # Not from text, in which "?" begins a query and "%41" is a letter.
        return URL.create("sqlite", database=str(folder.resolve() / "study.db"))
    try:
        made = make_url(url)
        if made.drivername in ("postgres", "postgresql"):
            made = made.set(drivername="postgresql+psycopg")
        made.get_dialect()
    except (ArgumentError, NoSuchModuleError, ValueError):
        raise SearchFileError(
            "--storage is no database URL; write one such as postgresql://user@host/name"
        ) from None
    return made


def _engine_options(url: URL) -> dict[str, Any]:
    if url.get_backend_name() == "sqlite":
        return {"connect_args": {"timeout": 60}}
    options: dict[str, Any] = {"pool_pre_ping": True}  # candidates take minutes, and lines break
    if url.get_driver_name() in ("psycopg", "psycopg2"):
        options["connect_args"] = {k: v for k, v in _LIBPQ.items() if k not in url.query}
    return options


def _flush_every_commit(connection: Any, record: Any) -> None:
    """Make what is committed outlast a power failure, which WAL alone does not."""
    connection.execute("PRAGMA synchronous = FULL")


def _reason(error: BaseException) -> str:
    return f"{str(error).splitlines()[0] if str(error) else type(error).__name__:.200}"
