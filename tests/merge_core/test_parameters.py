"""Which value a tensor gets. The expected values follow mergekit 0.1.5's rules."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_core.errors import RecipeError
from merge_core.methods import Parameter
from merge_core.parameters import look_up, value_at
from merge_core.recipe import Recipe

MLP = "model.layers.3.mlp.up_proj.weight"
ATTENTION = "model.layers.3.self_attn.q_proj.weight"
NORM = "model.layers.3.input_layernorm.weight"
NUMBER = Parameter(default=0.25)
BOOLEAN = Parameter("boolean", False)
REQUIRED = Parameter(required=True)


# ---- gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("anchors", "t", "expected"),
    [
        # position = t (n - 1); between anchors i and i + 1 linear
        ([0.3], 0.0, 0.3),
        ([0.3], 1.0, 0.3),
        ([0, 1], 0.0, 0.0),
        ([0, 1], 1.0, 1.0),
        ([0, 1], 0.25, 0.25),
        ([0, 1, 0], 0.5, 1.0),
        ([0, 1, 0], 0.75, 0.5),
        ([1, 3, 2, 8], 1 / 3, 3.0),
        ([1, 3, 2, 8], 0.5, 2.5),
        ([1, 3, 2, 8], 5 / 6, 5.0),
        ([-1.5, 0.5], 0.5, -0.5),
        ([2, 1], 0.5, 1.5),
    ],
    ids=str,
)
def test_a_gradient_interpolates_linearly_between_its_anchors(anchors, t, expected):
    assert value_at(anchors, MLP, t) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("n_anchors", range(1, 7))
def test_a_gradient_ends_exactly_at_its_ends(n_anchors):
    anchors = [0.1 * (i + 1) for i in range(n_anchors)]
    assert value_at(anchors, MLP, 0.0) == anchors[0]
    assert value_at(anchors, MLP, 1.0) == anchors[-1]


@pytest.mark.parametrize("n_layers", [2, 3, 7, 24, 32, 80])
def test_a_gradient_with_one_anchor_a_layer_gives_each_layer_its_anchor(n_layers):
    anchors = [((i * 37) % 11) / 7 for i in range(n_layers)]
    for i in range(n_layers):
        assert value_at(anchors, MLP, i / (n_layers - 1)) == pytest.approx(anchors[i], abs=1e-12)


@pytest.mark.parametrize(
    ("t", "expected"), [(0.0, True), (0.49, True), (0.5, False), (0.99, False), (1.0, True)], ids=str
)
def test_a_gradient_of_booleans_steps(t, expected):
    # floor(t * 2): the element at 0, 1, 2
    assert value_at([True, False, True], MLP, t) is expected


@pytest.mark.parametrize(("t", "expected"), [(0.0, False), (0.5, False), (1.0, True)], ids=str)
def test_a_gradient_of_a_boolean_parameter_steps_though_written_as_0_and_1(t, expected):
    assert look_up("normalize", BOOLEAN, ({"normalize": [0, 1]},), MLP, t) is expected


@given(
    anchors=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=9),
    i=st.integers(0, 60),
    n_steps=st.integers(1, 60),
)
def test_gradients_agree_with_exact_fractions(anchors, i, n_steps):
    t = Fraction(min(i, n_steps), n_steps)
    position = t * (len(anchors) - 1)
    lower = int(position)
    share = position - lower
    exact = (1 - share) * Fraction(anchors[lower])
    if share:
        exact += share * Fraction(anchors[lower + 1])
    value = value_at(anchors, MLP, float(t))
    size = max(abs(a) for a in anchors)
    # The rounding of t moves the position by n units, and so the value by so much of its span.
    assert abs(value - float(exact)) <= 1e-13 * size * len(anchors) + 1e-300
    assert min(anchors) - 1e-9 * size <= value <= max(anchors) + 1e-9 * size


# ---- filters ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "mlp", "attention", "norm"),
    [
        (0.7, 0.7, 0.7, 0.7),
        ({"filter": "mlp", "value": 0.1}, 0.1, None, None),
        ({"value": 0.1}, 0.1, 0.1, 0.1),
        ([{"filter": "mlp", "value": 0.1}], 0.1, None, None),
        ([{"filter": "mlp", "value": 0.1}, {"value": 0.2}], 0.1, 0.2, 0.2),
        ([{"value": 0.2}, {"filter": "mlp", "value": 0.1}], 0.2, 0.2, 0.2),  # the first match wins
        ([{"filter": "proj", "value": 0.1}, {"filter": "mlp", "value": 0.2}], 0.1, 0.1, None),
        ([{"filter": "*", "value": 0.3}], 0.3, 0.3, 0.3),
        ([{"filter": None, "value": 0.3}], 0.3, 0.3, 0.3),
        ([{"filter": "*mlp*", "value": 0.3}], None, None, None),  # a plain substring, no glob
        ([{"filter": "m.p", "value": 0.3}], None, None, None),  # and no regular expression
        ([{"filter": "MLP", "value": 0.3}], None, None, None),
        ([{"filter": "layers.3.mlp", "value": 0.3}], 0.3, None, None),
        ([{"filter": "mlp", "value": [0, 1]}, {"value": [1, 0]}], 0.25, 0.75, 0.75),
        ([{"filter": "mlp", "value": 0}, {"value": 1}], 0, 1, 1),  # zero is a value
        ([{"filter": "mlp", "value": False}, {"value": True}], False, True, True),
    ],
    ids=str,
)
def test_filters_match_by_substring_and_the_first_match_wins(setting, mlp, attention, norm):
    found = [value_at(setting, name, 0.25) for name in (MLP, ATTENTION, NORM)]
    assert found == [mlp, attention, norm]


FILTERS = [None, "*", "mlp", "self_attn", "up_proj", "layers.3", "weight", "nothing"]


@given(
    setting=st.lists(
        st.fixed_dictionaries({"filter": st.sampled_from(FILTERS), "value": st.floats(-9, 9)}),
        min_size=1,
        max_size=5,
    ),
    tensor=st.sampled_from([MLP, ATTENTION, NORM, "lm_head.weight"]),
)
def test_any_filter_list_gives_its_first_matching_entry(setting, tensor):
    matching = [e["value"] for e in setting if e["filter"] in (None, "*") or e["filter"] in tensor]
    assert value_at(setting, tensor, 0.5) == (matching[0] if matching else None)


# ---- precedence ---------------------------------------------------------------------------------

ONLY_NORM = [{"filter": "norm", "value": 9.0}]


@pytest.mark.parametrize(
    ("source", "part", "top", "expected"),
    [
        ({"w": 1}, {"w": 2}, {"w": 3}, 1.0),
        ({}, {"w": 2}, {"w": 3}, 2.0),
        ({}, {}, {"w": 3}, 3.0),
        ({}, {}, {}, 0.25),  # the default
        ({"other": 1}, {}, {"w": 3}, 3.0),
        ({"w": ONLY_NORM}, {"w": 2}, {"w": 3}, 2.0),  # no filter matches: look further down
        ({"w": ONLY_NORM}, {"w": ONLY_NORM}, {"w": 3}, 3.0),
        ({"w": ONLY_NORM}, {"w": ONLY_NORM}, {"w": ONLY_NORM}, 0.25),
        ({"w": 0}, {"w": 2}, {}, 0.0),  # zero is a value
        ({"w": [0, 1]}, {"w": 2}, {}, 0.5),
    ],
    ids=str,
)
def test_the_nearest_level_with_a_value_for_this_tensor_wins(source, part, top, expected):
    value = look_up("w", NUMBER, (source, part, top), MLP, 0.5)
    assert value == expected
    assert isinstance(value, float)


level = st.fixed_dictionaries(
    {},
    optional={
        "w": st.floats(-9, 9)
        | st.builds(lambda f, v: [{"filter": f, "value": v}], st.sampled_from(FILTERS), st.floats(-9, 9))
    },
)


@given(levels=st.lists(level, max_size=4))
def test_any_levels_give_the_first_value_or_the_default(levels):
    values = [value_at(level["w"], MLP, 0.0) for level in levels if "w" in level]
    expected = next((value for value in values if value is not None), NUMBER.default)
    assert look_up("w", NUMBER, levels, MLP, 0.0) == expected


@pytest.mark.parametrize(
    ("setting", "t", "expected"),
    [
        (True, 0, True),
        (1, 0, True),
        (0, 0, False),
        ([True, False], 1.0, False),
        ([True, False], 0.5, True),
    ],
    ids=str,
)
def test_booleans_come_out_as_booleans(setting, t, expected):
    assert look_up("normalize", BOOLEAN, ({"normalize": setting},), MLP, t) is expected


def test_a_required_parameter_that_no_filter_gives_a_value_is_an_error_that_names_the_tensor():
    with pytest.raises(RecipeError, match=rf"^weight has no value for tensor {MLP}; .*without filter"):
        look_up("weight", REQUIRED, ({"weight": ONLY_NORM},), MLP, 0.0)


# ---- everything at once, against a slow and obvious reading of the rules ------------------------

numbers = st.integers(-9, 9) | st.floats(-9, 9).map(lambda x: round(x, 3))
plain = numbers | st.lists(numbers, min_size=1, max_size=5)
entry = st.fixed_dictionaries({"value": plain}, optional={"filter": st.sampled_from(FILTERS)})
any_setting = plain | entry | st.lists(entry, min_size=1, max_size=4)
any_level = st.fixed_dictionaries({}, optional={"w": any_setting, "other": numbers})


def slowly(levels, tensor, layer, n_layers, default):
    """The value by the rules as the documents say them: exact, one step after the other."""
    for here in levels:
        if "w" not in here:
            continue
        entries = here["w"]
        if not isinstance(entries, list) or not isinstance(entries[0], dict):
            entries = [entries if isinstance(entries, dict) else {"value": entries}]
        for candidate in entries:
            pattern = candidate.get("filter", "*")
            if pattern is not None and pattern != "*" and pattern not in tensor:
                continue
            value = candidate["value"]
            if not isinstance(value, list):
                return Fraction(value)
            # Anchors stand at equal distances from the first layer to the last.
            where = Fraction(layer, n_layers - 1) if n_layers > 1 else Fraction(1)
            for i in range(len(value) - 1):
                left, right = Fraction(i, len(value) - 1), Fraction(i + 1, len(value) - 1)
                if left <= where <= right:
                    share = (where - left) / (right - left)
                    return Fraction(value[i]) * (1 - share) + Fraction(value[i + 1]) * share
            return Fraction(value[0])
    return Fraction(default)


@settings(max_examples=400, deadline=None)
@given(
    levels=st.lists(any_level, max_size=4),
    tensor=st.sampled_from([MLP, ATTENTION, NORM, "lm_head.weight"]),
    layer=st.integers(0, 11),
    n_layers=st.integers(1, 12),
)
def test_any_setting_at_any_levels_has_the_value_that_the_rules_say(levels, tensor, layer, n_layers):
    layer = min(layer, n_layers - 1)
    t = layer / (n_layers - 1) if n_layers > 1 else 1.0
    expected = float(slowly(levels, tensor, layer, n_layers, NUMBER.default))
    assert look_up("w", NUMBER, levels, tensor, t) == pytest.approx(expected, abs=1e-9)


@given(
    settings_=st.lists(any_setting, min_size=1, max_size=3),
    tensor=st.sampled_from([MLP, NORM]),
    layer=st.integers(0, 5),
)
def test_a_recipes_levels_are_read_from_the_source_down(settings_, tensor, layer):
    """The same setting, moved from level to level of a whole recipe, gives what look_up gives."""
    places = [{"scale": setting} for setting in settings_] + [{}] * 3
    source, part, module, top = [*places[:3], {"scale": 5}]
    ranged = {"model": "m", "layer_range": [0, 6], "parameters": source}
    body = {"slices": [{"sources": [ranged], "parameters": part}], "parameters": module}
    recipe = Recipe.parse({"merge_method": "passthrough", "modules": {"m": body}, "parameters": top})
    (found,) = recipe.parts()
    levels = (*found.sources[0].levels, *found.levels)
    value = look_up("scale", Parameter(default=1.0), levels, tensor, layer / 5)
    expected = slowly(
        [{"w": level["scale"]} for level in (source, part, module, top) if level], tensor, layer, 6, 1
    )
    assert value == pytest.approx(float(expected), abs=1e-9)


@pytest.mark.parametrize(
    ("setting", "t", "expected"), [(10, 0, 10), (10.0, 0, 10), ([1, 4], 0.5, 2), ([1, 4], 1, 4)], ids=str
)
def test_whole_numbers_come_out_as_whole_numbers(setting, t, expected):
    value = look_up("max_iter", Parameter("integer", 3), ({"max_iter": setting},), MLP, t)
    assert value == expected
    assert type(value) is int
