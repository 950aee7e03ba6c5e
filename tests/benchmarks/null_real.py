"""How often a whole search claims a gain where there is none: random perturbations of a real model.

    python tests/benchmarks/null_real.py TESTBED [--seeds 5]

Two copies of the testbed's base are moved by noise of one norm, a share of each tensor's own, and
`evolve run` searches for the weights of the two: candidates differ, and none has learned anything.
Each seed has noise, documents and proposals of its own.

The testbed's tasks will not do, the base scores 0 on both, as every candidate would. It is asked
which of four words goes on a passage of Python's own reference manual, by likelihood: something it
knows in part, so that there is room in both directions, and noise moves which documents it gets.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
SHARE = 0.04
CANDIDATES = 20
PASSAGE, DOCUMENTS = 6, 400
TASK = """task: null_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/words.jsonl}}}}
test_split: test
num_fewshot: 0
output_type: multiple_choice
doc_to_text: prompt
doc_to_choice: choices
doc_to_target: label
target_delimiter: " "
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


def perturbed(base: Path, out: Path, seed: int) -> None:
    """Copy a checkpoint, each floating tensor moved by SHARE of its norm in a random direction."""
    shutil.copytree(base, out)
    tensors = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in tensors.items():
        noise = torch.randn(tensor.shape, generator=generator)
        moved = tensor.float() + SHARE * tensor.float().norm() / noise.norm() * noise
        tensors[name] = moved.to(tensor.dtype)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def write_task(folder: Path) -> None:
    """Write passages with their next word and three words from elsewhere; no two passages overlap."""
    folder.mkdir()
    words = " ".join(topics.values()).split()
    plain = [word for word in words if word.isalpha() and word.islower()]  # as often as they stand there
    rng = random.Random(0)
    rows = []
    for start in range(0, len(words), PASSAGE):
        *passage, right = words[start : start + PASSAGE]
        if right.isalpha() and right.islower():
            choices = [right]
            while len(choices) < 4:
                choices += {rng.choice(plain)} - {*choices}
            rng.shuffle(choices)
            rows.append({"prompt": " ".join(passage), "choices": choices, "label": choices.index(right)})
    rows = rng.sample(rows, DOCUMENTS)
    (folder / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "null_words.yaml").write_text(TASK.format(folder=folder))


def search(testbed: Path, folder: Path, seed: int) -> dict[str, Any]:
    """Run one search, in a process of its own, and return its JSON."""
    models = []
    for i in range(2):
        models.append(folder / f"noise-{i}")
        perturbed(testbed / "base", models[-1], 2 * seed + i)
    file = {
        "merge_method": "task_arithmetic",
        "base_model": str(testbed / "base"),
        "models": [
            {"model": str(m), "parameters": {"weight": {"low": -1.0, "high": 1.0, "start": 0.5}}}
            for m in models
        ],
        "dtype": "bfloat16",
        "tasks": ["null_words"],
        "search": {"sampler": "cma", "n_iterations": CANDIDATES, "seed": seed, "racing": "none"},
        "scoring": {"backend": "hf", "limit": None, "task_paths": [str(folder.parent / "tasks")]},
    }
    path = folder / "null.yml"
    path.write_text(yaml.safe_dump(file))
    command = [sys.executable, "-m", "evolve.cli", "run", str(path), "--json", "--device", "cpu"]
    command += ["--storage-path", str(folder / "s")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    """Print each seed's verdict, and how many claim a gain."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("testbed", type=Path, metavar="TESTBED")
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    n_claims = n_naive = 0
    with tempfile.TemporaryDirectory() as temporary:
        write_task(Path(temporary) / "tasks")
        for seed in range(arguments.seeds):
            folder = Path(temporary) / f"seed-{seed}"
            folder.mkdir()
            found = search(arguments.testbed.resolve(), folder, seed)
            base = found["baselines"][0]["scores"]["null_words"]
            best = found["best"]["scores"]["null_words"]
            n_claims += bool(found["gain"]["shown"])
            n_naive += best > base
            print(f"seed {seed}: on search documents base {base:.3f}, best {best:.3f}", flush=True)
            print(f"  {found['verdict']}", flush=True)
            shutil.rmtree(folder)
    print(
        f"{n_claims} of {arguments.seeds} searches claim a gain; on the search documents the best is "
        f"above the base in {n_naive}"
    )


if __name__ == "__main__":
    main()
