"""Parity with mergekit 0.1.5 of what recipes can say besides a list of models: slices, files."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from merge_core.merge import merged_tensors, save_merged
from merge_core.recipe import Recipe

from .families import CASES, case, resolved


def source(name: str, start: int, end: int, **parameters: Any) -> dict[str, Any]:
    return {"model": name, "layer_range": [start, end], "parameters": parameters}


def sliced(
    method: str, *slices: dict[str, Any], base: str | None = None, **shared: Any
) -> dict[str, Any]:
    config = {**case(method, {}, base, **shared), "slices": list(slices)}
    del config["models"]
    return config


SLICED = {
    "slerp, another base a slice": sliced(
        "slerp",
        {"base_model": "x", "sources": [source("x", 0, 2), source("y", 0, 2)]},
        {"base_model": "y", "sources": [source("x", 2, 3), source("y", 2, 3)]},
        t=[0.3, 0.8],
    ),
    "task_arithmetic, one slice of layers": sliced(
        "task_arithmetic",
        {"sources": [source("base", 0, 2), source("x", 0, 2, weight=[0.2, 0.9])]},
        {
            "sources": [source("base", 2, 3), source("y", 1, 2, weight=[0.2, 0.9])],
            "parameters": {"lambda": [0.5, 2.0]},
        },
        base="base",
        lambda_=0.7,
    ),
    "passthrough, stacked and scaled": sliced(
        "passthrough",
        {"sources": [source("x", 0, 3)]},
        {"sources": [source("y", 1, 3, scale=[{"filter": "o_proj", "value": [0.5, 2]}, {"value": 1.0}])]},
    ),
    "sce, layers of other depths": sliced(
        "sce",
        {"sources": [source("base", 0, 2), source("x", 1, 3), source("y", 0, 2), source("z", 1, 3)]},
        base="base",
        select_topk=[0.4, 0.9],
    ),
}


@pytest.mark.parametrize("name", SLICED)
def test_slices_agree_with_mergekit(stored, theirs, name):
    family = stored("Llama", "float32")
    config = {**resolved(SLICED[name], family.folders), "dtype": "float32"}
    expected, found = theirs(config), dict(merged_tensors(Recipe.parse(config)))
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        difference = (found[key] - tensor).abs().max()
        assert float(difference) <= 1e-6 * float(tensor.abs().max()), key


@pytest.mark.parametrize("config", [CASES["ties"], CASES["slerp"], *SLICED.values()], ids=str)
def test_as_config_merges_the_same_in_mergekit(stored, theirs, config):
    family = stored("Llama", "float32")
    config = {**resolved(config, family.folders), "dtype": "float32"}
    expected, found = theirs(config), theirs(Recipe.parse(config).as_config())
    assert set(found) == set(expected)
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_the_written_config_has_mergekits_layers_and_dtype(stored, tmp_path):
    pytest.importorskip("mergekit", reason="mergekit is the oracle")
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    family = stored("Llama", "float32")
    config = resolved(SLICED["passthrough, stacked and scaled"], family.folders)
    config = {**config, "dtype": "bfloat16"}
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
    run_merge(MergeConfiguration.model_validate(config), str(tmp_path / "theirs"), options)
    save_merged(Recipe.parse(config), tmp_path / "ours")
    found, expected = (
        json.loads((tmp_path / who / "config.json").read_text()) for who in ("ours", "theirs")
    )
    assert found["num_hidden_layers"] == expected["num_hidden_layers"] == 5
    assert found["hidden_size"] == expected["hidden_size"]
    theirs_dtype = expected.get("dtype") or expected.get("torch_dtype")
    assert (found.get("dtype") or found.get("torch_dtype")) == theirs_dtype == "bfloat16"
