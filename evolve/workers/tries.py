"""How often a job is tried: a worker that is lost over it is replaced, and it is tried again."""

from __future__ import annotations

from dataclasses import replace

from evolve.workers.worker import Job, Result

MAX_RETRIES = 2
# Of hosts that leave with a job: never the job's fault, unless it happens each time.
_MAX_HOSTS = 10


class Tries:
    """A job, and what became of it so far.

    Attributes:
        job: what is tried.
        n: how often it was begun.
        last: what the last try was lost to.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.n = 0
        self.last = ""
        self._n_lost = job.n_lost
        self._n_hosts = 0

    def lose(self, kind: str, text: str, is_repeatable: bool = False) -> Result | None:
        """Count a try that cost its worker; return the job's result where it was the last.

        Args:
            kind, text: what it was lost to.
            is_repeatable: whether the text tells errors apart: the same one twice in a row is the
                candidate's, and a third try would find it again.
        """
        is_the_same = is_repeatable and text == self.last
        self._n_lost += 1
        self.last = text
        if self._n_lost > MAX_RETRIES or is_the_same:
            return self._failed(kind, text if is_repeatable else f"{text} ({self._n_lost} times)")
        return None

    def lose_host(self) -> Result | None:
        """Count a try that was lost with its host, which is held against nobody; see `lose`."""
        self._n_hosts += 1
        self.last = "its host left the cluster"
        if self._n_hosts > _MAX_HOSTS:
            return self._failed("worker", f"{self._n_hosts} hosts left the cluster while evaluating it")
        return None

    def done(self, result: Result) -> Result:
        """Return a result of the job as the caller's own: it may have come from another process."""
        return replace(result, job=self.job, n_tries=self.n)

    def _failed(self, kind: str, text: str) -> Result:
        return self.done(Result(self.job, failure=(kind, text)))

    def __str__(self) -> str:
        """Name the job for a notice."""
        what = "candidate" if self.job.kind == "trial" else f"{self.job.kind} scoring of"
        return f"{what} {self.job.name}"
