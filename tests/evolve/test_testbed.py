"""Real 135M models and a real vLLM engine; `EVOLVE_TESTBED` names the folder they were built in."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
TESTBED = Path(os.environ.get("EVOLVE_TESTBED", "/tmp/testbed"))
needs_testbed = pytest.mark.skipif(not (TESTBED / "base").is_dir(), reason="the testbed is not built")


def search_file(folder: Path, **scoring: Any) -> Path:
    """The committed testbed search, for the testbed's own place."""
    text = (ROOT / "configs/testbed.yml").read_text().replace("/tmp/testbed", str(TESTBED))
    data = yaml.safe_load(text)
    data["scoring"] |= scoring
    path = folder / "search.yml"
    path.write_text(yaml.safe_dump(data))
    return path


def run(path: Path, *arguments: str) -> dict[str, Any]:
    """Run in a process of its own: an engine stays until its process ends."""
    command = [sys.executable, "-m", "evolve.cli", "run", str(path), "--json", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.slow
@needs_testbed
def test_the_testbed_search_ships_what_it_scored(tmp_path: Path) -> None:
    path = search_file(tmp_path, limit=20, holdout=20)
    data = run(path, "--n-iterations", "3", "--storage-path", str(tmp_path / "s"))
    assert data["states"] == {"COMPLETE": 3, "FAIL": 0, "PRUNED": 0}
    out = str(tmp_path / "out")
    for arguments in (
        ["merge", str(tmp_path / "s/best.yml"), out],
        ["eval", out, "--like", str(tmp_path / "s"), "--json"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "evolve.cli", *arguments], capture_output=True, text=True, check=True
        )
    (scored,) = json.loads(done.stdout)["models"]
    assert scored["scores"] == data["best"]["scores"]


@pytest.mark.vllm
@needs_testbed
def test_vllm_scores_candidates_as_hf_does(tmp_path: Path) -> None:
    """The same candidates, in place: bf16 kernels differ, so a few answers may."""
    path = search_file(tmp_path, limit=40, holdout=0)
    by_backend = {}
    for backend in ("hf", "vllm"):
        folder = tmp_path / backend
        run(
            path,
            "--n-iterations",
            "3",
            "--sampler",
            "random",
            "--backend",
            backend,
            "--storage-path",
            str(folder),
        )
        by_backend[backend] = [outcomes(folder, n) for n in range(3)]
    pairs = [
        (a, b)
        for one, other in zip(by_backend["hf"], by_backend["vllm"], strict=True)
        for a, b in zip(one, other, strict=True)
    ]
    assert sum(a for a, _ in pairs) > 10  # the models can do something
    assert sum(a == b for a, b in pairs) >= 0.95 * len(pairs)


def outcomes(folder: Path, trial: int) -> list[float]:
    from evolve.study import load_outcomes

    by_task = load_outcomes(folder / f"outcomes/trial-{trial}.parquet")["search"]
    return [outcome.value for values in by_task.values() for outcome in values]
