"""The pool that scores several candidates at once, in this process: as adapters of one base.

Only trials are scored so, and only those whose merge is an adapter (`merge_core.combined`). What
decides, finals, baselines and holdout, is merged and scored in the ordinary engine, which then takes
the place of the adapters' one.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from evolve.engines import shape
from evolve.errors import TrialEngineError, TrialError, TrialMergeError, TrialWorkerError, boundary
from evolve.memory import Memory
from evolve.tasks import TaskSet
from evolve.under_way import UnderWay, nobody_waits
from evolve.workers.local import LocalPool
from evolve.workers.worker import Job, Result, Worker, WorkerSetup
from merge_core.combined import CombinedAdapter, NoAdapterError, combined_adapter, combined_adapters
from merge_core.plan import Sources, model_alone
from merge_core.recipe import Recipe

if TYPE_CHECKING:
    from evolve.engines.vllm_adapters import AsCandidate, VllmAdapters

_OF_ADAPTERS = "adapters"


class PopulationWorker(Worker):
    """A worker with an engine that serves candidates as adapters, and the ordinary one by turns.

    Args:
        size: how many candidates are served at once.
        examples: recipes that together have all models that candidates use; all are adapters of one
            base, and of one shape.
        setup, tasks, sources, reported: see Worker.
    """

    def __init__(
        self,
        size: int,
        examples: Sequence[Recipe],
        setup: WorkerSetup,
        tasks: TaskSet | None = None,
        sources: Sources | None = None,
        reported: TaskSet | None = None,
    ) -> None:
        self.size = size
        self._examples = examples
        super().__init__(setup, tasks, sources, reported)

    def _start(self) -> None:
        """Start the engine of adapters."""
        from evolve.engines.vllm_adapters import VllmAdapters

        examples = combined_adapters(self._examples, self.sources)
        base = model_alone(examples[0].base, self._examples[0])
        self.engine = VllmAdapters(self._first, self.size, examples, base, self.sources)
        self._shape = _OF_ADAPTERS

    def _serving(self) -> VllmAdapters:
        """Return the engine of adapters, started anew where the other one is up."""
        from evolve.engines.vllm_adapters import VllmAdapters

        if self._shape != _OF_ADAPTERS:
            self._stop()
            with boundary(TrialEngineError, "starting the engine of adapters"):
                self._start()
        assert isinstance(self.engine, VllmAdapters)
        return self.engine

    def evaluate(self, job: Job) -> Result:
        """Evaluate one job, see Worker."""
        (result,) = self.evaluate_together([job])
        return result

    def evaluate_together(self, jobs: Sequence[Job]) -> list[Result]:
        """Evaluate up to `size` jobs; a failure is part of the result, never raised."""
        results = [Result(job, as_adapter=True) for job in jobs]
        adapters: list[tuple[Result, CombinedAdapter]] = []
        merged: list[int] = []
        for i, (job, result) in enumerate(zip(jobs, results, strict=True)):
            began = time.perf_counter()
            try:
                with boundary(TrialMergeError, "merging"):
                    adapter = self._adapter(job)
            except TrialError as error:
                result.fail(error)
            else:
                if adapter is None:
                    merged.append(i)
                else:
                    adapters.append((result, adapter))
            result.seconds.merge = time.perf_counter() - began
        if adapters:
            self._serve(adapters)
        for i in merged:  # last: their engine takes the other's place
            results[i] = super().evaluate(jobs[i])
        return results

    def _adapter(self, job: Job) -> CombinedAdapter | None:
        """Return the adapter that a candidate's recipe is; None where it has to be merged."""
        if job.kind != "trial":
            return None
        try:
            adapter = combined_adapter(job.recipe, self.sources)
        except NoAdapterError:
            return None
        return adapter if shape(self._settings(job.recipe)) == shape(self._first) else None

    def _serve(self, adapters: Sequence[tuple[Result, CombinedAdapter]]) -> None:
        """Load the adapters and score them together."""
        results = [result for result, _ in adapters]
        try:
            with boundary(TrialEngineError, "preparing the requests"):
                for result in results:  # a new bank may load its references' weights
                    self._prepare(result.job)
            engine = self._serving()
        except TrialError as error:
            for result in results:
                result.fail(error)
            return
        held = []
        for result, adapter in adapters:
            began = time.perf_counter()
            try:
                with boundary(TrialEngineError, "loading the adapter"):
                    held.append((result, engine.hold(adapter)))
            except TrialError as error:
                result.fail(error)
            result.seconds.load = time.perf_counter() - began
        began = time.perf_counter()
        scored = engine.together([(place, partial(self._score, result)) for result, place in held])
        each_s = (time.perf_counter() - began) / max(1, len(held))
        for (result, _), fault in zip(held, scored, strict=True):
            result.seconds.score = each_s
            if isinstance(fault, TrialError):
                result.fail(fault)
        try:
            with boundary(TrialEngineError, "taking the adapters out"):
                engine.forget()
        except TrialError as error:
            for result in results:
                result.fail(error)

    def _prepare(self, job: Job) -> None:
        for prompting in job.promptings:
            folder = self._folder(prompting, job.recipe)
            for split in job.splits:
                self._bank(folder, prompting, split)

    def _score(self, result: Result, as_candidate: AsCandidate) -> TrialError | None:
        """Have a candidate's documents answered; returns what went wrong."""
        job = result.job
        try:
            with boundary(TrialWorkerError, "evaluating the candidate"):
                for prompting in job.promptings:
                    folder = self._folder(prompting, job.recipe)
                    lm = as_candidate(self._serving().lm(folder))
                    for split in job.splits:
                        bank = self._bank(folder, prompting, split).asking(lm)
                        with boundary(TrialEngineError, "answering the requests"):
                            outcomes = bank.answer(split, job.signal, documents=job.documents)
                        result.outcomes.setdefault(prompting, {})[split] = outcomes
                self._check_scores(result)
        except TrialError as error:
            return error
        return None


class PopulationPool:
    """Evaluates a generation of candidates together, when it is waited for.

    Args:
        worker: this process's.
        say: told what is lost and tried again.
    """

    by_generation = True

    def __init__(self, worker: PopulationWorker, say: UnderWay = nobody_waits) -> None:
        self.size = worker.size
        self._worker = worker
        self._alone = LocalPool(worker, say)
        self._jobs: deque[Job] = deque()
        self._done: deque[Result] = deque()

    def submit(self, job: Job) -> None:
        """Queue a job."""
        self._jobs.append(job)

    def wait(self) -> Result:
        """Return the oldest result; where there is none, evaluate all that is queued.

        Candidates that broke the engine are tried again one by one, as in `LocalPool`.

        Raises:
            WorkersLostError: the engine broke, and none can be started in its place.
        """
        if not self._done:
            jobs = list(self._jobs)
            self._jobs.clear()
            results = self._worker.evaluate_together(jobs)
            if broken := [result for result in results if result.broke_worker]:
                self._alone.replace_engine(broken[0])
            for result in results:
                if result.broke_worker:
                    self._alone.submit(result.job)
                    result = self._alone.wait()
                self._done.append(result)
        return self._done.popleft()

    def memory(self, references: Sequence[str], dtype: str | None) -> Memory:
        """Measure this process."""
        return self._worker.memory(references, dtype)

    def close(self) -> None:
        """Stop the engine."""
        self._worker.close()
