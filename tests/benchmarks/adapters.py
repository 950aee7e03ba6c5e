"""A search over adapters of one base beside one over full models: memory of the sources, seconds, bits.

    python tests/benchmarks/adapters.py TESTBED [--rank 16] [--method ties] [--candidates 4] [--json]

The methods are those with a weight for each model, and slerp.

The testbed's two specialists and the adapters that they were merged from; with `--rank` adapters are
extracted from the specialists instead, and the full models are merged from those. Both kinds go by
the same names: of entries that tie at a density, the name chooses. Each search's merges run in a
process of their own, into places that are there from the start, as an engine's live weights are, with
sources kept open as a search keeps them. Private memory is what the process holds more at the end, all
threads and compiled loops included. Ends with exit status 1 where candidates differ in a bit, or where
the sources with adapters take 1.5 times the base's memory or more.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measured import BASE, TUNED

LIMIT = 1.5


def prepare(testbed: Path, folder: Path, rank: int | None) -> None:
    """Make a folder for each kind of search, with models of the same names."""
    from merge_core.extract import ExtractOptions, extract, save_adapter
    from merge_core.merge import save_merged
    from merge_core.plan import model_alone

    base = str(testbed / BASE)
    for kind in ("adapters", "full"):
        (folder / kind).mkdir()
        (folder / kind / BASE).symlink_to(testbed / BASE)
    for name in TUNED:
        adapter, full = folder / "adapters" / name, folder / "full" / f"{BASE}+{name}"
        if rank is None:
            adapter.symlink_to(testbed / "adapters" / name)
            full.symlink_to(testbed / name)
            continue
        options = ExtractOptions(max_rank=rank, embed_lora=True)
        began = time.perf_counter()
        found = extract(model_alone(str(testbed / name)), model_alone(base), options)
        seconds = time.perf_counter() - began
        print(f"{name}: extracted in {seconds:.0f} s, error {found.error:.3f}", file=sys.stderr)
        save_adapter(found, adapter, base)
        save_merged(model_alone(f"{base}+{adapter}"), full, with_card=False)


def candidate(method: str, base: str, models: list[str], value: float) -> dict[str, Any]:
    """Spell a candidate of a search over that method."""
    from merge_core.methods import METHODS

    if method == "slerp":
        own: dict[str, Any] = {}
        top = {"base_model": models[0], "parameters": {"t": value}}
    else:
        ranged = {"weight", "density"} & METHODS[method].per_model.keys()
        own = {"parameters": dict.fromkeys(sorted(ranged), value)}
        top = {"base_model": base}
    entries = [{"model": model, **own} for model in models]
    return {"merge_method": method, **top, "models": entries, "dtype": "bfloat16"}


def candidates(method: str, n: int) -> dict[str, Any]:
    """Merge candidates of the models here into one live place; say what sources hold, and the bits."""
    import torch

    from merge_core.machine import give_back_freed_memory, private_bytes
    from merge_core.merge import merged_tensors
    from merge_core.plan import plan_merge
    from merge_core.recipe import Recipe
    from merge_core.sources import Sources

    base, models = BASE, [f"{BASE}+{name}" for name in TUNED]
    recipes = [Recipe.parse(candidate(method, base, models, 0.3 + 0.1 * i)) for i in range(n)]
    give_back_freed_memory()
    sources = Sources(keep=True)
    into = {
        planned.name: torch.zeros(planned.shape, dtype=getattr(torch, planned.dtype))
        for planned in plan_merge(recipes[0], sources)
    }
    before = private_bytes()
    seconds, bits = [], []
    for recipe in recipes:
        began = time.perf_counter()
        for name, tensor in merged_tensors(recipe, sources, into=into):
            if tensor is not into[name]:
                into[name].copy_(tensor)
        seconds.append(time.perf_counter() - began)
        digest = hashlib.sha256()
        for tensor in into.values():
            digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
        bits.append(digest.hexdigest())
    held = private_bytes() - before
    stores = {
        store.reference: sum(info.n_bytes for info in store.tensors.values())
        for model in (base, *models)
        for store in sources.architecture(model).checkpoint.stores()
    }
    return {
        "base_mb": stores[base] / 1e6,
        "mapped_mb": sum(stores.values()) / 1e6,
        "private_mb": max(0, held) / 1e6,
        "first_s": seconds[0],
        "next_s": sorted(seconds[1:])[len(seconds[1:]) // 2],
        "bits": bits,
    }


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("testbed", type=Path)
    parser.add_argument("--rank", type=int, help="extract adapters of this rank")
    parser.add_argument("--method", default="ties")
    parser.add_argument("--candidates", type=int, default=4, help="merges in each search, at least 2")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(json.dumps(candidates(options.method, options.candidates)))
        return
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        prepare(options.testbed.absolute(), Path(scratch), options.rank)
        for kind in ("full", "adapters"):
            command = [sys.executable, str(Path(__file__).absolute()), *sys.argv[1:], "--here"]
            run = subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=Path(scratch) / kind)
            found[kind] = json.loads(run.stdout)
    is_equal = found["full"].pop("bits") == found["adapters"].pop("bits")
    of = found["adapters"]
    ratio = (of["mapped_mb"] + of["private_mb"]) / of["base_mb"]
    if options.json:
        print(json.dumps({**found, "equal": is_equal, "ratio": ratio}))
    else:
        for kind, row in found.items():
            print(f"{kind:>10}: " + ", ".join(f"{key} {value:.2f}" for key, value in row.items()))
        print(f"candidates equal to the bit: {is_equal}; sources with adapters: {ratio:.2f} of the base")
    if not is_equal or ratio >= LIMIT:
        sys.exit(1)


if __name__ == "__main__":
    main()
