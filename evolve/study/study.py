"""A search's record as the search, its end and the commands use it: opened, resumed, ranked."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from evolve.errors import ResumeRefusedError, SearchFileError
from evolve.front import Hypervolume, front, hypervolume_over_time, ranking, reference_point
from evolve.objectives import Rating
from evolve.record_check import check_trials, checked_about, reading
from evolve.search_file import SearchFile
from evolve.study.alone import alone_in, leased
from evolve.study.database import parsed, without_secrets
from evolve.study.record import Record
from evolve.study.standing import is_violating, total_violation
from evolve.study.storage import Storage
from evolve.tasks import Outcomes
from merge_core.checkpoint.write import write_text


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


class Study(Record):
    """A search's record, and how the search stands by it."""

    # ---- opening ------------------------------------------------------------------------------

    @classmethod
    @contextmanager
    def create_or_resume(
        cls,
        folder: Path,
        url: str | None,
        search_file: SearchFile,
        identity: Mapping[str, Any],
        n_values: int = 1,
        artifacts: Path | None = None,
    ) -> Iterator[Study]:
        """Open the study in `folder`, or make it, and keep every other run out meanwhile.

        Args:
            url: storage other than folder/study.db, such as PostgreSQL; by default that of the search
                in `folder`, if there is one.
            identity: what makes two searches the same one, by topic; JSON.
            n_values: how many values a trial has; all are maximised.
            artifacts: a folder that other hosts see, where outcomes are kept too.

        Raises:
            ResumeRefusedError: the storage holds another search, or another run is at work.
            StorageError: the storage cannot be reached.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unusable(folder, error) from None
        name = _name_of(folder)
        with ExitStack() as held:
            held.enter_context(alone_in(folder))
            url = _storage_of(folder, url)
            storage = held.enter_context(closing(Storage.made(folder, url, name, n_values)))
            if url is not None:
                held.enter_context(leased(storage))
            study = cls(folder, name, storage)
            # Also where a run was killed between making the study and saying what it is.
            if study.note("identity") is None:
                study.keep_note("identity", identity)
            study._refuse_other(identity)
            check_trials(folder, study.trials(), n_values)
            if artifacts is not None:
                study._share(artifacts.resolve())
            (folder / "outcomes").mkdir(exist_ok=True)
            shown = storage.url if url else None
            write_text(folder / "search.yml", search_file.to_yaml())
            study.keep_note("search_file", search_file.as_dict())
            # Last: where it stands the folder holds a study, which is resumed by what is written above.
            write_text(folder / "study.json", json.dumps({"study": name, "storage": shown}) + "\n")
            yield study

    @staticmethod
    def is_in(folder: Path) -> bool:
        """Tell whether a folder holds a study."""
        return (folder / "study.json").is_file()

    @classmethod
    def open(cls, folder: Path, url: str | None = None) -> Study:
        """Open an existing study.

        Args:
            url: of its storage, where a password goes with it; by default as it was written down.

        Raises:
            SearchFileError: the folder holds none.
            ResumeRefusedError: the search in the folder is kept elsewhere.
            StorageError: the storage cannot be reached.
        """
        name, _ = checked_about(folder)
        url = _storage_of(folder, url)
        with reading(folder / "the storage"):
            storage = Storage.open(folder, url, name)
        if storage is None:
            raise SearchFileError(f"DIR is {folder}; its storage has no study {name!r}")
        study = cls(folder, name, storage)
        check_trials(folder, study.trials())
        return study

    @classmethod
    def earlier_file(cls, folder: Path, url: str | None) -> SearchFile | None:
        """Return the resolved search file of a search that began before, here or on another host."""
        if cls.is_in(folder):
            return cls.open(folder, url).search_file()
        if url is None:
            return None
        name = _name_of(folder)
        storage = Storage.open(folder, url, name)
        data = cls(folder, name, storage).note("search_file") if storage else None
        return None if data is None else SearchFile(data, name)

    def search_file(self) -> SearchFile:
        """Return the resolved search file that the study was run with; the record has it, too."""
        file = self.folder / "search.yml"
        if not file.exists() and (data := self.note("search_file")) is not None:
            return SearchFile(data, self.name)
        found = SearchFile.load(file)
        found.name = self.name
        return found

    @classmethod
    def check(cls, folder: Path, url: str | None, identity: Mapping[str, Any]) -> Study | None:
        """Check that a search may begin in `folder` or go on there, and leave nothing behind.

        Returns:
            The search that would go on; None where it would begin.

        Raises:
            SearchFileError, ResumeRefusedError, StorageError: as `create_or_resume`.
        """
        if cls.is_in(folder):
            study = cls.open(folder, url)
            study._refuse_other(identity)
            return study
        place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        try:
            TemporaryDirectory(dir=place).cleanup()
        except OSError as error:
            raise _unusable(folder, error) from None
        return None

    def _share(self, folder: Path) -> None:
        """Keep outcomes in a folder that other hosts see, from the first one on.

        Raises:
            ResumeRefusedError: the search has kept them elsewhere.
        """
        shared = self.note("artifacts")
        if shared is None and not self._trials:
            self.keep_note("artifacts", {"folder": str(folder), "search": uuid.uuid4().hex[:8]})
        elif shared is None or shared["folder"] != str(folder):
            where = shared["folder"] if shared else f"{self.folder} alone"
            raise ResumeRefusedError(
                f"--artifacts is {folder}, but this search keeps its outcomes in {where}; leave it out, "
                f"or give another --storage-path"
            )

    def _refuse_other(self, identity: Mapping[str, Any]) -> None:
        stored = self.note("identity")
        if not isinstance(stored, dict):
            stored = {}
        identity = json.loads(json.dumps(identity))
        faults = [
            f"{where}: the search in {self.folder} has {before}, this one has {now}; undo the change or "
            f"give another --storage-path"
            for topic, value in identity.items()
            for where, before, now in _differences(topic, stored.get(topic), value)
        ]
        if faults:
            raise ResumeRefusedError(faults)

    # ---- how it stands ------------------------------------------------------------------------

    def ranked(self) -> list[FrozenTrial]:
        """The completed trials, the best first: the finalists by metric, others by what the sampler saw.

        See `evolve.front.ranking`. Finals count until a further trial has finished.
        """
        finalists = [finalist.number for finalist in self._current_finalists()]
        complete = [trial for trial in self._trials if trial.state == TrialState.COMPLETE]
        values = np.array([trial.values for trial in complete])
        sums = [float(trial.user_attrs["objective"]) for trial in complete]
        order = ranking(values, [total_violation(trial) for trial in complete], sums)
        others = [complete[i] for i in order if complete[i].number not in finalists]
        return [*(self._trials[number] for number in finalists), *others]

    def best(self) -> FrozenTrial | None:
        """The first of `ranked`, or the finalist that the holdout preferred to it.

        The holdout's choice stands until a later trial outdoes all that it was asked about. Of a
        Pareto front it chooses none.
        """
        finalists = self._current_finalists()
        first = self._trials[finalists[0].number] if finalists else self._standing.leader()
        verdict, shortlist = self.note("verdict"), self.note("shortlist")
        asked = [member["trial"] for member in verdict["shortlist"]] if verdict else []
        if verdict and shortlist and shortlist["finished"] == verdict["finished"]:
            asked += shortlist["trials"]  # one that could not be scored there is no member
        if first is not None and first.number in asked and len(first.values) == 1:
            chosen: int = verdict["trial"]
            return self._trials[chosen]
        return first

    def front(self) -> list[FrozenTrial]:
        """The Pareto front by number, by the finals' metrics where held; see `evolve.front.front`."""
        best = self.best()
        if best is not None and len(best.values) == 1:  # the holdout may have chosen it
            return [] if is_violating(self.violations(best)) else [best]
        finalists = self._current_finalists()
        if not finalists:
            return list(self._standing.front)
        values = np.array([finalist.rating.values for finalist in finalists])
        violations = [finalist.rating.total_violation for finalist in finalists]
        return [
            self._trials[number]
            for number in sorted(finalists[i].number for i in front(values, violations))
        ]

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
            n_documents: how many were asked beside those of the trials, for these and earlier finals.
        """
        kept = [asdict(finalist) for finalist in finalists]
        finals = {"finished": self.n_finished, "documents": n_documents, "finalists": kept}
        self.keep_note("finals", finals)

    def finalists(self) -> dict[int, Finalist]:
        """The finalists by trial, the winner first; empty where no finals were held."""
        kept = (self.note("finals") or {}).get("finalists", [])
        return {data["number"]: Finalist(**{**data, "rating": Rating(**data["rating"])}) for data in kept}

    def _current_finalists(self) -> list[Finalist]:
        """The finalists, the winner first; empty where trials have finished since."""
        finals = self.note("finals")
        is_current = finals and finals["finished"] == self.n_finished
        return list(self.finalists().values()) if is_current else []

    def is_scored_as_adapter(self, trial: FrozenTrial) -> bool:
        """Tell whether a trial's scores are an adapter's: it was served so, and no finalist."""
        return trial.user_attrs.get("scored_as") == "adapter" and trial.number not in self.finalists()

    def scores(self, trial: FrozenTrial) -> dict[str, float]:
        """A completed trial's scores on the search documents by the tasks' metrics, where known.

        Else what the sampler saw of it: keys that end in ":likelihood" say so.
        """
        finalist = self.finalists().get(trial.number)
        scores: dict[str, float] = finalist.scores if finalist else trial.user_attrs["scores"]
        return scores

    def standard_errors(self, trial: FrozenTrial) -> dict[str, float]:
        """By key the standard errors of the scores in `scores` that are estimates; none of the others."""
        if trial.number in self.finalists():
            return {}
        errors: dict[str, float] = trial.user_attrs.get("standard_errors", {})
        return errors

    def objective(self, trial: FrozenTrial) -> float:
        """A completed trial's objective, by the same scores as `scores`."""
        finalist = self.finalists().get(trial.number)
        return finalist.rating.objective if finalist else float(trial.user_attrs["objective"])

    def violations(self, trial: FrozenTrial) -> dict[str, float] | None:
        """A completed trial's violation of each constraint, by the same scores; None without any."""
        finalist = self.finalists().get(trial.number)
        found: dict[str, float] | None = trial.user_attrs.get("violations")
        return finalist.rating.violations or None if finalist else found

    def search_outcomes(self, number: int) -> Outcomes:
        """A trial's outcomes on the search documents: those of the finals if any."""
        final = f"final-{number}"
        return self.outcomes.load(final if self.outcomes.has(final) else f"trial-{number}")["search"]


def _storage_of(folder: Path, url: str | None) -> str | None:
    """Return the URL of the storage of a folder's search, with the password if one is given.

    Raises:
        ResumeRefusedError: the search there is kept in another storage.
    """
    if not Study.is_in(folder):
        return url
    _, kept = checked_about(folder)
    if url is not None and without_secrets(parsed(folder, url)) != kept:
        where = kept or "its study.db"
        raise ResumeRefusedError(
            f"--storage is another than that of the search in {folder}, which is {where}; leave it out, "
            f"or give another --storage-path"
        )
    return url or kept


def _name_of(folder: Path) -> str:
    """Return the name of the study in a folder, which may have been renamed, or a new one's."""
    if Study.is_in(folder):
        return checked_about(folder)[0]
    return folder.resolve().name.removesuffix("-search")


def _unusable(folder: Path, error: OSError) -> SearchFileError:
    return SearchFileError(
        f"--storage-path is {folder}, which cannot be made a folder ({error.strerror}); name another"
    )


def _differences(where: str, before: Any, now: Any) -> Iterator[tuple[str, str, str]]:
    """Yield where two JSON values differ, and what each of them has there."""
    if before == now:
        return
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            yield from _differences(f"{where}.{key}", before.get(key), now.get(key))
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for i, (one, other) in enumerate(zip(before, now, strict=True)):
            yield from _differences(f"{where}[{i}]", one, other)
    else:
        yield where, _short(before), _short(now)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."
