"""A recipe and its seed decide every byte of a merge; how it is cut up, read or run decides none.

All methods, with the parameters that take another path through the code, on models whose tensors
are larger than the small chunks of these tests.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import pkgutil
import random
import struct
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import merge_core.methods
from merge_core.merge import merged_tensors, save_merged
from merge_core.methods import METHODS, compiled, job
from merge_core.plan import Sources, plan_merge
from merge_core.recipe import Recipe

# The largest tensors have 10368 entries: three chunks of 4096, rows and columns that do not fit them.
SIZES = {"vocab_size": 211, "intermediate_size": 216, "num_hidden_layers": 2}
WEIGHT = {"weight": [{"filter": "mlp", "value": [0.3, 0.9]}, {"value": 0.7}]}
TRIM = {**WEIGHT, "density": 0.37}
CRUMBS = {**WEIGHT, "density": 0.5, "gamma": 0.07}
DELLA = {**WEIGHT, "density": 0.5, "epsilon": 0.2}
OWN: dict[str, dict[str, Any]] = {
    "linear": WEIGHT,
    "nuslerp": WEIGHT,
    "multislerp": WEIGHT,
    "passthrough": {"scale": 0.7},
    "task_arithmetic": WEIGHT,
    "ties": TRIM,
    "dare_linear": TRIM,
    "dare_ties": TRIM,
    "breadcrumbs": CRUMBS,
    "breadcrumbs_ties": CRUMBS,
    "della": DELLA,
    "della_linear": DELLA,
}
# Every method's shared parameters, and other ones where they choose another computation.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{method: (method, {}) for method in METHODS},
    "slerp": ("slerp", {"t": [0.2, 0.8]}),
    "nearswap": ("nearswap", {"t": 0.01}),
    "sce": ("sce", {"select_topk": 0.4}),
    "ties rescaled": ("ties", {"rescale": True, "lambda": 1.2}),
    "nuslerp by rows": ("nuslerp", {"nuslerp_flatten": False}),
    "nuslerp by columns": ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
    "model_stock by rows": ("model_stock", {"filter_wise": True}),
}
# Merges whose inputs are, in this order, the base and the inputs of another one that has a base.
WITHOUT_BASE = {"multislerp without base": "nuslerp", "karcher without base": "model_stock"}
DTYPES = ("float32", "bfloat16")
every_variant = pytest.mark.parametrize("variant", VARIANTS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
Digests = dict[str, str]


def recipe_of(variant: str, dtype: str, folder: Path | str, seed: int = 5) -> Recipe:
    """Merge the models `base`, `x` and `y` of a folder; the first may be one like the others."""
    name, shared = VARIANTS.get(variant) or (variant.split()[0], {})
    method = METHODS[name]
    has_base = method.base != "ignored" and variant not in WITHOUT_BASE
    models = ["base", "x", "y"] if variant in WITHOUT_BASE else ["x", "y"]
    models = models[: int(min(3, method.n_models[1]))]
    config: dict[str, Any] = {
        "merge_method": name,
        "models": [{"model": f"{folder}/{other}", "parameters": OWN.get(name, {})} for other in models],
        "parameters": shared,
        "random_seed": seed,
        "dtype": dtype,
    }
    if has_base:
        config["base_model"] = f"{folder}/base"
    return Recipe.parse(config)


def digest(tensor: torch.Tensor) -> str:
    """Hash dtype, shape and bytes."""
    as_bytes = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}\0".encode() + as_bytes).hexdigest()


def digests(stream: Iterable[tuple[str, torch.Tensor]]) -> Digests:
    return {name: digest(tensor) for name, tensor in stream}


def files(folder: Path) -> Digests:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@cache
def expected(variant: str, dtype: str, folder: Path | str) -> Digests:
    """The whole merge on one thread, by torch."""
    assert torch.get_num_threads() == 1
    return digests(merged_tensors(recipe_of(variant, dtype, folder), compiles=False))


@pytest.fixture(scope="module")
def models(tmp_path_factory, llama_builder) -> Path:
    """Folder of `base`, `x` and `y`, float32, each one safetensors file."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "x", "y")):
        model = llama_builder(**SIZES)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += (seed and 0.02) * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(folder / name)
    return folder


def test_every_method_is_here() -> None:
    assert {method for method, _ in VARIANTS.values()} == set(METHODS)


@every_variant
def test_the_tensors_are_larger_than_the_small_chunks(models, variant):
    plan = plan_merge(recipe_of(variant, "float32", models), Sources())
    assert sum(torch.Size(planned.shape).numel() > 2 * 4096 for planned in plan) > 5


# ---- how a merge is run -------------------------------------------------------------------------


@every_variant
def test_the_number_of_threads_changes_no_byte(models, n_threads, variant):
    whole = expected(variant, "float32", models)
    for n in (2, 3):
        n_threads(n)
        assert digests(merged_tensors(recipe_of(variant, "float32", models))) == whole, n


@every_variant
@every_dtype
def test_the_length_of_a_chunk_changes_no_byte(models, monkeypatch, variant, dtype):
    whole = expected(variant, dtype, models)
    for module in pkgutil.iter_modules(merge_core.methods.__path__, "merge_core.methods."):
        if hasattr(importlib.import_module(module.name), "CHUNK"):
            monkeypatch.setattr(f"{module.name}.CHUNK", 4096)
    assert job.CHUNK == 4096
    assert digests(merged_tensors(recipe_of(variant, dtype, models), compiles=False)) == whole


@every_variant
@pytest.mark.skipif(not compiled.is_compilable(torch.zeros(1)), reason="no C compiler here")
def test_a_compiled_loop_changes_no_byte(models, variant):
    merged = merged_tensors(recipe_of(variant, "bfloat16", models), compiles=True)
    assert digests(merged) == expected(variant, "bfloat16", models)


@every_variant
@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_tensors_in_any_order_are_those_of_the_whole(models, variant, data):
    whole = expected(variant, "float32", models)
    recipe = recipe_of(variant, "float32", models)
    asked = data.draw(st.lists(st.sampled_from(sorted(whole)), unique=True))
    if data.draw(st.booleans()):  # all at once, which come in the order of the model
        found = list(digests(merged_tensors(recipe, names=asked)).items())
        assert found == [item for item in whole.items() if item[0] in asked]
    else:  # one by one, with the same sources
        sources = Sources()
        for name in asked:
            assert digests(merged_tensors(recipe, sources, [name])) == {name: whole[name]}


@pytest.fixture(scope="module")
def used_sources(models) -> Sources:
    """Sources from which every method was merged with another seed, with all that was kept of it."""
    sources = Sources()
    for variant in VARIANTS:
        for dtype in DTYPES:
            list(merged_tensors(recipe_of(variant, dtype, models, seed=6), sources))
    return sources


@every_variant
def test_what_was_merged_before_from_the_same_sources_changes_no_byte(models, used_sources, variant):
    for dtype in DTYPES:
        found = digests(merged_tensors(recipe_of(variant, dtype, models), used_sources))
        assert found == expected(variant, dtype, models)


@pytest.mark.parametrize("variant", WITHOUT_BASE)
def test_a_base_and_one_more_input_are_not_mistaken_for_each_other(models, variant):
    sources = Sources()
    for other in (WITHOUT_BASE[variant], variant):
        whole = expected(other, "float32", models)
        assert digests(merged_tensors(recipe_of(other, "float32", models), sources)) == whole


def test_the_seed_changes_what_random_methods_drop_and_nothing_else(models):
    for variant, (method, _) in VARIANTS.items():
        other = digests(merged_tensors(recipe_of(variant, "float32", models, seed=6)))
        same = other == expected(variant, "float32", models)
        assert same or METHODS[method].is_random or method in ("ties", "sce", "breadcrumbs"), variant
        assert not (same and METHODS[method].is_random), variant


# ---- how the result is written ------------------------------------------------------------------


@every_variant
def test_the_size_of_a_shard_changes_no_tensor(models, tmp_path, variant):
    for i, shard_bytes in enumerate((0, 60_000)):
        out = tmp_path / str(i)
        save_merged(recipe_of(variant, "bfloat16", models), out, shard_bytes=shard_bytes)
        shards = sorted(out.glob("*.safetensors"))
        assert (len(shards) > 1) == (shard_bytes > 0)
        tensors = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
        assert digests(tensors.items()) == expected(variant, "bfloat16", models)


@every_variant
def test_files_are_the_same_with_any_number_of_threads(models, tmp_path, n_threads, variant):
    for n in (1, 2):
        n_threads(n)
        out = tmp_path / str(n) / "out"
        save_merged(recipe_of(variant, "bfloat16", models), out, shard_bytes=60_000)
    first = files(tmp_path / "1" / "out")
    assert len(first) >= 5
    assert first == files(tmp_path / "2" / "out")


# ---- how the sources were written ---------------------------------------------------------------


def write_backwards(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write safetensors whose bytes lie in the reverse of the header's order."""
    offset, data, header = 0, b"", {}
    for name, tensor in reversed(tensors.items()):
        raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + len(raw)],
        }
        data, offset = data + raw, offset + len(raw)
    head = json.dumps(dict(reversed(header.items()))).encode()
    head += b" " * (-len(head) % 8)
    path.write_bytes(struct.pack("<Q", len(head)) + head + data)


def write_shards(tensors: dict[str, torch.Tensor], folder: Path, suffix: str) -> None:
    """Write five shards, each with tensors from everywhere."""
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names = sorted(tensors)
    random.Random(0).shuffle(names)
    weight_map = {}
    for i in range(5):
        file = f"{stem}-{i + 1:05d}-of-00005.{suffix}"
        shard = {name: tensors[name] for name in names[i::5]}
        weight_map.update(dict.fromkeys(shard, file))
        if suffix == "safetensors":
            save_file(shard, folder / file)
        else:
            torch.save(shard, folder / file)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / f"{stem}.{suffix}.index.json").write_text(index)


LAYOUTS = {
    "five files": lambda tensors, folder: write_shards(tensors, folder, "safetensors"),
    "backwards": lambda tensors, folder: write_backwards(tensors, folder / "model.safetensors"),
    ".bin": lambda tensors, folder: torch.save(tensors, folder / "pytorch_model.bin"),
    "five .bin files": lambda tensors, folder: write_shards(tensors, folder, "bin"),
}


@pytest.fixture(scope="module")
def layouts(tmp_path_factory, models) -> Path:
    """The same models, written in other ways; a folder each, of the same names within."""
    top = tmp_path_factory.mktemp("layouts")
    for layout, write in LAYOUTS.items():
        for name in ("base", "x", "y"):
            folder = top / layout / name
            folder.mkdir(parents=True)
            (folder / "config.json").write_bytes((models / name / "config.json").read_bytes())
            write(load_file(models / name / "model.safetensors"), folder)
    return top


@every_variant
def test_the_layout_of_the_sources_changes_no_byte(models, layouts, monkeypatch, variant):
    # A model's reference names its random masks, so it is the same here, whatever it leads to.
    found = {}
    for folder in (models, *(layouts / layout for layout in LAYOUTS)):
        monkeypatch.chdir(folder)
        assert os.path.isfile("x/model.safetensors") == (folder.name in (models.name, "backwards"))
        found[folder.name] = digests(merged_tensors(recipe_of(variant, "float32", ".")))
    whole = found.pop(models.name)
    assert len(whole) == len(expected(variant, "float32", models))
    assert found == dict.fromkeys(LAYOUTS, whole)
