"""What a search may spend: candidates, seconds, documents, GPU hours. Each is a hard limit.

Nothing is begun that would go beyond one of them, as far as can be known: a candidate's documents are
known before, its seconds are taken to be those of the slowest of the last few. What is under way is
finished, and the verdict is given whatever was spent: what it takes counts in no budget.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

from evolve.plan import FEWEST_FINALISTS, Plan
from evolve.search_file import SearchSettings
from evolve.study import Study

if TYPE_CHECKING:
    from evolve.workers.start import Workers

# A candidate may take as long as the slowest of so many before it.
_LATEST = 10


def n_gpus(plan: Plan, workers: Workers) -> float:
    """Return how many GPUs the workers hold; one that splits a model over several holds them all."""
    is_on_gpu = plan.setup.engine.device.startswith("cuda")
    ranks = int(plan.setup.engine.options.get("tensor_parallel_size", 1))
    return workers.count * max(workers.gpus_each, ranks if is_on_gpu else 0)


def limits(settings: SearchSettings) -> dict[str, float]:
    """Return the limits that a search has beside its candidates, by their keys in the file."""
    given = {key: getattr(settings, key) for key in ("timeout_s", "max_documents", "max_gpu_hours")}
    return {key: limit for key, limit in given.items() if limit is not None}


def documents_a_candidate(plan: Plan) -> int:
    """Count the documents that a candidate is asked during the search, if it is not dropped."""
    if (race := plan.race()) is None:
        return plan.followed.n_documents
    return len({each for half in race.blocks(0) for every in half.values() for each in every})


def documents_of_finals(plan: Plan) -> int:
    """Count the documents without which the finals name no winner; they are held back for them."""
    return (
        min(FEWEST_FINALISTS, plan.search_file.search.n_iterations) * plan.tasks.n_documents
        if plan.needs_finals
        else 0
    )


def budget_faults(plan: Plan) -> list[str]:
    """List limits under which no candidate could be evaluated."""
    a_candidate, in_finals = documents_a_candidate(plan), documents_of_finals(plan)
    limit = plan.search_file.search.max_documents
    if limit is None or limit >= a_candidate + in_finals:
        return []
    finals = f" and the finals' {in_finals}" if in_finals else ""
    return [
        f"search.max_documents is {limit}, less than a candidate's {a_candidate} documents{finals}; "
        f"allow {a_candidate + in_finals} or more, or lower scoring.limit"
    ]


def most_candidates(plan: Plan) -> int:
    """Return how many candidates a search has at most, by its limits and by what the space holds."""
    settings = plan.search_file.search
    most = min(settings.n_iterations, plan.space.n_points or settings.n_iterations)
    if settings.max_documents is None:
        return most
    for_candidates = settings.max_documents - documents_of_finals(plan)
    return min(most, for_candidates // documents_a_candidate(plan))


class Budget:
    """What is spent of a search's limits, over all its runs.

    Args:
        n_gpus: how many are held.
        began: when this run began, by time.monotonic.
        had_gpus: since when it has held them.
    """

    def __init__(
        self,
        study: Study,
        plan: Plan,
        n_gpus: float = 0,
        began: float | None = None,
        had_gpus: float | None = None,
    ) -> None:
        now = time.monotonic()
        self._study, self._plan, self._n_gpus = study, plan, n_gpus
        self._began = now if began is None else began
        self._had_gpus = now if had_gpus is None else had_gpus
        self._seconds_before = study.note("seconds_total") or 0.0
        self._gpu_hours_before = study.note("gpu_hours") or 0.0
        self._a_candidate = documents_a_candidate(plan)
        self._held_back = documents_of_finals(plan)
        self._limits = limits(plan.search_file.search)
        self._under_way: dict[int, float] = {}
        self._asked_later = _asked_later(study)
        recent = (trial.user_attrs.get("seconds", {}) for trial in study.finished()[-_LATEST:])
        self._latest = deque((sum(seconds.values()) for seconds in recent), maxlen=_LATEST)

    # ---- what is spent ------------------------------------------------------------------------

    @property
    def seconds(self) -> float:
        """Seconds of all runs so far."""
        return self._seconds_before + time.monotonic() - self._began

    @property
    def gpu_hours(self) -> float:
        """GPU hours of all runs so far: GPUs count while they are held, whatever they do."""
        return self._gpu_hours_before + self._n_gpus * (time.monotonic() - self._had_gpus) / 3600

    @property
    def documents(self) -> int:
        """Documents that candidates were asked, or are being asked; those of failed ones in full."""
        in_full = self._study.n_failed + len(self._under_way)
        return self._study.n_documents + in_full * self._a_candidate + self.asked_later

    @property
    def asked_later(self) -> int:
        """Documents that candidates were asked after the search, by all runs: in rounds and finals."""
        return sum(self._asked_later.values())

    def begin(self, number: int) -> None:
        """Count a candidate as under way."""
        self._under_way[number] = time.monotonic()

    def end(self, number: int) -> None:
        """Count a candidate that was told."""
        self._latest.append(time.monotonic() - self._under_way.pop(number))

    def keep(self) -> None:
        """Keep what is spent with the study."""
        spent = {"seconds_total": self.seconds}
        if self._n_gpus:
            spent["gpu_hours"] = self.gpu_hours
        self._study.keep_notes(spent)

    # ---- what may be begun --------------------------------------------------------------------

    def refusal(self) -> str | None:
        """Say which limit the next candidate would exceed; None where it may begin."""
        if (limit := self._limits.get("max_documents")) is not None:
            left = limit - self.documents - self._held_back
            if left < self._a_candidate:
                held = f", and the finals need {self._held_back}" if self._held_back else ""
                return (
                    f"search.max_documents {limit:.0f}: {self.documents} are spent, a candidate is asked "
                    f"{self._a_candidate}{held}"
                )
        takes = max(self._latest, default=0.0)
        if (limit := self._limits.get("timeout_s")) is not None and self.seconds + takes > limit:
            spent = f"{self.seconds:.1f} s are spent"
            return f"search.timeout_s {limit:g}: {spent}, a candidate takes {takes:.1f} s"
        if (limit := self._limits.get("max_gpu_hours")) is not None:
            more = self._n_gpus * takes / 3600
            if self.gpu_hours + more > limit:
                return (
                    f"search.max_gpu_hours {limit:g}: {self.gpu_hours:.4f} are spent, a candidate takes "
                    f"{more:.4f}"
                )
        return None

    def takes(self, file: str, n_documents: int, keep_for_finals: bool = False) -> bool:
        """Tell whether a candidate may be asked documents after the search, and count them once.

        Args:
            file: where its outcomes will be, or are already: then nothing is asked.
            keep_for_finals: whether what the finals need must be left, and time too.
        """
        if self._study.outcomes.has(file):
            return True
        if keep_for_finals and (
            self.seconds > self._limits.get("timeout_s", float("inf"))
            or self.gpu_hours > self._limits.get("max_gpu_hours", float("inf"))
        ):
            return False
        if file in self._asked_later:  # a run before this one was interrupted there, or it failed
            return True
        limit = self._limits.get("max_documents", float("inf"))
        held_back = self._held_back if keep_for_finals else 0
        if self.documents + n_documents + held_back > limit:
            return False
        self._asked_later[file] = n_documents
        self._study.keep_note("asked_later", self._asked_later)
        return True

    def shortage(self) -> str:
        """Say what limit lets no finalist be scored: it was lowered to what is spent already."""
        limit, needed = self._limits["max_documents"], self.documents + self._held_back
        return (
            f"search.max_documents is {limit:.0f}, and {self.documents} are spent, so that no finalist "
            f"can be scored by the tasks' own metrics; allow {needed} or more, and run it again"
        )

    def close(self, why: str) -> None:
        """Keep with the study why nothing more was begun, and under which limits."""
        self._study.keep_note("ended", {"why": why, "limits": self._limits})


def _asked_later(study: Study) -> dict[str, int]:
    """Return by file how many documents were asked after the search."""
    if (noted := study.note("asked_later")) is not None:
        return dict(noted)
    # Records of before there was this note know the number alone.
    finals = study.note("finals")
    return {"finals": finals["documents"]} if finals else {}


def ended_at(study: Study, settings: SearchSettings) -> str | None:
    """Say at which limit a search ended; None where it did not, or has other limits now."""
    ended = study.note("ended")
    if not ended or ended["limits"] != limits(settings) or study.n_finished >= settings.n_iterations:
        return None
    why: str = ended["why"]
    return why
