"""Workers: who evaluates candidates. `local` is this process, `ray` are actors in others, `population`
is this process with an engine that scores several candidates at once.

All offer the same pool interface: submit jobs, wait for results. A worker that is lost is replaced
and its job tried again (`tries`); `start` chooses the pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from evolve.memory import Memory
from evolve.workers.worker import Job, Result


class Evaluates(Protocol):
    """What a pool needs of a worker; see `evolve.workers.worker.Worker`."""

    def evaluate(self, job: Job) -> Result:
        """Evaluate one job; a candidate's failure is part of the result, never raised."""

    def restart(self) -> None:
        """Start the engine anew; a pool in the same process asks for it, others make another worker.

        Raises:
            TrialError: it does not start.
        """

    def memory(self, references: Sequence[str], dtype: str | None) -> Memory:
        """Measure this process."""

    def close(self) -> None:
        """Stop the engine."""


class Pool(Protocol):
    """Evaluates jobs, several at a time."""

    size: int
    """How many jobs can be under way at once."""
    by_generation: bool
    """Whether `size` candidates are begun together, when all before them are told."""

    def submit(self, job: Job) -> None:
        """Start a job, or queue it until a worker is free."""

    def wait(self) -> Result:
        """Return the next finished job's result, whichever it is; its job is the very one submitted."""

    def memory(self, references: Sequence[str], dtype: str | None) -> Memory:
        """Wait until the engine is up, and measure one worker's memory; see `evolve.memory`."""

    def close(self) -> None:
        """Release processes and memory."""
