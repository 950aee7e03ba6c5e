"""Workers that are killed while a search goes on.

    python tests/benchmarks/kill_workers.py [--workers 3] [--kills 6] [--every 20] [--candidates 400]

Of the Ray actors of one `evolve run` that score a candidate one, drawn by seed, is killed (kill -9)
every so many seconds or, with `--every 0`, whenever another equal share of the candidates is done.
The search has to complete: every candidate COMPLETE once or FAILED with its kind and text, and at
least 80% COMPLETE.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from evolve.search_file import SearchFile
from evolve.study import Study

ROOT = Path(__file__).resolve().parents[2]
SHARE = 0.8


@dataclass(frozen=True)
class Survived:
    """How a search ended whose workers were killed.

    Attributes:
        states: how many trials ended how.
        attempts: by how often a candidate was begun, how many there are.
        kills: what the killed workers were doing, as Ray names it.
        seconds: how long the search took.
    """

    states: Counter[str]
    attempts: Counter[int]
    kills: list[str]
    seconds: float


def actors(driver: int) -> dict[int, str]:
    """Return the Ray actors that a process and its children started: what they do, by process."""
    parents, names = {}, {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(process.name)] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(process.name)] = (process / "cmdline").read_text().split("\0")[0]
        except OSError:  # it ended meanwhile
            continue

    def is_below(process: int) -> bool:
        while process and process != driver:
            process = parents.get(process, 0)
        return process == driver

    return {p: name for p, name in names.items() if name.startswith("ray::_Actor") and is_below(p)}


def done(folder: Path) -> int:
    """Return how many candidates of a search have their outcomes."""
    return len(list(folder.glob("outcomes/trial-*.parquet")))


def survive(
    place: Path, n_workers: int, n_kills: int, every_s: float, n_candidates: int, seed: int = 0
) -> Survived:
    """Run a search of the quickstart's models and kill its workers.

    Without `every_s` the kills are spread over the candidates, so that no machine is too fast for them.

    Raises:
        AssertionError: it did not complete, or lost or doubled a candidate, or too many failed.
    """
    file = SearchFile.load(ROOT / "configs/quickstart.yml")
    search = place / "search.yml"
    search.write_text(file.changed(search={"n_iterations": n_candidates, "sampler": "random"}).to_yaml())
    command = [sys.executable, "-m", "evolve.cli", "run", str(search), "--workers", str(n_workers)]
    folder, log = place / "s", place / "log"
    began = time.monotonic()
    with log.open("wb") as output:
        run = subprocess.Popen(
            [*command, "--storage-path", str(folder)], cwd=ROOT, stdout=output, stderr=output
        )
    rng, kills = random.Random(seed), []
    try:
        while not done(folder) and run.poll() is None:
            time.sleep(0.1)
        first = time.monotonic()
        while len(kills) < n_kills:
            assert run.poll() is None, f"the search ended after {len(kills)} kills"
            shares = done(folder) * (n_kills + 1) / n_candidates
            if every_s:
                shares = (time.monotonic() - first) / every_s
            found = {p: name for p, name in actors(run.pid).items() if "evaluate" in name}
            if found and shares >= len(kills) + 1:
                process = rng.choice(sorted(found))
                kills.append(found[process])
                subprocess.run(["kill", "-9", str(process)], check=True)
            time.sleep(0.05)
        status = run.wait(timeout=3600)
    finally:
        run.terminate()
        run.wait()
    assert status == 0, log.read_text()[-3000:]
    study = Study.open(folder)
    trials = study.trials()
    assert [trial.number for trial in trials] == list(range(n_candidates))
    states = Counter(trial.state.name for trial in trials)
    assert set(states) <= {"COMPLETE", "FAIL"}
    for trial in trials:
        if trial.state.name == "FAIL":
            assert trial.user_attrs["failure"]["kind"] == "worker", trial.user_attrs["failure"]
        else:
            outcomes = study.outcomes.load(f"trial-{trial.number}")["search"]
            assert sum(map(len, outcomes.values())) == trial.user_attrs["documents"]
    assert states["COMPLETE"] >= SHARE * n_candidates
    attempts = Counter(int(trial.user_attrs["attempts"]) for trial in trials)
    assert sum((n - 1) * count for n, count in attempts.items()) >= n_kills / 2
    return Survived(states, attempts, kills, time.monotonic() - began)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--every", type=float, default=20.0)
    parser.add_argument("--candidates", type=int, default=400)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="evolve-kill-workers-") as place:
        found = survive(
            Path(place), arguments.workers, arguments.kills, arguments.every, arguments.candidates
        )
    print(f"{arguments.candidates} candidates in {found.seconds:.0f} s, killed: {len(found.kills)}")
    print(f"states: {dict(found.states)}; begun so often: {dict(sorted(found.attempts.items()))}")


if __name__ == "__main__":
    main()
