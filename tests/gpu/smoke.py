"""One command for anyone with a card: are merges on it right, and how long do they take?

    python tests/gpu/smoke.py [TESTBED | BASE MODEL MODEL...] [--device cuda] [--methods ties,della]

THIS HAS NOT BEEN RUN ON A GPU YET; it was tried with `--device cpu` alone. Please report what it
prints. Several methods are merged in bfloat16 on the device from sources that stay there
(merge_core/residence.py), twice with other values as a search would; every tensor is compared by
SHA-256 with the same merge on the CPU; each candidate is loaded into one resident Transformers
model, which then runs a forward pass. TESTBED is a folder with base, addition and roman; without
models, tiny random ones are made.

Prints one JSON object. For each method: seconds of the first candidate, which fetches its sources,
and of the next one, for merge, load and score; whether the checksums are equal, else the largest
difference; peak device memory. Ends with exit status 2 where there is no such device, with 1 where
a forward pass gave numbers that are not finite.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch
from torch import Tensor

from merge_core.merge import merged_tensors
from merge_core.plan import Sources, merged_config, plan_merge
from merge_core.recipe import Recipe
from merge_core.resident import build_model, fill

T = TypeVar("T")
# Each method's own parameters of a model and shared ones, for the value v of a candidate.
METHODS: dict[str, Callable[[float], tuple[dict[str, float], dict[str, float]]]] = {
    "linear": lambda v: ({"weight": v}, {"normalize": False}),
    "slerp": lambda v: ({}, {"t": v}),
    "ties": lambda v: ({"weight": 0.6, "density": v}, {}),
    "dare_ties": lambda v: ({"weight": 0.6, "density": v}, {}),
    "della": lambda v: ({"weight": 0.6, "density": v, "epsilon": 0.1}, {}),
    "model_stock": lambda v: ({}, {}),
}
# The values of the candidates: the first one fetches, the next one finds its sources there.
CANDIDATES = {"first": 0.7, "next": 0.4}
DTYPE = "bfloat16"
# A forward pass: texts, tokens each.
BATCH = (8, 128)


def make_models(folder: Path) -> list[str]:
    """Make a tiny random base and two fine-tunes of it, in float32 so that a cast is part of it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=301,
        hidden_size=96,
        intermediate_size=200,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    model = LlamaForCausalLM(config)
    for name in ("base", "a", "b"):
        model.save_pretrained(folder / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
    return [str(folder / name) for name in ("base", "a", "b")]


def recipe_of(method: str, models: Sequence[str], value: float) -> Recipe:
    """One candidate: the first model is the base."""
    own, shared = METHODS[method](value)
    base, *others = models
    config: dict[str, Any] = {
        "merge_method": method,
        "models": [
            {"model": m, "parameters": own} for m in (others[:1] if method == "slerp" else others)
        ],
        "parameters": shared,
        "dtype": DTYPE,
    }
    return Recipe.parse(config if method == "linear" else {**config, "base_model": base})


def timed(device: torch.device, work: Callable[[], T]) -> tuple[float, T]:
    """Time one call, until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began, result


def as_bytes(tensor: Tensor) -> bytes:
    """The bytes of a tensor."""
    flat: bytes = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return flat


def compare(found: Sequence[tuple[str, Tensor]], recipe: Recipe, sources: Sources) -> dict[str, Any]:
    """Compare a merge with the same one on the CPU, tensor by tensor."""
    here, there = hashlib.sha256(), hashlib.sha256()
    differing, largest = [], 0.0
    for (name, tensor), (other_name, other) in zip(found, merged_tensors(recipe, sources), strict=True):
        assert name == other_name
        a, b = as_bytes(tensor), as_bytes(other)
        here.update(a)
        there.update(b)
        if a != b:
            differing.append(name)
            gap = float((tensor.cpu().double() - other.double()).abs().max())
            largest = max(largest, math.inf if math.isnan(gap) else gap)
    return {
        "equal": not differing,
        "sha256": here.hexdigest(),
        "sha256_cpu": there.hexdigest(),
        "differing_tensors": len(differing),
        "first_differing": differing[:3],
        "largest_difference": largest,
    }


@torch.no_grad()
def smoke(models: Sequence[str], device: torch.device, methods: Sequence[str]) -> dict[str, Any]:
    """Run the methods; see the module's docstring."""
    on_cpu, kept = Sources(), Sources(keep=True)
    like = recipe_of("ties", models, 0.5)
    folder = on_cpu.architecture(models[0]).checkpoint.folder
    engine = build_model(merged_config(like, on_cpu), folder, str(device))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(engine.config.vocab_size, BATCH, generator=generator).to(device)
    timed(device, lambda: engine(input_ids=tokens))  # libraries start up at the first call
    results: dict[str, Any] = {}
    for method in methods:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        result: dict[str, Any] = {}
        for which, value in CANDIDATES.items():
            recipe = recipe_of(method, models, value)
            merge, merged = timed(
                device, lambda recipe=recipe: list(merged_tensors(recipe, kept, device=device))
            )
            load, _ = timed(device, lambda merged=merged: fill(engine, merged))
            score, output = timed(device, lambda: engine(input_ids=tokens))
            result[which] = {
                "merge_seconds": merge,
                "load_seconds": load,
                "score_seconds": score,
                "is_finite": bool(output.logits.isfinite().all()),
                "compared_with_cpu": compare(merged, recipe, on_cpu),
            }
            del merged, output
        if device.type == "cuda":
            result["peak_device_bytes"] = torch.cuda.max_memory_allocated(device)
        results[method] = result
        print(f"{method}: done", file=sys.stderr, flush=True)
    candidates = [result[which] for result in results.values() for which in CANDIDATES]
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "models": list(models),
        "model_bytes": sum(planned.n_bytes for planned in plan_merge(like, on_cpu)),
        "sources_kept": kept.residence.places(),
        "all_equal": all(c["compared_with_cpu"]["equal"] for c in candidates),
        "all_finite": all(c["is_finite"] for c in candidates),
        "methods": results,
    }


def main() -> None:
    """Run on the given models or on tiny random ones."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help="a testbed folder, or a base and two models or more")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu to try this program")
    parser.add_argument("--methods", default=",".join(METHODS), help="names with commas; default: all")
    arguments = parser.parse_args()
    methods = arguments.methods.split(",")
    if unknown := set(methods) - set(METHODS):
        parser.error(f"no such method here: {', '.join(sorted(unknown))}; known: {', '.join(METHODS)}")
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("error: torch finds no CUDA device here; --device cpu tries this program", file=sys.stderr)
        raise SystemExit(2)
    models = arguments.models
    if len(models) == 1:
        models = [str(Path(models[0], name)) for name in ("base", "addition", "roman")]
    if len(models) == 2:
        parser.error("give a base and at least two models")
    with tempfile.TemporaryDirectory() as folder:
        report = smoke(models or make_models(Path(folder)), device, methods)
    print(json.dumps(report, indent=2))
    raise SystemExit(0 if report["all_finite"] else 1)


if __name__ == "__main__":
    main()
