"""A search over two adapters of one base beside the same search over the models made of them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from evolve.loop import run
from evolve.search_file import SearchFile
from evolve.study import load_outcomes
from merge_core.checkpoint.locate import locate

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
    "search": {"sampler": "random", "n_iterations": N, "signal": "likelihood"},
    "scoring": {"backend": "hf", "limit": 4, "holdout": 0, "task_paths": [str(TESTBED / "tasks")]},
}


@pytest.mark.slow
@needs_testbed
def test_candidates_over_adapters_score_as_those_over_full_models_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last digit of each likelihood; by the same names, on which ties at a density depend."""
    places = [tmp_path / kind for kind in ("adapters", "full")]
    memories: dict[str, Any] = {}
    for place in places:
        place.mkdir()
        (place / "base").symlink_to(TESTBED / "base")
        for name in TUNED:
            if place.name == "adapters":
                (place / name).symlink_to(TESTBED / "adapters" / name)
            else:
                (place / f"base+{name}").symlink_to(TESTBED / name)
        monkeypatch.chdir(place)
        locate.cache_clear()  # the same name is another folder here
        Path("search.yml").write_text(yaml.safe_dump(SEARCH))
        result = run(SearchFile.load("search.yml"), folder=place / "study")
        assert len(result.study.trials()) == N
        memories[place.name] = result.study.note("memory")
    locate.cache_clear()
    studies = [place / "study" for place in places]
    for trial in range(N):
        of_adapters, of_full = (
            load_outcomes(study / f"outcomes/trial-{trial}.parquet")["search"] for study in studies
        )
        assert of_adapters == of_full
    assert (studies[0] / "best.yml").read_text() == (studies[1] / "best.yml").read_text()
    of_adapters, of_full = (memories[place.name] for place in places)
    weights = of_full["engine_gb"]["weights"]
    assert of_adapters["mapped_gb"] < 1.2 * weights  # the base and its factors, no sums
    assert of_full["mapped_gb"] > 2.9 * weights


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
