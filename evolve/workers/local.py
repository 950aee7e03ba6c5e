"""The pool of one worker in this process: no Ray, the default.

An engine that breaks is started anew here, and its candidate is tried again. What takes the whole
process with it, or leaves a device unusable for it, ends this run, and the next one goes on; and
nothing here can stop a computation that does not end (`search.candidate_timeout_s` takes a process).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from evolve.errors import TrialError, WorkersLostError
from evolve.memory import Memory
from evolve.under_way import UnderWay, nobody_waits
from evolve.workers import Evaluates
from evolve.workers.tries import Tries
from evolve.workers.worker import Job, Result


class LocalPool:
    """Evaluates one job at a time, when it is waited for.

    Args:
        worker: this process's.
        say: told what is lost and tried again.
    """

    size = 1
    by_generation = False

    def __init__(self, worker: Evaluates, say: UnderWay = nobody_waits) -> None:
        self._worker = worker
        self._say = say
        self._jobs: deque[Job] = deque()

    def submit(self, job: Job) -> None:
        """Queue a job."""
        self._jobs.append(job)

    def wait(self) -> Result:
        """Evaluate the oldest job.

        Raises:
            WorkersLostError: the engine broke, and none can be started in its place.
        """
        tries = Tries(self._jobs.popleft())
        while True:
            tries.n += 1
            result = self._worker.evaluate(tries.job)
            if not result.broke_worker or result.failure is None:
                return tries.done(result)
            kind, text = result.failure
            self.replace_engine(result)
            if (failed := tries.lose(kind, text, is_repeatable=True)) is not None:
                return failed
            self._say(f"{tries}: {text:.300}; the engine was started anew, it is tried again")

    def replace_engine(self, result: Result) -> None:
        """Start the engine anew after a result that broke it.

        Raises:
            WorkersLostError: it does not start.
        """
        try:
            self._worker.restart()
        except TrialError as error:
            _, text = result.failure or ("", "")
            raise WorkersLostError(
                f"{Tries(result.job)}: {text:.300}; the engine cannot be started again in this process "
                f"({error!s:.200}); run the same command again, it goes on where it was"
            ) from error

    def memory(self, references: Sequence[str], dtype: str | None) -> Memory:
        """Measure this process."""
        return self._worker.memory(references, dtype)

    def close(self) -> None:
        """Stop the engine."""
        self._worker.close()
