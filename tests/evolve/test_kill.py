"""Searches and workers that are killed: the scripts of the benchmarks, cut to a minute."""

import subprocess
import sys
from pathlib import Path

import pytest

from ..benchmarks.kill import disturb
from ..benchmarks.kill_workers import ROOT, survive


@pytest.mark.slow
@pytest.mark.parametrize("racing", [False, True], ids=["whole", "raced"])
def test_kills_at_random_moments_change_nothing(tmp_path: Path, racing: bool) -> None:
    found = disturb(tmp_path, n_kills=1 if racing else 3, racing=racing, n_candidates=14)
    assert found.n_searches >= 1


@pytest.mark.slow
def test_a_search_survives_its_workers(tmp_path: Path) -> None:
    found = survive(tmp_path, n_workers=3, n_kills=2, every_s=0, n_candidates=45)
    assert len(found.kills) == 2


WITHOUT_RAY = """
import psutil, time
from evolve.errors import WorkersLostError
from evolve.workers import ray as pools
from evolve.workers.worker import Job, Prompting
from merge_core.recipe import Recipe

class Sleeps:
    def evaluate(self, job):
        time.sleep(600)
    def close(self):
        pass

pools._PATIENCE_S = 2.0
ended = []
pool = pools.RayPool(Sleeps, 1, tidy_up=lambda: ended.append("tidied up"))
model = {"model": "x", "parameters": {"weight": 1.0}}
recipe = Recipe.parse({"merge_method": "linear", "models": [model]})
pool.submit(Job("0", "trial", recipe, ("search",), (Prompting("x", False),)))
while not pool._busy:
    pool._step()
(raylet,) = [p for p in psutil.Process().children(recursive=True) if p.name() == "raylet"]
raylet.kill()
try:
    pool.wait()
except WorkersLostError as error:
    print(error)
pool.close()
print(*ended)
"""


@pytest.mark.slow
def test_a_ray_of_our_own_that_died_ends_the_run() -> None:
    """No host can join it, so nothing is waited for."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_RAY], capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    *_, said, tidied = done.stdout.splitlines()
    assert said.startswith("Ray has died on this machine"), done.stderr[-2000:]
    assert said.endswith("run the same command again, it goes on where it was")
    assert tidied == "tidied up"
