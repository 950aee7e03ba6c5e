"""Every merge method side by side with mergekit 0.1.5, as whole commands.

    python tests/benchmarks/against_mergekit.py TESTBED [--methods ties,slerp] [--repeats 3] [--json]

TESTBED holds the models base, addition and roman. `mergekit-yaml RECIPE OUT --lazy-unpickle` and
`evolve merge RECIPE OUT` take turns on the same recipe in bfloat16, each into a fresh folder, files
warm in the page cache; imports count. "copy" reads the same models' files and writes one model's
bytes, in this process. The best of the repeats counts, for time and memory alike. Memory is that
of the process and its children: private (RssAnon, read every 20 ms) is what the merge itself
holds; resident memory (in the JSON) also counts mapped model files, which the system may drop.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from measured import (
    BASE,
    TUNED,
    best,
    copy_seconds,
    measure,
    our_command,
    peers_command,
    weights_of,
    write_recipe,
)

from merge_core.methods import METHODS

WEIGHT = {"weight": 0.6}
TRIM = {"weight": 0.6, "density": 0.5}
# Each method's own parameters of a model, and shared ones; a method that is not here has none.
OWN: dict[str, dict[str, float]] = {
    "linear": WEIGHT,
    "task_arithmetic": WEIGHT,
    "nuslerp": WEIGHT,
    "multislerp": WEIGHT,
    "ties": TRIM,
    "dare_linear": TRIM,
    "dare_ties": TRIM,
    "breadcrumbs": {**TRIM, "gamma": 0.01},
    "breadcrumbs_ties": {**TRIM, "gamma": 0.01},
    "della": {**TRIM, "epsilon": 0.2},
    "della_linear": {**TRIM, "epsilon": 0.2},
}
SHARED: dict[str, dict[str, float]] = {
    "slerp": {"t": 0.5},
    "nearswap": {"t": 0.001},
    "sce": {"select_topk": 0.5},
}


def config_of(method: str, testbed: Path) -> dict[str, Any]:
    """The recipe of one method."""
    table = METHODS[method]
    models = TUNED[: int(min(len(TUNED), table.n_models[1]))]
    config: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": str(testbed / name), "parameters": OWN.get(method, {})} for name in models],
        "parameters": SHARED.get(method, {}),
        "dtype": "bfloat16",
    }
    if table.base != "ignored":
        config["base_model"] = str(testbed / BASE)
    return config


def compared(method: str, testbed: Path, repeats: int, folder: Path) -> dict[str, Any]:
    """Measure one method: the copy, mergekit and this project, taking turns."""
    config = config_of(method, testbed)
    recipe = write_recipe(config, folder / f"{method}.yml")
    models = [entry["model"] for entry in config["models"]]
    if "base_model" in config:
        models.insert(0, config["base_model"])
    read = [path for model in models for path in weights_of(Path(model))]
    written = weights_of(Path(models[0]))
    copy_seconds(read, written, folder / "copy")  # warms the page cache
    commands: dict[str, Callable[[Path, Path], list[str]]] = {
        "mergekit": peers_command,
        "ours": our_command,
    }
    usages: dict[str, list[Any]] = {name: [] for name in commands}
    copies = []
    for _ in range(repeats):
        for name, command in commands.items():
            with tempfile.TemporaryDirectory(dir=folder) as out:
                usages[name].append(measure(command(recipe, Path(out) / "merged")))
        copies.append(copy_seconds(read, written, folder / "copy"))
    row: dict[str, Any] = {name: asdict(best(found)) for name, found in usages.items()}
    return {"method": method, **row, "copy_seconds": min(copies)}


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    peer, ours, copy = row["mergekit"], row["ours"], row["copy_seconds"]
    seconds = [f"{side['seconds']:.2f}" if not side["error"] else "failed" for side in (peer, ours)]
    private = [f"{side['private_mb']:.0f}" if not side["error"] else "failed" for side in (peer, ours)]
    both = not (peer["error"] or ours["error"])
    ratio = f"{peer['seconds'] / ours['seconds']:.1f}" if both else "-"
    to_copy = f"{ours['seconds'] / copy:.1f}" if not ours["error"] else "-"
    cells = (*seconds, ratio, *private, f"{copy:.3f}", to_copy)
    return f"{row['method']:<17}" + "".join(f"{cell:>12}" for cell in cells)


def main() -> None:
    """Measure and print the table, a row as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("testbed", type=Path)
    parser.add_argument("--methods", default=",".join(METHODS), help="names with commas; default: all")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    arguments = parser.parse_args()
    methods = arguments.methods.split(",")
    unknown = set(methods) - set(METHODS)
    if unknown:
        parser.error(f"no such method: {', '.join(sorted(unknown))}")
    os.environ["HF_HUB_OFFLINE"] = "1"
    # The table stays readable where it is piped while it grows.
    table = sys.stderr if arguments.json else sys.stdout
    heads = ("mergekit s", "ours s", "ratio", "mergekit MB", "ours MB", "copy s", "ours / copy")
    print(f"{'method':<17}" + "".join(f"{head:>12}" for head in heads), file=table, flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for method in methods:
            row = compared(method, arguments.testbed.resolve(), arguments.repeats, Path(folder))
            rows.append(row)
            print(line(row), file=table, flush=True)
            for side in ("mergekit", "ours"):
                if row[side]["error"]:
                    print(f"  {side}: {row[side]['error']}", file=sys.stderr, flush=True)
    if arguments.json:
        print(json.dumps({"repeats": arguments.repeats, "cpus": os.cpu_count(), "methods": rows}))


if __name__ == "__main__":
    main()
