"""Seconds per candidate on the testbed, split into merge, load and score, beside mergekit.

    python tests/benchmarks/candidate_seconds.py TESTBED [--candidates 5] [--alone]

One TIES merge of base + two 135M specialists in bfloat16, with other densities for every
candidate. First the merge alone, in one process with sources kept, as in a search: with compiled
loops and by torch without a compiler, each with its first candidate and the median of the next
ones, beside two copies of one model's bytes: in place, and fresh, into memory newly taken. Then,
without `--alone`, whole candidates, and mergekit 0.1.5 on the same recipe in the same run, called
in process (its imports do not count), writing to a temporary folder.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from merge_core.merge import merged_tensors
from merge_core.methods.compiled import is_compilable
from merge_core.plan import Sources, merged_config
from merge_core.recipe import Recipe


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


def copies_seconds(testbed: Path) -> tuple[float, float]:
    """Time a copy of one model in place, and one into memory newly taken; the best of five."""
    tensors = load_file(testbed / "base/model.safetensors")
    copies = [torch.empty_like(tensor) for tensor in tensors.values()]

    def in_place() -> None:
        for a, b in zip(copies, tensors.values(), strict=True):
            a.copy_(b)

    def fresh() -> list[torch.Tensor]:
        return [tensor.clone() for tensor in tensors.values()]

    in_place()
    return min(seconds(in_place) for _ in range(5)), min(seconds(fresh) for _ in range(5))


def alone_seconds(testbed: Path, n: int, compiles: bool) -> tuple[float, float]:
    """Time the merge alone: the first candidate of fresh sources, and the median of n more."""
    sources = Sources()

    def candidate(density: float) -> float:
        recipe = Recipe.parse(config(testbed, density))
        return seconds(lambda: deque(merged_tensors(recipe, sources, compiles=compiles), maxlen=0))

    first = candidate(0.5)
    return first, statistics.median(candidate(density) for density in densities(n))


def mergekit_seconds(testbed: Path) -> float:
    """Time mergekit on the same recipe, model card and tokenizer left out."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    parsed = MergeConfiguration.model_validate(config(testbed, 0.5))
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True, lazy_unpickle=True)
    with tempfile.TemporaryDirectory() as out:
        return seconds(lambda: run_merge(parsed, out, options))


def print_alone(testbed: Path, n: int) -> None:
    """Measure and print the merge alone beside the copies."""
    in_place, fresh = copies_seconds(testbed)
    print(f"copy of one model: in place {in_place:.3f} s, fresh {fresh:.3f} s")
    print(f"{'merge alone':<20}{'seconds':>9}{'/ in-place copy':>17}{'/ fresh copy':>14}")
    ways = {"compiled loops": True, "torch": False}
    if not is_compilable(torch.empty(0)):
        print("no C compiler here")
        del ways["compiled loops"]
    for way, compiles in ways.items():
        first, later = alone_seconds(testbed, n, compiles)
        for which, taken in (("first", first), ("later", later)):
            name = f"{way}, {which}"
            print(f"{name:<20}{taken:>9.2f}{taken / in_place:>17.1f}{taken / fresh:>14.1f}")


def print_whole(testbed: Path, n: int) -> None:
    """Measure and print whole candidates beside mergekit."""
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
    settings = EngineSettings(merged_config(first, sources), testbed / "base")
    setup = WorkerSetup("hf", settings, specs, scoring, 0, prompting)
    worker = Worker(setup, TaskSet(specs, scoring, 0), sources)

    def candidate(density: float) -> tuple[float, float, float]:
        recipe = Recipe.parse(config(testbed, density))
        result = worker.evaluate(Job("0", "trial", recipe, ("search",), (prompting,)))
        assert result.failure is None, result.failure
        return result.seconds.merge, result.seconds.load, result.seconds.score

    opening = candidate(0.5)
    later = [candidate(density) for density in densities(n)]
    merge, load, score = (statistics.median(part) for part in zip(*later, strict=True))
    peer = mergekit_seconds(testbed)
    print("whole candidates     merge    load   score")
    print(f"first candidate     {opening[0]:6.2f}  {opening[1]:6.2f}  {opening[2]:6.2f}")
    print(f"later, median       {merge:6.2f}  {load:6.2f}  {score:6.2f}")
    print(f"mergekit 0.1.5      {peer:6.2f}       -       -")
    print(f"mergekit / ours, merge and load: {peer / (merge + load):.1f}")


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("testbed", type=Path)
    parser.add_argument("--candidates", type=int, default=5, help="how many after the first")
    parser.add_argument("--alone", action="store_true", help="only the merge alone and the copies")
    arguments = parser.parse_args()
    testbed = arguments.testbed.resolve()
    print(f"threads {torch.get_num_threads()}")
    print_alone(testbed, arguments.candidates)
    if not arguments.alone:
        print_whole(testbed, arguments.candidates)


if __name__ == "__main__":
    main()
