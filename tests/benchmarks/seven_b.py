"""What `evolve merge --check` foretells, against the merge: three checkpoints with a 7B's tensors.

    python tests/benchmarks/seven_b.py FOLDER [--layers 8] [--methods ties linear] [--threads 2]

Makes a base and two fine-tunes of it in FOLDER (random bfloat16, 3.8 GB each with 8 layers; kept and
used again), then runs both commands for each method and prints disk, private memory and seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, MLP, VOCAB = 4096, 11008, 32000
LAYER = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (MLP, HIDDEN),
    "mlp.up_proj": (MLP, HIDDEN),
    "mlp.down_proj": (HIDDEN, MLP),
    "input_layernorm": (HIDDEN,),
    "post_attention_layernorm": (HIDDEN,),
}
UNITS = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "s": 1, "min": 60, "h": 3600}


def make_models(folder: Path, n_layers: int) -> None:
    """Write the base and two fine-tunes, a shard a layer and one for the rest."""
    names = [f"model-{i + 1:05d}-of-{n_layers + 1:05d}.safetensors" for i in range(n_layers + 1)]
    shards = [
        {f"model.layers.{i}.{name}.weight": shape for name, shape in LAYER.items()}
        for i in range(n_layers)
    ]
    rest = {"model.embed_tokens": (VOCAB, HIDDEN), "model.norm": (HIDDEN,), "lm_head": (VOCAB, HIDDEN)}
    shards.append({f"{name}.weight": shape for name, shape in rest.items()})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "vocab_size": VOCAB,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    models = [folder / name for name in ("base", "x", "y")]
    for model in models:
        model.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for file, shard in zip(names, shards, strict=True):
        base = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shard.items()}
        save_file({k: t.bfloat16() for k, t in base.items()}, models[0] / file)
        for model in models[1:]:
            tuned = {
                name: tensor.add(torch.randn(tensor.shape, generator=generator), alpha=1e-3).bfloat16()
                for name, tensor in base.items()
            }
            save_file(tuned, model / file)
    weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    for model in models:
        index = {"metadata": {}, "weight_map": weight_map}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
        (model / "config.json").write_text(json.dumps(config))
    (folder / "complete").touch()


def write_recipe(folder: Path, method: str) -> Path:
    """Write a recipe of that method over the three models."""
    own = "{weight: 0.5, density: 0.5}" if method == "ties" else "{weight: 0.5}"
    base = "" if method == "linear" else f"base_model: {folder}/base\n"
    models = ("base", "x", "y") if method == "linear" else ("x", "y")
    lines = [f"  - {{model: {folder}/{model}, parameters: {own}}}\n" for model in models]
    path = folder / f"{method}.yml"
    path.write_text(f"merge_method: {method}\n{base}models:\n{''.join(lines)}dtype: bfloat16\n")
    return path


def amount(text: str) -> float:
    """Add up an amount with its units: `3.77 GB`, `1 min 5 s`."""
    return sum(float(number) * UNITS[unit] for number, unit in re.findall(r"([\d.]+) (\w+)", text))


def foretold(command: list[str]) -> tuple[float, float, float]:
    """Run --check: bytes on disk, private bytes, seconds."""
    done = subprocess.run([*command, "--check"], check=True, capture_output=True, text=True)
    lines = dict(line.split(":", 1) for line in done.stdout.splitlines() if ":" in line)
    disk, memory = lines["disk"].split(" of ")[0], lines["memory"].split(" private")[0]
    return amount(disk), amount(memory), amount(lines["time"])


def measured(command: list[str], out: Path) -> tuple[float, float, float]:
    """Merge: bytes on disk, most private bytes at any time, seconds."""
    began, peak = time.perf_counter(), 0.0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        if found := re.search(r"RssAnon:\s+(\d+)", status):
            peak = max(peak, int(found[1]) * 1024)
        time.sleep(0.01)
    assert process.wait() == 0
    seconds = time.perf_counter() - began
    return sum(path.stat().st_size for path in out.iterdir()), peak, seconds


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--methods", nargs="+", default=["ties", "linear"])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    if not (folder / "complete").exists():
        make_models(folder, arguments.layers)
    for method in arguments.methods:
        out = folder / "out"
        command = [
            sys.executable,
            "-m",
            "evolve.cli",
            "merge",
            str(write_recipe(folder, method)),
            str(out),
        ]
        command += ["-q", "-j", str(arguments.threads)]
        os.sync()
        ahead = foretold(command)
        then = measured(command, out)
        shutil.rmtree(out)
        for what, a, b, scale, unit in zip(
            ("disk", "private memory", "time"), ahead, then, (1e9, 1e9, 1), ("GB", "GB", "s"), strict=True
        ):
            print(
                f"{method}: {what}: foretold {a / scale:.2f} {unit}, measured {b / scale:.2f} {unit} "
                f"({100 * (a / b - 1):+.0f}%)",
                flush=True,
            )


if __name__ == "__main__":
    main()
