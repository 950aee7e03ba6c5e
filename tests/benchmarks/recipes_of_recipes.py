"""A recipe that uses another's result, beside mergekit-multi: seconds, memory, disk, and the tensors.

    python tests/benchmarks/recipes_of_recipes.py /tmp/testbed

A slerp of the testbed's specialists is a model of a task_arithmetic merge; both in bfloat16.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from measured import BASE, TUNED, best, measure, our_command
from safetensors.torch import load_file

from merge_core.recipe import Recipe


def recipe_of(testbed: Path) -> Recipe:
    """Return the recipe, whose result `soup` is an intermediate one."""
    base, (one, other) = str(testbed / BASE), (str(testbed / name) for name in TUNED)
    soup: dict[str, Any] = {
        "merge_method": "slerp",
        "base_model": one,
        "models": [{"model": one}, {"model": other}],
        "parameters": {"t": 0.4},
        "dtype": "bfloat16",
    }
    return Recipe.parse(
        {
            "merge_method": "task_arithmetic",
            "base_model": base,
            "models": [
                {"model": "soup", "parameters": {"weight": 0.8}},
                {"model": other, "parameters": {"weight": 0.3}},
            ],
            "dtype": "bfloat16",
            "intermediate": {"soup": soup},
        }
    )


def n_bytes(folders: Iterable[Path]) -> int:
    """Count the bytes of weights in some folders."""
    files = (file for folder in folders for file in folder.rglob("*.safetensors"))
    return sum(file.stat().st_size for file in files)


def main() -> None:
    """Measure both programs and compare what they make."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("testbed", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=Path.home()) as scratch:
        folder = Path(scratch)
        file = folder / "recipe.yml"
        file.write_text(recipe_of(options.testbed).to_yaml())
        results = {}
        tool = Path(sys.executable).parent / "mergekit-multi"
        for name in ("evolve merge", "mergekit-multi"):
            usages, out, inner = [], folder / name / "out", folder / name / "inner"
            for _ in range(options.repeats):
                if name == "evolve merge":
                    command = [*our_command(file, out), "--overwrite"]
                else:
                    command = [str(tool), str(file), "--out-path", str(out), "-I", str(inner)]
                    command += ["--no-lazy", "--lazy-unpickle"]
                usages.append(measure(command))
            usage = best(usages)
            written = n_bytes([folder / name])
            print(
                f"{name:15} {usage.seconds:5.1f} s, {usage.private_mb:5.0f} MB private, "
                f"{written / 1e6:5.0f} MB written{f', {usage.error}' if usage.error else ''}"
            )
            results[name] = load_file(out / "model.safetensors")
    ours, theirs = results.values()
    differing = sum(int((ours[key] != theirs[key]).sum()) for key in theirs)
    largest = max(
        float((ours[key].float() - theirs[key].float()).abs().max() / theirs[key].abs().max().float())
        for key in theirs
    )
    total = sum(tensor.numel() for tensor in theirs.values())
    print(f"{differing / total:.2%} of {total} entries differ, by at most {largest:.1e} of the largest")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
