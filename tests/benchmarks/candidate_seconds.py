"""Seconds per candidate on the testbed, split into merge, load and score, beside mergekit.

    python tests/benchmarks/candidate_seconds.py TESTBED [--candidates 5] [--backends hf,vllm]
        [--alone] [--json]

One TIES merge of base + two 135M specialists in bfloat16, with other densities for every
candidate. First the merge alone, in one process with sources kept, as in a search: with compiled
loops and by torch without a compiler, straight into a live model's memory (`in place`, as the hf
engine does) and into new memory (`fresh`); the first candidate, and the median of the next ones.
The peer is a copy of one model's bytes, in place and fresh, made after each candidate; medians too.

Then, without `--alone`, whole candidates on 2 tasks of 40 documents, for each backend in a process
of its own. "bare" is the time inside the model's own passes in the same candidate: `forward` of the
Transformers model, `forward` and `compute_logits` of the vLLM model. Overhead is everything else;
the ratio is candidate / bare, and says more than seconds where a machine is shared. "later" are
medians, "best" is the candidate with the least seconds.

Last mergekit 0.1.5 on the same recipe in the same run, called in process (its imports do not
count), writing to a temporary folder. What mergekit-evolve takes for a candidate is quoted from a
measurement on another machine and not measured here.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from merge_core.merge import merged_tensors
from merge_core.methods.compiled import is_compilable
from merge_core.plan import Sources, merged_config
from merge_core.recipe import Recipe

# Seconds a candidate of mergekit-evolve 0.1.5 on disk, for the same search on another machine: with
# --batch-size 16, its best setting, and by default.
QUOTED_BEST, QUOTED_DEFAULT = 12.3, 27.9


@dataclass(frozen=True)
class Candidate:
    """Where one candidate's seconds went; `bare` are those inside the model's own passes."""

    merge: float
    load: float
    score: float
    bare: float

    @property
    def total(self) -> float:
        return self.merge + self.load + self.score

    @property
    def overhead(self) -> float:
        return self.total - self.bare

    @property
    def ratio(self) -> float:
        return self.total / self.bare


def config(testbed: Path, density: float) -> dict[str, Any]:
    """The recipe with one density for both specialists."""
    models = [
        {"model": str(testbed / name), "parameters": {"weight": 0.8, "density": density}}
        for name in ("addition", "roman")
    ]
    return {
        "merge_method": "ties",
        "base_model": str(testbed / "base"),
        "models": models,
        "parameters": {"normalize": False},
        "dtype": "bfloat16",
    }


def densities(n: int) -> Iterator[float]:
    """Another density for every candidate after the first, spread over (0.1, 0.9)."""
    return (0.1 + 0.8 * ((i + 1) * 0.618034 % 1) for i in range(n))


def seconds(work: Callable[[], object]) -> float:
    """Time one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def alone_seconds(testbed: Path, n: int, compiles: bool, in_place: bool) -> dict[str, float]:
    """Time the merge alone: the first candidate of fresh sources, and n more, each beside a copy."""
    sources = Sources(keep=True)
    tensors = load_file(testbed / "base/model.safetensors")
    live = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    into = live if in_place else None

    def candidate(density: float) -> float:
        recipe = Recipe.parse(config(testbed, density))
        stream = merged_tensors(recipe, sources, compiles=compiles, into=into)
        return seconds(lambda: deque(stream, maxlen=0))

    def copy() -> None:
        for name, tensor in tensors.items():
            if in_place:
                live[name].copy_(tensor)
            else:
                tensor.clone()

    first = candidate(0.5)
    later = [(candidate(density), seconds(copy)) for density in densities(n)]
    merge, copied = (statistics.median(values) for values in zip(*later, strict=True))
    return {"first": first, "later": merge, "copy": copied}


def mergekit_seconds(testbed: Path) -> float:
    """Time mergekit on the same recipe, model card and tokenizer left out."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    parsed = MergeConfiguration.model_validate(config(testbed, 0.5))
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True, lazy_unpickle=True)
    with tempfile.TemporaryDirectory() as out:
        return seconds(lambda: run_merge(parsed, out, options))


def measure_alone(testbed: Path, n: int) -> dict[str, Any]:
    """Measure the merge alone beside the copies, in seconds."""
    ways = {"compiled loops": True, "torch": False}
    if not is_compilable(torch.empty(0)):
        del ways["compiled loops"]
    return {
        f"{way}, {where}": alone_seconds(testbed, n, compiles, where == "in place")
        for way, compiles in ways.items()
        for where in ("in place", "fresh")
    }


def print_alone(found: dict[str, Any]) -> None:
    """Print the merge alone beside the copies."""
    print(f"{'merge alone':<26}{'first':>8}{'later':>8}{'copy':>8}{'later / copy':>14}")
    for way, took in found.items():
        row = f"{took['first']:>8.3f}{took['later']:>8.3f}{took['copy']:>8.3f}"
        print(f"{way:<26}{row}{took['later'] / took['copy']:>14.1f}")


class Stopwatch:
    """Adds up the seconds inside the functions that it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, model: Any, name: str) -> None:
        """Put a timed method in the place of a model's own."""
        method = getattr(model, name)

        @functools.wraps(method)
        def timed(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                found = method(*arguments, **options)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                return found
            finally:
                self.seconds += time.perf_counter() - began

        setattr(model, name, timed)


def time_passes(backend: str, engine: Any) -> Stopwatch:
    """Time an engine's own passes from now on."""
    watch = Stopwatch()
    if backend == "hf":
        watch.wrap(engine.model, "forward")
        return watch

    def wrap(model: Any) -> None:
        watch.wrap(model, "forward")
        watch.wrap(model, "compute_logits")

    engine._llm.apply_model(wrap)
    return watch


def measure_whole(testbed: Path, backend: str, n: int) -> list[Candidate]:
    """Measure whole candidates of one backend in this process: the first, and n more."""
    from evolve.engines import EngineSettings
    from evolve.search_file import ScoringSettings, TaskSpec
    from evolve.tasks import TaskSet
    from evolve.workers.worker import Job, Prompting, Worker, WorkerSetup

    sources = Sources()
    first = Recipe.parse(config(testbed, 0.5))
    sources.open_all(first.references())
    scoring = ScoringSettings(limit=40, holdout=0, task_paths=[str(testbed / "tasks")])
    specs = (TaskSpec(name="tb_addition"), TaskSpec(name="tb_roman"))
    prompting = Prompting(str(testbed / "base"), False)
    options = {"max_model_len": 256} if backend == "vllm" else {}
    settings = EngineSettings(merged_config(first, sources), testbed / "base", options=options)
    setup = WorkerSetup(backend, settings, specs, scoring, 0, prompting)
    worker = Worker(setup, TaskSet(specs, scoring, 0), sources)
    watch = time_passes(backend, worker.engine)

    def candidate(density: float) -> Candidate:
        recipe = Recipe.parse(config(testbed, density))
        watch.seconds = 0.0
        result = worker.evaluate(Job("0", "trial", recipe, ("search",), (prompting,)))
        assert result.failure is None, result.failure
        took = result.seconds
        return Candidate(took.merge, took.load, took.score, watch.seconds)

    return [candidate(density) for density in (0.5, *densities(n))]


def measure_in_another_process(testbed: Path, backend: str, n: int) -> list[Candidate]:
    """The same, where no other engine's memory and threads are in the way."""
    command = [sys.executable, __file__, str(testbed), "--candidates", str(n), "--measure", backend]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [Candidate(**one) for one in json.loads(done.stdout.splitlines()[-1])]


def print_whole(measured: dict[str, list[Candidate]], peer: float) -> None:
    """Print whole candidates beside mergekit."""
    print(f"{'whole candidates':<22}{'merge':>7}{'load':>7}{'score':>7}{'total':>7}{'bare':>7}", end="")
    print(f"{'overhead':>10}{'total / bare':>14}")
    for backend, (opening, *later) in measured.items():
        names = ("merge", "load", "score", "total", "bare", "overhead", "ratio")
        medians = [statistics.median(getattr(one, name) for one in later) for name in names]
        best = min(later, key=lambda one: one.total)
        for which, figures in (
            ("first", [getattr(opening, name) for name in names]),
            ("later", medians),
            ("best", [getattr(best, name) for name in names]),
        ):
            row = "".join(f"{figure:>7.2f}" for figure in figures[:5])
            print(f"{f'{backend}, {which}':<22}{row}{figures[5]:>10.2f}{figures[6]:>14.2f}")
    print(f"{'mergekit 0.1.5':<22}{peer:>7.2f}")
    print(
        f"mergekit-evolve 0.1.5 took {QUOTED_BEST} s a candidate at its best setting and "
        f"{QUOTED_DEFAULT} s by default, measured on another machine"
    )


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("testbed", type=Path)
    parser.add_argument("--candidates", type=int, default=5, help="how many after the first")
    parser.add_argument("--backends", default="hf,vllm", help="engines of the whole candidates")
    parser.add_argument("--alone", action="store_true", help="only the merge alone and the copies")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--measure", metavar="BACKEND", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    testbed, n = arguments.testbed.resolve(), arguments.candidates
    if arguments.measure:
        print("\n" + json.dumps([asdict(one) for one in measure_whole(testbed, arguments.measure, n)]))
        return
    alone = measure_alone(testbed, n)
    if not arguments.json:
        print(f"threads {torch.get_num_threads()}")
        print_alone(alone)
    measured, peer = {}, None
    if not arguments.alone:
        for backend in arguments.backends.split(","):
            measured[backend] = measure_in_another_process(testbed, backend, n)
        peer = mergekit_seconds(testbed)
        if not arguments.json:
            print_whole(measured, peer)
    if arguments.json:
        whole = {
            backend: [
                {**asdict(one), "total": one.total, "overhead": one.overhead, "ratio": one.ratio}
                for one in candidates
            ]
            for backend, candidates in measured.items()
        }
        quoted = {"best": QUOTED_BEST, "default": QUOTED_DEFAULT}
        found = {"threads": torch.get_num_threads(), "alone": alone, "whole": whole, "mergekit": peer}
        print(json.dumps({**found, "quoted_mergekit_evolve": quoted}))


if __name__ == "__main__":
    main()
