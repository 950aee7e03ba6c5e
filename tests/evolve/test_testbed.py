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


@pytest.mark.vllm
def test_vllm_takes_new_embeddings_of_a_tied_model(tmp_path: Path) -> None:
    """A reload that kept the tied head's old weights would answer at random."""
    code = """
import json, sys
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
import torch
from evolve.engines import EngineSettings
from evolve.engines.vllm import VllmEngine
from merge_core.merge import merged_tensors
from merge_core.plan import Sources, merged_config, model_alone

class Request:
    def __init__(self, *args): self.args = args

folder = Path(sys.argv[1])
a, b = (str(folder / name) for name in "ab")
sources = Sources()
recipe = model_alone(a)
sources.open_all([a, b])
options = {"max_model_len": 64}
engine = VllmEngine(EngineSettings(merged_config(recipe, sources), Path(a), options=options))
text, options = "the cat", [" dog", " a", " b"]
worst = 0.0
for model in (a, b, a):
    engine.load(merged_tensors(model_alone(model), sources))
    lm = engine.lm()
    found = [x for x, _ in lm.loglikelihood([Request(text, option) for option in options])]
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for option, value in zip(options, found):
        context, continuation = lm._encode_pair(text, option)
        logits = reference(torch.tensor([context + continuation])).logits[0].log_softmax(-1)
        n = len(continuation)
        expected = sum(logits[-n - 1 + i, token].item() for i, token in enumerate(continuation))
        worst = max(worst, abs(expected - value))
print(json.dumps(worst))
"""
    tied_pair(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) < 1e-3


def tied_pair(folder: Path) -> None:
    """Two tiny tied Llamas in float32 whose embeddings differ, with the quickstart's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "configs/quickstart/models/base")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=32,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
