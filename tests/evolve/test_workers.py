"""Pools: workers that die, break, hang or do not start are replaced, and their jobs tried again."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolve.errors import (
    SearchFileError,
    TrialEngineError,
    TrialMergeError,
    TrialWorkerError,
    WorkersLostError,
    boundary,
    breaks_worker,
)
from evolve.loop import run
from evolve.memory import Memory
from evolve.plan import Plan, make_plan
from evolve.search_file import SearchFile
from evolve.study import Study
from evolve.workers import Evaluates
from evolve.workers.hosts import Host, cpus_each
from evolve.workers.local import LocalPool
from evolve.workers.start import Workers, gpus_wanted, needs_actors, time_limit
from evolve.workers.tries import MAX_RETRIES, Tries
from evolve.workers.worker import Job, Result, Worker
from merge_core.recipe import Recipe

from .failing import save_vllm_models, search, write_tasks

ROOT = Path(__file__).resolve().parents[2]
RECIPE = Recipe.parse({"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": 1}}]})


def job(name: str, n_lost: int = 0) -> Job:
    return Job(name, "trial", RECIPE, ("search",), (), n_lost=n_lost)


# ---- how workers are placed ---------------------------------------------------------------------

HOSTS = st.lists(st.builds(Host, st.integers(1, 64), st.integers(0, 8)), min_size=1, max_size=4)


@given(HOSTS, st.integers(1, 64))
def test_every_worker_fits_on_a_host_and_with_one_cpu_more_it_would_not(
    hosts: list[Host], size: int
) -> None:
    def fit(cpus: float) -> int:
        return sum(int(host.cpus / cpus + 1e-9) for host in hosts)

    cpus = cpus_each(hosts, size)
    assert cpus is not None
    assert fit(cpus) >= size
    if cpus >= 1:
        assert fit(cpus + 1) < size
    else:
        assert fit(1) < size


def test_more_workers_than_cores_share_them() -> None:
    assert cpus_each([Host(2)], 3) == pytest.approx(0.5)
    assert cpus_each([Host(2)], 2) == 1
    assert cpus_each([Host(8), Host(8)], 3) == 5 or cpus_each([Host(8), Host(8)], 3) == 4


@pytest.mark.parametrize(("size", "gpus", "cpus"), [(2, 4, 16), (4, 2, 8), (3, 4, None), (1, 8, None)])
def test_a_worker_of_several_gpus_has_them_on_one_host(size: int, gpus: int, cpus: int | None) -> None:
    assert cpus_each([Host(16, 4), Host(16, 4)], size, gpus) == cpus


def test_each_rank_of_an_engine_has_a_gpu() -> None:
    ranks = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
    assert gpus_wanted("cuda", ranks, 0) == 4
    assert gpus_wanted("cuda", {}, 0) == 1
    assert gpus_wanted("cuda", {}, 0.5) == 0.5
    assert gpus_wanted("cuda:1", {}, 0) == 0  # all workers on the device that was named
    assert gpus_wanted("cpu", ranks, 0) == 0
    with pytest.raises(SearchFileError, match=r"--gpus-per-worker is 2.* 4 ranks.*--gpus-per-worker 4"):
        gpus_wanted("cuda", ranks, 2)


# ---- how often a job is tried -------------------------------------------------------------------


def lost(tries: Tries, lose: Callable[[], Result | None]) -> int:
    for n in range(1, 50):
        tries.n += 1
        if (result := lose()) is not None:
            assert result.failure is not None
            assert result.n_tries == n
            return n
    raise AssertionError("it is tried without end")


def test_a_job_is_tried_again_at_most_twice() -> None:
    tries = Tries(job("0"))
    assert lost(tries, lambda: tries.lose("worker", "it died")) == 1 + MAX_RETRIES
    killer = Tries(job("0", n_lost=MAX_RETRIES))  # it was running when two others died
    assert lost(killer, lambda: killer.lose("worker", "it died")) == 1


def test_the_same_error_twice_in_a_row_is_not_met_a_third_time() -> None:
    tries = Tries(job("0"))
    assert lost(tries, lambda: tries.lose("engine", "no", is_repeatable=True)) == 2


def test_hosts_that_leave_are_held_against_nobody() -> None:
    tries = Tries(job("0"))
    for _ in range(5):
        assert tries.lose_host() is None
    assert lost(tries, lambda: tries.lose("worker", "it died")) == 1 + MAX_RETRIES


@pytest.mark.parametrize(
    ("kind", "raised", "breaks"),
    [
        (TrialEngineError, IndexError("nobody foresaw it"), True),
        (TrialEngineError, TrialEngineError("a prompt is empty"), False),
        (TrialMergeError, ValueError("weights sum to zero"), False),
        (TrialMergeError, RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (TrialMergeError, MemoryError(), True),
    ],
)
def test_after_which_errors_a_worker_is_not_trusted(
    kind: type[TrialEngineError], raised: Exception, breaks: bool
) -> None:
    with pytest.raises((TrialEngineError, TrialMergeError)) as told, boundary(kind, "doing it"):
        raise raised
    assert breaks_worker(told.value) == breaks


# ---- one worker in this process -----------------------------------------------------------------


@pytest.fixture(scope="module")
def plan() -> Plan:
    with contextlib.chdir(ROOT):
        file = SearchFile.load(ROOT / "configs/quickstart.yml")
        return make_plan(file.changed(search={"n_iterations": 4}, scoring={"limit": 4, "holdout": 4}))


def break_engine(worker: Worker, error: Exception) -> None:
    """Make every pass of the engine's model raise, until another engine takes its place."""

    def raises(*_: Any) -> None:
        raise error

    worker.engine.model.register_forward_pre_hook(raises)  # type: ignore[attr-defined]


def asked(plan: Plan) -> Job:
    recipe = plan.space.recipe(plan.space.starts())
    return Job("7", "trial", recipe, ("search",), (plan.setup.prompting,))


def test_a_broken_engine_is_started_anew_and_its_candidate_tried_again(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    told: list[str] = []
    worker = Worker(plan.setup, plan.tasks, plan.sources)
    pool = LocalPool(worker, told.append)
    pool.submit(asked(plan))
    sound = pool.wait()
    assert sound.n_tries == 1
    broken = worker.engine
    break_engine(worker, RuntimeError("CUDA error: device-side assert triggered"))
    pool.submit(asked(plan))
    again = pool.wait()
    assert again.n_tries == 2
    assert again.outcomes == sound.outcomes
    assert worker.engine is not broken
    (line,) = told
    assert "candidate 7" in line
    assert "device-side assert" in line


def test_an_engine_that_cannot_be_started_again_ends_the_run_and_says_how_to_go_on(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    worker = Worker(plan.setup, plan.tasks, plan.sources)
    break_engine(worker, RuntimeError("CUDA error: unspecified launch failure"))
    worker.setup.engine.config["model_type"] = "no such architecture"
    pool = LocalPool(worker)
    pool.submit(asked(plan))
    try:
        with pytest.raises(WorkersLostError, match=r"launch failure.*run the same command again"):
            pool.wait()
    finally:
        worker.setup.engine.config["model_type"] = "llama"


def test_what_is_asked_more_may_take_longer(plan: Plan) -> None:
    limit_s = time_limit(plan, 10.0)
    candidate = asked(plan)
    assert limit_s(candidate) == 10
    prompting = plan.setup.prompting
    more = Job("base", "baseline", RECIPE, ("search", "holdout"), (prompting, prompting))
    assert limit_s(more) == pytest.approx(10 * 2 * 24 / 12)
    assert time_limit(plan, None)(candidate) is None


# ---- workers in other processes -----------------------------------------------------------------


def start_obedient(folder: Path) -> Callable[[], Evaluates]:
    """Return what makes a worker that does what a job's name says, in an actor's process.

    "A, B, C" is A at the first try, B at the second ...; the tries are counted in the folder.
    """

    class Obedient:
        def __init__(self) -> None:
            if (folder / "closed").exists():
                raise RuntimeError("no engine today")

        def evaluate(self, job: Job) -> Result:
            counter = folder / job.name.replace(" ", "")
            n = len(counter.read_text()) if counter.exists() else 0
            counter.write_text("x" * (n + 1))
            todo = job.name.split(", ")
            match todo[min(n, len(todo) - 1)]:
                case "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "hang":
                    time.sleep(600)
                case "break":
                    return Result(job, failure=("engine", f"CUDA error {n}"), broke_worker=True)
                case "fail":
                    return Result(job, failure=("task", "nan"))
            return Result(job)

        def restart(self) -> None:
            raise AssertionError("another one takes its place")

        def memory(self, references: Any, dtype: str | None) -> Memory:
            return Memory(0, 0, {}, os.getpid(), None)

        def close(self) -> None:
            pass

    return Obedient


def test_where_a_model_is_missing_no_worker_starts(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    missing = str(tmp_path / "elsewhere/model")
    setup = replace(plan.setup, references=(*plan.setup.references, missing))
    with pytest.raises(TrialWorkerError, match=f"on host .*{missing}"):
        Worker(setup, plan.tasks)


@pytest.fixture(scope="module")
def _two_cores() -> Iterator[None]:
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.usefixtures("_two_cores")
def test_actors_that_die_break_or_hang_are_replaced_and_the_rest_goes_on(tmp_path: Path) -> None:
    from evolve.workers.ray import RayPool

    told: list[str] = []
    pool = RayPool(
        start_obedient(tmp_path),
        3,
        limit_s=lambda job: 1.5 if "hang" in job.name else None,
        say=told.append,
    )
    assert "3 workers share 2 CPUs" in told[0]
    wanted = {
        "well": (None, 1),
        "fail": ("task", 1),
        "die, well": (None, 2),
        "die": ("worker", 3),
        "break, well": (None, 2),
        "break, fail": ("task", 2),
        "hang": ("timeout", 3),
    }
    names, found = list(wanted), {}
    n_pending = 0
    try:
        while names or n_pending:
            while names and n_pending < pool.size:
                pool.submit(job(names.pop(0)))
                n_pending += 1
            result = pool.wait()
            n_pending -= 1
            kind = result.failure[0] if result.failure else None
            assert result.job.name not in found
            found[result.job.name] = (kind, result.n_tries)
    finally:
        pool.close()
    assert found == wanted
    assert sum("tried again" in line for line in told) == sum(n - 1 for _, n in wanted.values())


@pytest.mark.slow
@pytest.mark.usefixtures("_two_cores")
def test_workers_that_do_not_start_again_end_the_run_with_their_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evolve.workers import ray as pools

    monkeypatch.setattr(pools, "_START_AGAIN_S", 0.1)
    told: list[str] = []
    pool = pools.RayPool(start_obedient(tmp_path), 1, say=told.append)
    try:
        assert pool.memory([], None).private_gb != os.getpid()
        (tmp_path / "closed").touch()
        pool.submit(job("die, well"))
        with pytest.raises(WorkersLostError, match=r"no engine today.*run the same command again"):
            pool.wait()
        assert sum("it is tried again" in line for line in told) == 3  # the job once, the start twice
    finally:
        pool.close()


@pytest.mark.slow
def test_a_candidate_that_was_running_at_two_ends_is_evaluated_apart(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process whose end would be seen; it gives the same there."""
    monkeypatch.chdir(ROOT)
    whole = run(plan.search_file, folder=tmp_path / "whole").study.trials()

    def killed(event: str, *_: Any) -> None:
        if event == "answered":
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(plan.search_file, folder=tmp_path / "s", progress=killed)
    told: list[str] = []
    run(plan.search_file, folder=tmp_path / "s", say=told.append)
    trials = Study.open(tmp_path / "s").trials()
    assert "candidate 0 was under way" in told[0]
    assert trials[0].user_attrs["attempts"] == 3
    assert [(t.params, t.values, t.user_attrs["scores"]) for t in trials] == [
        (t.params, t.values, t.user_attrs["scores"]) for t in whole
    ]


def test_a_time_limit_takes_a_process_of_its_own(plan: Plan) -> None:
    assert not needs_actors(plan, Workers())
    assert needs_actors(plan, Workers(2))
    assert needs_actors(plan, Workers(), is_apart=True)
    limited = plan.search_file.changed(search={"candidate_timeout_s": 5.0})
    assert needs_actors(replace(plan, search_file=limited), Workers())


@pytest.mark.vllm
def test_an_actor_has_an_engine_of_several_ranks(tmp_path: Path) -> None:
    """In another process vLLM's ranks are that process's own; the search ends as with one rank here."""
    models = save_vllm_models(tmp_path / "m")
    tasks = write_tasks(tmp_path / "tasks")
    file = search(tasks, "plain", models, backend="vllm", engine={"tensor_parallel_size": 2})
    path = tmp_path / "search.yml"
    path.write_text(file.changed(search={"candidate_timeout_s": 300.0}).to_yaml())
    done = subprocess.run(
        [sys.executable, "-m", "evolve.cli", "run", str(path), "--storage-path", str(tmp_path / "s")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    trials = Study.open(tmp_path / "s").trials()
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 2
