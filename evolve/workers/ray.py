"""The pool of Ray actors: one Worker a process, on this machine or a cluster.

No barrier: a free actor takes the next job at once. An actor that dies, breaks its engine or takes
too long is replaced, and its job is tried again. A replacement may wait for resources, on a host
that has yet to come; the others go on meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray._private import ray_constants

from evolve.errors import (
    SearchFileError,
    TrialError,
    TrialTimeoutError,
    TrialWorkerError,
    WorkersLostError,
)
from evolve.memory import Memory
from evolve.under_way import UnderWay, nobody_waits
from evolve.workers import Evaluates
from evolve.workers.hosts import Host, cpus_each, places
from evolve.workers.tries import Tries
from evolve.workers.worker import Job, Result
from merge_core.machine import divide_memory

# How often in a row a worker may fail to start, and how long to wait before the next attempt.
_MAX_STARTS, _START_AGAIN_S = 3, 5.0
# How long no worker may be up before that is said.
_PATIENCE_S = 30.0
# How long workers that are idle may take to tidy up.
_CLOSE_S = 5.0
# A Ray of our own has no dashboard, and listens to this machine alone. "local": left to itself Ray
# would join whatever cluster somebody started on this machine.
_ALONE: dict[str, Any] = {
    "address": "local",
    "include_dashboard": False,
    "_node_ip_address": "127.0.0.1",
}
# What torch takes its number of threads from; either may stand in the environment already.
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def no_limit(job: Job) -> float | None:
    """Let every job take what it takes."""
    return None


@dataclass(frozen=True)
class _Evaluation:
    """A job at work in an actor, until when at most (of `time.monotonic`)."""

    tries: Tries
    actor: Any
    deadline: float


class RayPool:
    """Workers in processes of their own.

    Args:
        start: makes a worker, in the actor's process; picklable.
        size: how many workers.
        gpus_each: GPUs each one gets.
        address: an existing cluster's, or None to start one here.
        n_threads: how many each computes with at most; None = as many as it has cores.
        limit_s: gives the seconds that a job may take.
        say: told what is lost, replaced and tried again.
        tidy_up: called when all workers have ended.

    Raises:
        SearchFileError: the cluster has not the GPUs for so many workers.
        TrialWorkerError: Ray cannot be started or reached.
    """

    by_generation = False

    by_generation = False

    def __init__(
        self,
        start: Callable[[], Evaluates],
        size: int,
        gpus_each: float = 0,
        address: str | None = None,
        n_threads: int | None = None,
        limit_s: Callable[[Job], float | None] = no_limit,
        say: UnderWay = nobody_waits,
        tidy_up: Callable[[], None] = lambda: None,
    ) -> None:
        self.size = size
        self._tidy_up = tidy_up
        self._is_alone = address is None
        self._make = start
        self._limit_s = limit_s
        self._say = say
        # Of workers that start: the actor, and how often in a row its like have failed to.
        self._starting: dict[Any, tuple[Any, int]] = {}
        self._free: list[Any] = []
        self._busy: dict[Any, _Evaluation] = {}
        self._backlog: deque[Tries] = deque()
        self._done: deque[Result] = deque()
        self._owns_ray = not ray.is_initialized()
        if self._owns_ray:
            _start_ray(address)
        hosts = [
            Host(host["Resources"].get("CPU", 0), host["Resources"].get("GPU", 0))
            for host in ray.nodes()
            if host["Alive"]
        ]
        cpus = cpus_each(hosts, size, gpus_each)
        if cpus is None:
            self.close()
            n_gpus = sum(host.gpus for host in hosts)
            raise SearchFileError(
                f"--workers {size} need {gpus_each:g} GPUs each, and the cluster has {n_gpus:g} on "
                f"{len(hosts)} hosts; use fewer workers"
            )
        if cpus < 1:
            n_cpus = sum(host.cpus for host in hosts)
            say(f"note: {size} workers share {n_cpus:g} CPUs; fewer would each be faster")
        # Disjoint cores: two thread pools on one core are slower than one.
        n_threads = max(1, min(int(cpus), n_threads or int(cpus)))
        self._actor_class = ray.remote(
            num_cpus=cpus,
            num_gpus=gpus_each,
            max_restarts=0,
            runtime_env={"env_vars": dict.fromkeys(_THREADS, str(n_threads))},
        )(_Actor)
        self._n_on_host = max(places(host, cpus, gpus_each, size) for host in hosts)
        # When (of `time.monotonic`) to start a worker again that has failed to so often in a row.
        self._due: list[tuple[float, int]] = []
        self._was_up = False
        self._silent_since = time.monotonic()
        for _ in range(size):
            self._start()

    def _start(self, n_failed: int = 0) -> None:
        actor = self._actor_class.remote(self._make, os.getcwd(), self._n_on_host)
        self._starting[actor.ready.remote()] = actor, n_failed

    # ---- the pool's interface -------------------------------------------------------------------

    def memory(self, references: Sequence[str], dtype: str | None) -> Memory:
        """Wait for the first worker and measure it; the others hold as much again.

        Raises:
            SearchFileError: the engine cannot start with the user's settings.
            WorkersLostError: no worker can be started.
        """
        while True:
            while not self._free:
                self._step()
            actor = self._free[-1]
            try:
                measured: Memory = ray.get(actor.memory.remote(references, dtype))
                return measured
            except ray.exceptions.RayTaskError as error:
                raise _unwrapped(error) from None
            except ray.exceptions.RayError as error:
                self._free.remove(actor)
                self._start_failed(f"it died while it was measured: {_last_line(error)}", 0)

    def submit(self, job: Job) -> None:
        """Give a job to a free worker, now or as soon as one is."""
        self._backlog.append(Tries(job))
        self._hand_out()

    def wait(self) -> Result:
        """Return the next finished job's result.

        Raises:
            WorkersLostError: no worker is left, and none can be started.
        """
        while not self._done:
            self._step()
        return self._done.popleft()

    def close(self) -> None:
        """End the actors, whatever they are doing; stop Ray where it was started or joined here."""
        with contextlib.suppress(Exception):  # what is not tidied up is killed
            ray.wait(
                [actor.close.remote() for actor in self._free],
                num_returns=len(self._free),
                timeout=_CLOSE_S,
            )
        starting = [actor for actor, _ in self._starting.values()]
        for actor in (*starting, *self._free, *(each.actor for each in self._busy.values())):
            _kill(actor)
        if self._owns_ray:
            ray.shutdown()
        self._tidy_up()

    # ---- what happens ---------------------------------------------------------------------------

    def _hand_out(self) -> None:
        while self._backlog and self._free:
            tries, actor = self._backlog.popleft(), self._free.pop()
            tries.n += 1
            limit_s = self._limit_s(tries.job)
            deadline = time.monotonic() + (float("inf") if limit_s is None else limit_s)
            self._busy[actor.evaluate.remote(tries.job)] = _Evaluation(tries, actor, deadline)

    def _step(self) -> None:
        """Wait until something happens, and act on it."""
        now = time.monotonic()
        for due in [due for due in self._due if due[0] <= now]:
            self._due.remove(due)
            self._start(due[1])
        waited_for = [*self._busy, *self._starting]
        dues = [due for due, _ in self._due] + [each.deadline for each in self._busy.values()]
        until = min([now + _PATIENCE_S, *dues])
        if waited_for:
            ready, _ = ray.wait(waited_for, num_returns=1, timeout=max(0.0, until - now))
        else:
            ready = []
            time.sleep(max(0.0, until - now))
        for reference in ready:
            if reference in self._busy:
                self._answered(reference, self._busy.pop(reference))
            else:
                self._started(reference, *self._starting.pop(reference))
        for reference, late in list(self._busy.items()):
            if late.deadline <= time.monotonic():
                del self._busy[reference]
                self._is_late(late)
        self._tell_if_nobody_works()
        self._hand_out()

    def _started(self, reference: Any, actor: Any, n_failed: int) -> None:
        try:
            ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            fault = _unwrapped(error)
            # What others took is no fault of the file, but of the host.
            if isinstance(fault, SearchFileError) and not self._was_up:
                raise fault from None
            _kill(actor)
            self._start_failed(str(fault), n_failed)
        except ray.exceptions.RayError as error:
            _kill(actor)
            if _is_of_the_host(error):
                self._start(n_failed)
            else:
                self._start_failed(_last_line(error), n_failed)
        else:
            self._was_up = True
            self._free.append(actor)

    def _start_failed(self, why: str, n_failed: int) -> None:
        """Try again in a while; after some failures in a row go on without this worker."""
        text = f"a worker could not start: {' '.join(why.split())[:300]}"
        is_the_last = not (self._free or self._busy or self._starting or self._due)
        if is_the_last and (n_failed + 1 >= _MAX_STARTS or not self._was_up):
            raise WorkersLostError(f"{text}; correct it and run the same command again")
        if n_failed + 1 < _MAX_STARTS:
            self._due.append((time.monotonic() + _START_AGAIN_S, n_failed + 1))
            self._say(f"{text}; it is tried again")
        else:
            self._say(f"{text}; the search goes on without it")

    def _answered(self, reference: Any, evaluation: _Evaluation) -> None:
        tries, actor = evaluation.tries, evaluation.actor
        try:
            result: Result = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            raise _unwrapped(error) from None
        except ray.exceptions.RayError as error:
            self._replace(actor)
            if _is_of_the_host(error):
                self._try_again(tries, tries.lose_host())
            else:
                text = "the worker died: it was killed, ran out of memory or crashed"
                self._try_again(tries, tries.lose(TrialWorkerError.kind, text))
            return
        if result.broke_worker and result.failure is not None:
            self._replace(actor)
            self._try_again(tries, tries.lose(*result.failure, is_repeatable=True))
            return
        self._free.append(actor)
        self._done.append(tries.done(result))

    def _is_late(self, late: _Evaluation) -> None:
        self._replace(late.actor)
        limit_s = self._limit_s(late.tries.job)
        text = f"it took longer than {limit_s:g} s, see search.candidate_timeout_s"
        self._try_again(late.tries, late.tries.lose(TrialTimeoutError.kind, text))

    def _replace(self, actor: Any) -> None:
        _kill(actor)
        self._start()

    def _try_again(self, tries: Tries, failed: Result | None) -> None:
        if failed is not None:
            self._done.append(failed)
            return
        self._say(f"{tries}: {tries.last:.300}; the worker is replaced, it is tried again")
        self._backlog.appendleft(tries)

    def _tell_if_nobody_works(self) -> None:
        """Say that no worker is up.

        Raises:
            WorkersLostError: none can be: this machine's own Ray has died, which no host can join.
        """
        now = time.monotonic()
        if self._free or self._busy:
            self._silent_since = now
        elif now - self._silent_since > _PATIENCE_S:
            self._silent_since = now
            if self._is_alone and not any(node["Alive"] for node in ray.nodes()):
                raise WorkersLostError(
                    "Ray has died on this machine: it was killed, or memory ran out; run the same "
                    "command again, it goes on where it was"
                )
            self._say("no worker is up; waiting for one to start, or for a host to join the cluster")


def _start_ray(address: str | None) -> None:
    options: dict[str, Any] = {"address": address} if address else _ALONE
    if not address:
        # Else Ray takes 127.0.0.1 for a name of this machine, and its servers listen everywhere.
        ray_constants.ENABLE_RAY_CLUSTER = False
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(log_to_driver=False, logging_level="ERROR", **options)
    except (ConnectionError, ValueError, ray.exceptions.RayError) as error:
        if "token" in f"{error} {error.__cause__}":
            raise TrialWorkerError(
                f"--ray-address is {address}, whose cluster asks for a token; set RAY_AUTH_MODE=token, "
                f"with ~/.ray/auth_token as on its head"
            ) from error
        raise TrialWorkerError(f"Ray cannot be started or reached: {str(error)[:300]}") from error
    finally:
        # Ray puts its own handler there, which exits with status 15 instead of pausing.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _kill(actor: Any) -> None:
    with contextlib.suppress(Exception):  # it may be gone, and its cluster with it
        ray.kill(actor)


def _is_of_the_host(error: ray.exceptions.RayError) -> bool:
    """Tell whether a worker was lost with its host, or with the way to it."""
    if isinstance(error, ray.exceptions.ActorUnavailableError | ray.exceptions.NodeDiedError):
        return True
    return "node has died" in str(error) or "node was terminated" in str(error)


def _unwrapped(error: ray.exceptions.RayTaskError) -> Exception:
    """Return what an actor raised, where it is of ours, else the error as it is."""
    cause = error.cause
    return cause if isinstance(cause, SearchFileError | TrialError) else error


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1][:300]


class _Actor:
    """The actor's body: a worker in the driver's working directory."""

    def __init__(self, start: Callable[[], Evaluates], working_directory: str, n_on_host: int) -> None:
        divide_memory(n_on_host)
        self._fault: Exception | None = None
        # A host without this folder can serve a search whose paths are absolute; others fail to start.
        with contextlib.suppress(OSError):
            os.chdir(working_directory)
        try:
            self._worker = start()
        except (
            SearchFileError,
            TrialError,
        ) as error:  # told when it is asked: a dead actor loses the text
            self._fault = error
        except Exception as error:
            self._fault = TrialWorkerError(f"{type(error).__name__}: {error}")

    def ready(self) -> None:
        """Return when the engine is up.

        Raises:
            SearchFileError: it cannot start with the user's settings.
            TrialError: it cannot start.
        """
        if self._fault:
            raise self._fault

    def memory(self, references: Sequence[str], dtype: str | None) -> Memory:
        """Measure this process."""
        return self._worker.memory(references, dtype)

    def evaluate(self, job: Job) -> Result:
        """Evaluate one job."""
        return self._worker.evaluate(job)

    def close(self) -> None:
        """Give back what the worker holds beyond its process."""
        self._worker.close()
