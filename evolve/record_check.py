"""What a storage holds, checked when a study is opened: files and databases are changed by hand.

After that the search trusts its record. Whatever is wrong is one line that names the place.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from evolve.errors import SearchFileError, StorageError
from evolve.redaction import redacted
from merge_core.errors import MergeError, field_path, reason, shown

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from evolve.space import SearchSpace

_REPAIR = "restore it from a copy, or give another --storage-path"
_MOST_FAULTS = 5


class _Failure(BaseModel):
    kind: str
    text: str


class _Attributes(BaseModel):
    """What trials carry; samplers keep more, which they check by themselves."""

    model_config = ConfigDict(strict=True)

    attempts: int = 1
    told: int = 0
    known: str = ""
    scored_as: str = ""
    documents: int = 0
    objective: float = 0.0
    scores: dict[str, float] = {}
    seconds: dict[str, float] = {}
    standard_errors: dict[str, float] = {}
    violations: dict[str, float] = {}
    failure: _Failure | None = None


class _Rating(BaseModel):
    values: list[float]
    objective: float
    violations: dict[str, float]


class _Finalist(BaseModel):
    number: int
    scores: dict[str, float]
    rating: _Rating


class _Finals(BaseModel):
    finished: int
    documents: int
    finalists: list[_Finalist]


class _Shortlist(BaseModel):
    trials: list[int]
    finished: int


# What each note is; those of other names are read where they are used.
_NOTES: dict[str, Any] = {
    "documents": dict[str, str],
    "notices": list[str],
    "n_layers": int,
    "seconds_total": float,
    "exhausted": str,
    "asked_later": dict[str, int],
    "finals": _Finals,
    "shortlist": _Shortlist,
}


@contextmanager
def reading(what: object) -> Iterator[None]:
    """Turn whatever damaged contents end in, in any library, into one error that names the place."""
    try:
        yield
    except MergeError:
        raise
    except Exception as error:
        raise StorageError(
            f"{what} is damaged ({type(error).__name__}: {reason(error)}); {_REPAIR}"
        ) from error


def check_trials(where: object, trials: Sequence[FrozenTrial], n_values: int | None = None) -> None:
    """Check what every trial holds.

    Args:
        where: the storage, as errors name it.
        n_values: how many values a trial has, where that is known.

    Raises:
        StorageError: with the first faults.
    """
    faults: list[str] = []
    for number, trial in enumerate(trials):
        fault = _trial_fault(trial, number, n_values)
        if fault:
            faults.append(f"{where}: trial {number} is damaged ({fault}); {_REPAIR}")
        elif trial.state.name == "COMPLETE":
            n_values = len(trial.values)  # the same of all
        if len(faults) == _MOST_FAULTS:
            break
    if faults:
        raise StorageError(faults)


def _trial_fault(trial: FrozenTrial, number: int, n_values: int | None) -> str | None:
    if trial.number != number:
        return f"its number is {trial.number}"
    try:
        _Attributes.model_validate(trial.user_attrs)
    except ValidationError as error:
        return _first(error)
    needed: tuple[str, ...] = ()
    if trial.state.name == "COMPLETE":
        needed = ("scores", "objective", "seconds", "documents", "told")
        values = trial.values
        if not values or not all(isinstance(v, float) and math.isfinite(v) for v in values):
            return f"its values are {shown(values)}"
        if n_values is not None and len(values) != n_values:
            return f"it has {len(values)} values, and not {n_values}"
        if not all(isinstance(v, float) for v in trial.constraints.values()):
            return f"its constraints are {shown(trial.constraints)}"
    elif trial.state.name == "FAIL":
        needed = ("failure", "told")
    missing = [key for key in needed if trial.user_attrs.get(key) is None]
    return f"it has no {missing[0]}" if missing else None


def check_points(where: object, trials: Sequence[FrozenTrial], space: SearchSpace) -> None:
    """Check that every trial is a point of the space.

    Raises:
        StorageError: with the first faults.
    """
    distributions = space.distributions()
    faults: list[str] = []
    for trial in trials:
        strange = [name for name in trial.params if name not in distributions]
        strange += [
            name
            for name, value in trial.params.items()
            if name in distributions and trial.distributions[name] != distributions[name]
        ]
        with reading(f"{where}: trial {trial.number}"):
            strange += sorted(set(trial.params) ^ set(space.active({**space.starts(), **trial.params})))
        if strange:
            faults.append(
                f"{where}: trial {trial.number} is damaged ({strange[0]} is not as in the search file); "
                f"{_REPAIR}"
            )
        if len(faults) == _MOST_FAULTS:
            break
    if faults:
        raise StorageError(faults)


def checked_note(where: object, key: str, note: Any, n_trials: int) -> Any:
    """Return a note that is what it should be.

    Args:
        n_trials: how many trials there are that it may speak of.

    Raises:
        StorageError: it is not.
    """
    fault = None
    try:
        if key.endswith(" failed"):
            _checker(tuple[str, str, str]).validate_python(note)
        elif key == "verdict":
            fault = _verdict_fault(note, n_trials)
        elif key in _NOTES:
            _checker(_NOTES[key]).validate_python(note)
        if key == "finals":
            numbers = [finalist["number"] for finalist in note["finalists"]]
            fault = _unknown(numbers, n_trials)
        elif key == "shortlist":
            fault = _unknown(note["trials"], n_trials)
    except ValidationError as error:
        fault = _first(error)
    except (TypeError, KeyError) as error:
        fault = f"{type(error).__name__}: {reason(error)}"
    if fault:
        raise StorageError(f"{where}: what is noted as {key!r} is damaged ({fault}); {_REPAIR}")
    return note


def _verdict_fault(note: Any, n_trials: int) -> str | None:
    from evolve.verdict import Verdict

    verdict = _checker(Verdict).validate_python(note)
    if type(note.get("finished")) is not int:
        return f"finished is {shown(note.get('finished'))}"
    return _unknown([verdict.trial, *(member.trial for member in verdict.shortlist)], n_trials)


def _unknown(numbers: Sequence[int], n_trials: int) -> str | None:
    strange = [n for n in numbers if type(n) is not int or not 0 <= n < n_trials]
    return f"there is no trial {shown(strange[0])}" if strange else None


def _first(error: ValidationError) -> str:
    item = error.errors(include_url=False)[0]
    return f"{field_path(item['loc'])} is {shown(item['input'])}"


@cache
def _checker(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def checked_about(folder: Path) -> tuple[str, str | None]:
    """Read study.json: the study's name, and the URL of its storage, None for study.db beside it.

    Raises:
        SearchFileError: there is none.
        StorageError: it holds something else, or names a database that is none of a search's: opening
            that would make one, or tables in somebody else's.
    """
    path = folder / "study.json"
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise SearchFileError(
            f"DIR is {folder}, which holds no search; name the storage path of an `evolve run`"
        ) from None
    is_one = isinstance(about, dict) and isinstance(about.get("study"), str) and "storage" in about
    if not is_one or not isinstance(about["storage"], str | None):
        raise StorageError(
            f"{path} is {shown(about)}; it must be {{study: a name, storage: a URL or null}}, {_REPAIR}"
        )
    name, url = about["study"], about["storage"]
    if url is None:
        if not (folder / "study.db").is_file():
            raise SearchFileError(f"DIR is {folder}, whose study.db is gone; restore it")
        _check_database(folder / "study.db", folder / "study.db")
        return name, None
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        made = make_url(url)
    except (ArgumentError, ValueError):
        raise StorageError(
            f"{path} names {shown(redacted(url))}, which is no database URL; {_REPAIR}"
        ) from None
    if made.get_backend_name() == "sqlite":
        _check_database(path, Path(made.database or ""))
    return name, url


def _check_database(where: Path, file: Path) -> None:
    """Look, without writing, whether a file is the database of a search."""
    if not file.is_file():
        raise StorageError(f"{where}: {file} cannot be opened (no such file); {_REPAIR}")
    try:
        with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as database:
            found = database.execute("select 1 from sqlite_master where name = 'studies'").fetchone()
    except (sqlite3.Error, ValueError) as error:
        raise StorageError(f"{where}: {file} cannot be opened ({error}); {_REPAIR}") from None
    if found is None:
        raise StorageError(f"{where}: {file} is no database of a search; {_REPAIR}")
