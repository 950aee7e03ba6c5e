"""Laws of every space that a search file can spell: values -> recipe -> values, one recipe a vector."""

from typing import Any

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from evolve.errors import SearchFileError
from evolve.space import Space, Value
from merge_core.errors import RecipeError
from merge_core.recipe import Recipe

METHODS = ["ties", "dare_ties", "linear", "slerp", "task_arithmetic", "multislerp", "nuslerp", "sce"]
QUICK = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)


@st.composite
def numbers(draw: st.DrawFn, low: float = -2.0, high: float = 2.0, lists: bool = True) -> Any:
    """A number, fixed or a range of any kind, plain or as a gradient or by filters."""
    kinds = ["fixed", "float", "step", "choices"] + (["points", "anchor", "filters"] if lists else [])
    if low > 0:
        kinds.append("log")
    a, b = sorted(draw(st.tuples(st.floats(low, high), st.floats(low, high))))
    assume(b - a > 0.01)
    match draw(st.sampled_from(kinds)):
        case "fixed":
            return a
        case "step":
            return {"low": a, "high": b, "step": (b - a) / draw(st.integers(1, 7))}
        case "choices":
            return {"choices": [a, b]}
        case "log":
            return {"low": a, "high": b, "log": True}
        case "points":
            return {"low": a, "high": b, "points": draw(st.integers(2, 5))}
        case "anchor":
            return [a, {"low": a, "high": b}, {"low": a, "high": b}]
        case "filters":
            plain = numbers(low, high, lists=False)
            return [{"filter": "mlp", "value": draw(plain)}, {"value": draw(plain)}]
    return {"low": a, "high": b, "start": draw(st.floats(a, b))}


@st.composite
def models(draw: st.DrawFn, i: int) -> dict[str, Any]:
    """One of the models: fixed, a category, or one that can be off."""
    names = [f"m{i}", f"n{i}", "shared"]
    model = draw(
        st.sampled_from(
            [names[0], {"choices": names[:2]}, {"choices": [names[0], None]}, {"choices": [*names, None]}]
        )
    )
    return {
        "model": model,
        "parameters": {"weight": draw(numbers()), "density": draw(numbers(0.1, 1.0))},
    }


@st.composite
def whole_models(draw: st.DrawFn) -> dict[str, Any]:
    """Whole models, under one method or a choice of methods with parameters of their own."""
    chosen = draw(st.lists(st.sampled_from(METHODS), min_size=1, max_size=4, unique=True))
    return {
        "merge_method": {"choices": chosen} if len(chosen) > 1 else "ties",
        "base_model": draw(st.sampled_from(["b", {"choices": ["b", "c"]}])),
        "models": [draw(models(i)) for i in range(draw(st.integers(2, 4)))],
        "parameters": {
            "lambda": draw(numbers()),
            "normalize": {"choices": [True, False]},
            "t": draw(numbers(-0.5, 1.5)),
        }
        if len(chosen) > 1
        else {"lambda": draw(numbers())},
        "dtype": draw(st.sampled_from(["float32", {"choices": ["bfloat16", "float32"]}])),
    }


@st.composite
def stacked_layers(draw: st.DrawFn) -> dict[str, Any]:
    """Runs of layers under passthrough, whose bounds are searched, and which can be off."""

    def bound(low: int) -> Any:
        searched = {"low": low, "high": low + draw(st.integers(1, 4)), "step": 1}
        return draw(st.sampled_from([low, searched]))

    slices = []
    for i in range(draw(st.integers(1, 3))):
        model = draw(
            st.sampled_from(["shared", {"choices": [f"m{i}", None]}, {"choices": ["shared", None]}])
        )
        source: dict[str, Any] = {"model": model, "layer_range": [bound(0), bound(6)]}
        if draw(st.booleans()):
            source["parameters"] = {"scale": draw(numbers(0.5, 1.5))}
        slices.append({"sources": [source]})
    return {"merge_method": "passthrough", "slices": slices, "random_seed": {"choices": [0, 7]}}


TEMPLATES = st.one_of(whole_models(), stacked_layers())


def space_of(template: dict[str, Any]) -> Space:
    try:
        return Space(template, n_layers=lambda: 12)
    except SearchFileError:  # a method whose counts no choice of models can serve
        assume(False)
        raise


def point(space: Space, data: st.DataObject) -> dict[str, Value]:
    units = data.draw(
        st.lists(st.floats(0, 1), min_size=len(space.variables), max_size=len(space.variables))
    )
    return {v.name: v.from_unit(u) for v, u in zip(space.variables, units, strict=True)}


@QUICK
@given(TEMPLATES, st.data())
def test_values_to_recipe_to_values_is_the_identity(
    template: dict[str, Any], data: st.DataObject
) -> None:
    space = space_of(template)
    values = point(space, data)
    try:
        recipe = space.recipe(values)
    except RecipeError:
        assume(False)
        raise
    active = space.active(values)
    assert space.values(recipe) == active
    assert space.active(active) == active
    assert space.recipe(active) == recipe
    # And through a file.
    assert space.values(Recipe.parse(recipe.as_config())) == active


@QUICK
@given(TEMPLATES, st.data())
def test_two_vectors_of_active_values_are_two_recipes(
    template: dict[str, Any], data: st.DataObject
) -> None:
    space = space_of(template)
    one, other = point(space, data), point(space, data)
    for name in data.draw(st.sets(st.sampled_from([v.name for v in space.variables]))):
        other[name] = one[name]
    try:
        recipes = space.recipe(one), space.recipe(other)
    except RecipeError:
        assume(False)
        raise
    assert (space.active(one) == space.active(other)) == (recipes[0] == recipes[1])


@QUICK
@given(TEMPLATES)
def test_the_starts_and_the_examples_lie_in_the_space(template: dict[str, Any]) -> None:
    space = space_of(template)
    assert space.values(space.recipe(space.starts())) == space.active(space.starts())
    choices = {(v.name, choice) for v in space.variables for choice in v.choices or ()}
    seen = set()
    for recipe in space.examples():
        seen |= set(space.values(recipe).items())
    assert choices <= {(name, value) for name, value in seen if (name, value) in choices}
