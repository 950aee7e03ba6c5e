"""Seconds per candidate on the testbed, split into merge, load and score, beside mergekit.

    python tests/benchmarks/candidate_seconds.py TESTBED [--candidates 5]

One TIES merge of base + two 135M specialists in bfloat16, with other densities for every
candidate. mergekit 0.1.5 computes the same recipe in the same run, called in process (its
imports do not count), writing to a temporary folder. "copy" is one plain copy of a model's bytes.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file

from evolve.engines import EngineSettings
from evolve.search_file import ScoringSettings, TaskSpec
from evolve.tasks import TaskSet
from evolve.workers.worker import Job, Prompting, Worker, WorkerSetup
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


def seconds(work: Callable[[], object]) -> float:
    """Time one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def mergekit_seconds(testbed: Path) -> float:
    """Time mergekit on the same recipe, model card and tokenizer left out."""
    parsed = MergeConfiguration.model_validate(config(testbed, 0.5))
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True, lazy_unpickle=True)
    with tempfile.TemporaryDirectory() as out:
        return seconds(lambda: run_merge(parsed, out, options))


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("testbed", type=Path)
    parser.add_argument("--candidates", type=int, default=5)
    arguments = parser.parse_args()
    testbed = arguments.testbed.resolve()

    tensors = load_file(testbed / "base/model.safetensors")
    copies = [torch.empty_like(tensor) for tensor in tensors.values()]
    copy = min(
        seconds(lambda: [a.copy_(b) for a, b in zip(copies, tensors.values(), strict=True)])
        for _ in range(5)
    )

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
    later = [candidate(0.45 - 0.03 * i) for i in range(arguments.candidates)]
    merge, load, score = (statistics.median(part) for part in zip(*later, strict=True))
    peer = mergekit_seconds(testbed)
    print(f"threads {torch.get_num_threads()}, copy of one model {copy:.3f} s")
    print("seconds              merge    load   score")
    print(f"first candidate     {opening[0]:6.2f}  {opening[1]:6.2f}  {opening[2]:6.2f}")
    print(f"later, median       {merge:6.2f}  {load:6.2f}  {score:6.2f}")
    print(f"mergekit 0.1.5      {peer:6.2f}       -       -")
    print(f"mergekit / ours, merge and load: {peer / (merge + load):.1f}")


if __name__ == "__main__":
    main()
