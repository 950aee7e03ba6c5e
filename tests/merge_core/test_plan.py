"""Plans: what each output tensor is made of, and what is refused before work begins."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_core.errors import CheckpointError, RecipeError
from merge_core.merge import merged_tensors
from merge_core.methods import METHODS
from merge_core.parameters import look_up
from merge_core.plan import MergePlan, Sources, merged_config, model_alone, plan_merge
from merge_core.recipe import Recipe

N_LAYERS = 4
SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (7, 4),
    **{f"model.layers.{i}.{n}.weight": (4, 4) for i in range(N_LAYERS) for n in ("attn", "mlp")},
    "model.norm.weight": (4,),
    "lm_head.weight": (7, 4),
}
CONFIG = {"model_type": "tiny", "num_hidden_layers": N_LAYERS, "vocab_size": 7}
HEAD, EMBEDDING, MLP = "lm_head.weight", "model.embed_tokens.weight", "model.layers.1.mlp.weight"


class Zoo:
    """Writes tiny checkpoints below a folder; each has numbers of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, name: str, changes: dict[str, Any] | None = None, **config: Any) -> str:
        """Write a model; `changes` maps names to shapes, tensors, or None to leave one out."""
        wanted = {n: v for n, v in {**SHAPES, **(changes or {})}.items() if v is not None}
        generator = torch.Generator().manual_seed(len(list(self.folder.iterdir())))
        tensors = {
            n: v if isinstance(v, torch.Tensor) else torch.randn(v, generator=generator)
            for n, v in wanted.items()
        }
        (self.folder / name).mkdir()
        (self.folder / name / "config.json").write_text(json.dumps({**CONFIG, **config}))
        save_file(tensors, self.folder / name / "model.safetensors")
        return str(self.folder / name)


@pytest.fixture
def zoo(tmp_path):
    return Zoo(tmp_path)


def recipe(method: str, *models: str, base: str | None = None, **keys: Any) -> Recipe:
    required = {n: p.example for n, p in METHODS[method].parameters.items() if p.required}
    config: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": model} for model in models],
        "parameters": required,
        **keys,
    }
    return Recipe.parse({**config, "base_model": base} if base else config)


def by_name(plan: MergePlan) -> dict[str, Any]:
    return {planned.name: planned for planned in plan}


def made_of(planned: Any) -> list[str]:
    """The folders' names that go into a tensor, the base first."""
    entries = [*([planned.base] if planned.base else []), *planned.inputs]
    return [Path(entry.model).name for entry in entries]


def faults_of(given: Recipe, **leniency: bool) -> list[str]:
    with pytest.raises(CheckpointError) as caught:
        plan_merge(given, Sources(), **leniency)
    assert all("\n" not in fault for fault in caught.value.faults)
    return caught.value.faults


def value(planned: Any, name: str, entry: Any = None) -> Any:
    """A parameter's value as the merge looks it up."""
    parameter = METHODS[planned.method].parameters[name]
    if entry is None:
        return look_up(name, parameter, planned.levels, planned.name, planned.t)
    return look_up(name, parameter, (*entry.levels, *planned.levels), entry.filter_name, planned.t)


# ---- the base -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gets_its_base_and_its_inputs(zoo, method):
    table = METHODS[method]
    n_models = int(table.n_models[0])
    base, *models = (zoo(name) for name in ["base", *"xyz"[:n_models]])
    plan = plan_merge(recipe(method, *models, base=base), Sources())
    assert len(plan) == len(SHAPES)
    for planned in plan:
        assert planned.method == method
        assert (planned.base is not None) == (table.base in ("required", "optional"))
        expected = ["base"] if planned.base else []
        expected += list("xyz"[:n_models])
        assert made_of(planned) == expected + (["base"] if table.base == "input" else [])


@pytest.mark.parametrize("listed", [0, 1, None], ids=["first", "last", "not at all"])
def test_the_base_is_the_base_wherever_it_is_listed(zoo, listed):
    base, x = zoo("base"), zoo("x")
    models = [x] if listed is None else [x, base] if listed else [base, x]
    for planned in plan_merge(recipe("ties", *models, base=base), Sources()):
        assert planned.base.model == base
        assert [entry.model for entry in planned.inputs] == [x]


def test_without_a_base_the_optional_one_is_absent_and_slerps_is_the_first(zoo):
    x, y = zoo("x"), zoo("y")
    assert all(p.base is None for p in plan_merge(recipe("nuslerp", x, y), Sources()))
    for planned in plan_merge(recipe("slerp", x, y), Sources()):
        assert planned.base.model == x
        assert [entry.model for entry in planned.inputs] == [y]


def test_a_base_that_no_slice_lists_is_added_with_the_slices_layers(zoo):
    base, x = zoo("base"), zoo("x")
    parts = [{"sources": [{"model": x, "layer_range": r}]} for r in ([2, 4], [0, 2])]
    given = recipe("ties", base=base, models=None, slices=parts)
    planned = by_name(plan_merge(given, Sources()))["model.layers.0.mlp.weight"]
    assert planned.base.name == planned.inputs[0].name == "model.layers.2.mlp.weight"
    assert planned.base.model == base


def test_the_same_model_twice_has_two_occurrences(zoo):
    base, x = zoo("base"), zoo("x")
    for planned in plan_merge(recipe("dare_ties", x, x, base=base), Sources()):
        assert [entry.occurrence for entry in planned.inputs] == [0, 1]


# ---- levels -------------------------------------------------------------------------------------


def weights(given: dict[str, Any], name: str = MLP) -> list[Any]:
    planned = by_name(plan_merge(Recipe.parse(given), Sources()))[name]
    return [value(planned, "weight", entry) for entry in planned.inputs]


def test_source_stands_above_slice_above_module_above_top_above_default(zoo):
    x = zoo("x")

    def config(*given: bool) -> dict[str, Any]:
        source, model, part, module, top = (
            {"weight": 0.1 * (i + 1)} if flag else {} for i, flag in enumerate(given)
        )
        body = {
            "models": [{"model": x, "parameters": model}],
            "slices": [
                {
                    "sources": [{"model": x, "layer_range": [0, 4], "parameters": source}],
                    "parameters": part,
                }
            ],
            "parameters": module,
        }
        return {"merge_method": "linear", "modules": {"default": body}, "parameters": top}

    for n_absent in range(6):
        flags = [i >= n_absent for i in range(5)]
        expected = 1.0 if n_absent == 5 else 0.1 * (n_absent + 1)
        assert weights(config(*flags)) == [pytest.approx(expected)]


def test_a_level_whose_filter_does_not_match_is_passed_over(zoo):
    x = zoo("x")
    entry = {"model": x, "parameters": {"weight": [{"filter": "attn", "value": 0.1}]}}
    given = {"merge_method": "linear", "models": [entry], "parameters": {"weight": 0.7}}
    assert weights(given) == [0.7]
    assert weights(given, "model.layers.1.attn.weight") == [0.1]


def test_shared_parameters_do_not_see_a_models_own(zoo):
    x, y = zoo("x"), zoo("y")
    entries = [{"model": x, "parameters": {"t": 0.9}}, {"model": y}]
    given = Recipe.parse({"merge_method": "slerp", "models": entries, "parameters": {"t": 0.2}}, False)
    assert all(value(planned, "t") == 0.2 for planned in plan_merge(given, Sources()))


def test_filters_of_shared_parameters_match_output_names_and_those_of_models_input_names(zoo):
    x, y = zoo("x"), zoo("y")
    t = [{"filter": "layers.0.", "value": 0.25}, {"value": 0.5}]
    ranged = [{"model": model, "layer_range": [2, 4]} for model in (x, y)]
    given = recipe("slerp", models=None, slices=[{"sources": ranged}], parameters={"t": t})
    planned = by_name(plan_merge(given, Sources()))
    assert value(planned["model.layers.0.mlp.weight"], "t") == 0.25
    assert value(planned["model.layers.1.mlp.weight"], "t") == 0.5
    scale = [{"filter": "layers.2.", "value": 3.0}]
    source = {"model": x, "layer_range": [2, 4], "parameters": {"scale": scale}}
    given = recipe("passthrough", models=None, slices=[{"sources": [source]}])
    planned = by_name(plan_merge(given, Sources()))
    for name, expected in (("model.layers.0.mlp.weight", 3.0), ("model.layers.1.mlp.weight", 1.0)):
        assert value(planned[name], "scale", planned[name].inputs[0]) == expected


def test_gradients_begin_anew_in_every_slice_and_tensors_outside_take_the_first_value(zoo):
    x = zoo("x")
    parts = [{"sources": [{"model": x, "layer_range": r}]} for r in ([0, 3], [3, 4], [1, 4])]
    given = recipe("passthrough", models=None, slices=parts, parameters={"scale": [0, 1]})
    plan = plan_merge(given, Sources())
    found = {p.name: value(p, "scale", p.inputs[0]) for p in plan}
    layers = [found[f"model.layers.{i}.mlp.weight"] for i in range(7)]
    assert layers == [0.0, 0.5, 1.0, 1.0, 0.0, 0.5, 1.0]  # a slice of one layer sits at its end
    assert [found[name] for name in (EMBEDDING, "model.norm.weight", HEAD)] == [0.0] * 3


def test_each_slice_has_its_own_method_base_and_parameters(zoo):
    base, x, y = zoo("base"), zoo("x"), zoo("y")

    def ranged(*models: str, layers: list[int]) -> list[dict[str, Any]]:
        return [{"model": model, "layer_range": layers} for model in models]

    config = {
        "slices": [
            {"sources": ranged(x, layers=[0, 1]), "merge_method": "passthrough"},
            {"sources": ranged(x, y, layers=[1, 2]), "merge_method": "slerp", "base_model": y},
            {"sources": ranged(x, y, layers=[2, 4]), "parameters": {"density": 0.5}},
        ],
        "merge_method": "ties",
        "base_model": base,
        "parameters": {"t": 0.3, "weight": 0.4, "scale": 2.0},
    }
    given = Recipe.parse(config)
    assert given.check() == ([], [])
    assert given.methods() == ["passthrough", "slerp", "ties"]
    plan = by_name(plan_merge(given, Sources()))
    assert plan[EMBEDDING].method == "passthrough"
    assert plan[HEAD].method == "ties"
    layers = [plan[f"model.layers.{i}.mlp.weight"] for i in range(4)]
    assert [p.method for p in layers] == ["passthrough", "slerp", "ties", "ties"]
    assert [made_of(p) for p in layers] == [["x"], ["y", "x"], *[["base", "x", "y"]] * 2]
    assert value(layers[2], "density", layers[2].inputs[0]) == 0.5
    assert given.references() == [base, x, y]


# ---- what is remembered -------------------------------------------------------------------------


def test_recipes_of_one_structure_share_wires_but_not_numbers(zoo):
    base, x, y = zoo("base"), zoo("x"), zoo("y")
    sources = Sources()
    for weight, dtype in ((0.1, None), (0.9, "bfloat16")):
        given = recipe("ties", x, y, base=base, parameters={"weight": weight}, dtype=dtype)
        warm, fresh = plan_merge(given, sources), plan_merge(given, Sources())
        assert warm == fresh
        assert value(warm[0], "weight", warm[0].inputs[0]) == weight
        assert warm[0].dtype == (dtype or "float32")
    other = recipe("linear", x, y, base=base)
    assert plan_merge(other, sources) == plan_merge(other, Sources())
    assert plan_merge(recipe("ties", x, base=base), sources)[0].inputs != warm[0].inputs


def test_leniency_is_part_of_the_structure(zoo):
    x, odd = zoo("x"), zoo("odd", {MLP: None})
    sources = Sources()
    assert len(plan_merge(recipe("linear", x, odd), sources, allow_crimes=True)) == len(SHAPES)
    with pytest.raises(CheckpointError):
        plan_merge(recipe("linear", x, odd), sources)


def test_a_candidates_plan_takes_a_few_milliseconds(zoo):
    # 272 tensors of three models, as many as a SmolLM of 135M has.
    layers = {f"model.layers.{i}.{n}.weight": (2,) for i in range(30) for n in "abcdefghi"}
    unwanted = dict.fromkeys(n for n in SHAPES if ".layers." in n or n == HEAD)
    base, x, y = (zoo(n, unwanted | layers, num_hidden_layers=30) for n in ("base", "x", "y"))
    sources = Sources()
    seconds = []
    for i in range(6):
        given = recipe("ties", x, y, base=base, parameters={"weight": 0.1 * i})
        start = time.perf_counter()
        assert len(plan_merge(given, sources)) == 272
        seconds.append(time.perf_counter() - start)
    assert min(seconds[1:]) < 0.01


# ---- what does not fit --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs", "is_refused"),
    [
        ({}, {}, False),
        ({}, {"model_type": "other"}, True),
        ({"architectures": ["A"]}, {"architectures": ["B"]}, True),
        ({"architectures": ["A"]}, {}, False),
        ({"model_type": None}, {"model_type": "other"}, False),
    ],
    ids=str,
)
def test_models_of_different_architectures_need_allow_crimes(zoo, ours, theirs, is_refused):
    given = recipe("linear", zoo("x", **ours), zoo("y", **theirs))
    if is_refused:
        (fault,) = faults_of(given)
        assert "insist with allow_crimes" in fault
    assert len(plan_merge(given, Sources(), allow_crimes=True)) == len(SHAPES)


BIAS = {f"model.layers.{i}.attn.bias": (4,) for i in range(N_LAYERS)}


def test_a_tensor_that_some_models_lack_is_refused_with_names_and_a_count(zoo):
    x, y = zoo("x"), zoo("y", BIAS | {"model.extra": (3,), "model.more": (3,)})
    for models in ((x, y), (y, x)):
        (fault,) = faults_of(recipe("linear", *models))
        assert fault.startswith(f"model {x!r} does not fit {y!r}: ")
        assert f"model.layers.0.attn.bias is missing in {x}" in fault
        assert "and 1 more; " in fault
        assert "allow_crimes" in fault


@pytest.mark.parametrize("n_models", [1, 2, 3])
def test_the_donors_tensors_come_out_each_from_the_models_that_have_it(zoo, n_models):
    base = zoo("base", BIAS)
    odd = zoo("odd", {MLP: None, "model.extra": (3,)})
    models = [odd, *(zoo(name, BIAS) for name in "xy"[: n_models - 1])]
    given = recipe("ties", *models, base=base)
    plan = plan_merge(given, Sources(), allow_crimes=True)
    tensors = by_name(plan)
    assert tensors.keys() == (SHAPES | BIAS).keys()
    (warning,) = plan.warnings
    assert "model.extra" in warning
    others = list("xy"[: n_models - 1])
    for name in (MLP, "model.layers.2.attn.bias"):
        planned = tensors[name]
        # Only the base has it: the base's own. Else the method as usual.
        assert made_of(planned) == ["base", *others]
        assert planned.method == ("ties" if others else "passthrough")
    assert made_of(tensors[HEAD]) == ["base", "odd", *others]


def test_a_lone_tensor_of_a_method_of_two_is_passed_through_untouched(zoo):
    x, y = zoo("x", BIAS), zoo("y")
    parameters = {"t": 0.5, "scale": 3.0}
    given = Recipe.parse(
        {
            "merge_method": "slerp",
            "models": [{"model": x}, {"model": y}],
            "parameters": parameters,
        },
        strict=False,
    )
    name = "model.layers.2.attn.bias"
    sources = Sources()
    planned = by_name(plan_merge(given, sources, allow_crimes=True))[name]
    assert (planned.method, planned.base, made_of(planned)) == ("passthrough", None, ["x"])
    assert value(planned, "scale", planned.inputs[0]) == 1.0, "no parameter of the recipe applies"


def test_a_donor_that_is_no_input_gives_its_own_tensors(zoo):
    base, x, y = zoo("base", {"model.extra": (3,)}), zoo("x"), zoo("y")
    given = recipe("linear", x, y, base=base)
    (fault, *_) = faults_of(given)
    assert "model.extra is missing in" in fault
    planned = by_name(plan_merge(given, Sources(), allow_crimes=True))["model.extra"]
    assert (planned.method, made_of(planned)) == ("passthrough", ["base"])


def test_different_shapes_are_refused_even_with_allow_crimes(zoo):
    given = recipe("linear", zoo("x"), zoo("y", {MLP: (5, 4)}))
    (fault,) = faults_of(given, allow_crimes=True)
    assert f"{MLP} is [5, 4] against [4, 4]" in fault


# ---- values that filters leave out --------------------------------------------------------------


def test_a_required_value_that_no_filter_gives_is_missed_before_work_begins(zoo):
    base, x, y = zoo("base"), zoo("x"), zoo("y")
    only_mlp = {"weight": [{"filter": "mlp", "value": 1}]}
    entries = [{"model": x, "parameters": only_mlp}, {"model": y, "parameters": {"weight": 1}}]
    config = {"merge_method": "ties", "base_model": base, "models": entries}
    with pytest.raises(RecipeError) as caught:
        plan_merge(Recipe.parse(config), Sources())
    assert caught.value.faults == [
        "models[0]: weight has no value for tensor model.embed_tokens.weight and 6 more; no filter "
        "matches it, add a last entry without filter"
    ]
    for rest in ({"weight": 0.5}, {"weight": [{"filter": "*", "value": 1}]}):
        assert plan_merge(Recipe.parse({**config, "parameters": rest}), Sources())
    covering = {"weight": [{"filter": part, "value": 1} for part in ("embed", "attn", "norm", "lm_h")]}
    assert plan_merge(Recipe.parse({**config, "parameters": covering}), Sources())


def test_shared_values_are_missed_by_output_names(zoo):
    t = [{"filter": "layers", "value": 0.5}]
    given = recipe("slerp", zoo("x"), zoo("y"), parameters={"t": t})
    with pytest.raises(RecipeError, match=r"^models: t has no value for tensor .* and 2 more; "):
        plan_merge(given, Sources())


# ---- tied heads ---------------------------------------------------------------------------------


@pytest.mark.parametrize("donor_is_tied", [True, False])
@pytest.mark.parametrize("method", ["linear", "ties", "slerp"])
def test_a_tied_model_lends_its_embedding_where_others_have_a_head(zoo, method, donor_is_tied):
    tied = zoo("tied", {HEAD: None}, tie_word_embeddings=True)
    untied = zoo("untied", tie_word_embeddings=False)
    first, second = (tied, untied) if donor_is_tied else (untied, tied)
    base = None if method == "linear" else first
    given = recipe(method, first, second, base=base)
    sources = Sources()
    planned = by_name(plan_merge(given, sources))[HEAD]
    entries = [*([planned.base] if planned.base else []), *planned.inputs]
    assert {entry.model: entry.name for entry in entries} == {tied: EMBEDDING, untied: HEAD}
    assert {entry.filter_name for entry in entries} == {HEAD}
    assert merged_config(given, sources)["tie_word_embeddings"] is False


def test_models_that_all_tie_stay_tied(zoo):
    x, y = (zoo(name, tie_word_embeddings=True) for name in "xy")  # a head is stored, but not read
    given, sources = recipe("linear", x, y), Sources()
    assert HEAD not in by_name(plan_merge(given, sources))
    assert merged_config(given, sources)["tie_word_embeddings"] is True


# ---- vocabularies -------------------------------------------------------------------------------


def larger(zoo: Zoo, name: str = "large", n: int = 9, **config: Any) -> str:
    bias = {"lm_head.bias": (n,)} if config.pop("bias", False) else {}
    return zoo(name, {EMBEDDING: (n, 4), HEAD: (n, 4), **bias}, vocab_size=n, **config)


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_vocabularies_are_cut_to_their_common_rows_on_demand(zoo, method):
    small, large = zoo("small", {"lm_head.bias": (7,)}), larger(zoo, bias=True)
    for first, second in ((small, large), (large, small)):
        given = recipe(method, first, second, base=first if method == "ties" else None)
        (fault,) = faults_of(given)
        assert "unsafe_truncate_embeddings" in fault
        sources = Sources()
        plan = plan_merge(given, sources, unsafe_truncate_embeddings=True)
        (warning,) = plan.warnings
        assert warning == f"the last 2 rows of the vocabulary of {large!r} are left out"
        shapes = {p.name: p.shape for p in plan}
        assert shapes == {**SHAPES, "lm_head.bias": (7,)}
        assert merged_config(given, sources)["vocab_size"] == 7


@pytest.mark.parametrize("rows", [9, 8])
def test_only_tables_with_a_row_for_each_token_are_cut(zoo, rows):
    # 8 rows with vocab_size 9: padded or damaged, and no vocabulary to cut.
    odd = zoo("odd", {EMBEDDING: (rows, 4), HEAD: (rows, 4)}, vocab_size=9)
    given = recipe("linear", zoo("x"), odd)
    if rows == 9:
        assert len(plan_merge(given, Sources(), unsafe_truncate_embeddings=True)) == len(SHAPES)
    else:
        (fault,) = faults_of(given, unsafe_truncate_embeddings=True)
        assert "[8, 4] against [7, 4]" in fault


def test_an_embedding_and_a_head_of_different_vocabularies_are_refused(zoo):
    small, large = zoo("small"), larger(zoo)
    parts = [
        {"sources": [{"model": small, "layer_range": [0, 2]}]},
        {"sources": [{"model": large, "layer_range": [2, 4]}]},
    ]
    given = recipe("passthrough", models=None, slices=parts)
    (fault,) = faults_of(given)
    assert "vocabularies of different sizes (model.embed_tokens.weight 7, lm_head.weight 9)" in fault
    sources = Sources()
    plan = plan_merge(given, sources, unsafe_truncate_embeddings=True)
    assert by_name(plan)[HEAD].shape == (7, 4)
    assert merged_config(given, sources)["vocab_size"] == 7


# ---- whole merges of what is planned ------------------------------------------------------------


def test_a_merge_by_slices_reads_what_the_plan_says(zoo):
    x, y = zoo("x"), zoo("y")
    parts = [
        {"sources": [{"model": x, "layer_range": [2, 4]}], "merge_method": "passthrough"},
        {
            "sources": [{"model": m, "layer_range": [0, 2]} for m in (x, y)],
            "merge_method": "linear",
        },
    ]
    merged = dict(merged_tensors(Recipe.parse({"slices": parts})))
    a, b = (load_file(Path(model) / "model.safetensors") for model in (x, y))
    assert torch.equal(merged["model.layers.1.mlp.weight"], a["model.layers.3.mlp.weight"])
    average = (a["model.layers.1.mlp.weight"] + b["model.layers.1.mlp.weight"]) / 2
    torch.testing.assert_close(merged["model.layers.3.mlp.weight"], average)
    torch.testing.assert_close(merged[HEAD], (a[HEAD] + b[HEAD]) / 2)
    assert torch.equal(merged[EMBEDDING], a[EMBEDDING])


def test_a_stored_head_is_no_embedding_where_the_config_does_not_say(llamas, tmp_path):
    """Some families tie by default: without the word the engine would be tied, and the plan not."""
    folder = tmp_path / "silent"
    shutil.copytree(llamas.base, folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    (folder / "config.json").write_text(json.dumps(config))
    assert merged_config(model_alone(str(folder)), Sources())["tie_word_embeddings"] is False
