"""A search that is open: its record, kept from other runs, its workers, and what may be spent."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
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


def folder_of(search_file: SearchFile, folder: Path | str | None) -> Path:
    """Return the storage path: `folder`, or else NAME-search in the working directory."""
    return Path(folder or f"{search_file.name}-search")


def settled_plan(search_file: SearchFile, folder: Path, storage: str | None, **options: Any) -> Plan:
    """Return the plan of a search; what `auto` means stays what it meant when the search began.

    Args:
        options: those of `evolve.plan.make_plan`.

    Raises:
        SearchFileError, StorageError: the input is at fault, or an earlier record cannot be read.
    """
    if (earlier := Study.earlier_file(folder, storage)) is not None:
        search_file = search_file.settled(earlier)
    plan = make_plan(search_file, **options)
    if faults := budget_faults(plan):
        raise SearchFileError(faults)
    return plan


def check(plan: Plan, folder: Path, storage: str | None, artifacts: Path | None) -> None:
    """Check what `opened` would refuse, and leave nothing behind.

    Raises:
        SearchFileError, ResumeRefusedError, StorageError: as there.
    """
    check_artifacts(artifacts)
    Study.check(folder, storage, plan.identity())


def check_artifacts(artifacts: Path | None) -> None:
    """Raise SearchFileError where `--artifacts` names no folder."""
    if artifacts is not None and not artifacts.is_dir():
        raise SearchFileError(f"--artifacts is {artifacts}, which is no folder; make it or name another")


class Session:
    """A run of a search; see `opened`.

    Attributes:
        resumed: the study, where the search began before.
    """

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        storage: str | None,
        artifacts: Path | None,
        began: float,
        progress: Progress,
        held: ExitStack,
    ) -> None:
        self._plan, self._folder, self._storage, self._artifacts = plan, folder, storage, artifacts
        self._began, self._progress, self._held = began, progress, held
        self._study: Study | None = None
        self._budget: Budget | None = None
        self.resumed = self._opened_study() if Study.is_in(folder) else None
        if self.resumed is not None:
            check_points(folder, self.resumed.trials(), plan.space)

    def _opened_study(self) -> Study:
        plan = self._plan
        identity, n_values = plan.identity(), len(plan.objectives.names)
        return self._held.enter_context(
            Study.create_or_resume(
                self._folder, self._storage, plan.search_file, identity, n_values, self._artifacts
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
def opened(
    plan: Plan,
    folder: Path,
    storage: str | None,
    artifacts: Path | None,
    began: float,
    progress: Progress,
) -> Iterator[Session]:
    """Open a search, resumed where `folder` holds it; close its workers and its record at the end.

    Args:
        artifacts: a folder that all hosts of the search see.
        began: when this run did, by time.monotonic.

    Raises:
        ResumeRefusedError: the folder holds another search, or another run is at work.
        StorageError: the storage cannot be reached.
    """
    with ExitStack() as held:
        held.enter_context(disk_faults_told(folder))
        yield Session(plan, folder, storage, artifacts, began, progress, held)
