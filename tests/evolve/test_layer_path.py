"""Layer paths: every path is one point, merges as mergekit does, and ships as it was scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from optuna.trial import TrialState

from evolve.errors import SearchFileError
from evolve.evaluation import EvalOptions, evaluate_models
from evolve.known import known_recipes
from evolve.loop import run
from evolve.samplers.auto import resolve_sampler
from evolve.search_file import SearchFile
from evolve.space import LayerPathSpace, Value
from merge_core.errors import RecipeError
from merge_core.merge import load_merged, merged_tensors, save_merged
from merge_core.recipe import Recipe

from ..benchmarks.unstored import search

ROOT = Path(__file__).resolve().parents[2]
MODELS = "configs/quickstart/models"
LAYERS = {"a": 4, "b": 4, "c": 2}


def space(**section: Any) -> LayerPathSpace:
    section = {"models": ["a", "b"], **section}
    return LayerPathSpace({"layer_path": section, "dtype": "float32"}, LAYERS.__getitem__)


def path(recipe: Recipe) -> list[tuple[str, int]]:
    sources = [entry.sources[0] for entry in recipe.slices or ()]
    return [(source.model, layer) for source in sources for layer in range(*source.layer_range)]


def switches(over: LayerPathSpace) -> list[str]:
    return [v.name for v in over.variables if not v.name.endswith(".scale")]


SECTIONS: list[dict[str, Any]] = [
    {},
    {"repeats": 3},
    {"order": "depths", "repeats": 2},
    {"group": 2, "repeats": 2, "models": ["a", "b", "c"]},
    {"scale": {"low": 0.5, "high": 1.5}, "repeats": 2},
    {"scale": {"choices": [0.5, 1.0]}, "group": 2, "order": "depths"},
    {"scale": {"low": 0.5, "high": 2.0, "log": True}, "length": {"low": 2, "high": 5}},
]


@given(st.sampled_from(SECTIONS), st.randoms(use_true_random=False))
def test_values_to_recipe_to_values_is_the_identity(section: dict[str, Any], random: Any) -> None:
    over = space(**section)
    values: dict[str, Value] = {v.name: v.from_unit(random.random()) for v in over.variables}
    active = over.active(values)
    assert over.active({**over.starts(), **active}) == active
    try:
        recipe = over.recipe(values)
    except RecipeError:  # too long, too short, or empty
        assume(False)
    assert over.recipe(active) == recipe
    assert over.values(recipe) == active
    assert len(path(recipe)) == sum(active[name] is True for name in switches(over)) * section.get(
        "group", 1
    )


def test_the_start_is_the_first_model_and_the_row_is_in_order() -> None:
    over = space(repeats=2)
    assert path(over.recipe(over.starts())) == [("a", i) for i in range(4)]
    everything = over.recipe(dict.fromkeys(switches(over), True))
    once = [(model, i) for model in "ab" for i in range(4)]
    assert path(everything) == once * 2
    assert len(everything.slices or ()) == 4  # neighbours share a slice
    by_depth = space(order="depths")
    row = path(by_depth.recipe(dict.fromkeys(switches(by_depth), True)))
    assert row == [(model, i) for i in range(4) for model in "ab"]


@pytest.mark.parametrize(
    ("low", "high", "row"),
    [
        (1, 1, [("a", 0)]),
        (2, 5, [("a", i) for i in range(4)]),
        (6, 7, [*(("a", i) for i in range(4)), ("b", 0), ("b", 1)]),
    ],
)
def test_the_start_is_cut_or_goes_on_where_the_length_asks_it(
    low: int, high: int, row: list[tuple[str, int]]
) -> None:
    over = space(length={"low": low, "high": high})
    assert path(over.recipe(over.starts())) == row
    is_whole = row == [("a", i) for i in range(4)]
    assert ("a alone" in known_recipes(over, {}, LAYERS.__getitem__)) is is_whole


def test_a_path_that_fits_earlier_is_the_same_point() -> None:
    over = space(repeats=2)
    late = dict.fromkeys(switches(over), False) | {"layer_path[1].models[0].layers[1]": True}
    assert over.active(late) == dict.fromkeys(switches(over), False) | {
        "layer_path[0].models[0].layers[1]": True
    }
    twice = late | {"layer_path[0].models[0].layers[1]": True}
    assert path(over.recipe(twice)) == [("a", 1), ("a", 1)]
    assert over.active(twice) == twice


def test_models_alone_are_tried_first_and_a_search_begins_near_them() -> None:
    over = space(repeats=2, scale={"low": 0.5, "high": 1.5})
    assert set(known_recipes(over, {}, LAYERS.__getitem__)) == {
        "starts",
        "a alone",
        "b alone",
        "centres",
    }
    assert resolve_sampler("auto", over, 100)[0] == "cma"
    trials = search(over, lambda v: 0.0, 30)
    assert len({repr(trial.params) for trial in trials}) == 30
    start = over.starts()
    turned = [sum(trial.params[name] != start[name] for name in switches(over)) for trial in trials[1:6]]
    assert 0 < sum(turned) / len(turned) < 8  # of 16


@pytest.mark.parametrize(
    ("slices", "said"),
    [
        ([("a", 0, 4), ("a", 2, 4)], "goes back, or repeats layers, more often than layer_path.repeats"),
        ([("a", 1, 3)], "layer_path.group is 2"),
        ([("d", 0, 4)], "goes back"),
    ],
)
def test_a_recipe_outside_the_space_is_told_apart(slices: list[Any], said: str) -> None:
    entries = [{"sources": [{"model": m, "layer_range": [i, j]}]} for m, i, j in slices]
    recipe = Recipe.parse({"merge_method": "passthrough", "slices": entries, "dtype": "float32"})
    with pytest.raises(SearchFileError, match=said):
        space(group=2).values(recipe)


def test_other_parameters_lie_outside_the_space() -> None:
    over = space(scale={"low": 0.5, "high": 1.5})
    config = over.recipe(over.starts()).as_config()
    for parameters, said in [
        ({"scale": 0.5}, "one value for o_proj, down_proj"),
        ({"scale": [{"filter": "o_proj", "value": 9}, {"value": 1.0}]}, "one value for"),
        (
            {"scale": [*({"filter": f, "value": 9} for f in ("o_proj", "down_proj")), {"value": 1.0}]},
            "is 9; the space has",
        ),
    ]:
        config["slices"][0]["sources"][0]["parameters"] = parameters
        with pytest.raises(SearchFileError, match=said):
            over.values(Recipe.parse(config))


@pytest.mark.parametrize(
    ("section", "beside", "said"),
    [
        ({"models": []}, {}, "layer_path.models is"),
        ({"repeat": 2}, {}, "did you mean 'repeats'"),
        ({"group": 3}, {}, "does not divide the 4 layers of a"),
        ({"length": {"low": 5, "high": 4}}, {}, "low must not lie above high"),
        ({"length": {"low": 9, "high": 12}}, {}, "up to 8; change length, group or repeats"),
        ({"length": {"low": 3, "high": 3}, "group": 2}, {}, "a multiple of layer_path.group"),
        ({"scale": {"low": 2, "high": 1}}, {}, "low must lie below high"),
        ({"scale": {"choices": ["x", "y"]}}, {}, "layer_path.scale.choices is"),
        ({"scale": {"choices": [None, 1.0]}}, {}, "each choice must be a finite number"),
        ({"scale": {"low": 0.5, "high": 1.5, "points": 3}}, {}, "layer_path.scale.points is 3"),
        ({"models": ["a", "a"]}, {}, "lists 'a' twice; use repeats"),
        ({}, {"models": [{"model": "a"}]}, "models stands beside layer_path"),
        ({}, {"merge_method": "linear"}, "a layer path is passthrough"),
        ({}, {"dtype": {"choices": ["float32", "bfloat16"]}}, "dtype is a range"),
    ],
)
def test_what_is_wrong_is_said(section: dict[str, Any], beside: dict[str, Any], said: str) -> None:
    template = {"layer_path": {"models": ["a", "b"], **section}, **beside}
    with pytest.raises(SearchFileError, match=said.replace("(", r"\(")):
        LayerPathSpace(template, LAYERS.__getitem__)


# ---- models ----------------------------------------------------------------------------------------


def of_llamas(llamas: Any, **section: Any) -> LayerPathSpace:
    section = {"models": [llamas.x, llamas.y], "repeats": 2, **section}
    return LayerPathSpace({"layer_path": section, "dtype": "float32"}, lambda model: 4)


def logits(recipe: Recipe, entering: dict[int, float] | None = None) -> torch.Tensor:
    """Run the merged model, its norms without epsilon, with what enters a layer scaled."""
    model = load_merged(recipe).eval()
    for name, module in model.named_modules():
        if "norm" in name:
            module.variance_epsilon = 0.0
    for layer, w in (entering or {}).items():
        model.model.layers[layer].register_forward_pre_hook(
            lambda module, given, w=w: (given[0] * w, *given[1:])
        )
    with torch.no_grad():
        result: torch.Tensor = model(torch.arange(11)[None]).logits
    return result


def test_a_layer_scaled_by_zero_is_one_that_is_skipped(llamas: Any) -> None:
    over = of_llamas(llamas, scale={"low": 0.0, "high": 2.0})
    silent = over.starts() | {"layer_path[0].models[0].layers[2].scale": 0.0}
    without = over.starts() | {"layer_path[0].models[0].layers[2]": False}
    assert torch.equal(logits(over.recipe(silent)), logits(over.recipe(without)))


def test_scaling_what_enters_a_layer_is_scaling_what_all_later_ones_add(llamas: Any) -> None:
    """The paper's scale w before a layer, in a model whose norms take the scale of their input out."""
    over = of_llamas(llamas, scale={"low": 0.1, "high": 2.0})
    expected = logits(over.recipe(over.starts()), {1: 0.8, 2: 1.6})
    added = {1: 1 / 0.8, 2: 1 / 0.8 / 1.6, 3: 1 / 0.8 / 1.6}
    scales = {f"layer_path[0].models[0].layers[{i}].scale": scale for i, scale in added.items()}
    found = logits(over.recipe(over.starts() | scales))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, logits(over.recipe(over.starts())), atol=1e-2)


def test_a_path_merges_as_in_mergekit(llamas: Any, tmp_path: Path) -> None:
    pytest.importorskip("mergekit", reason="mergekit is the oracle")
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions
    from safetensors.torch import load_file

    over = of_llamas(llamas, scale={"low": 0.5, "high": 1.5}, order="depths")
    values = {v.name: v.from_unit(i * 0.37 % 1) for i, v in enumerate(over.variables)}
    recipe = over.recipe(values)
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
    run_merge(MergeConfiguration.model_validate(recipe.as_config()), str(tmp_path), options)
    expected, found = load_file(tmp_path / "model.safetensors"), dict(merged_tensors(recipe))
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_a_search_for_a_path_resumes_and_ships_as_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    section = {
        "models": [f"{MODELS}/reverse", f"{MODELS}/sort"],
        "repeats": 2,
        "scale": {"low": 0.5, "high": 1.5},
        "length": {"low": 3, "high": 6},
    }
    data = {
        "layer_path": section,
        "dtype": "float32",
        "tasks": ["qs_reverse", "qs_sort"],
        "search": {"n_iterations": 6},
        "scoring": {"limit": 10, "holdout": 10},
    }
    file = SearchFile(data, "path")
    run(file.changed(search={"n_iterations": 3}), folder=tmp_path / "s")
    result = run(file, folder=tmp_path / "s")
    trials = result.study.trials()
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 6
    best = Recipe.load(tmp_path / "s/best.yml")
    assert best == result.recipe
    save_merged(best, tmp_path / "out")
    (scored,) = evaluate_models([str(tmp_path / "out")], EvalOptions(like=tmp_path / "s"))
    assert result.best is not None
    assert scored["scores"] == result.best.user_attrs["scores"]
    data["layer_path"] = {**section, "scaled": ["c_proj"]}
    with pytest.raises(SearchFileError, match="scaled names 'c_proj', which is in no tensor's name"):
        run(SearchFile(data, "path"), folder=tmp_path / "t")
