"""Which pool a search has: this process, or processes of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from evolve.errors import SearchFileError
from evolve.memory import refuse_too_large
from evolve.under_way import UnderWay, nobody_waits
from evolve.workers import Pool
from evolve.workers.local import LocalPool
from evolve.workers.worker import Job, Worker

if TYPE_CHECKING:
    from evolve.plan import Plan


@dataclass(frozen=True)
class Workers:
    """How many workers evaluate candidates, and where.

    `count` 1 is this process, unless something needs it to be another; more are Ray actors.
    """

    count: int = 1
    gpus_each: float = 0
    ray_address: str | None = None


def start_pool(
    plan: Plan, workers: Workers, say: UnderWay = nobody_waits, is_apart: bool = False
) -> Pool:
    """Start the workers: this process for one, Ray actors for more; see `needs_actors`.

    Candidates that are served as adapters, several at once, are this process's too.

    Args:
        say: told what is lost, replaced and tried again.
        is_apart: whether even one worker has to be in a process of its own.

    Raises:
        SearchFileError: the engine cannot fit or start with these settings.
    """
    n_here = 1 if workers.ray_address else workers.count
    refuse_too_large(plan.largest, plan.sources, plan.setup.engine.device, n_here)
    if (size := plan.search_file.search.n_adapters) and not is_apart:
        if needs_actors(plan, workers):
            raise SearchFileError(
                f"search.adapters_at_once is {size}, which one engine in this process serves; leave out "
                f"--workers and --ray-address, or write none"
            )
        from evolve.workers.population import PopulationPool, PopulationWorker

        known = plan.setup, plan.tasks, plan.sources, plan.report_only
        return PopulationPool(PopulationWorker(size, plan.space.examples(), *known), say)
    if not needs_actors(plan, workers, is_apart):
        return LocalPool(Worker(plan.setup, plan.tasks, plan.sources, plan.report_only), say)
    import torch

    from evolve.workers.ray import RayPool
    from merge_core.shared import remove_shared

    gpus_each = gpus_wanted(plan.setup.engine.device, plan.setup.engine.options, workers.gpus_each)
    shared_as = uuid4().hex
    setup = replace(plan.setup, shared_as=shared_as)
    # On this machine no more threads than this process has: one worker apart gives the same numbers.
    n_threads = None if workers.ray_address else torch.get_num_threads()
    if gpus_each:  # Ray shows a worker its own devices alone
        setup = replace(setup, engine=replace(setup.engine, device=setup.engine.device.split(":")[0]))
    limit_s = time_limit(plan, plan.search_file.search.candidate_timeout_s)
    start = partial(Worker, setup)
    tidy_up = partial(remove_shared, shared_as)
    return RayPool(start, workers.count, gpus_each, workers.ray_address, n_threads, limit_s, say, tidy_up)


def needs_actors(plan: Plan, workers: Workers, is_apart: bool = False) -> bool:
    """Tell whether the workers are processes of their own.

    One is, too, where candidates have a time limit: only a process can be stopped.
    """
    is_elsewhere = workers.count > 1 or workers.ray_address is not None
    return is_elsewhere or is_apart or plan.search_file.search.candidate_timeout_s is not None


def gpus_wanted(device: str, options: dict[str, Any], gpus_each: float) -> float:
    """Return how many GPUs a worker takes: as asked for, else one for each rank of its engine.

    Args:
        device: the engine's; one with a number is shared by all workers.
        options: `scoring.engine`.
        gpus_each: what the user asks for; 0 = nothing.

    Raises:
        SearchFileError: the ranks need more.
    """
    n_ranks = options.get("tensor_parallel_size", 1) * options.get("pipeline_parallel_size", 1)
    if not device.startswith("cuda"):
        return gpus_each
    if gpus_each and gpus_each < n_ranks and n_ranks > 1:
        raise SearchFileError(
            f"--gpus-per-worker is {gpus_each:g}, and scoring.engine has {n_ranks} ranks "
            f"(tensor_parallel_size x pipeline_parallel_size), each on a GPU of its own; use "
            f"--gpus-per-worker {n_ranks}"
        )
    return gpus_each or (n_ranks if device == "cuda" else 0)


def time_limit(plan: Plan, timeout_s: float | None) -> Callable[[Job], float | None]:
    """Return the seconds that a job may take: a candidate's, and as much more as it is asked more."""
    whole = max(1, plan.tasks.n_documents)

    def documents(job: Job) -> int:
        found = 0
        for split in job.splits:
            if split == "report":
                found += plan.report_only.n_documents if plan.report_only else 0
            else:
                found += sum(task.n_documents(split) for task in plan.tasks.tasks)
        return found * len(job.promptings)

    def limit_s(job: Job) -> float | None:
        return None if timeout_s is None else timeout_s * max(1.0, documents(job) / whole)

    return limit_s
