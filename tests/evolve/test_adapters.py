"""A search over two adapters of one base beside the same search over the models made of them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from evolve.study import load_outcomes

ROOT = Path(__file__).resolve().parents[2]
TESTBED = Path(os.environ.get("EVOLVE_TESTBED", "/tmp/testbed"))
needs_testbed = pytest.mark.skipif(not (TESTBED / "base").is_dir(), reason="the testbed is not built")
TUNED = ("addition", "roman")
N = 3  # candidates
RANGES = {"weight": {"low": 0.0, "high": 1.5}, "density": {"low": 0.1, "high": 1.0}}
SEARCH: dict[str, Any] = {
    "merge_method": "ties",
    "base_model": "base",
    "models": [{"model": f"base+{name}", "parameters": RANGES} for name in TUNED],
    "dtype": "bfloat16",
    "tasks": ["tb_addition"],
    "search": {"sampler": "random", "n_iterations": N},
    "scoring": {"backend": "hf", "limit": 6, "holdout": 0, "task_paths": [str(TESTBED / "tasks")]},
}


def mapped_mb(log: str) -> tuple[float, float]:
    """Return megabytes of the sources and of the engine's weights, as the search says them."""
    (line,) = (line for line in log.splitlines() if line.startswith("memory: "))
    words = line.replace(",", "").split()
    return float(words[words.index("sources") + 1]), float(words[words.index("weights") + 1])


@pytest.mark.slow
@needs_testbed
def test_candidates_over_adapters_score_as_those_over_full_models_do(tmp_path: Path) -> None:
    """By the same names, which the masks and ties at a density depend on."""
    logs = {}
    for kind in ("adapters", "full"):
        place = tmp_path / kind
        place.mkdir()
        (place / "base").symlink_to(TESTBED / "base")
        for name in TUNED:
            if kind == "adapters":
                (place / name).symlink_to(TESTBED / "adapters" / name)
            else:
                (place / f"base+{name}").symlink_to(TESTBED / name)
        (place / "search.yml").write_text(yaml.safe_dump(SEARCH))
        done = subprocess.run(
            [sys.executable, "-m", "evolve.cli", "run", "search.yml", "--json"],
            cwd=place,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["states"]["COMPLETE"] == N
        logs[kind] = done.stderr
    studies = [tmp_path / kind / "search-search" for kind in ("adapters", "full")]
    for trial in range(N):
        of_adapters, of_full = (
            load_outcomes(study / f"outcomes/trial-{trial}.parquet")["search"] for study in studies
        )
        assert of_adapters == of_full
    assert (studies[0] / "best.yml").read_text() == (studies[1] / "best.yml").read_text()
    of_sources, of_weights = mapped_mb(logs["adapters"])
    assert of_sources < 1.2 * of_weights  # the base and its factors, no sums


@pytest.mark.slow
@needs_testbed
def test_sources_of_two_adapters_hold_less_than_half_as_much_again_as_the_base() -> None:
    """Private memory counts; with this method none of it is results or statistics."""
    command = [sys.executable, str(ROOT / "tests/benchmarks/adapters.py"), str(TESTBED)]
    done = subprocess.run(
        [*command, "--method", "linear", "--candidates", "2", "--json"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["equal"]
    assert found["ratio"] < 1.5
