"""The merge of whole checkpoints: one stream, whoever consumes it and however it is cut."""

from __future__ import annotations

import json
import os
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import merge_core.methods.job
from merge_core.checkpoint.read import Checkpoint
from merge_core.errors import CheckpointError, OutputError, RecipeError
from merge_core.merge import load_merged, merged_tensors, save_merged
from merge_core.plan import Sources, model_alone
from merge_core.recipe import Recipe

WEIGHTS = [{"filter": "mlp", "value": [0.1, 0.9]}, {"value": 0.7}]
METHODS: dict[str, dict[str, Any]] = {
    "linear": {"own": {"weight": WEIGHTS}},
    "slerp": {"shared": {"t": [0.2, 0.8]}},
    "task_arithmetic": {"own": {"weight": WEIGHTS}},
    "ties": {"own": {"weight": WEIGHTS, "density": 0.3}, "shared": {"rescale": True}},
    "dare_linear": {"own": {"weight": WEIGHTS, "density": 0.3}},
    "dare_ties": {"own": {"weight": WEIGHTS, "density": 0.3}, "shared": {"normalize": True}},
    "passthrough": {"own": {"scale": 0.7}},
}
every_method = pytest.mark.parametrize("method", METHODS)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def recipe_of(method: str, family: Any, **keys: Any) -> Recipe:
    names = {"slerp": ["x"], "passthrough": ["x"]}.get(method, ["x", "y"])
    own = METHODS[method].get("own", {})
    config: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": getattr(family, name), "parameters": own} for name in names],
        "parameters": METHODS[method].get("shared", {}),
        **keys,
    }
    if method not in ("linear", "passthrough"):
        config["base_model"] = family.base
    return Recipe.parse(config)


def slices_of(family: Any, *parts: tuple[str, int, int], **keys: Any) -> Recipe:
    return Recipe.parse(
        {
            "merge_method": "passthrough",
            "slices": [
                {"sources": [{"model": getattr(family, name), "layer_range": [start, end]}]}
                for name, start, end in parts
            ],
            **keys,
        }
    )


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    assert a.dtype == b.dtype
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.shape == b.shape and torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


def same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(same_bits(a[name], b[name]) for name in a)


def saved(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, whatever its shards."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def copied(model: str, folder: Path) -> Path:
    shutil.copytree(model, folder)
    return folder


def rewritten(folder: Path, **changes: torch.Tensor | None) -> None:
    """Change tensors of a one-file checkpoint; None removes one."""
    tensors = {**load_file(folder / "model.safetensors"), **changes}
    kept = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def configured(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def faults_of(recipe: Recipe) -> list[str]:
    """The faults of a merge, which must come before any tensor is asked for."""
    with pytest.raises(CheckpointError) as caught:
        merged_tensors(recipe)
    return caught.value.faults


def average(*models: str | Path, **keys: Any) -> Recipe:
    return Recipe.parse(
        {"merge_method": "linear", "models": [{"model": str(model)} for model in models], **keys}
    )


# ---- one stream ---------------------------------------------------------------------------------


@every_method
def test_some_tensors_are_those_of_the_whole_merge(llamas, method):
    recipe = recipe_of(method, llamas)
    whole = dict(merged_tensors(recipe))
    for name in ("lm_head.weight", "model.layers.2.mlp.down_proj.weight", "model.norm.weight"):
        ((found, tensor),) = merged_tensors(recipe, names=[name])
        assert found == name
        assert same_bits(tensor, whole[name])
    backwards = list(reversed(whole))
    assert same_tensors(dict(merged_tensors(recipe, names=backwards)), whole)
    assert not list(merged_tensors(recipe, names=[]))


def test_tensors_come_in_the_order_of_the_model(llamas):
    names = [name for name, _ in merged_tensors(recipe_of("ties", llamas))]
    layers = [int(name.split(".")[2]) for name in names if ".layers." in name]
    assert names[0] == "model.embed_tokens.weight"
    assert layers == sorted(layers)
    assert set(names[-2:]) == {"model.norm.weight", "lm_head.weight"}
    assert set(names) == set(saved(Path(llamas.base)))


@every_method
def test_open_sources_give_what_fresh_ones_give(llamas, method):
    sources = Sources()
    other = recipe_of(method, llamas, dtype="bfloat16")
    recipe = recipe_of(method, llamas)
    fresh = dict(merged_tensors(recipe))
    list(merged_tensors(other, sources))
    assert same_tensors(dict(merged_tensors(recipe, sources)), fresh)
    assert same_tensors(dict(merged_tensors(recipe, sources)), fresh)


def test_open_sources_serve_recipes_of_different_dtypes(llamas, bf16_llamas):
    # The base is float32 on disk, the model bfloat16: casting changes the deltas, not the model.
    entry = {"model": bf16_llamas.x, "parameters": {"weight": 1.0, "density": 0.3}}
    config = {"merge_method": "ties", "base_model": llamas.base, "models": [entry]}
    recipes = [Recipe.parse(config), Recipe.parse({**config, "dtype": "bfloat16"})]
    sources = Sources()
    for recipe in recipes:
        warm, fresh = dict(merged_tensors(recipe, sources)), dict(merged_tensors(recipe))
        assert same_tensors(warm, fresh), recipe.dtype


@every_method
def test_sources_are_never_written_to(llamas, method):
    sources = Sources()
    before = {name: {k: v.clone() for k, v in saved(Path(p)).items()} for name, p in vars(llamas).items()}
    for _, tensor in merged_tensors(recipe_of(method, llamas), sources):
        assert tensor.isfinite().all()
    for name, path in vars(llamas).items():
        checkpoint = sources.architecture(path).checkpoint if name == "x" else Checkpoint(path)
        assert all(torch.equal(checkpoint.read(k), v) for k, v in before[name].items())


@every_method
@pytest.mark.parametrize("compiles", [False, True], ids=["torch", "compiled"])
def test_results_may_be_written_where_they_are_wanted(llamas, method, compiles):
    recipe = recipe_of(method, llamas)
    expected = dict(merged_tensors(recipe))
    into = {name: torch.full_like(tensor, 7.0) for name, tensor in expected.items()}
    got = dict(merged_tensors(recipe, into=into, compiles=compiles))
    assert same_tensors(got, expected)
    assert all(got[name].data_ptr() == into[name].data_ptr() for name in got)


@pytest.mark.parametrize("unfit", ["dtype", "shape", "stride"])
def test_a_place_that_does_not_fit_is_left_alone(llamas, unfit):
    recipe = recipe_of("ties", llamas)
    expected = dict(merged_tensors(recipe))
    other = {
        "dtype": lambda t: torch.zeros_like(t, dtype=torch.bfloat16),
        "shape": lambda t: torch.zeros(t.numel() + 1),
        "stride": lambda t: torch.zeros(*t.shape, 2)[..., 0],
    }[unfit]
    into = {name: other(tensor) for name, tensor in expected.items()}
    assert same_tensors(dict(merged_tensors(recipe, into=into)), expected)
    assert all(not place.any() for place in into.values())


def test_a_model_alone_is_that_model_bit_for_bit(llamas, tied_llamas):
    for family in (llamas, tied_llamas):
        recipe = model_alone(family.x)
        assert same_tensors(dict(merged_tensors(recipe)), saved(Path(family.x)))


def test_a_model_listed_twice_counts_twice(llamas):
    entries = [{"model": llamas.x, "parameters": {"weight": w}} for w in (0.25, 0.5)]
    entries.append({"model": llamas.y, "parameters": {"weight": 0.25}})
    merged = dict(merged_tensors(Recipe.parse({"merge_method": "linear", "models": entries})))
    x, y = saved(Path(llamas.x)), saved(Path(llamas.y))
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, 0.75 * x[name] + 0.25 * y[name], atol=1e-7, rtol=1e-6)


def test_a_model_listed_twice_draws_two_masks(llamas):
    entry = {"model": llamas.x, "parameters": {"weight": 1.0, "density": 0.5}}
    config = {"merge_method": "dare_linear", "base_model": llamas.base, "models": [entry, entry]}
    recipe = Recipe.parse({**config, "parameters": {"rescale": False}})
    name = "model.layers.0.mlp.up_proj.weight"
    ((_, merged),) = merged_tensors(recipe, names=[name])
    base, x = saved(Path(llamas.base))[name], saved(Path(llamas.x))[name]
    times = ((merged - base) / (x - base))[(x - base).abs() > 1e-3].round()
    shares = [float((times == n).float().mean()) for n in range(3)]
    # Independent masks of probability 1/2: never, once, twice with 1/4, 1/2, 1/4.
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.05)


def test_one_model_may_give_two_runs_of_layers_to_one_slice(llamas):
    pieces = [
        {"model": llamas.x, "layer_range": [0, 2], "parameters": {"weight": 0.25}},
        {"model": llamas.x, "layer_range": [2, 4], "parameters": {"weight": 0.75}},
    ]
    try:
        recipe = Recipe.parse({"merge_method": "linear", "slices": [{"sources": pieces}]})
        merged = dict(merged_tensors(recipe))
    except (RecipeError, CheckpointError):
        return  # mergekit refuses duplicate inputs; to refuse is as good as to be right
    x = saved(Path(llamas.x))
    name = "model.layers.{}.mlp.up_proj.weight"
    expected = 0.25 * x[name.format(0)] + 0.75 * x[name.format(2)]
    torch.testing.assert_close(merged[name.format(0)], expected)


# ---- the same bits however the work is cut ------------------------------------------------------


@every_method
def test_shards_of_any_size_hold_the_same_bytes(llamas, tmp_path, method):
    recipe, sources = recipe_of(method, llamas, dtype="bfloat16"), Sources()
    expected = dict(merged_tensors(recipe, sources))
    for shard_bytes in (0, 1, 20_000, 10**9):
        folder = tmp_path / str(shard_bytes)
        save_merged(recipe, folder, sources=sources, shard_bytes=shard_bytes)
        assert same_tensors(saved(folder), expected)


@pytest.mark.parametrize("shard_bytes", [1, 9_600, 20_000, 100_000])
def test_no_shard_is_larger_than_asked_and_the_index_names_each_tensors_shard(
    llamas, tmp_path, shard_bytes
):
    save_merged(model_alone(llamas.x), tmp_path / "out", shard_bytes=shard_bytes)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert len(files) == int(files[0].name.split("-of-")[1][:5])
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in saved(tmp_path / "out").values())
    for file in files:
        held = load_file(file)
        assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= shard_bytes
        assert all(index["weight_map"][name] == file.name for name in held)


@pytest.mark.parametrize("shard_bytes", [0, -1, 10**9])
def test_without_a_limit_there_is_one_file_and_no_index(llamas, tmp_path, shard_bytes):
    save_merged(model_alone(llamas.x), tmp_path / "out", shard_bytes=shard_bytes)
    assert [file.name for file in (tmp_path / "out").glob("model*")] == ["model.safetensors"]


# Crosses several chunks; the last one is long enough for torch to share it between threads, and
# odd, so that vector units end in the middle.
N = 2 * (1 << 16) + 50_001


def big_tensors(n_models, dtype):
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(N, generator=generator, dtype=torch.float64)
    tuned = [base + torch.randn(N, generator=generator, dtype=torch.float64) for _ in range(n_models)]
    return base.to(dtype), [x.to(dtype) for x in tuned]


def merged_big(merge_one, method, dtype):
    base, tuned = big_tensors(1 if method in ("slerp", "passthrough") else 2, dtype)
    own = {
        "linear": {"weight": 0.37},
        "slerp": {},
        "passthrough": {"scale": 0.7},
        "task_arithmetic": {"weight": 0.37},
    }.get(method, {"weight": 0.37, "density": 0.3})
    shared: dict[str, Any] = {"t": 0.3} if method == "slerp" else {}
    if "density" in own:
        shared["rescale"] = True
    base = None if method in ("linear", "passthrough") else base
    return merge_one(method, base, [(x, own) for x in tuned], **shared)


@every_method
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("k", [1, 3], ids=lambda k: f"{k}x4096")
def test_the_chunk_length_changes_no_bit(merge_one, monkeypatch, method, dtype, k):
    expected = merged_big(merge_one, method, dtype)
    monkeypatch.setattr(merge_core.methods.job, "CHUNK", 4096 * k)
    assert same_bits(merged_big(merge_one, method, dtype), expected)


@pytest.mark.parametrize(
    ("method", "dtype"),
    [(m, torch.float32) for m in METHODS] + [(m, torch.float64) for m in ("slerp", "dare_linear")],
    ids=str,
)
def test_the_number_of_threads_changes_no_bit(merge_one, n_threads, method, dtype):
    n_threads(1)
    expected = merged_big(merge_one, method, dtype)
    n_threads(2)
    assert same_bits(merged_big(merge_one, method, dtype), expected)


@every_method
def test_whole_merges_are_the_same_with_two_threads_and_small_chunks(
    llamas, monkeypatch, n_threads, method
):
    recipe = recipe_of(method, llamas)
    expected = dict(merged_tensors(recipe))
    n_threads(2)
    monkeypatch.setattr(merge_core.methods.job, "CHUNK", 4096)
    assert same_tensors(dict(merged_tensors(recipe)), expected)


def test_a_merge_leaves_the_number_of_threads_and_may_be_abandoned(llamas, n_threads):
    n_threads(2)
    stream = merged_tensors(recipe_of("ties", llamas))
    first, _ = next(stream)
    stream.close()
    assert first == "model.embed_tokens.weight"
    assert torch.get_num_threads() == 2
    assert len(list(merged_tensors(recipe_of("linear", llamas)))) == len(saved(Path(llamas.x)))
    assert torch.get_num_threads() == 2


@every_method
def test_sharded_sources_give_what_single_files_give(llamas, tmp_path, method):
    from transformers import AutoModelForCausalLM

    expected = dict(merged_tensors(recipe_of(method, llamas, random_seed=3)))
    sharded = {}
    for name, path in vars(llamas).items():
        model = AutoModelForCausalLM.from_pretrained(path)
        model.save_pretrained(tmp_path / name, max_shard_size="100KB")
        assert len(list((tmp_path / name).glob("*.safetensors"))) > 2
        sharded[name] = str(tmp_path / name)
    found = dict(merged_tensors(recipe_of(method, type(llamas)(**sharded), random_seed=3)))
    if method.startswith("dare"):  # masks follow the model's name, which is its path here
        assert all(found[name].shape == expected[name].shape for name in expected)
        return
    assert same_tensors(found, expected)


# ---- what is saved is what is loaded ------------------------------------------------------------


@pytest.mark.parametrize("family", ["llamas", "tied_llamas", "bf16_llamas", "qwens"])
@pytest.mark.parametrize("method", ["dare_ties", "slerp"])
def test_the_saved_model_is_the_live_one_bit_for_bit(request, tmp_path, family, method):
    from transformers import AutoModelForCausalLM

    recipe = recipe_of(method, request.getfixturevalue(family))
    save_merged(recipe, tmp_path / "out")
    live = load_merged(recipe)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype="auto", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert same_tensors(dict(loaded.state_dict()), dict(live.state_dict()))
    assert loaded.dtype == live.dtype
    ids = torch.tensor([[1, 5, 9, 2]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, live(ids).logits)


def test_a_tied_model_stays_tied(tied_llamas, tmp_path):
    recipe = recipe_of("task_arithmetic", tied_llamas)
    save_merged(recipe, tmp_path / "out")
    assert "lm_head.weight" not in saved(tmp_path / "out")
    live = load_merged(recipe)
    assert live.lm_head.weight.data_ptr() == live.model.embed_tokens.weight.data_ptr()


def test_an_output_head_that_a_tied_model_also_stored_is_left_out(tied_llamas, tmp_path):
    folder = copied(tied_llamas.x, tmp_path / "x")
    rewritten(folder, **{"lm_head.weight": saved(folder)["model.embed_tokens.weight"].clone()})
    merged = dict(merged_tensors(average(folder, tied_llamas.y)))
    assert same_tensors(merged, dict(merged_tensors(average(tied_llamas.x, tied_llamas.y))))


@pytest.mark.parametrize("order", [["tied", "untied"], ["untied", "tied"]], ids="-".join)
def test_a_tied_model_lends_its_embedding_as_the_head_of_an_untied_merge(
    llamas, tied_llamas, tmp_path, order
):
    from transformers import AutoModelForCausalLM

    models = {"tied": tied_llamas.x, "untied": llamas.y}
    recipe = average(*(models[name] for name in order))
    save_merged(recipe, tmp_path / "out")
    tied, untied = saved(Path(tied_llamas.x)), saved(Path(llamas.y))
    head = (tied["model.embed_tokens.weight"] + untied["lm_head.weight"]) / 2
    merged = saved(tmp_path / "out")
    torch.testing.assert_close(merged["lm_head.weight"], head)
    assert not torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.lm_head.weight, merged["lm_head.weight"])
    assert same_tensors(dict(load_merged(recipe).state_dict()), dict(loaded.state_dict()))


@pytest.mark.parametrize("order", [["plain", "biased"], ["biased", "plain"]], ids="-".join)
def test_tensors_that_only_one_model_has_are_refused_whatever_the_order(
    llamas, llama_builder, tmp_path, order
):
    llama_builder(attention_bias=True).save_pretrained(tmp_path / "biased")
    models = {"plain": llamas.x, "biased": str(tmp_path / "biased")}
    (fault,) = faults_of(average(*(models[name] for name in order)))
    assert "q_proj.bias" in fault


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("out_dtype", [None, "bfloat16", "float32"])
def test_tensors_have_out_dtype_else_dtype_else_the_files(llamas, tmp_path, dtype, out_dtype):
    keys = {key: v for key, v in (("dtype", dtype), ("out_dtype", out_dtype)) if v}
    recipe = recipe_of("task_arithmetic", llamas, **keys)
    expected = out_dtype or dtype or "float32"
    save_merged(recipe, tmp_path / "out")
    assert {str(t.dtype) for t in saved(tmp_path / "out").values()} == {f"torch.{expected}"}
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config.get("dtype") or config.get("torch_dtype")) == expected


def test_dtype_rounds_the_sources_and_out_dtype_only_the_result(llamas):
    # Without a merge to do: float32 -> bfloat16 -> float32 loses bits, float32 -> float32 none.
    x = saved(Path(llamas.x))
    entry = [{"model": llamas.x}]
    rounded = Recipe.parse(
        {"merge_method": "passthrough", "models": entry, "dtype": "bfloat16", "out_dtype": "float32"}
    )
    for name, tensor in merged_tensors(rounded):
        assert torch.equal(tensor, x[name].bfloat16().float())


# ---- slices -------------------------------------------------------------------------------------


def test_slices_stack_layers_in_the_order_given(llamas, tmp_path):
    from transformers import AutoModelForCausalLM

    recipe = slices_of(llamas, ("x", 0, 3), ("y", 1, 4), ("x", 3, 4))
    save_merged(recipe, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["num_hidden_layers"] == 7
    x, y, merged = (saved(Path(p)) for p in (llamas.x, llamas.y, tmp_path / "out"))
    origin = [(x, 0), (x, 1), (x, 2), (y, 1), (y, 2), (y, 3), (x, 3)]
    for i, (model, layer) in enumerate(origin):
        for suffix in ("mlp.up_proj.weight", "self_attn.q_proj.weight", "input_layernorm.weight"):
            assert torch.equal(
                merged[f"model.layers.{i}.{suffix}"], model[f"model.layers.{layer}.{suffix}"]
            )
    assert torch.equal(merged["model.embed_tokens.weight"], x["model.embed_tokens.weight"])
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_tensors_before_the_layers_are_the_first_slices_and_those_after_the_last_ones(llamas):
    merged = dict(merged_tensors(slices_of(llamas, ("y", 0, 2), ("x", 2, 4))))
    x, y = saved(Path(llamas.x)), saved(Path(llamas.y))
    assert torch.equal(merged["model.embed_tokens.weight"], y["model.embed_tokens.weight"])
    assert torch.equal(merged["model.norm.weight"], x["model.norm.weight"])
    assert torch.equal(merged["lm_head.weight"], x["lm_head.weight"])


def test_lists_with_one_entry_a_layer_follow_their_layers(qwens, tmp_path):
    from transformers import AutoModelForCausalLM

    recipe = slices_of(qwens, ("x", 0, 1), ("y", 0, 4), ("x", 3, 4))
    save_merged(recipe, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    full, sliding = "full_attention", "sliding_attention"
    assert config["num_hidden_layers"] == 6
    assert config["layer_types"] == [full, full, sliding, full, sliding, sliding]
    assert len(AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.layers) == 6
    assert same_tensors(dict(load_merged(recipe).state_dict()), saved(tmp_path / "out"))


def test_slices_over_all_layers_are_models(llamas):
    entries = [{"model": getattr(llamas, n), "parameters": {"weight": [0.1, 0.9]}} for n in "xy"]
    ranged = [{**entry, "layer_range": [0, 4]} for entry in entries]
    keys = {"merge_method": "ties", "base_model": llamas.base}
    plain = dict(merged_tensors(Recipe.parse({**keys, "models": entries})))
    sliced = dict(merged_tensors(Recipe.parse({**keys, "slices": [{"sources": ranged}]})))
    assert same_tensors(plain, sliced)


def test_a_range_beyond_the_layers_is_refused(llamas):
    (fault,) = faults_of(slices_of(llamas, ("x", 0, 2), ("y", 2, 5)))
    assert "slices[1]" in fault
    assert "[2, 5)" in fault
    assert "4 layers" in fault


# ---- models that do not fit ---------------------------------------------------------------------


def test_models_of_different_shapes_are_refused_with_names_and_shapes(llamas, llama_builder, tmp_path):
    llama_builder(intermediate_size=96).save_pretrained(tmp_path / "other")
    (fault,) = faults_of(average(llamas.x, tmp_path / "other"))
    assert "model.layers.0.mlp.gate_proj.weight is [96, 48] against [100, 48]" in fault
    assert str(tmp_path / "other") in fault
    assert "more" in fault, "the rest is counted"
    assert len(fault) < 2000


def test_models_of_different_vocabularies_are_refused(llamas, llama_builder, tmp_path):
    llama_builder(vocab_size=98).save_pretrained(tmp_path / "other")
    entry = {"model": str(tmp_path / "other"), "parameters": {"weight": 1}}
    config = {"merge_method": "ties", "base_model": llamas.base, "models": [entry]}
    (fault,) = faults_of(Recipe.parse(config))
    assert "model.embed_tokens.weight is [98, 48] against [97, 48]" in fault


def test_models_of_different_depths_are_refused(llamas, llama_builder, tmp_path):
    llama_builder(num_hidden_layers=3).save_pretrained(tmp_path / "other")
    (fault,) = faults_of(average(llamas.x, tmp_path / "other"))
    assert "different numbers of layers" in fault
    assert " 4, " in fault
    assert " 3" in fault


def test_a_model_that_lacks_a_tensor_is_refused(llamas, tmp_path):
    folder = copied(llamas.y, tmp_path / "y")
    rewritten(folder, **{"model.layers.2.mlp.up_proj.weight": None})
    for order in ([llamas.x, folder], [folder, llamas.x]):
        (fault,) = faults_of(average(*order))
        assert "model.layers.2.mlp.up_proj.weight" in fault
        assert str(folder) in fault


def test_every_model_that_cannot_be_opened_is_named_at_once(tmp_path):
    faults = faults_of(average(tmp_path / "a", tmp_path / "b"))
    assert len(faults) == 2


def test_integer_buffers_are_copied_where_equal_and_refused_where_not(llamas, tmp_path):
    x, y = copied(llamas.x, tmp_path / "x"), copied(llamas.y, tmp_path / "y")
    for folder in (x, y):
        rewritten(folder, **{"model.layers.0.position_ids": torch.arange(5)})
    name = "model.layers.0.position_ids"
    ((_, buffer),) = merged_tensors(average(x, y, dtype="bfloat16"), names=[name])
    assert torch.equal(buffer, torch.arange(5))
    rewritten(y, **{name: torch.arange(5) + 1})
    with pytest.raises(CheckpointError, match="position_ids differs"):
        list(merged_tensors(average(x, y), names=[name]))


# ---- damaged checkpoints ------------------------------------------------------------------------


def truncate(folder):
    with (folder / "model.safetensors").open("r+b") as f:
        f.truncate((folder / "model.safetensors").stat().st_size - 100)


def drop_shard(folder):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "gone.safetensors"}}
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def with_index(value):
    def damage(folder):
        (folder / "model.safetensors").unlink()
        text = value if isinstance(value, str) else json.dumps(value)
        (folder / "model.safetensors.index.json").write_text(text)

    return damage


def with_weights(content):
    return lambda folder: (folder / "model.safetensors").write_bytes(content)


def with_header(header, data=b""):
    text = json.dumps(header).encode()
    return with_weights(len(text).to_bytes(8, "little") + text + data)


def with_shape(folder):
    """Claim another shape for one tensor, over the same bytes."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["model.norm.weight"]["shape"] = [49]
    with_header(header, content[8 + length :])(folder)


def only_bin(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def with_config(text):
    return lambda folder: (folder / "config.json").write_text(text)


DAMAGES = {
    "no folder": (shutil.rmtree, r"no such folder"),
    "a file, no folder": (lambda f: (shutil.rmtree(f), f.write_text("")), r"is a file; name the folder"),
    "no config.json": (
        lambda f: (f / "config.json").unlink(),
        r"has no config\.json in .*; name the folder",
    ),
    "config.json is no JSON": (with_config("{"), r"config\.json is not valid JSON"),
    "config.json is a list": (with_config("[]"), r"config\.json is not a JSON object"),
    "config.json with other layers": (with_config('{"num_hidden_layers": 9}'), r"says 9 layers, .* 4;"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"has no model\.safetensors"),
    "a .bin that is none": (only_bin, r"pytorch_model\.bin is damaged or no file of weights"),
    "a missing shard": (drop_shard, r"shard gone\.safetensors is missing"),
    "an index that points outside": (
        with_index({"weight_map": {"a": "../x/model.safetensors"}}),
        r"names '\.\./x/model\.safetensors'; shards must lie in the model's own folder",
    ),
    "an index that points to the root": (
        with_index({"weight_map": {"a": "/etc/passwd"}}),
        r"names '/etc/passwd'; shards must lie",
    ),
    "an index that names a number": (with_index({"weight_map": {"a": 3}}), r"names 3; shards must"),
    "an index of numbers and names": (with_index({"weight_map": {"a": 3, "b": "c"}}), r"index"),
    "an index that names the folder": (with_index({"weight_map": {"a": "."}}), r"index"),
    "an index that is no JSON": (with_index("{"), r"is not a valid index"),
    "an index without a map": (with_index({}), r"is not a valid index"),
    "an index that maps nothing": (with_index({"weight_map": {}}), r"no numbered layers|index"),
    "a truncated file": (truncate, r"is damaged: it has \d+ bytes where its header says \d+; download"),
    "an empty file": (with_weights(b""), r"is damaged: its header does not fit its 0 bytes"),
    "a file of zeros": (with_weights(bytes(100)), r"is damaged"),
    "a git-lfs pointer": (
        with_weights(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"),
        r"is a Git LFS pointer .*git lfs pull",
    ),
    "a header of a web page": (with_weights(b"<html>" * 100), r"is damaged: its header does not fit"),
    "a header that is no JSON": (
        with_weights((4).to_bytes(8, "little") + b"abcd"),
        r"is damaged: its header cannot be read",
    ),
    "a header that is a list": (with_header([]), r"is damaged: its header cannot be read"),
    "a header with text for offsets": (
        with_header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, "4"]}}, bytes(4)),
        r"is damaged: its header cannot be read",
    ),
    "a header whose shape belies its bytes": (with_shape, r"is damaged"),
    "no numbered layers": (
        with_header({"a.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
        r"has no numbered layers among its tensors \(a\.weight",
    ),
}


@pytest.mark.parametrize(("damage", "expected"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_one_clear_error(llamas, tmp_path, damage, expected):
    folder = copied(llamas.x, tmp_path / "x")
    damage(folder)
    with pytest.raises(CheckpointError, match=expected) as caught:
        list(merged_tensors(average(folder)))
    (fault,) = caught.value.faults
    assert str(folder) in fault
    assert "\n" not in fault


@pytest.mark.parametrize(
    "reference", ["~nosuchuser/model", "m" * 300, "a/" * 3000 + "b", "x\0y"], ids=len
)
def test_a_reference_that_is_no_path_is_one_clear_error(reference):
    (fault,) = faults_of(average(reference))
    assert fault.startswith("model ")


def test_a_relative_path_that_does_not_exist_is_an_error_without_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (fault,) = faults_of(average("models/gone"))
    assert "no such folder" in fault
    assert str(tmp_path) in fault


def test_a_value_that_is_missing_for_a_tensor_is_an_error_that_names_it(llamas):
    entry = {"model": llamas.x, "parameters": {"weight": [{"filter": "mlp", "value": 1}]}}
    config = {"merge_method": "ties", "base_model": llamas.base, "models": [entry]}
    with pytest.raises(RecipeError, match=r"weight has no value for tensor model\.embed_tokens\.weight"):
        merged_tensors(Recipe.parse(config))


# ---- the output folder --------------------------------------------------------------------------


def failing(llamas: Any) -> Recipe:
    """A recipe that fails in the middle of the stream: the weights of lm_head sum to zero."""
    weight = [{"filter": "lm_head", "value": -1}, {"value": 1}]
    entries = [{"model": llamas.x}, {"model": llamas.y, "parameters": {"weight": weight}}]
    return Recipe.parse({"merge_method": "linear", "models": entries})


def test_a_failure_mid_stream_leaves_nothing(llamas, tmp_path):
    recipe = failing(llamas)
    streamed = []
    with pytest.raises(RecipeError, match=r"lm_head\.weight"):
        streamed += [name for name, _ in merged_tensors(recipe)]
    with pytest.raises(RecipeError):
        save_merged(recipe, tmp_path / "deep/out", shard_bytes=1)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
    assert list((tmp_path / "deep").iterdir()) == []


def test_a_failed_overwrite_leaves_the_old_folder(llamas, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("keep")
    with pytest.raises(RecipeError):
        save_merged(failing(llamas), tmp_path / "out", overwrite=True)
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == ["out", "out/mine.txt"]


def test_an_output_folder_with_files_is_refused_and_left_alone(llamas, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("keep")
    with pytest.raises(OutputError, match=r"OUT is .*not empty; add --overwrite"):
        save_merged(recipe_of("linear", llamas), tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]
    (tmp_path / "file").write_text("keep")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"which is a file; name a folder"):
            save_merged(recipe_of("linear", llamas), tmp_path / "file", overwrite=overwrite)


@pytest.mark.parametrize("state", ["absent", "empty", "full"])
def test_only_the_complete_folder_is_there_at_the_end(llamas, tmp_path, state):
    out = tmp_path / "deep/out"
    if state != "absent":
        out.mkdir(parents=True)
    if state == "full":
        (out / "old.txt").write_text("old")
    recipe = recipe_of("linear", llamas)
    save_merged(recipe, out, overwrite=state == "full")
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    names = {p.name for p in out.iterdir()}
    assert {"model.safetensors", "config.json", "mergekit_config.yml"} <= names
    assert "old.txt" not in names
    assert not [name for name in names if "part" in name]
    assert same_tensors(saved(out), dict(merged_tensors(recipe)))


def test_a_model_may_be_overwritten_by_its_own_merge(llamas, tmp_path):
    folder = copied(llamas.x, tmp_path / "x")
    recipe = average(folder, llamas.y)
    expected = {name: tensor.clone() for name, tensor in merged_tensors(recipe)}
    save_merged(recipe, folder, overwrite=True)
    assert same_tensors(saved(folder), expected)


def test_an_output_folder_may_be_a_symbolic_link(llamas, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    save_merged(model_alone(llamas.x), tmp_path / "out")
    assert same_tensors(saved(tmp_path / "out"), saved(Path(llamas.x)))
    assert {p.name for p in tmp_path.iterdir()} <= {"out", "real"}


def test_an_output_folder_below_a_file_is_an_output_error(llamas, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="OUT"):
        save_merged(model_alone(llamas.x), tmp_path / "file/out")


def test_a_disk_that_is_full_is_an_output_error_and_leaves_nothing(llamas, tmp_path):
    # A limit on the size of files stands in for it; Python ignores the signal that goes with it.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OutputError, match="OUT"):
            save_merged(model_alone(llamas.x), tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_files_get_the_usual_permissions(llamas, tmp_path):
    before = os.umask(0o022)
    try:
        save_merged(recipe_of("linear", llamas), tmp_path / "out", shard_bytes=100_000)
    finally:
        os.umask(before)
    assert {oct(p.stat().st_mode & 0o777) for p in (tmp_path / "out").iterdir()} == {"0o644"}
    assert oct((tmp_path / "out").stat().st_mode & 0o777) == "0o755"


def test_mergekit_config_is_the_recipes_text(llamas, tmp_path):
    recipe = recipe_of("linear", llamas)
    text = f"# A comment, été\n{recipe.to_yaml()}"
    save_merged(recipe, tmp_path / "given", recipe_text=text)
    assert (tmp_path / "given/mergekit_config.yml").read_text(encoding="utf-8") == text
    save_merged(recipe, tmp_path / "own")
    assert Recipe.load(tmp_path / "own/mergekit_config.yml") == recipe


TOKENIZER = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "merges.txt"]


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_tokenizer_and_templates_of_the_base_are_copied(llamas, tmp_path, with_tokenizer):
    base, x = copied(llamas.base, tmp_path / "base"), copied(llamas.x, tmp_path / "x")
    files = [*TOKENIZER, "chat_template.jinja", "additional_chat_templates/tool.jinja"]
    for folder in (base, x):
        (folder / "additional_chat_templates").mkdir()
        for file in [*files, "README.md", "training_args.bin"]:
            (folder / file).write_text(f"{file} of {folder.name}")
    entry = {"model": str(x), "parameters": {"weight": 1}}
    recipe = Recipe.parse({"merge_method": "ties", "base_model": str(base), "models": [entry]})
    save_merged(recipe, tmp_path / "out", with_tokenizer=with_tokenizer)
    for file in files:
        path = tmp_path / "out" / file
        assert path.exists() == with_tokenizer
        if with_tokenizer:
            assert path.read_text() == f"{file} of base"
    assert not (tmp_path / "out/training_args.bin").exists()


def test_config_json_is_the_bases_own_but_for_what_the_merge_changed(llamas, tmp_path):
    base = copied(llamas.base, tmp_path / "base")
    configured(base, some_new_key={"a": [1, 2]})
    entry = {"model": llamas.x, "parameters": {"weight": 1}}
    config = {"merge_method": "ties", "base_model": str(base), "models": [entry], "dtype": "bfloat16"}
    save_merged(Recipe.parse(config), tmp_path / "out")
    before = json.loads((base / "config.json").read_text())
    after = json.loads((tmp_path / "out/config.json").read_text())
    changed = {key for key in before | after if before.get(key) != after.get(key)}
    assert changed <= {"dtype", "torch_dtype"}


def test_a_fingerprint_changes_with_the_checkpoint_and_only_then(llamas, tmp_path):
    x, again = copied(llamas.x, tmp_path / "x"), copied(llamas.x, tmp_path / "again")
    assert Checkpoint(str(x)).fingerprint() == Checkpoint(str(again)).fingerprint()
    rewritten(again, **{"model.norm.weight": torch.ones(48).bfloat16()})
    assert Checkpoint(str(x)).fingerprint() != Checkpoint(str(again)).fingerprint()
