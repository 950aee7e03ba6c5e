"""Known recipes are what they are called, enter first, and nothing is tried twice."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from evolve.errors import SearchFileError
from evolve.known import known_recipes, own_recipes
from evolve.loop import run
from evolve.samplers import make_sampler
from evolve.samplers.proposer import Proposer
from evolve.search_file import SearchFile
from evolve.space import Space, Value
from merge_core.merge import merged_tensors
from merge_core.plan import model_alone
from merge_core.recipe import Recipe

from ..benchmarks.unstored import Values, numbers, search, weights

ROOT = Path(__file__).resolve().parents[2]

MODELS = Path(__file__).resolve().parents[2] / "configs/quickstart/models"
BASE, ONE, TWO, THREE = (str(MODELS / name) for name in ("base", "reverse", "sort", "largest"))
WEIGHT = {"low": 0.0, "high": 1.5, "start": 0.6}
DENSITY = {"low": 0.1, "high": 1.0, "start": 0.5}
N_LAYERS = 4


def n_layers(model: str) -> int:
    return N_LAYERS


def known(space: Space, **own: dict[str, Value]) -> dict[str, dict[str, Value]]:
    return known_recipes(space, own, n_layers)


def merge(method: str, models: tuple[str, ...] = (ONE, TWO), **shared: Any) -> dict[str, Any]:
    """A recipe of models with weights, and densities where the method has them, in filters and groups."""
    has_density = method not in ("linear", "nuslerp", "multislerp")
    own: dict[str, Any] = {
        "weight": [{"filter": "mlp", "value": {**WEIGHT, "points": 2}}, {"value": WEIGHT}]
    }
    own |= {"density": DENSITY} if has_density else {}
    data: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": model, "parameters": own} for model in models],
        "dtype": "float32",
    }
    data |= {"parameters": shared} if shared else {}
    return data if method in ("linear", "nuslerp", "multislerp") else {**data, "base_model": BASE}


def slices(**parameters: Any) -> dict[str, Any]:
    """Slerp in two slices of two layers each."""
    sources = [{"model": model, "parameters": {}} for model in (BASE, ONE)]
    bounds = ([0, 2], [2, 4])
    return {
        "merge_method": "slerp",
        "base_model": BASE,
        "slices": [
            {
                "sources": [{**source, "layer_range": layers} for source in sources],
                "parameters": {"t": {"low": 0.0, "high": 1.0, "start": 0.3}},
            }
            for layers in bounds
        ],
        "dtype": "float32",
    }


CASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "linear": (merge("linear"), (ONE, TWO)),
    "linear, not normalised": (merge("linear", normalize=False), (ONE, TWO)),
    "linear over three": (merge("linear", (ONE, TWO, THREE)), (ONE, TWO, THREE)),
    "task arithmetic": (merge("task_arithmetic"), (ONE, TWO)),
    "ties": (merge("ties"), (ONE, TWO)),
    "ties, lambda": (merge("ties", **{"lambda": {"low": 0.5, "high": 1.5}}), (ONE, TWO)),
    "dare_ties": (merge("dare_ties"), (ONE, TWO)),
    "breadcrumbs": (merge("breadcrumbs"), (ONE, TWO)),
    "della": (merge("della"), (ONE, TWO)),
    "nuslerp": (merge("nuslerp"), (ONE, TWO)),
    "multislerp": (merge("multislerp"), (ONE, TWO)),
    "slerp": (
        {
            "merge_method": "slerp",
            "models": [{"model": BASE}, {"model": ONE}],
            "base_model": BASE,
            "parameters": {"t": {"low": 0.0, "high": 1.0, "points": 3}},
            "dtype": "float32",
        },
        (BASE, ONE),
    ),
    "slerp in slices": (slices(), (BASE, ONE)),
    "a method to choose": (
        {**merge("ties"), "merge_method": {"choices": ["task_arithmetic", "ties"]}},
        (ONE, TWO),
    ),
    "a model to choose": (
        {
            "merge_method": "passthrough",
            "models": [
                {
                    "model": {"choices": [ONE, TWO]},
                    "parameters": {"scale": {"low": 0.5, "high": 1.5, "start": 0.9}},
                }
            ],
            "dtype": "float32",
        },
        (ONE, TWO),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_model_alone_is_that_model(case: str) -> None:
    template, models = CASES[case]
    space = Space(template)
    found = known(space)
    assert [name for name in found if name.endswith(" alone")] == [f"{m} alone" for m in models]
    for model in models:
        made = merged_tensors(space.recipe(found[f"{model} alone"]))
        exact = dict(merged_tensors(model_alone(model, space.recipe(space.starts()))))
        for name, tensor in made:
            torch.testing.assert_close(tensor, exact[name], rtol=1e-5, atol=1e-6)


def test_layer_groups_have_one_value() -> None:
    space = Space(merge("ties"), 2, lambda: N_LAYERS)
    values = known(space)[f"{TWO} alone"]
    assert len(values) == len(space.variables) == 12
    assert {v for name, v in values.items() if "[0].weight" in name} == {0.0}
    assert {v for name, v in values.items() if "[1].weight" in name} == {1.0}
    assert {v for name, v in values.items() if "[1].density" in name} == {1.0}


@pytest.mark.parametrize("case", ["linear", "linear over three", "task arithmetic"])
def test_the_average_is_the_mean_of_the_models(case: str) -> None:
    template, models = CASES[case]
    space = Space(template)
    each = [dict(merged_tensors(model_alone(m, space.recipe(space.starts())))) for m in models]
    for name, tensor in merged_tensors(space.recipe(known(space)["average"])):
        mean = torch.stack([tensors[name] for tensors in each]).mean(dim=0)
        torch.testing.assert_close(tensor, mean, rtol=1e-5, atol=1e-6)


def test_what_does_not_lie_in_the_space_is_no_candidate() -> None:
    narrow = merge("ties")
    for model in narrow["models"]:
        model["parameters"] = {"weight": {"low": 0.2, "high": 0.9}, "density": DENSITY}
    assert list(known(Space(narrow))) == ["starts", "average", "centres"]
    thin = merge("ties")
    for model in thin["models"]:
        model["parameters"] = {"weight": WEIGHT, "density": 0.5}
    assert list(known(Space(thin))) == ["starts", "centres"]
    stepped = merge("linear")
    for model in stepped["models"]:
        model["parameters"] = {"weight": {"low": 0.0, "high": 1.2, "step": 0.4}}
    assert list(known(Space(stepped))) == ["starts", "centres"]


def test_layers_of_one_model_stacked_are_not_that_model() -> None:
    scale = {"scale": {"low": 0.5, "high": 1.5}}

    def stack(*bounds: list[int]) -> Space:
        sources = [{"model": ONE, "layer_range": layers, "parameters": scale} for layers in bounds]
        parts = [{"sources": [source]} for source in sources]
        return Space({"merge_method": "passthrough", "slices": parts})

    assert f"{ONE} alone" in known(stack([0, 2], [2, 4]))
    assert f"{ONE} alone" not in known(stack([0, 3], [1, 4]))
    assert f"{ONE} alone" not in known(stack([0, 2], [2, 3]))


# ---- the user's own ---------------------------------------------------------------------------


def written(folder: Path, space: Space, values: dict[str, Value], name: str = "own.yml") -> str:
    (folder / name).write_text(space.recipe(values).to_yaml())
    return str(folder / name)


def test_a_seed_recipe_is_tried_right_after_the_starts(tmp_path: Path) -> None:
    space = weights(3)
    values: dict[str, Value] = {v.name: 0.1 * (i + 1) for i, v in enumerate(space.variables)}
    file = written(tmp_path, space, values)
    own = own_recipes(space, [file])
    assert own == {file: pytest.approx(values)}
    assert list(known_recipes(space, own, n_layers))[:2] == ["starts", file]


def test_a_seed_recipe_that_is_called_like_a_known_one_is_tried_as_well() -> None:
    space = weights(2)
    own: dict[str, dict[str, Value]] = {
        name: {"models[0].weight": i / 10, "models[1].weight": 0.7}
        for i, name in enumerate(("starts", "average", "m0 alone", "centres"))
    }
    found = known_recipes(space, own, n_layers)
    assert {name: found[name] for name in own} == own
    others = known_recipes(space, {}, n_layers)
    assert [found[f"{name} (recipe)"] for name in own] == [others[name] for name in own]


def test_seed_recipes_outside_the_space_are_told_each_with_what_is_wrong(tmp_path: Path) -> None:
    wide, space = weights(2, high=3.0), weights(2)
    outside = written(tmp_path, wide, {"models[0].weight": 2.5, "models[1].weight": 0.5})
    (tmp_path / "other.yml").write_text(
        Recipe.parse(
            merge("ties") | {"models": [{"model": ONE, "parameters": {"weight": 1.0}}]}
        ).to_yaml()
    )
    missing = str(tmp_path / "missing.yml")
    with pytest.raises(SearchFileError) as raised:
        own_recipes(space, [outside, str(tmp_path / "other.yml"), missing])
    text = "\n".join(raised.value.faults)
    assert f"{outside}: models[0].weight is 2.5; the space has [0, 1]; change the recipe" in text
    assert "other.yml: models has 1 entries; the space has 2" in text
    assert "missing.yml" in text


# ---- first, and never twice -------------------------------------------------------------------


def test_known_recipes_enter_first_and_equal_ones_once() -> None:
    space = weights(2)
    found = known_recipes(
        space, {"own.yml": {"models[0].weight": 1.0, "models[1].weight": 0.0}}, n_layers
    )
    trials = search(space, lambda values: float(numbers(values).sum()), 12, known=found)
    names = [trial.user_attrs.get("known") for trial in trials]
    # Starts, average and centres are one and the same here.
    assert names == ["starts", "own.yml", "m1 alone", *[None] * 9]


def test_whole_numbers_are_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written 1 and read back as 1.0, by the file's own start and by a recipe of the user's."""
    monkeypatch.chdir(ROOT)
    models: list[dict[str, Any]] = [
        {
            "model": f"configs/quickstart/models/{name}",
            "parameters": {"weight": {"low": 0, "high": 2, "start": start}},
        }
        for name, start in (("reverse", 1), ("sort", 2))
    ]
    recipe: dict[str, Any] = {
        "merge_method": "task_arithmetic",
        "base_model": "configs/quickstart/models/base",
        "models": models,
        "dtype": "float32",
    }
    own = [{**model, "parameters": {"weight": 0}} for model in models]
    own_file = tmp_path / "own.yml"
    own_file.write_text(yaml.safe_dump({**recipe, "models": own}))
    file = SearchFile(
        {
            **recipe,
            "tasks": ["qs_sort"],
            "search": {
                "n_iterations": 7,
                "sampler": "random",
                "seed_recipes": [str(own_file)],
            },
            "scoring": {"task_paths": ["tasks"], "limit": 4, "holdout": 0},
        },
        "whole",
    )
    trials = run(file, folder=tmp_path / "s").study.trials()
    names = [trial.user_attrs.get("known") for trial in trials]
    assert names[:2] == ["starts", str(own_file)]
    assert [tuple(trial.params.values()) for trial in trials[:2]] == [(1, 2), (0, 0)]
    assert len({tuple(trial.params.values()) for trial in trials}) == len(trials) == 7
    space = file.space(lambda model: 2)
    assert {type(value) for value in space.starts().values()} == {float}
    assert {type(value) for value in space.values(Recipe.load(own_file)).values()} == {float}


@pytest.mark.parametrize(("choices", "start"), [([0.5, 1], 1.0), ([0.5, 1.0], 1), ([1, 0], 0.0)])
def test_a_start_is_the_choice_however_it_is_written(choices: list[float], start: float) -> None:
    models = [{"model": f"m{i}", "parameters": {"weight": {"low": 0, "high": 1}}} for i in range(2)]
    models[0]["parameters"]["weight"] = {"choices": choices, "start": start}  # type: ignore[index]
    over = Space({"merge_method": "task_arithmetic", "base_model": "base", "models": models})
    found = known_recipes(over, {}, n_layers)
    trials = search(over, lambda values: 0.0, 12, "tpe", known=found)
    assert [trial.user_attrs.get("known") for trial in trials].count("starts") == 1
    assert len({tuple(trial.params.values()) for trial in trials}) == 12


def test_a_start_that_is_true_is_no_choice_of_1() -> None:
    models = [{"model": "m", "parameters": {"weight": {"choices": [0, 1], "start": True}}}]
    with pytest.raises(SearchFileError, match=r"weight\.start is True; it must be one of the choices"):
        Space({"merge_method": "task_arithmetic", "base_model": "base", "models": models})


def test_seeds_of_a_wide_range_are_told_apart() -> None:
    over = Space(
        {
            "merge_method": "dare_linear",
            "base_model": "base",
            "models": [{"model": "m", "parameters": {"weight": 1.0, "density": 0.5}}],
            "random_seed": {"low": 0, "high": 2**32 - 1, "step": 1},
        }
    )
    (name,) = (v.name for v in over.variables)
    known: dict[str, dict[str, Value]] = {str(i): {name: i} for i in (1, 2)}
    trials = search(over, lambda values: 0.0, 3, "random", known=known)
    assert [trial.params[name] for trial in trials[:2]] == [1, 2]


def test_cma_begins_at_the_best_known_recipe() -> None:
    space = weights(3)
    found: dict[str, Values] = {
        name: {v.name: value for v in space.variables}
        for name, value in (("a", 0.5), ("b", 0.8), ("c", 0.2))
    }

    def near(values: Values) -> float:
        return -float(((numbers(values) - 0.8) ** 2).sum())

    trials = search(space, near, 200, known=found)
    drawn = [trial for trial in trials if "cma" in trial.user_attrs]
    assert {trial.user_attrs["cma"]["mean"] for trial in drawn} == {1}
    assert [t.params for t in search(space, near, 200, known=found, renew=9)] == [
        t.params for t in trials
    ]
    plain = search(space, near, 40)
    assert sum(t.values[0] for t in drawn[:30]) > sum(t.values[0] for t in plain[:30])


@pytest.mark.parametrize("name", ["cma", "tpe", "nsga2", "qmc", "random"])
def test_a_finite_space_is_searched_to_its_end(name: str) -> None:
    space = weights(2, step=0.25)
    for renew in (None, 1):
        trials = search(space, lambda values: -float(numbers(values).sum()), 99, name, renew=renew)
        assert len(trials) == space.n_points == 25
        assert len({repr(trial.params) for trial in trials}) == 25
    proposer = Proposer(space, make_sampler(name, space, 0), {}, 0)
    assert proposer.propose(25, trials) is None
    assert proposer.ending == "all 25 candidates of the space are scored"


def test_invalid_recipes_are_not_proposed() -> None:
    """Layer ranges that would be empty or run backwards are drawn anew."""
    bounds = [{"low": 0, "high": 3, "step": 1, "start": 0}, {"low": 1, "high": 4, "step": 1, "start": 4}]
    source = {"model": ONE, "layer_range": bounds}
    space = Space({"merge_method": "passthrough", "slices": [{"sources": [source]}]})
    trials = search(space, lambda values: -float(numbers(values).sum()), 99, "random", known=known(space))
    ranges = [tuple(trial.params.values()) for trial in trials]
    assert all(begin < end for begin, end in ranges)  # type: ignore[operator]
    assert len(set(ranges)) == len(ranges) == 10
