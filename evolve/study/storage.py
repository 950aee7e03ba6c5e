"""A study in Optuna's tables, read and written in few statements.

Optuna creates the tables and checks their version; what stands in them is what Optuna itself would
write, and it reads what is written here. Only the statements are our own: Optuna's take two
queries a parameter to create a trial and one transaction an attribute to tell it, and its reader
makes an object of every parameter of every trial. Here a trial is created in one transaction, told
in one, and all trials are read in five queries.
"""

from __future__ import annotations

import gc
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from optuna.distributions import BaseDistribution, distribution_to_json, json_to_distribution
from optuna.exceptions import DuplicatedStudyError
from optuna.storages._rdb import models  # the tables themselves; RDBStorage checks their version
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Connection, Table, delete, func, insert, select, update

from evolve.errors import ResumeRefusedError, StorageError
from evolve.study.database import Database, TakenError

T = TypeVar("T")

_STUDIES: Table = models.StudyModel.__table__
_NOTES: Table = models.StudyUserAttributeModel.__table__
_TRIALS: Table = models.TrialModel.__table__
_VALUES: Table = models.TrialValueModel.__table__
_PARAMS: Table = models.TrialParamModel.__table__
_USER: Table = models.TrialUserAttributeModel.__table__
_SYSTEM: Table = models.TrialSystemAttributeModel.__table__


class Storage:
    """One study of a database.

    Attributes:
        url: of the database, without its password.
    """

    def __init__(self, database: Database, study_id: int) -> None:
        self.url = database.shown
        self._database = database
        self._study_id = study_id
        # A note that must stand in the study while anything is written: (key, text).
        self._held: tuple[str, str] | None = None

    @classmethod
    def open(cls, folder: Path, url: str | None, name: str) -> Storage | None:
        """Open the study of this name to read it; None where there is none.

        Args:
            folder, url: see Database.

        Raises:
            SearchFileError, StorageError: the database cannot be opened.
        """
        database = Database(folder, url)
        study_id = _found(database, name)
        return None if study_id is None else cls(database, study_id)

    @classmethod
    def made(cls, folder: Path, url: str | None, name: str, n_values: int) -> Storage:
        """Open the study of this name to write to it, or make it; see `open`.

        Args:
            n_values: how many values a new study's trials have, all maximised.

        Raises:
            ResumeRefusedError: study.db holds another study alone.
        """
        database = Database(folder, url)
        database.let_read()
        study_id = _found(database, name)
        if study_id is None:
            if url is None and (others := database.optuna.get_all_studies()):
                raise ResumeRefusedError(
                    f"{folder} holds the search {others[0].study_name!r} and no study.json that says so; "
                    f"put that back, or give another --storage-path"
                )
            with suppress(DuplicatedStudyError):  # another run was quicker; the lease decides
                database.optuna.create_new_study([StudyDirection.MAXIMIZE] * n_values, name)
            study_id = _found(database, name)
            assert study_id is not None
        return cls(database, study_id)

    def close(self) -> None:
        """Close every connection."""
        self._database.close()

    # ---- reading ------------------------------------------------------------------------------

    def trials(self) -> list[FrozenTrial]:
        """Read all trials, by number."""
        return self._database.transaction(self._read_trials)

    def notes(self) -> dict[str, str]:
        """Read the study's attributes, texts by key."""
        query = select(_NOTES.c.key, _NOTES.c.value_json).where(_NOTES.c.study_id == self._study_id)
        found = self._database.transaction(lambda connection: connection.execute(query).all())
        return {key: json.loads(value) for key, value in found}

    def _read_trials(self, connection: Connection) -> list[FrozenTrial]:
        # Hundreds of thousands of objects come to stay: looking for garbage among them took a third.
        with _no_collections():
            return self._all_trials(connection)

    def _all_trials(self, connection: Connection) -> list[FrozenTrial]:
        # The trials come first: what is finished by then has all that is read of it later.
        columns = (_TRIALS.c.trial_id, _TRIALS.c.number, _TRIALS.c.state)
        times = (_TRIALS.c.datetime_start, _TRIALS.c.datetime_complete)
        rows = connection.execute(
            select(*columns, *times)
            .where(_TRIALS.c.study_id == self._study_id)
            .order_by(_TRIALS.c.number)
        ).all()
        params: defaultdict[int, dict[str, Any]] = defaultdict(dict)
        distributions: defaultdict[int, dict[str, BaseDistribution]] = defaultdict(dict)
        known: dict[str, BaseDistribution] = {}
        of_params = (_PARAMS.c.param_name, _PARAMS.c.param_value, _PARAMS.c.distribution_json)
        for trial_id, name, value, text in self._of_trials(
            connection, _PARAMS, of_params, _PARAMS.c.param_id
        ):
            distribution = known.get(text)
            if distribution is None:
                distribution = known[text] = json_to_distribution(text)
            params[trial_id][name] = distribution.to_external_repr(value)
            distributions[trial_id][name] = distribution
        values: defaultdict[int, list[float]] = defaultdict(list)
        of_values = (_VALUES.c.value, _VALUES.c.value_type)
        for trial_id, value, kind in self._of_trials(connection, _VALUES, of_values, _VALUES.c.objective):
            values[trial_id].append(models.TrialValueModel.stored_repr_to_value(value, kind))
        attributes: list[defaultdict[int, dict[str, Any]]] = []
        for table in (_USER, _SYSTEM):
            found: defaultdict[int, dict[str, Any]] = defaultdict(dict)
            attributes.append(found)
            for trial_id, key, text in self._of_trials(
                connection, table, (table.c.key, table.c.value_json)
            ):
                found[trial_id][key] = json.loads(text)
        user, system = attributes
        return [
            FrozenTrial(
                number=number,
                state=state,
                value=None,
                values=values.get(trial_id),
                datetime_start=_local(start),
                datetime_complete=_local(complete),
                params=params.get(trial_id, {}),
                distributions=distributions.get(trial_id, {}),
                user_attrs=user.get(trial_id, {}),
                system_attrs=system.get(trial_id, {}),
                intermediate_values={},
                trial_id=trial_id,
            )
            for trial_id, number, state, start, complete in rows
        ]

    def _of_trials(
        self, connection: Connection, table: Table, columns: Sequence[Any], *order: Any
    ) -> Iterator[Any]:
        """Yield (trial's id, *columns) of every row of a table that belongs to the study's trials."""
        query = (
            select(table.c.trial_id, *columns)
            .join(_TRIALS, _TRIALS.c.trial_id == table.c.trial_id)
            .where(_TRIALS.c.study_id == self._study_id)
        )
        result = connection.execute(query.order_by(*order) if order else query)
        for part in result.partitions(10_000):
            yield from part

    # ---- writing ------------------------------------------------------------------------------

    def create_trial(
        self,
        number: int,
        params: Mapping[str, Any],
        distributions: Mapping[str, BaseDistribution],
        attributes: Mapping[str, Any],
    ) -> FrozenTrial:
        """Create a running trial, whole.

        Raises:
            StorageError: the number is another's, who writes to this study too.
        """
        now = datetime.now(UTC).replace(tzinfo=None)
        in_study = _TRIALS.c.study_id == self._study_id
        internal = {name: distributions[name].to_internal_repr(value) for name, value in params.items()}
        texts = _texts(attributes)

        def create(connection: Connection) -> int:
            before = connection.scalar(select(func.count()).select_from(_TRIALS).where(in_study)) or 0
            if before == number + 1:  # done, where the server fell silent after it
                mine = in_study & (_TRIALS.c.number == number) & (_TRIALS.c.datetime_start == now)
                if (found := connection.scalar(select(_TRIALS.c.trial_id).where(mine))) is not None:
                    return int(found)
            if before != number:
                raise StorageError(
                    f"storage: trial {number} would be created as {before}; another `evolve run` writes "
                    f"to this study, wait for it to end"
                )
            made = connection.execute(
                insert(_TRIALS).values(
                    study_id=self._study_id, number=number, state=TrialState.RUNNING, datetime_start=now
                )
            )
            trial_id: int = made.inserted_primary_key[0]  # type: ignore[index]  # an insert has one
            rows = [
                {
                    "trial_id": trial_id,
                    "param_name": name,
                    "param_value": value,
                    "distribution_json": distribution_to_json(distributions[name]),
                }
                for name, value in internal.items()
            ]
            if rows:
                connection.execute(insert(_PARAMS), rows)
            _set_attributes(connection, _USER, trial_id, texts)
            return trial_id

        return FrozenTrial(
            number=number,
            state=TrialState.RUNNING,
            value=None,
            values=None,
            datetime_start=_local(now),
            datetime_complete=None,
            params={name: distributions[name].to_external_repr(v) for name, v in internal.items()},
            distributions={name: distributions[name] for name in params},
            user_attrs=_values(texts),
            system_attrs={},
            intermediate_values={},
            trial_id=self._write(create),
        )

    def set_attributes(self, trial: FrozenTrial, attributes: Mapping[str, Any]) -> None:
        """Set attributes of a running trial (JSON), there and in memory."""
        texts = _texts(attributes)
        self._write(lambda connection: _set_attributes(connection, _USER, trial._trial_id, texts))
        trial.user_attrs.update(_values(texts))

    def tell(
        self,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
        attributes: Mapping[str, Any],
        system_attributes: Mapping[str, Any],
    ) -> None:
        """Finish a running trial with all that is known of it, there and in memory."""
        trial_id, now = trial._trial_id, datetime.now(UTC).replace(tzinfo=None)
        user, system = _texts(attributes), _texts(system_attributes)
        running = (_TRIALS.c.trial_id == trial_id) & (_TRIALS.c.state == TrialState.RUNNING)
        is_told = (_USER.c.trial_id == trial_id) & (_USER.c.key == "told")

        def tell(connection: Connection) -> None:
            done = connection.execute(
                update(_TRIALS).where(running).values(state=state, datetime_complete=now)
            )
            if not done.rowcount:
                told = connection.scalar(select(_USER.c.value_json).where(is_told))
                if told == user.get("told"):  # done, where the server fell silent after it
                    return
                raise StorageError(
                    f"storage: trial {trial.number} was told by another `evolve run`, which writes to "
                    f"this study; wait for it to end"
                )
            if values is not None:
                rows = []
                for objective, value in enumerate(values):
                    stored, kind = models.TrialValueModel.value_to_stored_repr(value)
                    row = {"objective": objective, "value": stored, "value_type": kind}
                    rows.append({"trial_id": trial_id, **row})
                connection.execute(insert(_VALUES), rows)
            _set_attributes(connection, _USER, trial_id, user)
            _set_attributes(connection, _SYSTEM, trial_id, system)

        self._write(tell)
        trial.user_attrs.update(_values(user))
        trial.system_attrs.update(_values(system))
        trial.values = None if values is None else [float(value) for value in values]
        trial.datetime_complete = _local(now)
        trial.state = state

    def keep_notes(self, notes: Mapping[str, str], patience_s: float | None = None) -> None:
        """Set attributes of the study, texts by key."""
        self._write(lambda connection: self._set_notes(connection, notes), patience_s)

    def swap_note(
        self,
        key: str,
        old: str | None,
        new: str | None,
        also: Mapping[str, str] | None = None,
        patience_s: float | None = None,
    ) -> bool:
        """Replace an attribute of the study if it is still the old one; None stands for no attribute.

        Args:
            also: further attributes that are set with it.

        Returns:
            Whether it was replaced.
        """
        mine = (_NOTES.c.study_id == self._study_id) & (_NOTES.c.key == key)

        def swap(connection: Connection) -> bool:
            if old is not None:
                gone = delete(_NOTES).where(mine & (_NOTES.c.value_json == json.dumps(old)))
                if not connection.execute(gone).rowcount:
                    return False
            if new is not None:
                row = {"study_id": self._study_id, "key": key, "value_json": json.dumps(new)}
                connection.execute(insert(_NOTES), [row])
            if also:
                self._set_notes(connection, also)
            return True

        try:
            return self._database.transaction(swap, patience_s)
        except TakenError:
            return False

    def hold(self, key: str, text: str | None) -> None:
        """Write from now on only while a note stands in the study; None lets go of it."""
        self._held = (key, text) if text is not None else None

    def now(self) -> datetime:
        """Return the database's time, naive UTC."""
        found = self._database.transaction(lambda connection: connection.scalar(select(func.now())))
        assert isinstance(found, datetime)
        return found.astimezone(UTC).replace(tzinfo=None) if found.tzinfo else found

    def _set_notes(self, connection: Connection, notes: Mapping[str, str]) -> None:
        mine = (_NOTES.c.study_id == self._study_id) & _NOTES.c.key.in_(list(notes))
        connection.execute(delete(_NOTES).where(mine))
        rows = [
            {"study_id": self._study_id, "key": key, "value_json": json.dumps(text)}
            for key, text in notes.items()
        ]
        connection.execute(insert(_NOTES), rows)

    # ---- transactions -------------------------------------------------------------------------

    def _write(self, work: Callable[[Connection], T], patience_s: float | None = None) -> T:
        def fenced(connection: Connection) -> T:
            if self._held:
                key, text = self._held
                held = (_NOTES.c.key == key) & (_NOTES.c.value_json == json.dumps(text))
                # It changes nothing, and lets nobody else change it until this is committed.
                touched = connection.execute(
                    update(_NOTES)
                    .where((_NOTES.c.study_id == self._study_id) & held)
                    .values(value_json=_NOTES.c.value_json)
                )
                if not touched.rowcount:
                    raise StorageError(
                        f"{self.url}: another `evolve run` has taken this search over, since this one "
                        f"was not seen for long; it goes on there, let it"
                    )
            return work(connection)

        return self._database.transaction(fenced, patience_s)


@contextmanager
def _no_collections() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _found(database: Database, name: str) -> int | None:
    query = select(_STUDIES.c.study_id).where(_STUDIES.c.study_name == name)
    return database.transaction(lambda connection: connection.scalar(query))


def _local(time_utc: datetime | None) -> datetime | None:
    """Return Optuna's time, which is naive and local, of a stored one, which is naive UTC."""
    return None if time_utc is None else time_utc.replace(tzinfo=UTC).astimezone().replace(tzinfo=None)


def _texts(attributes: Mapping[str, Any]) -> dict[str, str]:
    return {key: json.dumps(value) for key, value in attributes.items()}


def _values(texts: Mapping[str, str]) -> dict[str, Any]:
    """Return attributes as a reader finds them: whoever goes on must see what was seen before."""
    return {key: json.loads(text) for key, text in texts.items()}


def _set_attributes(
    connection: Connection, table: Table, trial_id: int, texts: Mapping[str, str]
) -> None:
    if not texts:
        return
    connection.execute(delete(table).where((table.c.trial_id == trial_id) & table.c.key.in_(list(texts))))
    connection.execute(
        insert(table), [{"trial_id": trial_id, "key": k, "value_json": v} for k, v in texts.items()]
    )
