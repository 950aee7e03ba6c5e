"""The pool of Ray actors: one Worker a process, on this machine or a cluster.

No barrier: a free actor takes the next job at once. An actor that dies is replaced, and its job is
tried again, at most twice.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import ray

from evolve.errors import SearchFileError, TrialWorkerError
from evolve.memory import Memory
from evolve.workers import Evaluates
from evolve.workers.worker import Job, Result

MAX_RETRIES = 2
# What torch takes its number of threads from; either may stand in the environment already.
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


class RayPool:
    """`size` workers in processes of their own.

    Args:
        start: makes a worker, in the actor's process; picklable.
        size: how many workers.
        gpus_per_worker: GPUs each one gets.
        address: an existing cluster's, or None to start one here.
    """

    def __init__(
        self,
        start: Callable[[], Evaluates],
        size: int,
        gpus_per_worker: float = 0,
        address: str | None = None,
    ) -> None:
        self.size = size
        self._make = start
        self._owns_ray = not ray.is_initialized()
        if self._owns_ray:
            options: dict[str, Any] = {"address": address} if address else {"include_dashboard": False}
            handler = signal.getsignal(signal.SIGTERM)
            try:
                ray.init(log_to_driver=False, logging_level="ERROR", **options)
            except (ConnectionError, ValueError) as error:
                raise TrialWorkerError(f"Ray cannot be started or reached: {str(error)[:300]}") from error
            finally:
                # Ray puts its own handler there, which exits with status 15 instead of pausing.
                if threading.current_thread() is threading.main_thread():
                    signal.signal(signal.SIGTERM, handler)
        n_cpus = int(ray.cluster_resources().get("CPU", 1))
        cpus = max(1, n_cpus // size)
        if n_cpus < size * cpus or ray.cluster_resources().get("GPU", 0) < size * gpus_per_worker:
            have = f"{n_cpus} CPUs, {ray.cluster_resources().get('GPU', 0):g} GPUs"
            self.close()
            raise SearchFileError(
                f"--workers {size} needs {size * cpus} CPUs and {size * gpus_per_worker:g} GPUs; the "
                f"cluster has {have}, use fewer workers"
            )
        # Disjoint cores: two thread pools on one core are slower than one.
        self._actor_class = ray.remote(
            num_cpus=cpus,
            num_gpus=gpus_per_worker,
            max_restarts=0,
            runtime_env={"env_vars": dict.fromkeys(_THREADS, str(cpus))},
        )(_Actor)
        self._free = [self._start() for _ in range(size)]
        self._pending: dict[Any, tuple[Job, Any, int]] = {}

    def _start(self) -> Any:
        return self._actor_class.remote(self._make, os.getcwd())

    def memory(self, references: Sequence[str], dtype: str | None) -> Memory:
        """Measure the first worker; the others hold as much again."""
        try:
            measured: Memory = ray.get(self._free[0].memory.remote(references, dtype))
        except ray.exceptions.RayActorError as error:
            raise _could_not_start(error) from error
        except ray.exceptions.RayTaskError as error:
            raise _unwrapped(error) from None
        return measured

    def submit(self, job: Job) -> None:
        """Give a job to a free worker."""
        self._submit(job, self._free.pop(), attempt=0)

    def _submit(self, job: Job, actor: Any, attempt: int) -> None:
        self._pending[actor.evaluate.remote(job)] = (job, actor, attempt)

    def wait(self) -> Result:
        """Return the next finished job's result."""
        while True:
            (ready,), _ = ray.wait(list(self._pending), num_returns=1)
            job, actor, attempt = self._pending.pop(ready)
            try:
                result: Result = ray.get(ready)
            except ray.exceptions.RayActorError as error:
                if isinstance(error, ray.exceptions.ActorDiedError) and "__init__" in str(error):
                    raise _could_not_start(error) from error
                if attempt < MAX_RETRIES:
                    self._submit(job, self._start(), attempt + 1)
                    continue
                self._free.append(self._start())
                text = f"the worker died {attempt + 1} times while evaluating this candidate"
                return Result(job, failure=(TrialWorkerError.kind, text))
            except ray.exceptions.RayTaskError as error:
                raise _unwrapped(error) from None
            self._free.append(actor)
            # The job came back through another process: hand out the caller's own.
            return replace(result, job=job)

    def close(self) -> None:
        """Stop the actors, and Ray where it was started here."""
        if self._owns_ray:
            ray.shutdown()


def _unwrapped(error: ray.exceptions.RayTaskError) -> Exception:
    """Return the user's fault that an actor told, else the error as it is."""
    return error.cause if isinstance(error.cause, SearchFileError) else error


def _could_not_start(error: Exception) -> TrialWorkerError:
    return TrialWorkerError(f"a worker could not start: {str(error).strip().splitlines()[-1]:.300}")


class _Actor:
    """The actor's body: a worker in the driver's working directory."""

    def __init__(self, start: Callable[[], Evaluates], working_directory: str) -> None:
        os.chdir(working_directory)
        self._fault: SearchFileError | None = None
        try:
            self._worker = start()
        except SearchFileError as error:  # told when it is asked: a dead actor loses the text
            self._fault = error

    def memory(self, references: Sequence[str], dtype: str | None) -> Memory:
        """Measure this process.

        Raises:
            SearchFileError: the engine cannot start with the user's settings.
        """
        if self._fault:
            raise self._fault
        return self._worker.memory(references, dtype)

    def evaluate(self, job: Job) -> Result:
        """Evaluate one job.

        Raises:
            SearchFileError: the engine could not start with the user's settings.
        """
        if self._fault:
            raise self._fault
        return self._worker.evaluate(job)
