import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolve.errors import SearchFileError
from evolve.space import Space, Value

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
        ({"low": 0, "high": 1, "points": 1}, "at least 2"),
        ({"low": "a", "high": 1}, "must be a finite number"),
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
