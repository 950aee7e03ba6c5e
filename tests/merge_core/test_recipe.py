"""Recipes: what is accepted, and a readable line for everything that is not."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from merge_core.errors import CheckpointError, RecipeError, nearest
from merge_core.methods import METHODS
from merge_core.recipe import Recipe, load_yaml

TIES: dict[str, Any] = {
    "merge_method": "ties",
    "base_model": "org/base",
    "models": [
        {"model": "org/x", "parameters": {"weight": 0.5, "density": 0.3}},
        {"model": "org/y@main", "parameters": {"weight": [0.1, {}], "density": 1}},
    ],
    "parameters": {"normalize": True, "lambda": 1.1},
    "dtype": "bfloat16",
}
TIES["models"][1]["parameters"]["weight"] = [{"filter": "mlp", "value": [0.1, 0.9]}, {"value": 0.4}]
LINEAR: dict[str, Any] = {
    "merge_method": "linear",
    "models": [{"model": "a", "parameters": {"weight": 1}}, {"model": "b", "parameters": {"weight": 2}}],
}
SLERP: dict[str, Any] = {
    "merge_method": "slerp",
    "base_model": "a",
    "models": [{"model": "a"}, {"model": "b"}],
    "parameters": {"t": [0, 0.5, 1]},
}
PASSTHROUGH: dict[str, Any] = {
    "merge_method": "passthrough",
    "slices": [
        {"sources": [{"model": "a", "layer_range": [0, 3]}]},
        {"sources": [{"model": "b", "layer_range": [1, 4], "parameters": {"scale": 0.5}}]},
    ],
    "dtype": "float16",
    "out_dtype": "float32",
    "random_seed": 7,
}
MODULES: dict[str, Any] = {
    "merge_method": "linear",
    "modules": {
        "default": {"models": LINEAR["models"], "parameters": {"normalize": False}},
    },
}
KARCHER: dict[str, Any] = {"merge_method": "karcher", "models": [{"model": "a"}, {"model": "b"}]}
MIXED: dict[str, Any] = {
    "merge_method": "ties",
    "base_model": "b",
    "models": [{"model": "x", "parameters": {"weight": 0.5}}, {"model": "y"}],
    "slices": [
        {
            "sources": [{"model": m, "layer_range": [0, 2]} for m in "xy"],
            "parameters": {"weight": [0.1, 0.2]},
        },
        {
            "sources": [{"model": m, "layer_range": [2, 3]} for m in "xy"],
            "merge_method": "slerp",
            "base_model": "y",
            "parameters": {"t": 0.5},
        },
    ],
}


def della(**own: float) -> dict[str, Any]:
    entry = {"model": "x", "parameters": {"weight": 1, **own}}
    return {"merge_method": "della", "base_model": "b", "models": [entry]}


GOOD = {"ties": TIES, "linear": LINEAR, "slerp": SLERP, "passthrough": PASSTHROUGH}
GOOD |= {"modules": MODULES, "mixed": MIXED, "karcher": KARCHER, "della": della(density=0.5)}


def changed(config, path, value=...):
    """Copy a config with one place set, or removed."""
    config = copy.deepcopy(config)
    at = config
    for key in path[:-1]:
        at = at[key]
    if value is ...:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return config


def faults_of(config, strict=True):
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(config, strict)
    return caught.value.faults


# ---- what is accepted ---------------------------------------------------------------------------


@pytest.mark.parametrize("config", GOOD.values(), ids=GOOD)
def test_parse_of_as_config_is_the_same_recipe(config):
    recipe = Recipe.parse(config)
    assert Recipe.parse(recipe.as_config()) == recipe
    assert Recipe.parse(yaml.safe_load(recipe.to_yaml())) == recipe


@pytest.mark.parametrize("config", GOOD.values(), ids=GOOD)
def test_the_yaml_text_read_from_a_file_is_the_same_recipe(tmp_path, config):
    recipe = Recipe.parse(config)
    (tmp_path / "r.yml").write_text(recipe.to_yaml())
    assert Recipe.load(tmp_path / "r.yml") == recipe


# Any letters, no control characters: PyYAML itself loses some of those.
letters = st.characters(exclude_categories=["C", "Z"])
names = st.text(letters, min_size=1, max_size=12).filter(
    lambda name: not re.fullmatch(r"[\d.+-]+[eE][\d+-]+", name)  # see the next test
)
numbers = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**6), 10**6)
gradients = st.lists(numbers, min_size=1, max_size=4)
filtered = st.lists(
    st.fixed_dictionaries({"value": numbers | gradients}, optional={"filter": names}),
    min_size=1,
    max_size=3,
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(weights=st.lists(numbers | gradients | filtered, min_size=1, max_size=3), name=names)
def test_any_recipe_survives_yaml(tmp_path_factory, weights, name):
    models = [{"model": name, "parameters": {"weight": weight}} for weight in weights]
    recipe = Recipe.parse({"merge_method": "linear", "models": models})
    path = tmp_path_factory.getbasetemp() / "survives.yml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert Recipe.load(path) == recipe


settings_of = st.dictionaries(st.sampled_from(["weight", "normalize"]), numbers, max_size=1).map(
    lambda given: {k: (bool(v) if k == "normalize" else v) for k, v in given.items()}
)
own = st.fixed_dictionaries({}, optional={"weight": numbers | gradients | filtered})
entries = st.lists(
    st.fixed_dictionaries({"model": names}, optional={"parameters": own}), min_size=1, max_size=3
)


@st.composite
def bodies(draw):
    """What may be merged: models, slices with a method of their own or not, or both."""
    body = {"models": draw(entries)} if draw(st.booleans()) else {}
    if not body or draw(st.booleans()):
        body["slices"] = [
            {
                "sources": [{**source, "layer_range": [start, start + 2]} for source in sources],
                **draw(st.sampled_from([{}, {"merge_method": "linear"}, {"base_model": "b"}])),
                "parameters": draw(settings_of),
            }
            for start, sources in enumerate(draw(st.lists(entries, min_size=1, max_size=3)))
        ]
    return {**body, "parameters": draw(settings_of)}


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(body=bodies(), in_module=st.booleans(), dtype=st.sampled_from([None, "float16"]))
def test_a_recipe_of_any_form_survives_and_keeps_its_one_form(body, in_module, dtype):
    config = {"modules": {"default": body}} if in_module else body
    recipe = Recipe.parse({"merge_method": "linear", "dtype": dtype, **config})
    again = Recipe.parse(yaml.safe_load(recipe.to_yaml()) if dtype else recipe.as_config())
    assert again == recipe
    assert again.parts() == recipe.parts()
    parts = recipe.parts()
    assert [source.model for part in parts for source in part.sources] == [
        source["model"]
        for part in body.get("slices", [{"sources": body.get("models")}])
        for source in part["sources"]
    ]
    for part in parts:
        assert part.levels[-1] == recipe.parameters
        assert part.levels[-2 if in_module else -1] == body["parameters"]


@pytest.mark.parametrize(
    "name", ["1e5", "0E0", "7", "1.5", "true", "null", "2026-01-01", "~", "a: b", "#x"]
)
def test_a_model_whose_name_looks_like_a_value_survives_yaml(tmp_path, name):
    recipe = Recipe.parse(changed(LINEAR, ["models", 0, "model"], name))
    (tmp_path / "r.yml").write_text(recipe.to_yaml())
    assert Recipe.load(tmp_path / "r.yml") == recipe


@pytest.mark.parametrize("written", ["bfloat16", "torch.bfloat16"])
@pytest.mark.parametrize("key", ["dtype", "out_dtype"])
def test_a_torch_prefix_is_taken_off(key, written):
    recipe = Recipe.parse({**LINEAR, key: written})
    assert getattr(recipe, key) == "bfloat16"


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-5", 1e-5), ("-2E3", -2000.0), ("1.5e+2", 150.0), ("3.e1", 30.0), (".5", 0.5), ("7", 7)],
)
def test_numbers_are_read_as_people_write_them(tmp_path, text, value):
    (tmp_path / "n.yml").write_text(f"w: {text}\n")
    loaded = load_yaml(tmp_path / "n.yml")["w"]
    assert loaded == value
    assert not isinstance(loaded, str)


@pytest.mark.parametrize("text", ["'1e-5'", "1e-5x", "e5", "main"])
def test_text_stays_text(tmp_path, text):
    (tmp_path / "n.yml").write_text(f"w: {text}\n")
    assert isinstance(load_yaml(tmp_path / "n.yml")["w"], str)


def test_a_yaml_merge_key_may_be_overridden(tmp_path):
    (tmp_path / "r.yml").write_text(
        "merge_method: ties\nbase_model: b\nmodels:\n"
        "  - model: x\n    parameters: &common {weight: 1, density: 0.5}\n"
        "  - model: y\n    parameters: {<<: *common, weight: 0.3}\n"
    )
    recipe = Recipe.load(tmp_path / "r.yml")
    assert recipe.models[1].parameters == {"weight": 0.3, "density": 0.5}


def test_empty_parameters_are_none_at_all():
    config = changed(LINEAR, ["parameters"], None)
    assert Recipe.parse(config).parameters == {}


def test_references_are_listed_once_base_first():
    config = changed(TIES, ["models", 1, "model"], "org/base")
    assert Recipe.parse(config).references() == ["org/base", "org/x"]
    assert Recipe.parse(PASSTHROUGH).references() == ["a", "b"]


def test_a_recipe_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        Recipe.parse(LINEAR).merge_method = "slerp"


def test_weights_may_be_given_once_at_the_top():
    config = {**changed(TIES, ["parameters", "weight"], 0.5)}
    for i in range(2):
        config = changed(config, ["models", i, "parameters", "weight"])
    assert Recipe.parse(config).parameters["weight"] == 0.5


def test_the_base_needs_no_weight_where_it_is_listed():
    config = changed(TIES, ["models"], [*TIES["models"], {"model": "org/base"}])
    assert Recipe.parse(config).references() == ["org/base", "org/x", "org/y@main"]


def test_the_base_of_a_slice_needs_no_weight():
    base, x = {"model": "b", "layer_range": [0, 2]}, {"model": "x", "layer_range": [0, 2]}
    x["parameters"] = {"weight": 0.5}
    config = {"merge_method": "ties", "slices": [{"base_model": "b", "sources": [base, x]}]}
    assert Recipe.parse(config).references() == ["b", "x"]


# ---- one fault, one line ------------------------------------------------------------------------

RANGE = ["slices", 0, "sources", 0, "layer_range"]
FAULTS = {
    "unknown method": (
        changed(TIES, ["merge_method"], "tie"),
        r"^merge_method is 'tie', which is not a known method; did you mean 'ties'\?$",
    ),
    "a method far from all": (
        changed(TIES, ["merge_method"], "zzz"),
        r"^merge_method is 'zzz', .*; use one of: arcee_fusion, .*ties$",
    ),
    "no method": (changed(TIES, ["merge_method"]), r"^merge_method is missing; .*add it$"),
    "unknown parameter of a model": (
        changed(TIES, ["models", 0, "parameters", "densty"], 0.5),
        r"^models\[0\]\.parameters\.densty: ties has no parameter 'densty'; did you mean 'density'\?$",
    ),
    "unknown parameter at the top": (
        changed(TIES, ["parameters", "lamda"], 0.5),
        r"^parameters\.lamda: ties has no parameter 'lamda'; did you mean 'lambda'\?$",
    ),
    "another method's parameter": (
        changed(LINEAR, ["models", 1, "parameters", "density"], 0.5),
        r"^models\[1\]\.parameters\.density: linear has no parameter 'density'; use one of: ",
    ),
    "a shared parameter at a model": (
        changed(TIES, ["models", 0, "parameters", "normalize"], True),
        r"^models\[0\]\.parameters\.normalize: .*whole merge.*move it to the top-level parameters$",
    ),
    "density above 1": (
        changed(TIES, ["models", 0, "parameters", "density"], 1.5),
        r"^models\[0\]\.parameters\.density is 1\.5; it must lie in \[0, 1\]$",
    ),
    "density below 0 in a gradient under a filter": (
        changed(TIES, ["models", 0, "parameters", "density"], [{"filter": "mlp", "value": [0.1, -0.2]}]),
        r"^models\[0\]\.parameters\.density\[0\]\.value\[1\] is -0\.2; it must lie in \[0, 1\]$",
    ),
    "a weight that is text": (
        changed(LINEAR, ["models", 0, "parameters", "weight"], "much"),
        r"^models\[0\]\.parameters\.weight is 'much'; it must be a finite number$",
    ),
    "a weight that is not finite": (
        changed(LINEAR, ["models", 0, "parameters", "weight"], math.nan),
        r"^models\[0\]\.parameters\.weight is nan; it must be a finite number$",
    ),
    "a weight that is nothing": (
        changed(LINEAR, ["models", 0, "parameters", "weight"], None),
        r"^models\[0\]\.parameters\.weight is None; it must be a finite number$",
    ),
    "a weight that is true": (
        changed(LINEAR, ["models", 0, "parameters", "weight"], True),
        r"^models\[0\]\.parameters\.weight is True; it must be a finite number$",
    ),
    "an empty gradient": (
        changed(LINEAR, ["models", 0, "parameters", "weight"], []),
        r"^models\[0\]\.parameters\.weight is an empty list; give at least one value$",
    ),
    "a filter without a value": (
        changed(LINEAR, ["models", 0, "parameters", "weight"], [{"filter": "mlp"}]),
        r"^models\[0\]\.parameters\.weight\[0\] is \{'filter': 'mlp'\}; .*\{filter: NAME, value: ",
    ),
    "numbers among filters": (
        changed(LINEAR, ["models", 0, "parameters", "weight"], [0.5, {"value": 1}]),
        r"^models\[0\]\.parameters\.weight\[0\] is 0\.5; ",
    ),
    "normalize as text": (
        changed(TIES, ["parameters", "normalize"], "yes"),
        r"^parameters\.normalize is 'yes'; it must be true or false$",
    ),
    "slerp with three models": (
        changed(SLERP, ["models"], [{"model": m} for m in "abc"]),
        r"^models lists 2 models besides the base; slerp takes 1: remove some or use another method$",
    ),
    "slerp with the base alone": (
        changed(SLERP, ["models"], [{"model": "a"}]),
        r"^models lists 0 models besides the base; slerp takes 1: add some$",
    ),
    "passthrough of two models": (
        {"merge_method": "passthrough", "models": [{"model": "a"}, {"model": "b"}]},
        r"^models lists 2 models in all; passthrough takes 1: remove some",
    ),
    "slerp without t": (changed(SLERP, ["parameters"]), r"^parameters\.t is missing; .*add t: 0\.5$"),
    "no base": (
        changed(TIES, ["base_model"]),
        r"^base_model is missing; ties merges differences from a base, add base_model$",
    ),
    "no weight": (
        changed(TIES, ["models", 1, "parameters", "weight"]),
        r"^models\[1\]\.parameters\.weight is missing; ties needs it, add weight: 1\.0$",
    ),
    "modules and slices": (
        {**PASSTHROUGH, "modules": {"default": {"models": [{"model": "a"}]}}},
        r"has `modules:`, or `models:` and `slices:`, not both; remove one$",
    ),
    "neither models nor slices": (
        changed(TIES, ["models"]),
        r"needs `models:` or `slices:`; add one$",
    ),
    "no models": (changed(TIES, ["models"], []), r"needs `models:` or `slices:`; add one$"),
    "unknown key": (
        {**TIES, "base_modle": "a"},
        r"^base_modle: unknown key 'base_modle'; did you mean 'base_model'\?$",
    ),
    "unknown key of a model": (
        changed(TIES, ["models", 0, "parameter"], {}),
        r"^models\[0\]\.parameter: unknown key 'parameter'; did you mean 'parameters'\?$",
    ),
    "unknown key of a source": (
        changed(PASSTHROUGH, ["slices", 0, "sources", 0, "layer_rang"], [0, 1]),
        r"^slices\[0\]\.sources\[0\]\.layer_rang: unknown key .* did you mean 'layer_range'\?$",
    ),
    "a model without name": (
        changed(TIES, ["models", 0, "model"]),
        r"^models\[0\]\.model is missing; it is required, add it$",
    ),
    "a model that is a number": (changed(TIES, ["models", 0, "model"], 7), r"^models\[0\]\.model is 7; "),
    "models that are text": (changed(TIES, ["models"], "a"), r"^models is 'a'; "),
    "unknown dtype": (changed(TIES, ["dtype"], "int4"), r"^dtype is 'int4'; .*bfloat16"),
    "a seed that is text": ({**TIES, "random_seed": "x"}, r"^random_seed is 'x'; "),
    "no layer range": (
        changed(PASSTHROUGH, RANGE),
        r"^slices\[0\]\.sources\[0\]\.layer_range is missing",
    ),
    "a backward layer range": (
        changed(PASSTHROUGH, RANGE, [3, 1]),
        r"^slices\[0\]\.sources\[0\]\.layer_range is \[3, 1\]; .*0 <= start < end$",
    ),
    "an empty layer range": (changed(PASSTHROUGH, RANGE, [2, 2]), r"layer_range is \[2, 2\]; "),
    "a negative layer range": (changed(PASSTHROUGH, RANGE, [-1, 2]), r"layer_range is \[-1, 2\]; "),
    "a layer range of three": (
        changed(PASSTHROUGH, RANGE, [0, 1, 2]),
        r"^slices\[0\]\.sources\[0\]\.layer_",
    ),
    "layer ranges of different lengths": (
        {
            **LINEAR,
            "models": None,
            "slices": [
                {
                    "sources": [
                        {"model": "a", "layer_range": [0, 2], "parameters": {"weight": 1}},
                        {"model": "b", "layer_range": [0, 3], "parameters": {"weight": 1}},
                    ]
                }
            ],
        },
        r"^slices\[0\]\.sources have layer ranges of lengths \[2, 3\]; .*equally long$",
    ),
    "an unknown key of a module": (
        {**MODULES, "modules": {"default": {"model": [], "models": LINEAR["models"]}}},
        r"^modules\.default\.model: unknown key 'model'; did you mean 'models'\?$",
    ),
    "an unknown key of a module's slice": (
        {
            **MODULES,
            "modules": {"default": {"slices": [{"source": [], **PASSTHROUGH["slices"][0]}]}},
        },
        r"^modules\.default\.slices\[0\]\.source: unknown key 'source'; did you mean 'sources'\?$",
    ),
    "two modules": (
        {**MODULES, "modules": {name: MODULES["modules"]["default"] for name in ("text", "vision")}},
        r"modules names 2 modules \(text, vision\); .*keep one under the name default$",
    ),
    "no module": ({**MODULES, "modules": {}}, r"modules names 0 modules"),
    "a module without models": (
        {**MODULES, "modules": {"default": {}}},
        r"a module needs `models:` or `slices:`; add one$",
    ),
    "no method in a slice": (
        changed(PASSTHROUGH, ["merge_method"]),
        r"^merge_method is missing; .*add it$",
    ),
    "an unknown method in a slice": (
        changed(PASSTHROUGH, ["slices", 1, "merge_method"], "slrp"),
        r"^slices\[1\]\.merge_method is 'slrp', .*; did you mean 'slerp'\?$",
    ),
    "a slice without the base of its method": (
        changed(
            changed(PASSTHROUGH, ["slices", 1, "merge_method"], "ties"),
            ["slices", 1, "sources", 0, "parameters"],
            {"weight": 1},
        ),
        r"^slices\[1\]\.base_model is missing; ties merges differences from a base, add base_model$",
    ),
    "another slice's parameter": (
        changed(
            changed(PASSTHROUGH, ["slices", 1, "merge_method"], "linear"),
            ["slices", 0, "parameters"],
            {"normalize": True},
        ),
        r"^slices\[0\]\.parameters\.normalize: passthrough has no parameter 'normalize'; ",
        2,  # and the scale that linear does not have
    ),
    "nuslerp of one": (
        {**changed(LINEAR, ["models", 1]), "merge_method": "nuslerp"},
        r"^models lists 1 models in all; nuslerp takes 2: add some$",
    ),
    "nuslerp of its base": (
        {**LINEAR, "merge_method": "nuslerp", "base_model": "a"},
        r"^models lists 1 models besides the base; nuslerp takes 2: add some$",
    ),
    "model_stock of two": (
        {
            "merge_method": "model_stock",
            "base_model": "a",
            "models": [{"model": "a"}, {"model": "b"}],
        },
        r"^models lists 1 models besides the base; model_stock takes at least 2: add some$",
    ),
    "slerp of three without a base": (
        changed(changed(SLERP, ["models"], [{"model": m} for m in "abc"]), ["base_model"]),
        r"^base_model is missing; ",
        2,
    ),
    "half a step": (
        {**KARCHER, "parameters": {"max_iter": 2.5}},
        r"^parameters\.max_iter is 2\.5; it must be a whole number$",
    ),
    "no step": (
        {**KARCHER, "parameters": {"max_iter": 0}},
        r"^parameters\.max_iter is 0; it must be at least 1$",
    ),
    "a negative tolerance": (
        {**KARCHER, "parameters": {"tol": -1}},
        r"^parameters\.tol is -1; it must be at least 0$",
    ),
    "epsilon of zero": (della(epsilon=0), r"epsilon is 0; it must be above 0$"),
    "a band below zero": (
        della(density=0.1),
        r"^models\[0\]\.parameters: density is 0\.1 and epsilon 0\.15; .*choose a smaller epsilon$",
    ),
    "a band above one": (della(density=0.8, epsilon=0.2), r"density \+ epsilon below 1"),
    "gamma above one": (
        {**della(gamma=1.5), "merge_method": "breadcrumbs"},
        r"gamma is 1\.5; it must lie in \[0, 1\]$",
    ),
    "filters in filters": (
        changed(LINEAR, ["models", 0, "parameters", "weight"], [{"value": {"value": 1}}]),
        r"weight\[0\]\.value is .*; filters do not nest",
    ),
    "a filter that is a number": (
        changed(LINEAR, ["models", 0, "parameters", "weight"], [{"filter": 3, "value": 1}]),
        r"weight\[0\]\.filter is 3; it must be a part of a tensor's name$",
    ),
    "a number beyond all": (
        changed(LINEAR, ["models", 0, "parameters", "weight"], 10**400),
        r"^models\[0\]\.parameters\.weight is 1000.*; it must be a finite number$",
    ),
    "text that is not finite": (
        changed(LINEAR, ["models", 0, "parameters", "weight"], "inf"),
        r"^models\[0\]\.parameters\.weight is 'inf'; it must be a finite number$",
    ),
    "a reference with another architecture": (
        changed(LINEAR, ["models", 0, "model"], {"model": "a", "override_architecture": "B"}),
        r"^models\[0\]\.model is .*a model is named by text, or by \{model: ",
    ),
    "a reference without a path": (
        changed(LINEAR, ["models", 0, "model"], {"model": {"revision": "b"}}),
        r"^models\[0\]\.model is .* is not \{path: \.\.\., revision: \.\.\.\}; write it so$",
    ),
    "a reference with two revisions": (
        {**TIES, "base_model": {"model": {"path": "a@b", "revision": "c"}}},
        r"^base_model is .*path 'a@b' has an '@' beside a revision; name a path without '@'$",
    ),
    "a recipe that is a list": ([TIES], r"^recipe is \[.*; it must be a mapping with `merge_method:`$"),
    "a recipe that is nothing": (None, r"^recipe is None; it must be a mapping"),
}


@pytest.mark.parametrize("case", FAULTS.values(), ids=FAULTS)
def test_a_fault_is_one_line_that_names_field_value_and_rule(case):
    config, expected, n_faults = (*case, 1)[:3]
    faults = faults_of(config)
    assert len(faults) == n_faults, faults
    assert not any("\n" in fault for fault in faults)
    assert re.search(expected, faults[0]), faults[0]


def test_all_faults_are_reported_at_once():
    config = changed(TIES, ["models", 0, "parameters", "density"], 1.5)
    config = changed(config, ["parameters", "lambda"], "big")
    config = changed(config, ["models", 1, "parameters", "wieght"], 1)
    config = changed(config, ["base_model"])
    text = "\n".join(faults_of(config))
    assert text.count("\n") == 3
    for field in ("base_model", "models[0].parameters.density", "parameters.lambda", "wieght"):
        assert field in text


@pytest.mark.parametrize("method", METHODS)
def test_every_method_name_with_a_slip_leads_back_to_it(method):
    slip = method[:1] + method[2:]
    assert nearest(slip, METHODS) == f"did you mean {method!r}?"


def test_a_fault_quotes_no_more_than_a_glance_of_a_long_value():
    (fault,) = faults_of(changed(LINEAR, ["models", 0, "parameters", "weight"], [[0.5] * 5000]))
    assert len(fault) < 300


# ---- strict or not ------------------------------------------------------------------------------


def test_without_strict_unknown_parameters_are_warnings():
    config = changed(TIES, ["models", 0, "parameters", "densty"], 0.5)
    config = changed(config, ["parameters", "lamda"], 2.0)
    recipe = Recipe.parse(config, strict=False)
    faults, warnings = recipe.check()
    assert faults == []
    assert len(warnings) == 2
    assert "did you mean 'lambda'?" in warnings[0]
    assert "did you mean 'density'?" in warnings[1]


def test_without_strict_faults_stay_faults():
    config = changed(TIES, ["models", 0, "parameters", "densty"], 0.5)
    config = changed(config, ["models", 0, "parameters", "density"], 1.5)
    (fault,) = faults_of(config, strict=False)
    assert fault.startswith("models[0].parameters.density is 1.5")


def warnings_of(config):
    """The warnings of a recipe that strictness lets pass."""
    faults, warnings = Recipe.parse(config).check()
    assert faults == []
    return warnings


def test_a_shared_parameter_at_a_model_is_read_by_nobody():
    config = changed(TIES, ["models", 0, "parameters", "normalize"], True)
    (warning,) = Recipe.parse(config, strict=False).check()[1]
    assert "move it to the top-level parameters" in warning


def test_residual_weight_has_no_effect():
    (warning,) = warnings_of(changed(PASSTHROUGH, ["slices", 1, "residual_weight"], 0.3))
    assert warning.startswith("slices[1].residual_weight has no effect")


@pytest.mark.parametrize(
    ("own", "n_warnings"),
    [({}, 0), ({"weight": 0.3}, 0), ({"density": 1.0}, 0), ({"weight": 1, "density": 0.5}, 1)],
    ids=str,
)
def test_what_a_listed_base_is_given_is_warned_about_where_it_was_meant_to_do_something(own, n_warnings):
    config = changed(TIES, ["models"], [*TIES["models"], {"model": "org/base", "parameters": own}])
    warnings = warnings_of(config)
    assert len(warnings) == n_warnings
    assert all("models[2].parameters.density has no effect" in warning for warning in warnings)


def test_a_model_that_is_in_no_slice_is_warned_about_and_not_opened():
    config = changed(MIXED, ["models"], [*MIXED["models"], {"model": "z"}])
    (warning,) = warnings_of(config)
    assert warning.startswith("models[2] ('z') is in no slice")
    assert "z" not in Recipe.parse(config).references()


def test_the_base_among_models_beside_slices_is_no_stray():
    assert warnings_of(changed(MIXED, ["models"], [*MIXED["models"], {"model": "b"}])) == []


# ---- other ways to write the same ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "value"),
    [("1e-5", 1e-5), ("3", 3), ("-0.5", -0.5), (["1", 2, "3e0"], [1, 2, 3.0])],
    ids=str,
)
def test_numbers_in_quotes_are_numbers(written, value):
    for setting, expected in (
        (written, value),
        ([{"filter": "7", "value": written}], [{"filter": "7", "value": value}]),
    ):
        config = changed(LINEAR, ["models", 0, "parameters", "weight"], setting)
        assert Recipe.parse(config).models[0].parameters["weight"] == expected


@pytest.mark.parametrize(
    ("written", "reference"),
    [
        ({"model": "a"}, "a"),
        ({"model": {"path": "a"}}, "a"),
        ({"model": {"path": "a/b", "revision": "v1"}}, "a/b@v1"),
        ({"model": {"path": "a", "revision": None}, "lora": None}, "a"),
        ({"model": {"path": "a"}, "lora": {"path": "l", "revision": "r"}}, "a+l@r"),
        ({"model": {"path": "./my@folder"}}, "./my@folder"),
    ],
    ids=str,
)
def test_references_in_mapping_form_are_spelled_as_text(written, reference):
    config = changed(LINEAR, ["models", 0, "model"], written)
    recipe = Recipe.parse({**config, "base_model": written})
    assert recipe.models[0].model == recipe.base_model == reference


def test_a_module_of_any_name_is_the_models_own():
    for name in ("default", "text_decoder"):
        recipe = Recipe.parse({**MODULES, "modules": {name: MODULES["modules"]["default"]}})
        assert recipe.references() == ["a", "b"]
        (part,) = recipe.parts()
        assert part.levels == ({"normalize": False}, {})


@pytest.mark.parametrize(
    ("density", "epsilon", "is_good"),
    [(1, 0.15, True), (0, 0.15, True), (0.5, 0.4, True), (0.9, 0.05, True), (0.95, 0.05, False)],
)
def test_della_keeps_its_probabilities_between_0_and_1(density, epsilon, is_good):
    for method in ("della", "della_linear"):
        config = {**della(density=density, epsilon=epsilon), "merge_method": method}
        if is_good:
            Recipe.parse(config)
        else:
            faults_of(config)
    # Values from different levels meet; gradients are left to the merge.
    top = {**della(density=density), "parameters": {"epsilon": epsilon}}
    assert bool(Recipe.model_validate(top).check()[0]) != is_good
    Recipe.parse(della(density=[density, 0.5], epsilon=epsilon))


def test_parameters_of_any_slices_method_may_stand_at_the_top():
    config = {**MIXED, "parameters": {"t": 0.5, "density": 0.5, "normalize": True}}
    assert warnings_of(config) == []
    (fault,) = faults_of({**MIXED, "parameters": {"scale": 1}})
    assert fault.startswith("parameters.scale: ties or slerp has no parameter 'scale'; ")


def test_a_shared_value_must_suit_every_method_that_reads_it():
    parts = [
        {
            "merge_method": method,
            "sources": [{"model": m, "layer_range": [0, 1]} for m in models],
            "parameters": {"weight": 1} if method == "della" else {},
        }
        for method, models in (("ram", "x"), ("della", "x"))
    ]
    config = {"slices": parts, "base_model": "b", "parameters": {"epsilon": 0}}
    (fault,) = faults_of(config)
    assert fault == "parameters.epsilon is 0; it must be above 0"


# ---- files --------------------------------------------------------------------------------------

LAUGHS = "a0: &a0 [x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
)
TEXTS = {
    "a key given twice": (
        "merge_method: ties\ndtype: float32\ndtype: bfloat16\n",
        r":3:1: not valid YAML: key 'dtype' appears twice; correct the syntax there$",
    ),
    "a nested key given twice": ("a:\n  b: 1\n  b: 2\n", r":3:3: .*key 'b' appears twice"),
    "a syntax error": ("merge_method: [ties\nmodels: 3\n", r":2:7: not valid YAML: "),
    "a tab": ("models:\n\t- model: a\n", r":2:1: not valid YAML: "),
    "an empty file": ("", r" is empty; it must hold a mapping with `merge_method:`$"),
    "only comments": ("# nothing\n", r" is empty; "),
    "two documents": ("a: 1\n---\nb: 2\n", "2 documents have no name"),
    "an unknown tag": ("a: !python/name:os.system x\n", r":1:4: not valid YAML: "),
    "a list as a key": ("? [a, b]\n: 1\n", r": not valid YAML: "),
    "a control character": ("a: \x07\n", r": not valid YAML: (?!nested)"),
    "a day that does not exist": ("dtype: 2026-99-99\n", r": not valid YAML: "),
    "a mapping that is none": ("a: !!map [x, y]\n", r": not valid YAML: "),
    "a number that is none": ("a: !!int x\n", r": not valid YAML: "),
    "a number as a key given twice": ("a: {1: x, 1: y}\n", r":1:11: .*key 1 appears twice"),
    "deep nesting": ("[" * 1200, r": not valid YAML: "),
    "nesting that still parses": ("[" * 60 + "]" * 60, r": not valid YAML: nested too deeply"),
    "a billion values by aliases": (LAUGHS, r"[0-9]{10} values with its aliases written out"),
    "aliases in many documents": (
        "\n---\n".join(["a: &a [" + "1," * 99 + "]\nb: [" + "*a," * 99 + "]\n"] * 20),
        r"values with its aliases written out",
    ),
    "an alias within what it names": ("a: &a [*a]\n", r": not valid YAML: "),
}


@pytest.mark.parametrize(("text", "expected"), TEXTS.values(), ids=TEXTS)
def test_a_bad_file_gives_one_line_with_its_name_and_place(tmp_path, text, expected):
    path = tmp_path / "r.yml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path)
    (fault,) = caught.value.faults
    assert fault.startswith(str(path))
    assert re.search(expected, fault), fault


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(RecipeError, match="no such file"):
        Recipe.load(tmp_path / "r.yml")
    with pytest.raises(RecipeError, match="no such file"):
        Recipe.load(tmp_path)


def test_bytes_that_are_not_utf8_are_an_error(tmp_path):
    (tmp_path / "r.yml").write_bytes(b"a: \xff\xfe\n")
    with pytest.raises(RecipeError, match="not UTF-8 text"):
        Recipe.load(tmp_path / "r.yml")


def test_a_huge_file_is_refused_unread(tmp_path):
    (tmp_path / "r.yml").write_bytes(b"#" * ((4 << 20) + 1))
    with pytest.raises(RecipeError, match="at most"):
        Recipe.load(tmp_path / "r.yml")


def test_errors_survive_pickling_with_their_faults():
    import pickle

    for kind in (RecipeError, CheckpointError):
        error = pickle.loads(pickle.dumps(kind(["a", "b"])))
        assert type(error) is kind
        assert error.faults == ["a", "b"]
