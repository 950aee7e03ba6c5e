"""The user's own line, `evolve run search.yml --n-iterations N --task mmlu`, with models and data by
Hub id: interrupted, killed, resumed, exported, merged, evaluated.

The models are random, so scores say nothing.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from ..stand_in_hub import make_data, served

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "configs/quickstart/models/base"
N_SUBJECTS = 57


@dataclass(frozen=True)
class Hub:
    """A server with models and mmlu, and an empty cache."""

    environment: dict[str, str]
    folder: Path

    def start(self, *arguments: object, offline: bool = False) -> subprocess.Popen[str]:
        """Start a command, in a process group of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "evolve.cli", *map(str, arguments)],
            cwd=self.folder,
            env={**self.environment, "HF_HUB_OFFLINE": str(int(offline))},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: object) -> tuple[str, str]:
        """Run a command to a good end, from the cache alone; return stdout and stderr."""
        process = self.start(*arguments, offline=True)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        return out, err


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("hub")
    make_data(root)
    for seed, name in enumerate(("base", "poet", "sage")):
        save_model(root / "models/tiny" / name, seed)
    folder = tmp_path_factory.mktemp("user")
    data = {
        "merge_method": "task_arithmetic",
        "base_model": "tiny/base",
        "models": [
            {"model": f"tiny/{name}", "parameters": {"weight": {"low": 0.0, "high": 1.0}}}
            for name in ("poet", "sage")
        ],
        "dtype": "float32",
        "scoring": {"limit": 60, "holdout": 60},
    }
    (folder / "search.yml").write_text(yaml.safe_dump(data))
    kept = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    with served(root) as address:
        environment = {
            **kept,
            "HF_ENDPOINT": address,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(folder / "cache"),
            "PYTHONPATH": str(ROOT),
        }
        yield Hub(environment, folder)


def save_model(folder: Path, seed: int) -> None:
    """Save a random Llama that vLLM's CPU kernels can run; its tokenizer has a token a letter."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def stop_after(process: subprocess.Popen[str], folder: Path, trial: int, signum: int) -> tuple[int, str]:
    """Send a signal as soon as a trial's outcomes are there; return exit status and stderr."""
    deadline = time.monotonic() + 240
    while not (folder / f"outcomes/trial-{trial}.parquet").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signum)
    _, err = process.communicate(timeout=120)
    return process.returncode, err


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["hf", pytest.param("vllm", marks=pytest.mark.vllm)])
def test_the_users_line_runs_pauses_resumes_and_ships(hub: Hub, backend: str) -> None:
    folder = hub.folder / backend
    line = ["run", "search.yml", "--n-iterations", 12, "--task", "mmlu", "--backend", backend]
    line += ["--storage-path", backend]

    status, err = stop_after(hub.start(*line), folder, 2, signal.SIGINT)
    assert status == 130, err
    assert "memory: sources" in err
    if backend == "hf":  # a user who waits for data sets sees what for; later they are in the cache
        assert "loading tasks mmlu: " in err
    stop_after(hub.start(*line), folder, 6, signal.SIGKILL)
    out, err = hub.run(*line, "--json")
    assert "resuming after" in err
    assert "cached" not in err  # a line for each data set would bury the others
    data: dict[str, Any] = json.loads(out)
    assert data["states"] == {"COMPLETE": 12, "FAIL": 0, "PRUNED": 0}
    assert data["documents_scored"] == 12 * 60
    assert data["best"]["holdout"]["mmlu"]["low"] < data["best"]["holdout"]["mmlu"]["high"]
    assert [b["name"] for b in data["baselines"]][:3] == ["tiny/base", "tiny/poet", "tiny/sage"]
    assert set(data["noise"]["tasks"]) == {"mmlu"}
    assert every_subject_counts(folder)

    assert json.loads(hub.run("status", backend, "--json")[0])["noise"] == data["noise"]
    recipe = yaml.safe_load(hub.run("export", backend)[0])
    assert recipe == yaml.safe_load((folder / "best.yml").read_text())
    assert recipe["base_model"] == "tiny/base"
    hub.run("merge", folder / "best.yml", f"{backend}-model")
    scored = ["eval", f"{backend}-model", "--like", backend, "--backend", backend, "--json"]
    (model,) = json.loads(hub.run(*scored)[0])["models"]
    if backend == "hf":
        assert model["scores"] == data["best"]["scores"]
    else:
        assert model["scores"]["mmlu"] == pytest.approx(data["best"]["scores"]["mmlu"], abs=0.05)


def every_subject_counts(folder: Path) -> bool:
    from evolve.study import load_outcomes

    outcomes = load_outcomes(folder / "outcomes/trial-0.parquet")["search"]["mmlu"]
    return len({outcome.leaf for outcome in outcomes}) == N_SUBJECTS
