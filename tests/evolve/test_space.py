import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolve.errors import SearchFileError
from evolve.space import Space, Value
from merge_core.errors import RecipeError
from merge_core.recipe import Recipe

TEMPLATE = {
    "merge_method": "ties",
    "base_model": "base",
    "models": [
        {
            "model": "one",
            "parameters": {
                "weight": [
                    {"filter": "mlp", "value": {"low": 0.0, "high": 1.5, "points": 3}},
                    {"value": {"low": -1.0, "high": 1.5}},
                ],
                "density": {"low": 0.1, "high": 1.0, "start": 0.5},
            },
        },
        {
            "model": {"choices": ["two", "three"]},
            "parameters": {"weight": {"low": 0.01, "high": 10, "log": True}, "density": [0.2, 0.9]},
        },
    ],
    "parameters": {"normalize": {"choices": [True, False]}, "lambda": {"low": 0, "high": 2, "step": 0.5}},
    "dtype": "float32",
}
NAMES = [
    "models[0].weight[mlp][0]",
    "models[0].weight[mlp][1]",
    "models[0].weight[mlp][2]",
    "models[0].weight[*]",
    "models[0].density",
    "models[1].model",
    "models[1].weight",
    "normalize",
    "lambda",
]


def test_variables_are_named_by_their_path() -> None:
    assert [variable.name for variable in Space(TEMPLATE).variables] == NAMES


def test_starts_are_as_given_or_the_middle() -> None:
    starts = Space(TEMPLATE).starts()
    assert starts["models[0].density"] == 0.5
    assert starts["models[0].weight[*]"] == 0.25
    assert starts["models[1].weight"] == pytest.approx(math.sqrt(0.01 * 10))
    assert starts["normalize"] is True


def test_points_export_as_a_gradient_and_fixed_values_stay() -> None:
    space = Space(TEMPLATE)
    values = {**space.starts(), "models[0].weight[mlp][1]": 1.25}
    config = space.recipe(values).as_config()
    assert config["models"][0]["parameters"]["weight"][0] == {
        "filter": "mlp",
        "value": [0.75, 1.25, 0.75],
    }
    assert config["models"][1]["parameters"]["density"] == [0.2, 0.9]


@given(st.lists(st.floats(0, 1), min_size=len(NAMES), max_size=len(NAMES)))
def test_values_to_recipe_to_values_is_the_identity(unit: list[float]) -> None:
    space = Space(TEMPLATE)
    values: dict[str, Value] = {
        v.name: v.from_unit(u) for v, u in zip(space.variables, unit, strict=True)
    }
    assert space.values(space.recipe(values)) == values


@given(st.floats(0, 1))
def test_the_unit_interval_maps_into_the_bounds_and_back(u: float) -> None:
    for variable in Space(TEMPLATE).variables:
        value = variable.from_unit(u)
        again = variable.from_unit(variable.to_unit(value))
        if variable.choices is None:
            assert isinstance(value, int | float)
            assert variable.low <= value <= variable.high
            assert again == pytest.approx(value)
        else:
            assert again == value


def grouped(granularity: int, n_layers: int = 12) -> Space:
    weight = {"low": 0.0, "high": 1.0}
    models = [{"model": name, "parameters": {"weight": weight}} for name in ("one", "two")]
    template = {"merge_method": "task_arithmetic", "base_model": "base", "models": models}
    return Space(template, granularity, lambda: n_layers)


def test_layer_granularity_exports_one_value_a_layer_constant_in_each_group() -> None:
    space = grouped(4)
    assert [v.name for v in space.variables] == [
        f"models[{m}].weight[{g}]" for m in (0, 1) for g in range(3)
    ]
    values: dict[str, Value] = {v.name: float(i) / 10 for i, v in enumerate(space.variables)}
    weight = space.recipe(values).as_config()["models"][0]["parameters"]["weight"]
    assert weight == [0.0] * 4 + [0.1] * 4 + [0.2] * 4
    assert space.values(space.recipe(values)) == values


def test_granularity_of_all_layers_is_no_granularity() -> None:
    one_group, off = grouped(12), grouped(0)
    assert len(one_group.variables) == len(off.variables)


def test_points_win_over_granularity() -> None:
    template = {
        "merge_method": "linear",
        "models": [{"model": "one", "parameters": {"weight": {"low": 0.0, "high": 1.0, "points": 2}}}],
    }
    assert len(Space(template, 2, lambda: 8).variables) == 2


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        ({"low": 1}, "high is missing"),
        ({"low": 1, "high": 1}, "low must lie below high"),
        ({"low": 0, "high": 1, "start": 2}, "start is 2; it must lie in [0, 1]"),
        ({"low": 0, "high": 1, "log": True}, "with log: true it must be above 0"),
        ({"low": 0, "high": 1, "step": 0.3, "start": 0.5}, "between two steps"),
        ({"low": 0, "high": 1, "point": 3}, "did you mean 'points'?"),
        ({"low": 0, "high": 1, "points": 1}, "from 2 to 1000"),
        ({"low": 0, "high": 1, "points": 10**9}, "from 2 to 1000"),
        ({"low": 0, "high": 10**400}, "must be a finite number"),
        ({"low": "a", "high": 1}, "must be a finite number"),
        ({"low": -1e308, "high": 1e308}, "high - low is infinite"),
        ({"low": 1, "high": 2, "log": "no"}, "log is 'no'; it must be true or false"),
        ({"choices": [1]}, "at least two different values"),
        ({"choices": [1, 2], "start": 3}, "one of the choices"),
    ],
)
def test_a_bad_range_is_told_by_name(node: dict[str, object], expected: str) -> None:
    template = {"merge_method": "linear", "models": [{"model": "one", "parameters": {"weight": node}}]}
    with pytest.raises(SearchFileError) as raised:
        Space(template)
    assert "models[0].weight" in str(raised.value)
    assert expected in str(raised.value)


def test_steps_end_at_the_last_value_they_reach() -> None:
    template = {
        "merge_method": "linear",
        "models": [{"model": "one", "parameters": {"weight": {"low": 0, "high": 7, "step": 4}}}],
    }
    (variable,) = Space(template).variables
    assert {variable.from_unit(u / 10) for u in range(11)} == {0, 4}


WEIGHT = {"low": -0.5, "high": 1.5}


def two_models(**changes: Any) -> dict[str, Any]:
    """A template of two models, with what a test changes."""
    models = [{"model": name, "parameters": {"weight": WEIGHT}} for name in ("one", "two")]
    return {"merge_method": "task_arithmetic", "base_model": "base", "models": models, **changes}


def methods(*choices: str, **changes: Any) -> Space:
    density = {"low": 0.1, "high": 1.0}
    models = [
        {"model": {"choices": ["one", None]}, "parameters": {"weight": WEIGHT, "density": density}},
        {"model": "two", "parameters": {"weight": WEIGHT, "density": 0.5}},
    ]
    parameters = {"t": {"low": -0.5, "high": 1.5}, "normalize": True}
    template = two_models(merge_method={"choices": [*choices]}, models=models, parameters=parameters)
    return Space({**template, **changes})


def test_parameters_that_a_method_does_not_have_are_left_out_with_it() -> None:
    space = methods("ties", "linear", "slerp")
    values = {**space.starts(), "merge_method": "linear"}
    config = space.recipe(values).as_config()
    assert config["models"][1]["parameters"] == {"weight": 0.5}
    assert config["parameters"] == {"normalize": True}
    assert set(values) - set(space.active(values)) == {"models[0].density", "t"}
    slerp = {**values, "merge_method": "slerp", "models[0].model": None, "t": -0.25}
    assert space.active(slerp) == {"merge_method": "slerp", "models[0].model": None, "t": -0.25}
    assert space.recipe(slerp).as_config()["parameters"] == {"t": -0.25}


def test_what_makes_a_variable_count_is_said() -> None:
    conditions = {v.name: [str(c) for c in v.condition] for v in methods("ties", "slerp").variables}
    assert conditions["models[0].density"] == ["models[0].model is on", "merge_method is ties"]
    assert conditions["models[1].weight"] == ["merge_method is ties"]
    assert conditions["merge_method"] == []


def test_a_parameter_that_no_choice_has_is_a_fault_with_the_nearest_name() -> None:
    models = [{"model": "one", "parameters": {"weight": 1.0, "desnity": {"low": 0.1, "high": 1}}}]
    template = two_models(merge_method={"choices": ["ties", "dare_ties"]}, models=models)
    with pytest.raises(SearchFileError, match="'desnity'; did you mean 'density'"):
        Space(template)


def test_a_choice_that_never_fits_is_told_and_why() -> None:
    with pytest.raises(SearchFileError) as raised:
        Space(two_models(merge_method={"choices": ["ties", "slerp"]}))
    (missing, count) = sorted(raised.value.faults, reverse=True)
    assert missing == ("merge_method slerp: parameters.t is missing; slerp needs it, add t: 0.5")
    assert count.startswith("merge_method slerp: models lists 2 models besides the base; slerp takes 1")


def test_a_range_that_one_method_does_not_admit_is_told_with_it() -> None:
    density = {"low": 0.05, "high": 0.5}
    models = [{"model": "one", "parameters": {"weight": 1.0, "density": density}}]
    with pytest.raises(SearchFileError, match=r"merge_method della: .* choose a smaller epsilon"):
        Space(two_models(merge_method={"choices": ["ties", "della"]}, models=models))


def test_models_that_are_off_leave_the_recipe_and_too_few_are_an_invalid_point() -> None:
    models = [
        {"model": {"choices": [name, None]}, "parameters": {"weight": WEIGHT}} for name in ("one", "two")
    ]
    space = Space(two_models(models=models))
    off = {**space.starts(), "models[0].model": None}
    assert [entry.model for entry in space.recipe(off).models or ()] == ["two"]
    with pytest.raises(RecipeError):
        space.recipe({**off, "models[1].model": None})
    assert space.references() == ["base", "one", "two"]


def stacked(first: Any, second: Any) -> Space:
    ranges = ([{"low": 0, "high": 4, "step": 1}, 4], [2, {"low": 1, "high": 6, "step": 1, "start": 4}])
    sources = zip((first, second), ranges, strict=True)
    slices = [{"sources": [{"model": model, "layer_range": layers}]} for model, layers in sources]
    return Space({"merge_method": "passthrough", "slices": slices})


def test_layer_bounds_are_whole_numbers_and_an_empty_range_is_an_invalid_point() -> None:
    space = stacked("one", "two")
    values = {**space.starts(), "slices[1].sources[0].layer_range[1]": 5}
    slices = space.recipe(values).slices or ()
    assert [entry.sources[0].layer_range for entry in slices] == [(2, 4), (2, 5)]
    with pytest.raises(RecipeError, match="layer_range is"):
        space.recipe({**values, "slices[1].sources[0].layer_range[1]": 2})
    assert space.n_points == 5 * 6
    # The longest that a candidate may be is among the examples, for the memory check.
    lengths = [
        sum(e.sources[0].layer_range[1] - e.sources[0].layer_range[0] for e in recipe.slices or ())
        for recipe in space.examples()
    ]
    assert max(lengths) == 4 + 4


def test_entries_with_one_model_are_switched_on_in_their_order() -> None:
    entry = {"model": {"choices": ["one", None]}, "parameters": {"weight": WEIGHT}}
    space = Space(two_models(models=[entry, entry, {"model": "two", "parameters": {"weight": 1.0}}]))
    first = {**space.starts(), "models[1].model": None}
    second = {**space.starts(), "models[0].model": None}
    assert space.values(space.recipe(first)) == space.active(first)
    with pytest.raises(RecipeError, match="the recipe of another candidate"):
        space.recipe(second)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"models[0].weight": 2.0}, "models[0].weight is 2; the space has [-0.5, 1.5]"),
        ({"lambda": 0.7}, "lambda is 0.7; the space has steps of 0.5 there, the nearest is 0.5"),
        ({"dtype": "float16"}, "dtype is 'float16'; the space has the choices bfloat16, float32"),
        ({"models[1].density": 0.4}, "models[1].density is 0.4; the space has 0.5 there"),
        ({"lambda": None}, "lambda is missing; the space has it, add it"),
    ],
)
def test_a_recipe_outside_the_space_is_told_what_differs(change: dict[str, Any], expected: str) -> None:
    ties = two_models(
        merge_method="ties",
        parameters={"lambda": {"low": 0, "high": 2, "step": 0.5}},
        dtype={"choices": ["bfloat16", "float32"]},
    )
    ties["models"][1] = {"model": "two", "parameters": {"weight": WEIGHT, "density": 0.5}}
    space = Space(ties)
    config = space.recipe(space.starts()).as_config()
    ((path, value),) = change.items()
    place, _, key = path.rpartition(".")
    target = config["models"][int(place[7])]["parameters"] if place else config
    target = target["parameters"] if key == "lambda" else target
    if value is None:
        del target[key]
    else:
        target[key] = value
    with pytest.raises(SearchFileError) as raised:
        space.values(Recipe.parse(config, strict=False))
    assert expected in raised.value.faults


def test_a_number_in_a_recipe_lies_in_a_space_of_gradients() -> None:
    space = grouped(4)
    config = space.recipe(space.starts()).as_config()
    for entry, weight in zip(config["models"], (0.25, 0.75), strict=True):
        entry["parameters"]["weight"] = weight
    values = space.values(Recipe.parse(config))
    assert list(values.values()) == [0.25] * 3 + [0.75] * 3


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"models": [dict(WEIGHT), {"model": "one"}]}, "models[0]"),
        ({"models": [{"model": "one", "parameters": dict(WEIGHT)}]}, "models[0].parameters"),
        ({"models": [{"model": "one"}], "parameters": dict(WEIGHT)}, "parameters"),
    ],
)
def test_a_range_where_none_can_stand_is_told(changes: dict[str, Any], place: str) -> None:
    with pytest.raises(SearchFileError) as raised:
        Space(two_models(**changes))
    (fault,) = raised.value.faults
    assert fault.startswith(f"{place} is a range, and no value")


@pytest.mark.parametrize(
    ("changes", "fix"),
    [
        ({"merge_method": "linear"}, "one of them, such as models[0].weight"),
        ({"merge_method": "ties"}, "one of them, such as models[0].weight"),
        ({"merge_method": "dare_ties", "parameters": {"normalize": True}}, "one of them"),
        ({"merge_method": {"choices": ["task_arithmetic", "ties"]}}, "one of them"),
        ({"parameters": {"lambda": {"low": 0.0, "high": 2.0}}}, "lambda, or models[0].weight"),
    ],
)
def test_weights_whose_scale_cancels_are_noted(changes: dict[str, Any], fix: str) -> None:
    (note,) = Space(two_models(**changes)).notes
    assert f"fix {fix}" in note


def test_where_a_scale_cancels_is_said() -> None:
    """With some values of a category only, and for each filter by itself."""
    parameters = {"normalize": {"choices": [False, True]}}
    template = two_models(merge_method="ties", parameters=parameters)
    (note,) = Space(template).notes
    assert "divided by their sum where normalize is true, which" in note
    first, second = template["models"]
    by_filter = [{"filter": "mlp", "value": dict(WEIGHT)}, {"value": dict(WEIGHT)}]
    models = [{**first, "parameters": {"weight": by_filter}}, second]
    mlp, others = Space({**template, "models": models}).notes
    assert "same model on tensors of 'mlp'; fix one of them, such as models[0].weight[mlp]" in mlp
    assert "same model on tensors without a filter of their own; fix one of them" in others
    by_filter[0]["filter"] = {"choices": ["mlp", "attn"]}
    searched, _ = Space({**template, "models": models}).notes
    assert "same model on tensors of 'models[0].weight[0].filter'; fix one of them" in searched


def test_a_fixed_weight_holds_the_scale_and_a_fixed_zero_does_not() -> None:
    template = two_models(merge_method="ties")
    fixed = {"model": "two", "parameters": {"weight": 1.0}}
    assert Space({**template, "models": [template["models"][0], fixed]}).notes == []
    off = {"model": "two", "parameters": {"weight": 0.0, "density": {"low": 0.1, "high": 1.0}}}
    notes = Space({**template, "models": [template["models"][0], off]}).notes
    assert "models[1].density has no effect: the model's weight is 0; fix it" in notes
    assert len(notes) == 2
    assert Space(two_models()).notes == []  # nothing divides the weights here


def test_more_points_than_layers_are_noted() -> None:
    models = [{"model": "one", "parameters": {"weight": {**WEIGHT, "points": 6}}}]
    (note,) = Space(two_models(models=models), n_layers=lambda: 4).notes
    assert "models[0].weight has 6 points over 4 layers" in note
