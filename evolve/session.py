"""A search that is open: its record, kept from other runs, its workers, and what may be spent."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evolve.budget import Budget, budget_faults, n_gpus
from evolve.candidates import suspects
from evolve.errors import SearchFileError, disk_faults_told
from evolve.plan import Plan, make_plan
from evolve.record_check import check_points
from evolve.search_file import SearchFile
from evolve.study import Study
from evolve.under_way import UnderWay
from evolve.workers import Pool
from evolve.workers.start import Workers, start_pool

Progress = Callable[[str, Study | None, Plan], None]


@dataclass(frozen=True)
class Place:
    """Where a search is kept.

    Attributes:
        folder: the storage path.
        storage: URL of another storage than folder/study.db.
        artifacts: a folder that all hosts of the search see, where outcomes are kept too.
    """

    folder: Path
    storage: str | None = None
    artifacts: Path | None = None

    @classmethod
    def of(
        cls,
        search_file: SearchFile,
        folder: Path | str | None,
        storage: str | None,
        artifacts: Path | None,
    ) -> Place:
        """Return the place of a search: `folder`, or else NAME-search in the working directory.

        Raises:
            SearchFileError: `artifacts` is no folder.
        """
        if artifacts is not None and not artifacts.is_dir():
            raise SearchFileError(
                f"--artifacts is {artifacts}, which is no folder; make it or name another"
            )
        return cls(Path(folder or f"{search_file.name}-search"), storage, artifacts)


def settled_plan(search_file: SearchFile, place: Place, **options: Any) -> Plan:
    """Return the plan of a search; what `auto` means stays what it meant when the search began.

    Args:
        options: those of `evolve.plan.make_plan`.

    Raises:
        SearchFileError, StorageError: the input is at fault, or an earlier record cannot be read.
    """
    if (earlier := Study.earlier_file(place.folder, place.storage)) is not None:
        search_file = search_file.settled(earlier)
    plan = make_plan(search_file, **options)
    if faults := budget_faults(plan):
        raise SearchFileError(faults)
    return plan


def check(plan: Plan, place: Place) -> None:
    """Check what `opened` would refuse, and leave nothing behind.

    Raises:
        ResumeRefusedError, StorageError: as there.
    """
    if (begun := Study.check(place.folder, place.storage, plan.identity())) is not None:
        check_points(place.folder, begun.trials(), plan.space)


class Session:
    """A run of a search; see `opened`.

    Attributes:
        resumed: the study, where the search began before.
    """

    def __init__(
        self, plan: Plan, place: Place, began: float, progress: Progress, held: ExitStack
    ) -> None:
        self._plan, self._place, self._began = plan, place, began
        self._progress, self._held = progress, held
        self._study: Study | None = None
        self._budget: Budget | None = None
        self.resumed = self._opened_study() if Study.is_in(place.folder) else None
        if self.resumed is not None:
            check_points(place.folder, self.resumed.trials(), plan.space)

    def _opened_study(self) -> Study:
        plan, place = self._plan, self._place
        identity, n_values = plan.identity(), len(plan.objectives.names)
        return self._held.enter_context(
            Study.create_or_resume(
                place.folder, place.storage, plan.search_file, identity, n_values, place.artifacts
            )
        )

    def begin(self, workers: Workers, say: UnderWay) -> tuple[Study, Pool, Budget]:
        """Start the workers, then make the study: a new search writes nothing before its engine is up."""
        plan = self._plan
        apart = suspects(self.resumed) if self.resumed else []
        for number in apart:
            say(f"candidate {number} was under way whenever the search ended; it gets a process apart")
        self._progress("starting", None, plan)
        gpus, had_gpus = n_gpus(plan, workers), time.monotonic()
        pool = start_pool(plan, workers, say, bool(apart))
        self._held.callback(pool.close)
        memory = pool.memory(plan.references(), plan.start.dtype)
        self._study = study = self.resumed or self._opened_study()
        study.keep_notes(
            {
                "documents": plan.documents(),
                "metrics": plan.metrics(),
                # What an earlier run was allowed stays said.
                "notices": list(dict.fromkeys([*(study.note("notices") or ()), *plan.notices()])),
                "n_layers": plan.n_layers,
                "memory": asdict(memory),
            }
        )
        self._budget = Budget(study, plan, gpus, self._began, had_gpus)
        self.show("started")
        return study, pool, self._budget

    def show(self, event: str) -> None:
        """Tell of an event; now and then also keep what is spent, so that any end leaves it behind."""
        if self._budget is not None and event != "answered":
            self._budget.keep()
        self._progress(event, self._study, self._plan)


@contextmanager
def opened(plan: Plan, place: Place, began: float, progress: Progress) -> Iterator[Session]:
    """Open a search, resumed where its place holds it; close its workers and its record at the end.

    Args:
        began: when this run did, by time.monotonic.

    Raises:
        ResumeRefusedError: the place holds another search, or another run is at work.
        StorageError: the storage cannot be reached.
    """
    with ExitStack() as held:
        held.enter_context(disk_faults_told(place.folder))
        yield Session(plan, place, began, progress, held)
