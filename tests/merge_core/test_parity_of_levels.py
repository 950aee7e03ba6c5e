"""Where mergekit 0.1.5 finds a value, we find it: levels, filters and bases, by whole merges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from merge_core.merge import merged_tensors
from merge_core.recipe import Recipe

pytest.importorskip("mergekit")


def part(model: str, start: int, end: int, **parameters: Any) -> dict[str, Any]:
    return {"model": model, "layer_range": [start, end], "parameters": parameters}


def only(pattern: str, value: Any, *rest: Any) -> list[dict[str, Any]]:
    return [{"filter": pattern, "value": value}, *({"value": other} for other in rest)]


# BASE, X, Y: fine-tunes of one base; TIED: a model whose head is its embedding.
CASES: dict[str, dict[str, Any]] = {
    "source, slice, module, top": {
        "merge_method": "task_arithmetic",
        "base_model": "BASE",
        "modules": {
            "default": {
                "slices": [
                    {
                        "sources": [part("X", 0, 2, weight=only("mlp", 0.1)), part("BASE", 0, 2)],
                        "parameters": {"weight": only("q_proj", 0.2)},
                    },
                    {"sources": [part("X", 2, 4), part("BASE", 2, 4)]},
                ],
                "parameters": {"weight": only("k_proj", "3e-1"), "lambda": only("norm", 2.0)},
            }
        },
        "parameters": {"weight": 0.4, "lambda": 1.5},
    },
    "one filter without a list": {
        "merge_method": "linear",
        "models": [
            {"model": "X", "parameters": {"weight": {"filter": "mlp", "value": [0, 1]}}},
            {"model": "Y"},
        ],
        "parameters": {"weight": [0.3, 0.9]},
    },
    "a listed base with a weight": {
        "merge_method": "ties",
        "base_model": "BASE",
        "models": [
            {"model": "BASE", "parameters": {"weight": 1}},
            {"model": "X", "parameters": {"weight": 1, "density": 1}},
        ],
    },
    "filters see each model's own layer numbers": {
        "merge_method": "linear",
        "slices": [
            {
                "sources": [
                    part("X", 2, 4, weight=only("layers.2", 0.2, 0.7)),
                    part("Y", 0, 2, weight=only("layers.0", 0.5, 1.0)),
                ]
            }
        ],
    },
    "a slice's own base": {
        "merge_method": "slerp",
        "parameters": {"t": 0.3},
        "slices": [{"base_model": "Y", "sources": [part("X", 0, 4), part("Y", 0, 4)]}],
    },
    "a shared parameter at a model": {
        "merge_method": "slerp",
        "base_model": "X",
        "models": [{"model": "X"}, {"model": "Y", "parameters": {"t": 0.9}}],
        "parameters": {"t": 0.2},
    },
    "an embedding that stands in for a head": {
        "merge_method": "linear",
        "models": [
            {"model": "TIED", "parameters": {"weight": only("lm_head", 0.8, 1)}},
            {"model": "X", "parameters": {"weight": only("lm_head", 0.2, 1)}},
        ],
    },
}


def named(config: Any, folders: dict[str, str]) -> Any:
    if isinstance(config, dict):
        return {key: named(value, folders) for key, value in config.items()}
    if isinstance(config, list):
        return [named(value, folders) for value in config]
    return folders.get(config, config) if isinstance(config, str) else config


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_values_are_found_where_mergekit_finds_them(llamas, tied_llamas, tmp_path, config):
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    folders = {"BASE": llamas.base, "X": llamas.x, "Y": llamas.y, "TIED": tied_llamas.x}
    config = named(config, folders)
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
    run_merge(MergeConfiguration.model_validate(config), str(tmp_path), options)
    theirs = load_file(tmp_path / "model.safetensors")
    ours = dict(merged_tensors(Recipe.parse(config, strict=False)))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-7, rtol=1e-6, msg=name)
