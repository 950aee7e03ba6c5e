"""The pool of one worker in this process: no Ray, the default."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from evolve.memory import Memory
from evolve.workers import Evaluates
from evolve.workers.worker import Job, Result


class LocalPool:
    """Evaluates one job at a time, when it is waited for."""

    size = 1

    def __init__(self, worker: Evaluates) -> None:
        self._worker = worker
        self._jobs: deque[Job] = deque()

    def submit(self, job: Job) -> None:
        """Queue a job."""
        self._jobs.append(job)

    def wait(self) -> Result:
        """Evaluate the oldest job."""
        return self._worker.evaluate(self._jobs.popleft())

    def memory(self, references: Sequence[str], dtype: str | None) -> Memory:
        """Measure this process."""
        return self._worker.memory(references, dtype)

    def close(self) -> None:
        """Stop the engine."""
        self._worker.close()
