"""`model+adapter`: PEFT's merge_and_unload is the oracle, and the merged folder the other one."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from merge_core.adapted import LowRankUpdate
from merge_core.checkpoint.locate import locate, split_adapter, tokenizer_folder
from merge_core.errors import CheckpointError
from merge_core.merge import load_merged, merged_tensors, save_merged
from merge_core.plan import merged_config, model_alone, plan_merge
from merge_core.recipe import Recipe
from merge_core.sources import Sources

from .adapters import saved_adapter

pytest.importorskip("peft", reason="PEFT is the oracle")

ATTENTION = ["q_proj", "v_proj"]


def build_gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 31}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter += torch.randn(parameter.shape)
    return model


def build_qwen() -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 24, "intermediate_size": 57, "num_hidden_layers": 2,
             "num_attention_heads": 3, "num_key_value_heads": 1}  # fmt: skip
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=False))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter += torch.randn(parameter.shape)
    return model


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": ATTENTION}),
    "patterns": (
        "llama",
        {
            "target_modules": [*ATTENTION, "down_proj"],
            "rank_pattern": {"q_proj": 2, r"layers\.[23]\.self_attn\.v_proj": 7},
            "alpha_pattern": {"down_proj": 3, "layers.1.self_attn.q_proj": 11},
        },
    ),
    "rslora": ("llama", {"target_modules": ATTENTION, "use_rslora": True}),
    "dora": ("llama", {"target_modules": ATTENTION, "use_dora": True}),
    "regular expression": ("llama", {"target_modules": r".*layers\.[02]\.mlp\.(up|gate)_proj"}),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "some layers": ("llama", {"target_modules": ATTENTION, "layers_to_transform": [1, 3]}),
    "embedding and head": ("llama", {"target_modules": ["embed_tokens", "lm_head", "k_proj"]}),
    "dora of an embedding": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "whole modules": (
        "llama",
        {"target_modules": ATTENTION, "modules_to_save": ["lm_head", "embed_tokens", "norm"]},
    ),
    "tied, embedding": ("tied", {"target_modules": ["embed_tokens", "o_proj"]}),
    "tied, head": ("tied", {"target_modules": ["lm_head", "o_proj"]}),
    "tied, whole embedding": (
        "tied",
        {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens"]},
    ),
    "tied, whole head": ("tied", {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]}),
    "tied, kept tied": (
        "tied",
        {
            "target_modules": ATTENTION,
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
    ),
    "transposed, a square one among them": (
        "gpt2",
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    ),
    "transposed, square ones alone": (
        "gpt2",
        {"target_modules": r".*attn\.c_proj", "fan_in_fan_out": True},
    ),
    "dora, transposed": (
        "gpt2",
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True},
    ),
    "embeddings of tokens and positions": ("gpt2", {"target_modules": ["wte", "wpe"]}),
    "bias of all": (
        "gpt2",
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"},
    ),
    "bias of the adapted": ("qwen", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "bias of B": ("qwen", {"target_modules": ATTENTION, "lora_bias": True}),
}


@pytest.fixture(scope="module")
def builds(llama_builder: Callable[..., Any]) -> dict[str, Callable[[], Any]]:
    return {
        "llama": llama_builder,
        "tied": lambda: llama_builder(tied=True),
        "gpt2": build_gpt2,
        "qwen": build_qwen,
    }


@pytest.fixture(scope="module")
def bases(builds, tmp_path_factory) -> dict[str, Path]:
    folders = {}
    for name, build in builds.items():
        folders[name] = tmp_path_factory.mktemp("bases") / name
        build().save_pretrained(folders[name])
    return folders


def alone(reference: str, dtype: str | None = None) -> Recipe:
    return Recipe.parse({**model_alone(reference).as_config(), "dtype": dtype})


def merged(recipe: Recipe, sources: Sources | None = None) -> dict[str, Tensor]:
    return dict(merged_tensors(recipe, sources))


@pytest.mark.parametrize("case", CASES)
def test_a_model_with_an_adapter_is_what_peft_merges_it_to(case, builds, bases, tmp_path):
    base, config = CASES[case]
    expected = saved_adapter(builds[base](), tmp_path / "adapter", **config)
    reference = f"{bases[base]}+{tmp_path / 'adapter'}"
    sources = Sources()
    found = merged(alone(reference), sources)
    plain = merged(alone(str(bases[base])))
    assert any(not torch.equal(found[name], plain[name]) for name in plain)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=2e-6)
    for name in set(expected) - set(found):  # a head that is still the embedding
        assert name == "lm_head.weight"
        table = sources.architecture(reference).token_embedding
        assert torch.equal(expected[name], expected[table])


# ---- candidates equal those of full specialists ----


@pytest.fixture(scope="module")
def pair(llama_builder, tmp_path_factory) -> dict[str, tuple[str, list[str], list[str]]]:
    """By dtype: a base, it with two adapters, and the folders of the same two models, merged."""
    built = {}
    for dtype in ("float32", "bfloat16"):
        root = tmp_path_factory.mktemp(dtype)
        base = str(root / "base")
        llama_builder().to(getattr(torch, dtype)).save_pretrained(base)
        adapted, full = [], []
        for seed, name in enumerate("xy"):
            config = {"target_modules": [*ATTENTION, "down_proj"], "modules_to_save": ["norm"]}
            saved_adapter(llama_builder(), root / name, seed=seed, **config)
            adapted.append(f"{base}+{root / name}")
            save_merged(alone(adapted[-1], dtype), root / f"full-{name}", with_card=False)
            full.append(str(root / f"full-{name}"))
        built[dtype] = base, adapted, full
    return built


def recipe_of(method: str, base: str, models: list[str], dtype: str, **parameters: Any) -> Recipe:
    entries = [{"model": model, "parameters": {"weight": 0.6}} for model in models]
    return Recipe.parse(
        {
            "merge_method": method,
            "base_model": base,
            "models": entries,
            "parameters": parameters,
            "dtype": dtype,
        }
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("method", "own"), [("ties", {"density": 0.4}), ("task_arithmetic", {})])
def test_candidates_of_adapters_are_those_of_full_specialists_to_the_bit(
    method, own, dtype, pair, tmp_path, monkeypatch
):
    base, adapted, full = pair[dtype]
    # By the same names: of entries that tie at the density, those are kept that the name chooses.
    monkeypatch.chdir(tmp_path)
    for name, folder in zip("xy", full, strict=True):
        Path(f"base+{name}").symlink_to(folder)
    recipe = recipe_of(method, base, ["base+x", "base+y"], dtype, **own)
    expected = merged(recipe)
    (tmp_path / "apart").mkdir()
    monkeypatch.chdir(tmp_path / "apart")
    Path("base").symlink_to(base)
    for name, reference in zip("xy", adapted, strict=True):
        Path(name).symlink_to(reference.split("+")[1])
    kept = Sources(keep=True)
    for _ in range(2):  # the second time from what is kept
        locate.cache_clear()
        found = merged(recipe, kept)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    locate.cache_clear()


def test_of_several_adapters_only_the_base_is_kept(pair):
    base, adapted, _ = pair["bfloat16"]
    alone_kept, kept = Sources(keep=True), Sources(keep=True)
    merged(alone(base, "float32"), alone_kept)
    merged(recipe_of("task_arithmetic", base, adapted, "float32"), kept)
    n_whole = 2  # each adapter's own norm
    assert kept.residence.places()["pinned"] <= alone_kept.residence.places()["pinned"] + n_whole


@pytest.mark.parametrize(
    ("method", "own"), [("ties", {"density": 0.4}), ("sce", {"select_topk": 0.5}), ("della", {})]
)
def test_no_sum_of_base_and_adapter_outlives_its_merge(method, own, pair, monkeypatch):
    base, adapted, _ = pair["bfloat16"]
    made: list[weakref.ref[Tensor]] = []
    update = LowRankUpdate.__call__

    def watched(self: LowRankUpdate, stored: Tensor, dtype: torch.dtype) -> Tensor:
        result = update(self, stored, dtype)
        made.append(weakref.ref(result))
        return result

    monkeypatch.setattr(LowRankUpdate, "__call__", watched)
    entries = [{"model": m, "parameters": {"weight": 1} if method != "sce" else {}} for m in adapted]
    recipe = Recipe.parse(
        {"merge_method": method, "base_model": base, "models": entries, "parameters": own}
        | {"dtype": "bfloat16"}
    )
    sources = Sources(keep=True)
    for _ in range(2):
        merged(recipe, sources)
    gc.collect()
    assert len(made) >= 2 * 2 * 12
    assert not [ref for ref in made if ref() is not None]


def test_weight_one_of_one_adapter_is_that_model(pair):
    base, (x, _), _ = pair["float32"]
    recipe = recipe_of("task_arithmetic", base, [x], "float32")
    entry = recipe.models[0].model_copy(update={"parameters": {"weight": 1}})
    found = merged(recipe.model_copy(update={"models": (entry,)}))
    for name, tensor in merged(alone(x)).items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-7)


def test_no_bit_depends_on_threads(pair, n_threads):
    _, (x, _), _ = pair["float32"]
    n_threads(1)
    expected = merged(alone(x))
    n_threads(2)
    found = merged(alone(x))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_an_adapter_may_stand_in_slices_and_as_the_base(pair):
    base, (x, y), (full_x, full_y) = pair["float32"]

    def recipe(first: str, second: str) -> Recipe:
        sources = [{"model": first, "layer_range": [0, 2]}, {"model": second, "layer_range": [0, 2]}]
        slices = [{"sources": sources}, {"sources": [{"model": base, "layer_range": [1, 3]}] * 2}]
        slices[1]["merge_method"] = "linear"
        slices[1]["parameters"] = {"weight": 0.5}
        return Recipe.parse(
            {"merge_method": "slerp", "base_model": first, "slices": slices, "parameters": {"t": 0.3}}
        )

    expected = merged(recipe(full_x, full_y))
    found = merged(recipe(x, y))
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_mergekit_makes_the_same_of_a_model_with_an_adapter(pair, theirs, tmp_path):
    base, adapted, _ = pair["float32"]
    recipe = recipe_of("task_arithmetic", base, adapted, "float32")
    expected = theirs(recipe.as_config(), lora_merge_cache=str(tmp_path))
    found = merged(recipe)
    assert expected.keys() == found.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=2e-6)


def test_the_merged_model_loads_and_has_the_config_it_needs(builds, bases, tmp_path):
    config = CASES["tied, whole head"][1]
    expected = saved_adapter(builds["tied"](), tmp_path / "adapter", **config)
    model = load_merged(alone(f"{bases['tied']}+{tmp_path / 'adapter'}"))
    assert model.config.tie_word_embeddings is False
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=2e-6)


# ---- vocabularies and tokenizers ----


def test_a_resized_vocabulary_comes_with_the_adapter(builds, bases, tmp_path):
    grown = builds["llama"]()
    grown.resize_token_embeddings(103, mean_resizing=False)
    saved_adapter(
        grown,
        tmp_path / "adapter",
        target_modules=ATTENTION,
        modules_to_save=["embed_tokens", "lm_head"],
    )
    (tmp_path / "adapter" / "tokenizer.json").write_text("{}")
    recipe = alone(f"{bases['llama']}+{tmp_path / 'adapter'}")
    sources = Sources()
    found = merged(recipe, sources)
    assert found["model.embed_tokens.weight"].shape[0] == found["lm_head.weight"].shape[0] == 103
    assert merged_config(recipe, sources)["vocab_size"] == 103
    checkpoint = sources.architecture(recipe.references()[0]).checkpoint
    assert checkpoint.tokenizer_folder == tmp_path / "adapter"


def test_half_a_resized_vocabulary_is_refused(builds, bases, tmp_path):
    grown = builds["llama"]()
    grown.resize_token_embeddings(103, mean_resizing=False)
    saved_adapter(grown, tmp_path / "a", target_modules=ATTENTION, modules_to_save=["lm_head"])
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    tensors = {name: t for name, t in tensors.items() if "embed_tokens" not in name}
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="vocabularies of different sizes"):
        merged(alone(f"{bases['llama']}+{tmp_path / 'a'}"))


def test_the_tokenizer_is_the_bases_where_the_adapter_has_none(pair):
    base, (x, _), _ = pair["float32"]
    assert tokenizer_folder(x) == Path(base)


# ---- what is refused, and how ----


@pytest.fixture
def adapter(builds, bases, tmp_path) -> Path:
    """A plain adapter of the Llama, to be broken."""
    saved_adapter(builds["llama"](), tmp_path / "adapter", target_modules=ATTENTION)
    return tmp_path / "adapter"


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def without(tensors: dict[str, Tensor], *names: str) -> None:
    for name in names:
        del tensors[name]


LAYER = "base_model.model.model.layers.1.self_attn.q_proj"
BREAKS: dict[str, tuple[Callable[[Path], None], str]] = {
    "half a pair": (
        lambda a: change_tensors(a, lambda t: without(t, f"{LAYER}.lora_B.weight")),
        r"has no lora_B of model\.layers\.1\.self_attn\.q_proj",
    ),
    "a missing pair": (
        lambda a: change_tensors(a, lambda t: without(t, *(f"{LAYER}.lora_{x}.weight" for x in "AB"))),
        r"has no factors of model\.layers\.1\.self_attn\.q_proj\.weight",
    ),
    "a pair too many": (
        lambda a: change_tensors(
            a,
            lambda t: t.update(
                {f"{LAYER}x.lora_{x}.weight": t[f"{LAYER}.lora_{x}.weight"].clone() for x in "AB"}
            ),
        ),
        "q_projx .* has no place in",
    ),
    "another base's": (
        lambda a: change_tensors(
            a, lambda t: t.update({f"{LAYER}.lora_A.weight": torch.zeros(4, 50)})
        ),
        r"is \[48, 50\] where .* is \[48, 48\]; name the base that it was trained on",
    ),
    "another rank": (lambda a: change_config(a, r=8), r"has rank 4 where .* says 8"),
    "tensors of another kind": (
        lambda a: change_tensors(a, lambda t: t.update({f"{LAYER}.lora_E": torch.zeros(4)})),
        "which no LoRA has",
    ),
    "another method": (lambda a: change_config(a, peft_type="LOHA"), "peft_type is 'LOHA'; only LORA"),
    "a changed base": (
        lambda a: change_config(a, init_lora_weights="pissa_niter_4"),
        "init_lora_weights is 'pissa_niter_4', which changes the base's weights",
    ),
    "single rows": (
        lambda a: change_config(a, trainable_token_indices=[1]),
        "single rows are not merged",
    ),
    "lengths without DoRA": (lambda a: change_config(a, use_dora=True), "do not agree"),
    "a rank that is none": (lambda a: change_config(a, r="many"), "r is 'many'; it must be a number"),
    "no settings": (lambda a: (a / "adapter_config.json").unlink(), "has no adapter_config.json"),
    "no weights": (
        lambda a: (a / "adapter_model.safetensors").unlink(),
        "has no adapter_model.safetensors or adapter_model.bin",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BREAKS)
def test_an_adapter_that_does_not_fit_is_refused_in_one_clear_line(case, bases, adapter):
    spoil, message = BREAKS[case]
    spoil(adapter)
    with pytest.raises(CheckpointError, match=message) as raised:
        plan_merge(alone(f"{bases['llama']}+{adapter}"), Sources())
    assert "; " in raised.value.faults[0]


def test_a_bin_file_is_read_and_never_run(bases, adapter):
    reference = f"{bases['llama']}+{adapter}"
    expected = merged(alone(reference))
    file = adapter / "adapter_model.safetensors"
    torch.save(load_file(file), adapter / "adapter_model.bin")
    file.unlink()
    found = merged(alone(reference))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    torch.save({"x": adapter}, adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"nothing in a \.bin file is ever run"):
        merged(alone(reference))


def test_an_adapter_without_a_model_is_refused_with_how_to_write_it(adapter):
    with pytest.raises(CheckpointError, match=r"is an adapter without a model; .* BASE\+"):
        merged(alone(str(adapter)))


def test_a_base_saved_without_its_head_fits_an_adapter_for_the_whole(tmp_path):
    expected = saved_adapter(build_gpt2(), tmp_path / "a", target_modules=["c_fc"], fan_in_fan_out=True)
    build_gpt2().transformer.save_pretrained(tmp_path / "bare")
    found = merged(alone(f"{tmp_path / 'bare'}+{tmp_path / 'a'}"))
    name = "h.1.mlp.c_fc.weight"
    torch.testing.assert_close(found[name], expected[f"transformer.{name}"], rtol=0, atol=2e-6)


def test_a_fingerprint_tells_scalings_apart(bases, adapter):
    def fingerprint() -> str:
        return Sources().architecture(f"{bases['llama']}+{adapter}").checkpoint.fingerprint()

    before = fingerprint()
    assert fingerprint() == before
    change_config(adapter, lora_alpha=7)
    assert fingerprint() != before


def test_references_are_split_at_the_adapter(tmp_path):
    (tmp_path / "a+b").mkdir()
    (tmp_path / "l").mkdir()
    odd = str(tmp_path / "a+b")
    assert split_adapter("org/a@v1+org/l@v2") == ("org/a@v1", "org/l@v2")
    assert split_adapter("org/a") == ("org/a", None)
    assert split_adapter(odd) == (odd, None)
    assert split_adapter(f"{odd}+{tmp_path / 'l'}") == (odd, str(tmp_path / "l"))
    for reference in ("org/a+org/b+org/c", "org/a+", "+org/b"):
        with pytest.raises(CheckpointError, match="with one '\\+'"):
            split_adapter(reference)
