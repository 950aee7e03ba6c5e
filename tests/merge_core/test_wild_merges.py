"""Recipes of published shapes, merged with tiny models: as mergekit merges them, where it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from merge_core.merge import merged_tensors
from merge_core.methods import METHODS
from merge_core.plan import Sources
from merge_core.recipe import Recipe

from ..conftest import build_llama, fine_tuned
from .test_recipes_in_the_wild import WILD
from .vocabularies import assert_same_rows, build_vocabularies, read, saved, saved_by_mergekit

# The recipes are of models with 28 and 32 layers; here eight of them are one.
_LAYERS_EACH = 8
# What mergekit 0.1.5 does not merge, and why it is more here.
OURS_ALONE = {
    "slerp without a base": "the first model is the base",
    "a method a slice": "slices have methods of their own",
    "models and slices": "models give parameters, slices layers",
}
# Which share of the entries may be on the other side of a threshold that both compute, but round.
AT_A_THRESHOLD = {"arcee_fusion": 0.01}
# A thousand steps of either program for each tensor.
LONG = "karcher"
# Its adapter is read elsewhere.
WITH_ADAPTER = "references as mappings"
# Its models have vocabularies of their own.
WITH_TOKENIZERS = "tokenizer union"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A base of four layers, and four fine-tunes of it."""
    folder, base = tmp_path_factory.mktemp("wild"), build_llama()
    models = [base, *(fine_tuned(base, seed) for seed in range(1, 5))]
    for i, model in enumerate(models):
        model.save_pretrained(folder / str(i))
    return [str(folder / str(i)) for i in range(len(models))]


@pytest.fixture(scope="module")
def sources() -> Sources:
    return Sources()


def made_small(text: str, folders: list[str]) -> dict[str, Any]:
    """Put tiny models in the place of a recipe's, and few layers in the place of many."""
    data = yaml.safe_load(text)
    names = Recipe.parse(data, strict=False).references()
    tiny = dict(zip(names, folders if data.get("base_model") else folders[1:], strict=False))

    def small(node: Any, key: str = "") -> Any:
        if key == "layer_range":
            start, end = (n // _LAYERS_EACH for n in node)
            return [start, end]
        if isinstance(node, dict):
            return {key: small(part, key) for key, part in node.items()}
        if isinstance(node, list):
            return [small(part) for part in node]
        return tiny.get(node, node) if isinstance(node, str) else node

    config = {key: part for key, part in small(data).items() if key != "out_dtype"}
    return {**config, "dtype": "float32"}


def whole(node: Any) -> Any:
    """Keep every entry, so that random masks have no say."""
    if isinstance(node, dict):
        return {key: 1.0 if key == "density" else whole(part) for key, part in node.items()}
    return [whole(part) for part in node] if isinstance(node, list) else node


def merged(config: dict[str, Any], sources: Sources) -> dict[str, Tensor]:
    return dict(merged_tensors(Recipe.parse(config, strict=False), sources))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name == LONG else name
        for name in WILD
        if name not in (WITH_ADAPTER, WITH_TOKENIZERS)
    ],
)
def test_a_published_recipe_merges(name: str, folders: list[str], sources: Sources, theirs: Any) -> None:
    config = made_small(WILD[name][0], folders)
    found = merged(config, sources)
    assert all(torch.isfinite(tensor).all() for tensor in found.values())
    if name in OURS_ALONE:
        with pytest.raises((ValueError, RuntimeError)):
            theirs(config)
        return
    if any(METHODS[method].is_random for method in WILD[name][1]):
        config = whole(config)
        found = merged(config, sources)
    expected = theirs(config)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        differs = (found[key] - tensor).abs() > 2e-6 * tensor.abs().max()
        assert float(differs.float().mean()) <= AT_A_THRESHOLD.get(name, 0.0), key


def test_a_published_union_of_vocabularies_merges(tmp_path: Path) -> None:
    names = build_vocabularies(tmp_path / "models")
    config = made_small(WILD[WITH_TOKENIZERS][0], [names["a"], names["b"], names["d"]])
    ours = saved(config, tmp_path / "ours")
    assert_same_rows(ours, saved_by_mergekit(config, tmp_path / "theirs"))
    assert len(ours.tokenizer) > max(len(read(Path(names[name])).tokenizer) for name in "abd")
