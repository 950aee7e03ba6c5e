"""The storage: Optuna's format in few statements, in SQLite and on a server; one run at a time."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
import pytest
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState

from evolve.errors import ResumeRefusedError, SearchFileError, StorageError
from evolve.study import alone
from evolve.study.alone import leased
from evolve.study.database import parsed, without_secrets
from evolve.study.storage import Storage

from .postgres import PASSWORD, PostgreSQL

DISTRIBUTIONS: dict[str, BaseDistribution] = {
    "w": FloatDistribution(0.0, 1.5),
    "eps": FloatDistribution(1e-6, 1.0, log=True),
    "density": FloatDistribution(0.1, 1.0, step=0.1),
    "layer": IntDistribution(0, 8),
    "method": CategoricalDistribution(("ties", "linear", None, True)),
}
PARAMS = [
    {"w": 0.1 + 0.2, "eps": 3e-5, "density": 0.3, "layer": 4, "method": "linear"},
    {"w": 1.5, "method": None},
    {"w": 0.0, "eps": 1.0, "density": 1.0, "layer": 8, "method": True},
]


class Database:
    """Where a test keeps its study.

    Attributes:
        folder, url: as for `Storage.open`.
        of_optuna: the URL for Optuna itself.
    """

    def __init__(self, folder: Path, url: str | None) -> None:
        self.folder, self.url = folder, url
        self.name = folder.name
        self.of_optuna = url.replace("://", "+psycopg://") if url else f"sqlite:///{folder}/study.db"

    def made(self, n_values: int = 2) -> Storage:
        return Storage.made(self.folder, self.url, self.name, n_values)

    def opened(self) -> Storage:
        storage = Storage.open(self.folder, self.url, self.name)
        assert storage is not None
        return storage

    def study(self) -> optuna.Study:
        return optuna.load_study(study_name=self.name, storage=self.of_optuna)


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Database:
    if request.param == "sqlite":
        return Database(tmp_path, None)
    return Database(tmp_path, request.getfixturevalue("postgresql").url)


@pytest.fixture
def remote(postgresql: PostgreSQL, tmp_path: Path) -> Database:
    return Database(tmp_path, postgresql.url)


def written(database: Database) -> tuple[Storage, list[FrozenTrial]]:
    """A study with trials of every kind."""
    storage = database.made()
    attributes = {"known": "x", "attempts": 1}
    trials = [storage.create_trial(i, p, DISTRIBUTIONS, attributes) for i, p in enumerate(PARAMS)]
    storage.set_attributes(trials[1], {"attempts": 2})
    scored = {"told": 0, "scores": {"a": 1.0}}
    storage.tell(trials[2], TrialState.COMPLETE, [0.25, float("inf")], scored, {"constraints:c": 0.5})
    failed = {"told": 1, "failure": {"kind": "merge", "text": "x"}}
    storage.tell(trials[0], TrialState.FAIL, None, failed, {})
    storage.keep_notes({"identity": "{}", "x": '"1"'})
    storage.keep_notes({"x": '"2"'})
    return storage, trials


def test_what_is_kept_in_memory_is_what_a_reader_finds(database: Database) -> None:
    _, trials = written(database)
    assert database.opened().trials() == trials
    assert database.opened().notes() == {"identity": "{}", "x": '"2"'}


def test_optuna_reads_what_is_written_here(database: Database) -> None:
    _, trials = written(database)
    study = database.study()
    assert study.get_trials() == trials
    assert [direction.name for direction in study.directions] == ["MAXIMIZE"] * 2
    assert study.user_attrs == {"identity": "{}", "x": '"2"'}


def test_what_optuna_writes_is_read_here(database: Database) -> None:
    study = optuna.create_study(
        study_name=database.name, storage=database.of_optuna, directions=["maximize"] * 2
    )
    for _ in range(3):
        trial = study.ask(DISTRIBUTIONS)
        trial.set_user_attr("told", trial.number)
        trial.set_constraint("c", 0.25)
        study.tell(trial, [1.0, float("-inf")])
    study.ask(DISTRIBUTIONS)
    assert database.opened().trials() == study.get_trials()


@pytest.mark.parametrize("name", ["a?b", "50%25off", "{x}"])
def test_a_folder_may_have_a_name_that_a_url_would_read_otherwise(name: str, tmp_path: Path) -> None:
    database = Database(tmp_path / name, None)
    database.folder.mkdir()
    _, trials = written(database)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (database.folder / "study.db").is_file()
    assert database.opened().trials() == database.made().trials() == trials


def test_a_second_writer_is_noticed_and_leaves_no_trial(database: Database) -> None:
    storage, _ = written(database)
    other = database.made()
    foreign = other.create_trial(3, PARAMS[0], DISTRIBUTIONS, {})
    with pytest.raises(StorageError, match="another `evolve run` writes"):
        storage.create_trial(3, PARAMS[1], DISTRIBUTIONS, {})
    (mine,) = storage.trials()[3:]
    other.tell(foreign, TrialState.FAIL, None, {"told": 2}, {})
    with pytest.raises(StorageError, match="told by another"):
        storage.tell(mine, TrialState.FAIL, None, {"told": 3}, {})
    assert [trial.number for trial in database.study().get_trials()] == [0, 1, 2, 3]


def test_a_transaction_is_whole_or_not_there(database: Database) -> None:
    storage, trials = written(database)
    before = database.opened().trials()
    with renamed(storage, "trial_system_attributes", "away"), pytest.raises(StorageError):
        storage.tell(trials[1], TrialState.COMPLETE, [1.0, 2.0], {"told": 2}, {"constraints:c": 0.5})
    assert database.opened().trials() == before == trials


@contextmanager
def renamed(storage: Storage, table: str, to: str) -> Iterator[None]:
    """Take a table away for a while: statements before those that need it succeed."""
    with storage._database.engine.begin() as connection:
        connection.exec_driver_sql(f"ALTER TABLE {table} RENAME TO {to}")
    yield
    with storage._database.engine.begin() as connection:
        connection.exec_driver_sql(f"ALTER TABLE {to} RENAME TO {table}")


def test_a_reader_does_not_wait_for_a_writer(database: Database) -> None:
    storage, _ = written(database)
    with storage._database.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE trials SET state = 'FAIL'")  # not committed yet
        states = [trial.state for trial in database.opened().trials()]
    assert states == [TrialState.FAIL, TrialState.RUNNING, TrialState.COMPLETE]


# ---- one run at a time ------------------------------------------------------------------------


def test_a_second_run_elsewhere_is_refused_while_the_first_works(remote: Database) -> None:
    first, second = remote.made(), remote.made()
    with leased(first):
        with pytest.raises(ResumeRefusedError, match="another `evolve run` is at work"), leased(second):
            pass
        first.create_trial(0, PARAMS[0], DISTRIBUTIONS, {})
    with leased(second):  # it was given back
        second.create_trial(1, PARAMS[1], DISTRIBUTIONS, {})


def test_a_run_that_was_killed_here_leaves_nothing_to_wait_for(remote: Database) -> None:
    remote.made()
    code = f"""
import os, pathlib
from evolve.study.alone import leased
from evolve.study.database import parsed, without_secrets
from evolve.study.storage import Storage
with leased(Storage.made(pathlib.Path({str(remote.folder)!r}), {remote.url!r}, {remote.name!r}, 1)):
    os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert alone.HOLDER in remote.opened().notes()
    with leased(remote.made()):
        pass


def test_a_run_that_was_not_seen_for_long_is_replaced_and_writes_no_more(
    remote: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = remote.made(), remote.made()
    with leased(first):
        first.create_trial(0, PARAMS[0], DISTRIBUTIONS, {})
        monkeypatch.setattr(alone, "EXPIRY_S", 0.0)
        with leased(second):
            with pytest.raises(StorageError, match="taken this search over"):
                first.create_trial(1, PARAMS[1], DISTRIBUTIONS, {})
            second.create_trial(1, PARAMS[1], DISTRIBUTIONS, {})
        second.create_trial(2, PARAMS[2], DISTRIBUTIONS, {})
    assert [trial.params for trial in remote.opened().trials()] == PARAMS


def test_a_run_renews_its_lease(remote: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alone, "_RENEWED_EVERY_S", 0.05)
    storage = remote.made()
    with leased(storage):
        before = storage.notes()[alone.SEEN]
        until = time.monotonic() + 10
        while storage.notes()[alone.SEEN] == before:
            assert time.monotonic() < until
            time.sleep(0.05)


# ---- a server that goes away ------------------------------------------------------------------


def test_a_server_that_comes_back_has_everything_once(postgresql: PostgreSQL, remote: Database) -> None:
    storage, trials = written(remote)

    def work() -> None:
        for number in range(3, 6):
            storage.create_trial(number, PARAMS[0], DISTRIBUTIONS, {})
        storage.tell(trials[1], TrialState.COMPLETE, [1.0, 1.0], {"told": 2}, {})

    postgresql.stop()
    working = threading.Thread(target=work)
    working.start()
    time.sleep(0.3)
    postgresql.start()
    working.join(timeout=30)
    found = remote.opened().trials()
    assert [trial.number for trial in found] == list(range(6))
    assert found[1].state == TrialState.COMPLETE


def test_a_server_that_stays_away_is_an_error_without_the_password(
    postgresql: PostgreSQL, remote: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = remote.made()
    postgresql.stop()
    try:
        with pytest.raises(StorageError, match="run the same command again") as raised:
            storage.keep_notes({"x": "1"}, patience_s=0)
        with pytest.raises(StorageError, match="cannot be opened") as unopened:
            remote.made()
    finally:
        postgresql.start()
    assert PASSWORD not in str(raised.value) + str(unopened.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://u:secret@h/d", "postgresql+psycopg://u@h/d"),
        ("postgres://h/d?password=secret&sslmode=require", "postgresql+psycopg://h/d?sslmode=require"),
        ("postgresql://h/d?sslpassword=secret&user=u", "postgresql+psycopg://h/d?user=u"),
    ],
)
def test_a_url_is_shown_without_its_secrets(url: str, shown: str, tmp_path: Path) -> None:
    assert without_secrets(parsed(tmp_path, url)) == shown


@pytest.mark.parametrize("url", ["nonsense", "nosuchdatabase://h/d", "postgresql+nosuchdriver://h/d"])
def test_what_is_no_url_is_said_before_anything_begins(url: str, tmp_path: Path) -> None:
    with pytest.raises(SearchFileError, match="--storage"):
        Storage.made(tmp_path, url, "s", 1)
