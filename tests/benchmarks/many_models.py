"""Private memory of a merge of 2 models and of 8, which must not grow with their number.

    python tests/benchmarks/many_models.py TESTBED [--models 8] [--methods task_arithmetic,ties] [--json]

The models are addition and roman in turn, each under a name of its own: symbolic links, or with
`--copies` copies. `evolve merge` runs as a whole command. Ends with exit status 1 where the larger
merge holds twice as much private memory or more.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from measured import BASE, TUNED, best, measure, our_command, write_recipe

FEW = 2
OWN: dict[str, dict[str, float]] = {"ties": {"weight": 0.3, "density": 0.5}}


def make_models(testbed: Path, folder: Path, n: int, copies: bool) -> list[Path]:
    """Make n models of the testbed's two specialists."""
    models = []
    for i in range(n):
        model = folder / f"model{i}"
        source = testbed / TUNED[i % len(TUNED)]
        if copies:
            shutil.copytree(source, model)
        else:
            model.symlink_to(source)
        models.append(model)
    return models


def config_of(method: str, base: Path, models: list[Path]) -> dict[str, Any]:
    """The recipe of a merge of these models."""
    own = OWN.get(method, {"weight": 0.3})
    return {
        "merge_method": method,
        "base_model": str(base),
        "models": [{"model": str(model), "parameters": own} for model in models],
        "dtype": "bfloat16",
    }


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("testbed", type=Path)
    parser.add_argument("--models", type=int, default=8, help="how many in the larger merge")
    parser.add_argument("--methods", default="task_arithmetic,ties", help="names with commas")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--copies", action="store_true", help="copy the models' files")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    testbed = arguments.testbed.resolve()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = make_models(testbed, folder, arguments.models, arguments.copies)
        for method in arguments.methods.split(","):
            row: dict[str, Any] = {"method": method}
            for key, n in (("few", FEW), ("many", arguments.models)):
                config = config_of(method, testbed / BASE, models[:n])
                recipe = write_recipe(config, folder / "recipe.yml")
                usages = []
                for _ in range(arguments.repeats):
                    with tempfile.TemporaryDirectory(dir=folder) as out:
                        usages.append(measure(our_command(recipe, Path(out) / "merged")))
                usage = best(usages)
                if usage.error:
                    sys.exit(f"{method} of {n} models failed: {usage.error}")
                row[key] = asdict(usage)
            row["ratio"] = row["many"]["private_mb"] / row["few"]["private_mb"]
            rows.append(row)
    if arguments.json:
        print(json.dumps({"models": [FEW, arguments.models], "methods": rows}))
    else:
        heads = [f"{n} models {unit}" for unit in ("MB", "s") for n in (FEW, arguments.models)]
        print(f"{'method':<17}{heads[0]:>14}{heads[1]:>14}{'ratio':>8}{heads[2]:>14}{heads[3]:>14}")
        for row in rows:
            few, many = row["few"], row["many"]
            print(
                f"{row['method']:<17}{few['private_mb']:>14.0f}{many['private_mb']:>14.0f}"
                f"{row['ratio']:>8.2f}{few['seconds']:>14.2f}{many['seconds']:>14.2f}"
            )
    if any(row["ratio"] >= 2 for row in rows):
        sys.exit("error: private memory grows with the number of models")


if __name__ == "__main__":
    main()
