"""The share of worker time in use with 64 workers, simulated: candidates sleep instead of computing.

    python tests/benchmarks/scale.py [--workers 64] [--candidates 640] [--modes search barriers deaths]

Everything but the workers' work is the product's: the search loop, the sampler (cma, 48 variables),
the record in SQLite with the outcomes of 300 documents a candidate, and the pool of Ray actors, each
a process of its own. A candidate takes a time drawn evenly from 1 to 10 s. Three modes:

    search     the loop as it is: whoever is free gets the next candidate
    barriers   for comparison: the next candidates begin when the last ones have all ended
    deaths     as `search`, and one evaluation in ten ends by kill -9 of its process at a moment
               drawn evenly from its time; the pool starts another actor and tries again

Shares are of the time between the moment at which every worker had begun its first candidate and
that at which the last candidate was proposed: what was evaluated then, and of that what was
evaluated to its end.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import ray
from optuna.trial import FrozenTrial, TrialState
from ray import cloudpickle

from evolve.budget import Budget
from evolve.heats import Heats
from evolve.loop import search
from evolve.memory import Memory
from evolve.plan import Plan, make_plan
from evolve.search_file import SearchFile
from evolve.study import Study
from evolve.tasks import Outcome
from evolve.workers import Pool
from evolve.workers.ray import RayPool
from evolve.workers.worker import Job, Prompting, Result

ROOT = Path(__file__).resolve().parents[2]
SKILLS = ("reverse", "sort", "largest")
# 64 processes that sleep need no store for objects, and their start takes a minute on two cores.
STORE_BYTES, START_PATIENCE_S = 200_000_000, 600


@dataclass(frozen=True)
class Simulation:
    """What is simulated.

    Attributes:
        candidates: how many in each mode.
        shortest_s, longest_s: a candidate's time is drawn evenly between them.
    """

    workers: int = 64
    candidates: int = 640
    shortest_s: float = 1.0
    longest_s: float = 10.0


@dataclass(frozen=True)
class Mode:
    """One search of a simulation.

    Attributes:
        death_share: so many of the evaluations are killed.
        has_barriers: whether as many candidates as there are workers make a generation.
    """

    death_share: float = 0.0
    has_barriers: bool = False


# Those who replace the dead may still be starting when a search ends: deaths come last.
MODES = {"search": Mode(), "barriers": Mode(has_barriers=True), "deaths": Mode(death_share=0.1)}


# ---- in the actors --------------------------------------------------------------------------------


class SleepingWorker:
    """Takes a candidate's time without computing, and answers by a formula of the recipe's numbers.

    Args:
        documents: by task the documents that a candidate is scored on.
        folder: for diaries of what each process did and when; `mode.json` there says which mode it is.
    """

    def __init__(
        self,
        simulation: Simulation,
        prompting: Prompting,
        documents: Mapping[str, Sequence[int]],
        folder: Path,
    ) -> None:
        self._simulation, self._prompting, self._documents = simulation, prompting, documents
        self._folder = folder
        self._diary = folder / f"{os.getpid()}.jsonl"
        self._diary.touch()

    def evaluate(self, job: Job) -> Result:
        """Sleep, or die on the way."""
        simulation = self._simulation
        # Of the candidate alone, so that every mode has the same times.
        seconds = np.random.default_rng(int(job.name)).uniform(
            simulation.shortest_s, simulation.longest_s
        )
        # Of the process too: who tries again may live.
        fate = np.random.default_rng([int(job.name), os.getpid()])
        mode = json.loads((self._folder / "mode.json").read_text())
        self._note(job, "began")
        if fate.random() < mode["death_share"]:
            time.sleep(seconds * fate.random())
            self._note(job, "killed")
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(seconds)
        self._note(job, "ended")
        quality = _quality(job)
        outcomes = {
            task: [
                Outcome(task, number, float(_even(task, number) < quality), {}, "exact_match,none")
                for number in numbers
            ]
            for task, numbers in self._documents.items()
        }
        return Result(job, {self._prompting: {"search": outcomes}})

    def _note(self, job: Job, event: str) -> None:
        with self._diary.open("a") as file:
            file.write(json.dumps([int(job.name), event, time.time()]) + "\n")

    def restart(self) -> None:
        """Nothing can break."""

    def memory(self, references: Sequence[str], dtype: str | None) -> Memory:
        """Nothing is held."""
        return Memory(0, 0, {}, 0, None)

    def close(self) -> None:
        """Nothing is held."""


def _quality(job: Job) -> float:
    """A share of documents that falls with the distance of the recipe's numbers from 0.7."""
    numbers = [float(text) for text in _numbers(job.recipe.as_config()["models"])]
    return math.exp(-sum((number - 0.7) ** 2 for number in numbers) / len(numbers))


def _numbers(node: object) -> list[float]:
    if isinstance(node, Mapping):
        return [number for value in node.values() for number in _numbers(value)]
    if isinstance(node, list):
        return [number for value in node for number in _numbers(value)]
    return [float(node)] if isinstance(node, int | float) else []


def _even(task: str, number: int) -> float:
    digest = hashlib.blake2b(f"{task} {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


# ---- in the driver --------------------------------------------------------------------------------


class Wrapped:
    """A pool around another."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.size, self.by_generation = pool.size, pool.by_generation

    def submit(self, job: Job) -> None:
        self._pool.submit(job)

    def wait(self) -> Result:
        return self._pool.wait()

    def memory(self, references: Sequence[str], dtype: str | None) -> Memory:
        return self._pool.memory(references, dtype)

    def close(self) -> None:
        self._pool.close()


class Watched(Wrapped):
    """Knows when it was last given a job, and what its user does between two results.

    Attributes:
        last_submitted: when it was given a job.
        between: of each wait but the first, when it began and the seconds since the last result.
    """

    def __init__(self, pool: Pool) -> None:
        super().__init__(pool)
        self.last_submitted = 0.0
        self.between: list[tuple[float, float]] = []
        self._answered: float | None = None

    def submit(self, job: Job) -> None:
        super().submit(job)
        self.last_submitted = time.time()

    def wait(self) -> Result:
        now = time.time()
        if self._answered is not None:
            self.between.append((now, now - self._answered))
        result = super().wait()
        self._answered = time.time()
        return result


class Barriers(Wrapped):
    """Begins as many jobs as it has workers at once, when the ones before have all ended."""

    def __init__(self, pool: Pool) -> None:
        super().__init__(pool)
        self._held: list[Job] = []
        self._ended: list[Result] = []

    def submit(self, job: Job) -> None:
        self._held.append(job)

    def wait(self) -> Result:
        if not self._ended:
            generation, self._held = self._held, []
            for job in generation:
                super().submit(job)
            self._ended = [self._pool.wait() for _ in generation]
        return self._ended.pop(0)


@dataclass(frozen=True)
class Found:
    """What a simulation gave.

    Attributes:
        in_use: share of worker time in which something was evaluated.
        to_the_end: the same of evaluations that came to their end.
        driver_s: seconds a candidate that the driver proposed, recorded and started candidates.
        bound_s: the same if the driver alone were the limit: mean candidate time / workers.
        seconds: over which the shares are.
        starting_s: until every worker was up; the search begins then.
        states: of all trials.
        ended: trial numbers of the evaluations that came to their end, each as often as it did.
        killed: how many evaluations were killed.
    """

    in_use: float
    to_the_end: float
    driver_s: float
    bound_s: float
    seconds: float
    starting_s: float
    states: dict[str, int]
    ended: list[int]
    killed: int


def simulate(
    simulation: Simulation, modes: Mapping[str, Mode], folder: Path
) -> Iterator[tuple[str, Found]]:
    """Run a search in each mode, one after another over the same sleeping workers."""
    plan = _plan(simulation)
    diaries = folder / "diaries"
    diaries.mkdir(parents=True)
    documents = {
        task.key: [n for leaf in task.leaves for n in leaf.documents["search"]]
        for task in plan.tasks.tasks
    }
    start = partial(SleepingWorker, simulation, plan.setup.prompting, documents, diaries)
    # Where it is no installed module, actors must get it by value.
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    began = time.time()
    ray.init(
        address="local",
        num_cpus=simulation.workers,
        object_store_memory=STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        # Ray has its workers give way to every other process; here they would start after them all.
        _system_config={
            "worker_register_timeout_seconds": START_PATIENCE_S,
            "worker_niceness": 0,
        },
    )
    try:
        pool = RayPool(start, simulation.workers)
        while len(list(diaries.glob("*.jsonl"))) < simulation.workers:
            time.sleep(0.1)
        starting_s = time.time() - began
        for name, mode in modes.items():
            (diaries / "mode.json").write_text(json.dumps(asdict(mode)))
            began = time.time()
            watched = Watched(Barriers(pool) if mode.has_barriers else pool)
            opened = Study.create_or_resume(folder / name, None, plan.search_file, plan.identity())
            with opened as study:
                budget = Budget(study, plan)
                search(study, plan, watched, Heats(study, plan), budget, lambda event: None)
                yield name, _found(simulation, study.trials(), diaries, watched, began, starting_s)
    finally:
        ray.shutdown()


def _plan(simulation: Simulation) -> Plan:
    """Plan a search over 48 variables on the quickstart's models, 100 documents of each task."""

    def gradients(start: float) -> list[dict[str, object]]:
        anchors = {"low": 0.1, "high": 1.0, "start": start, "points": 4}
        return [{"filter": "mlp", "value": anchors}, {"value": anchors}]

    models = ROOT / "configs/quickstart/models"
    search_file = SearchFile(
        {
            "merge_method": "ties",
            "base_model": str(models / "base"),
            "models": [
                {
                    "model": str(models / skill),
                    "parameters": {"weight": gradients(0.5), "density": gradients(0.3)},
                }
                for skill in SKILLS
            ],
            "dtype": "float32",
            "tasks": [f"qs_{skill}" for skill in SKILLS],
            "search": {"sampler": "cma", "n_iterations": simulation.candidates, "racing": "none"},
            "scoring": {"backend": "hf", "limit": 100, "task_paths": [str(ROOT / "tasks")]},
        }
    )
    return make_plan(search_file, device="cpu")


def _found(
    simulation: Simulation,
    trials: Sequence[FrozenTrial],
    diaries: Path,
    pool: Watched,
    began: float,
    starting_s: float,
) -> Found:
    evaluations: list[tuple[int, str, float, float]] = []
    firsts = []
    for path in diaries.glob("*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lines = [line for line in lines if line[2] >= began]
        firsts += [since for _, _, since in lines[:1]]
        for (number, _, since), (_, event, until) in zip(lines[::2], lines[1::2], strict=True):
            evaluations.append((number, event, since, until))
    # Those that replaced a killed one came later.
    low, high = sorted(firsts)[simulation.workers - 1], pool.last_submitted

    def share(*events: str) -> float:
        within = [min(until, high) - max(since, low) for _, e, since, until in evaluations if e in events]
        return sum(max(0.0, seconds) for seconds in within) / (simulation.workers * (high - low))

    states = [trial.state for trial in trials]
    return Found(
        in_use=share("ended", "killed"),
        to_the_end=share("ended"),
        driver_s=float(np.mean([seconds for at, seconds in pool.between if low <= at <= high])),
        bound_s=(simulation.shortest_s + simulation.longest_s) / 2 / simulation.workers,
        seconds=high - low,
        starting_s=starting_s,
        states={state.name: states.count(state) for state in TrialState if state in states},
        ended=[number for number, event, *_ in evaluations if event == "ended"],
        killed=sum(event == "killed" for _, event, *_ in evaluations),
    )


def main() -> None:
    """Print a table of the modes."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--candidates", type=int, default=640)
    parser.add_argument("--shortest", type=float, default=1.0)
    parser.add_argument("--longest", type=float, default=10.0)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    arguments = parser.parse_args()
    simulation = Simulation(
        arguments.workers, arguments.candidates, arguments.shortest, arguments.longest
    )
    modes = {name: mode for name, mode in MODES.items() if name in arguments.modes}
    print("mode      in use  to the end  driver s (of)  over s  starting s  killed  states")
    with tempfile.TemporaryDirectory() as folder:
        for name, found in simulate(simulation, modes, Path(folder)):
            print(
                f"{name:9} {found.in_use:6.1%}  {found.to_the_end:10.1%}  {found.driver_s:.3f} "
                f"({found.bound_s:.3f})  {found.seconds:6.1f}  {found.starting_s:10.1f}  "
                f"{found.killed:6}  {found.states}",
                flush=True,
            )


if __name__ == "__main__":
    main()
