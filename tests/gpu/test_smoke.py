"""The smoke test for machines with a GPU at least runs, on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tests/gpu/smoke.py"), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=300,
    )


@pytest.mark.slow
def test_on_the_cpu_every_method_is_merged_loaded_and_compared() -> None:
    done = run("--device", "cpu")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["all_equal"]
    assert report["all_finite"]
    assert set(report["methods"]) == {"linear", "slerp", "ties", "dare_ties", "della", "model_stock"}
    # float32 sources of a bfloat16 merge: every cast is kept
    assert set(report["sources_kept"]) == {"pinned"}
    sums = []
    for result in report["methods"].values():
        for which in ("first", "next"):
            taken = result[which]
            assert min(taken[f"{part}_seconds"] for part in ("merge", "load", "score")) > 0
            compared = taken["compared_with_cpu"]
            assert compared["sha256"] == compared["sha256_cpu"]
            assert compared["largest_difference"] == 0
            sums.append(compared["sha256"])
    # No two candidates are the same, but those of model_stock, which has nothing to vary.
    assert len(set(sums)) == len(sums) - 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_card_it_says_so_in_one_line() -> None:
    done = run()
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("error: torch finds no CUDA device")
