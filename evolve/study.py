"""The record of a search: trials in Optuna's storage, outcomes and recipes in its folder.

One trial is one evaluation of one candidate. A trial is created with its parameters in one storage
call; its outcomes are on disk before it is told; so whatever is killed, a finished trial is whole
and an interrupted one stays RUNNING, to be evaluated again under the same number.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.storages import BaseStorage, RDBStorage, get_storage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from evolve.errors import ResumeRefusedError, SearchFileError, StorageError
from evolve.front import Hypervolume, front, hypervolume_over_time, ranking, reference_point
from evolve.objectives import Rating
from evolve.record_check import check_trials, checked_about, checked_note, reading
from evolve.samplers import Proposal
from evolve.search_file import SearchFile
from evolve.space import SearchSpace
from evolve.tasks import SPLITS, Outcome, Outcomes, Split, as_json, n_documents
from evolve.workers.worker import Seconds
from merge_core.checkpoint.write import write_text

_FINISHED = (TrialState.COMPLETE, TrialState.FAIL, TrialState.PRUNED)


@dataclass(frozen=True)
class Finalist:
    """A candidate that was scored by the tasks' own metrics on every search document, at the end.

    Attributes:
        number: its trial.
        scores: by the keys of `tasks:`.
        rating: what the sampler would have seen, had it followed these.
    """

    number: int
    scores: dict[str, float]
    rating: Rating


class Study:
    """A search's record, opened.

    Attributes:
        folder: the storage path (`DIR` of the commands).
        name: the study's name in the storage.
    """

    def __init__(self, folder: Path, name: str, storage: BaseStorage, study_id: int) -> None:
        self.folder = folder
        self.name = name
        self._storage = storage
        self._study_id = study_id
        self._checked: dict[str, Any] = {}  # notes as they were last checked, by key

    # ---- opening ------------------------------------------------------------------------------

    @classmethod
    def create_or_resume(
        cls,
        folder: Path,
        url: str | None,
        search_file: SearchFile,
        identity: Mapping[str, Any],
        n_values: int = 1,
    ) -> Study:
        """Open the study in `folder`, or make it.

        Args:
            url: storage other than folder/study.db, such as PostgreSQL.
            identity: what makes two searches the same one, by topic; JSON.
            n_values: how many values a trial has; all are maximised.

        Raises:
            ResumeRefusedError: the storage holds another search.
            StorageError: the storage cannot be reached.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SearchFileError(
                f"--storage-path is {folder}, which cannot be made a folder "
                f"({error.strerror}); name another"
            ) from None
        name = folder.resolve().name.removesuffix("-search")
        storage = _open_storage(folder, url)
        study_id = _find_study(storage, name)
        if study_id is None:
            study_id = storage.create_new_study([StudyDirection.MAXIMIZE] * n_values, name)
        # Also where a run was killed between making the study and saying what it is.
        if "identity" not in storage.get_study_user_attrs(study_id):
            storage.set_study_user_attr(study_id, "identity", json.dumps(identity))
        study = cls(folder, name, storage, study_id)
        study._refuse_other(identity)
        study.check(n_values)
        (folder / "outcomes").mkdir(exist_ok=True)
        # Without the password, not with stars for it: then the driver's own ways (PGPASSWORD) work.
        shown = make_url(url).set(password=None).render_as_string() if url else None
        write_text(folder / "study.json", json.dumps({"study": name, "storage": shown}) + "\n")
        write_text(folder / "search.yml", search_file.to_yaml())
        return study

    @staticmethod
    def is_in(folder: Path) -> bool:
        """Tell whether a folder holds a study."""
        return (folder / "study.json").is_file()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out of the folder; the lock ends with the process, however that ends.

        Raises:
            ResumeRefusedError: another run is at work there.
        """
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            raise ResumeRefusedError(
                f"--storage-path is {self.folder}, where another `evolve run` is at work; wait for "
                f"it, or give another one"
            ) from None
        finally:
            os.close(descriptor)

    @classmethod
    def open(cls, folder: Path) -> Study:
        """Open an existing study.

        Raises:
            SearchFileError: the folder holds none.
            StorageError: the storage cannot be reached.
        """
        name, url = checked_about(folder)
        storage = _open_storage(folder, url)
        with reading(folder / "the storage"):
            study_id = _find_study(storage, name)
        if study_id is None:
            raise SearchFileError(f"DIR is {folder}; its storage has no study {name!r}")
        study = cls(folder, name, storage, study_id)
        study.check()
        return study

    def check(self, n_values: int | None = None) -> None:
        """Check what the storage holds of every trial.

        Raises:
            StorageError: it was changed by hand, or is damaged.
        """
        check_trials(self.folder, self.trials(), n_values)

    def search_file(self) -> SearchFile:
        """Return the resolved search file that the study was run with."""
        found = SearchFile.load(self.folder / "search.yml")
        found.name = self.name
        return found

    def _refuse_other(self, identity: Mapping[str, Any]) -> None:
        stored = self.note("identity")
        if not isinstance(stored, dict):
            stored = {}
        identity = json.loads(json.dumps(identity))
        faults = [
            f"{topic}: the search in {self.folder} has {_short(stored.get(topic))}, this one has "
            f"{_short(value)}; undo the change or give another --storage-path"
            for topic, value in identity.items()
            if stored.get(topic) != value
        ]
        if faults:
            raise ResumeRefusedError(faults)

    # ---- trials -------------------------------------------------------------------------------

    def trials(self) -> list[FrozenTrial]:
        """All trials, by number."""
        with reading(self.folder / "the storage"):
            return self._storage.get_all_trials(self._study_id, deepcopy=False)

    def finished(self) -> list[FrozenTrial]:
        """The trials that were told, by number."""
        return [trial for trial in self.trials() if trial.state in _FINISHED]

    def begin(self, number: int, proposal: Proposal, space: SearchSpace) -> None:
        """Create trial `number` as RUNNING, with its active parameters, in one call."""
        params = space.active(proposal.values)
        distributions = space.distributions()
        template = FrozenTrial(
            number=-1,
            state=TrialState.RUNNING,
            value=None,
            datetime_start=datetime.now(),
            datetime_complete=None,
            params=params,
            distributions={name: distributions[name] for name in params},
            user_attrs={**proposal.attributes, "attempts": 1},
            system_attrs={},
            intermediate_values={},
            trial_id=-1,
        )
        trial_id = self._storage.create_new_trial(self._study_id, template)
        created = self._storage.get_trial_number_from_id(trial_id)
        if created != number:
            raise StorageError(
                f"storage: trial {number} was created as {created}; another `evolve run` writes to this "
                f"study, wait for it to end"
            )

    def begin_again(self, number: int, n_times: int = 1) -> None:
        """Count further attempts of a trial: it was interrupted, or its worker was lost."""
        trial = self.trials()[number]
        attempts = int(trial.user_attrs["attempts"]) + n_times
        self._storage.set_trial_user_attr(trial._trial_id, "attempts", attempts)

    def complete(
        self,
        number: int,
        rating: Rating,
        scores: Mapping[str, float],
        outcomes: Outcomes,
        seconds: Seconds,
        standard_errors: Mapping[str, float],
    ) -> None:
        """Tell a trial: outcomes to disk first, then scores, then the state.

        Args:
            standard_errors: of scores that are estimates from a part of the documents.
        """
        save_outcomes(self.outcomes_path(f"trial-{number}"), {"search": outcomes})
        attributes = {
            "scores": dict(scores),
            "objective": rating.objective,
            "seconds": vars(seconds),
            "documents": n_documents(outcomes),
        }
        if standard_errors:
            attributes["standard_errors"] = dict(standard_errors)
        if rating.violations:
            attributes["violations"] = rating.violations
            trial_id = self.trials()[number]._trial_id
            for name, violation in rating.violations.items():
                # What `Trial.set_constraint` keeps, which is for trials that Optuna evaluates.
                self._storage.set_trial_system_attr(trial_id, f"constraints:{name}", violation)
        self._tell(number, TrialState.COMPLETE, attributes, rating.values)

    def fail(self, number: int, kind: str, text: str, seconds: Seconds) -> None:
        """Tell a trial as failed, with the boundary it failed at and why."""
        attributes = {"failure": {"kind": kind, "text": text[:2000]}, "seconds": vars(seconds)}
        self._tell(number, TrialState.FAIL, attributes, None)

    def _tell(
        self,
        number: int,
        state: TrialState,
        attributes: Mapping[str, Any],
        values: Sequence[float] | None,
    ) -> None:
        trials = self.trials()
        trial_id = trials[number]._trial_id
        told = sum(trial.state in _FINISHED for trial in trials)
        for key, attribute in {**attributes, "told": told}.items():
            self._storage.set_trial_user_attr(trial_id, key, attribute)
        self._storage.set_trial_state_values(trial_id, state, values)

    def ranked(self) -> list[FrozenTrial]:
        """The completed trials, the best first: the finalists by metric, others by what the sampler saw.

        See `evolve.front.ranking`. Finals count until a further trial has finished.
        """
        trials = self.trials()
        finalists = [finalist.number for finalist in self._current_finalists()]
        complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        values = np.array([trial.values for trial in complete])
        order = ranking(values, [total_violation(trial) for trial in complete])
        others = [complete[i] for i in order if complete[i].number not in finalists]
        return [*(trials[number] for number in finalists), *others]

    def best(self) -> FrozenTrial | None:
        """The first of `ranked`, or the finalist that the holdout preferred to it.

        The holdout's choice stands until a later trial outdoes all that it was asked about. Of a
        Pareto front it chooses none.
        """
        ranked = self.ranked()
        verdict = self.note("verdict")
        asked = [member["trial"] for member in verdict["shortlist"]] if verdict else []
        if asked and ranked[0].number in asked and len(ranked[0].values) == 1:
            chosen: int = verdict["trial"]
            return self.trials()[chosen]
        return next(iter(ranked), None)

    def front(self) -> list[FrozenTrial]:
        """The Pareto front by number, by the finals' metrics where held; see `evolve.front.front`."""
        best = self.best()
        if best is not None and len(best.values) == 1:  # the holdout may have chosen it
            return [] if is_violating(self.violations(best)) else [best]
        finalists = self._current_finalists()
        if finalists:
            trials = [self.trials()[finalist.number] for finalist in finalists]
            values = np.array([finalist.rating.values for finalist in finalists])
            violations = [finalist.rating.total_violation for finalist in finalists]
        else:
            trials = [trial for trial in self.trials() if trial.state == TrialState.COMPLETE]
            values = np.array([trial.values for trial in trials])
            violations = [total_violation(trial) for trial in trials]
        members = [trials[i] for i in front(values, violations)]
        return sorted(members, key=lambda trial: trial.number)

    def hypervolume(self) -> Hypervolume | None:
        """What the front dominates of the values that samplers see, and did after each finished trial.

        Failed trials and those that violate a constraint add nothing. None with one value a trial,
        or where none is complete.
        """
        told = sorted(self.finished(), key=lambda trial: int(trial.user_attrs["told"]))
        complete = [trial for trial in told if trial.state == TrialState.COMPLETE]
        if not complete or len(complete[0].values) == 1:
            return None
        reference = reference_point(np.array([trial.values for trial in complete]))
        nothing = [float("nan")] * len(reference)
        counted = [
            trial.values if trial.values and not total_violation(trial) else nothing for trial in told
        ]
        over_time = hypervolume_over_time(np.array(counted), reference)
        return Hypervolume(reference.tolist(), over_time[-1], over_time)

    # ---- finals -------------------------------------------------------------------------------

    @property
    def has_finals(self) -> bool:
        """Whether the best of all finished trials were scored by the tasks' own metrics."""
        return bool(self._current_finalists())

    def keep_finals(self, finalists: Sequence[Finalist], n_documents: int) -> None:
        """Keep what the finalists scored, the winner first; a finished trial takes no attributes.

        Args:
            n_documents: how many were scored for it beside those of the trials.
        """
        kept = [asdict(finalist) for finalist in finalists]
        finals = {"finished": len(self.finished()), "documents": n_documents, "finalists": kept}
        self.keep_note("finals", finals)

    def finalists(self) -> dict[int, Finalist]:
        """The finalists by trial, the winner first; empty where no finals were held."""
        kept = (self.note("finals") or {}).get("finalists", [])
        return {data["number"]: Finalist(**{**data, "rating": Rating(**data["rating"])}) for data in kept}

    def _current_finalists(self) -> list[Finalist]:
        """The finalists, the winner first; empty where trials have finished since."""
        finals = self.note("finals")
        is_current = finals and finals["finished"] == len(self.finished())
        return list(self.finalists().values()) if is_current else []

    def scores(self, trial: FrozenTrial) -> dict[str, float]:
        """A completed trial's scores on the search documents by the tasks' metrics, where known.

        Else what the sampler saw of it: keys that end in ":likelihood" say so.
        """
        finalist = self.finalists().get(trial.number)
        scores: dict[str, float] = finalist.scores if finalist else trial.user_attrs["scores"]
        return scores

    def objective(self, trial: FrozenTrial) -> float:
        """A completed trial's objective, by the same scores as `scores`."""
        finalist = self.finalists().get(trial.number)
        return finalist.rating.objective if finalist else float(trial.user_attrs["objective"])

    def violations(self, trial: FrozenTrial) -> dict[str, float] | None:
        """A completed trial's violation of each constraint, by the same scores; None without any."""
        finalist = self.finalists().get(trial.number)
        found: dict[str, float] | None = trial.user_attrs.get("violations")
        return finalist.rating.violations or None if finalist else found

    def search_outcomes_path(self, number: int) -> Path:
        """Where a trial's outcomes on the search documents are kept: those of the finals if any."""
        final = self.outcomes_path(f"final-{number}")
        return final if final.exists() else self.outcomes_path(f"trial-{number}")

    # ---- notes and outcomes -------------------------------------------------------------------

    def note(self, key: str) -> Any:
        """Read a note kept with the study; None where there is none."""
        with reading(self.folder / key):
            text = self._storage.get_study_user_attrs(self._study_id).get(key)
            note = None if text is None else json.loads(text)
        if note is None or self._checked.get(key) == text:
            return note
        found = checked_note(self.folder, key, note, len(self.trials()))
        self._checked[key] = text
        return found

    def keep_note(self, key: str, value: Any) -> None:
        """Keep a note (JSON) with the study."""
        self._storage.set_study_user_attr(self._study_id, key, json.dumps(value))

    def outcomes_path(self, name: str) -> Path:
        """Where the outcomes of a trial or baseline are kept."""
        return self.folder / "outcomes" / f"{name}.parquet"


def is_violating(violations: Mapping[str, float] | None) -> bool:
    """Tell whether a constraint is not met, of what `Study.violations` returns."""
    return any(violation > 0 for violation in (violations or {}).values())


def total_violation(trial: FrozenTrial) -> float:
    """By how much a trial violates the constraints in all; 0 where it meets them."""
    return sum(max(0.0, violation) for violation in trial.constraints.values())


def _open_storage(folder: Path, url: str | None) -> BaseStorage:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # Finished trials are read once: a candidate must not take longer the more came before it.
    shown = "storage"
    try:
        if url is None:
            sqlite = f"sqlite:///{folder.resolve() / 'study.db'}"
            return get_storage(RDBStorage(sqlite, engine_kwargs={"connect_args": {"timeout": 60}}))
        shown = make_url(url).render_as_string(hide_password=True)
        return get_storage(RDBStorage(url))
    except ArgumentError:
        raise SearchFileError(
            "--storage is no database URL; write one such as postgresql://user@host/name"
        ) from None
    except ImportError as error:
        raise SearchFileError(
            f"--storage is {shown}; its driver is missing ({error}), install it"
        ) from error
    except (SQLAlchemyError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise StorageError(
            f"{shown} cannot be opened: {reason:.200}; check that it is reachable"
        ) from error


def _find_study(storage: BaseStorage, name: str) -> int | None:
    try:
        return storage.get_study_id_from_name(name)
    except KeyError:
        return None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."


_OUTCOME_COLUMNS = {
    "split": "string",
    "task": "string",
    "leaf": "string",
    "document": "int64",
    "metric": "string",
    "counts": "bool",
    "value": "double",
    "detail": "string",
}


def save_outcomes(path: Path, outcomes: Mapping[Split, Outcomes]) -> None:
    """Write outcomes as parquet, one row a document, entry and metric, renamed into place.

    Columns: split, task (the entry's key), leaf, document, metric ("exact_match,strict-match"; null
    where the key says it), counts (whether it is the entry's own), and value (a number) or detail
    (JSON, where lm-eval keeps more than a number). A document's other metrics follow its own.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {
            "split": split,
            "task": task,
            "leaf": outcome.leaf,
            "document": outcome.document,
            "metric": metric,
            "counts": counts,
            "value": float(value) if _is_number(value) else None,
            "detail": None if _is_number(value) else as_json(value),
        }
        for split, by_task in outcomes.items()
        for task, values in by_task.items()
        for outcome in values
        for metric, counts, value in [
            (outcome.metric, True, outcome.value),
            *((other, False, value) for other, value in outcome.others.items()),
        ]
    ]
    schema = pa.schema(list(_OUTCOME_COLUMNS.items()))
    part = path.with_name(f"{path.name}.part-{os.getpid()}")
    try:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), part)
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def load_outcomes(path: Path) -> dict[Split, Outcomes]:
    """Read what `save_outcomes` wrote.

    Raises:
        StorageError: the file is missing or damaged.
    """
    with reading(path):
        return _loaded(path)


def _loaded(path: Path) -> dict[Split, Outcomes]:
    import pyarrow.parquet as pq

    found: dict[Split, Outcomes] = {split: {} for split in SPLITS}  # `report` where it is there
    others: dict[str, Any] = {}
    for row in pq.read_table(path).to_pylist():
        value = row["value"] if row["detail"] is None else json.loads(row["detail"])
        if not row["counts"]:
            others[row["metric"]] = value
            continue
        others = {}  # of the rows that follow
        outcome = Outcome(row["leaf"], row["document"], value, others, row["metric"])
        found.setdefault(row["split"], {}).setdefault(row["task"], []).append(outcome)
    return found


def _is_number(value: Any) -> bool:
    import numbers

    return isinstance(value, numbers.Real)
