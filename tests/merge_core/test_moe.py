"""Mixtures of experts: parity with mergekit-moe, laws of the mixture, and what is refused."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from merge_core.card import model_card
from merge_core.errors import CheckpointError, MergeError, RecipeError
from merge_core.estimate import estimate
from merge_core.experts import MIXTRAL, QWEN, respelled, single_experts
from merge_core.merge import load_merged, merged_tensors, save_merged
from merge_core.methods import METHODS
from merge_core.moe.recipe import MoeRecipe
from merge_core.plan import Sources, merged_config, model_alone, plan_merge
from merge_core.randomness import MaskKey, normals, uniforms
from merge_core.recipe import Recipe
from merge_core.resident import build_model, fill

ROOT = Path(__file__).resolve().parents[2]
SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
DENSE = {
    "llama": ("LlamaConfig", {}),
    "tied llama": ("LlamaConfig", {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {"sliding_window": 5}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 10}),
}
# What comes out, of which models, and whether with a shared expert.
MIXTURES = {
    "Mixtral of llamas": ("llama", False, "mixtral"),
    "Mixtral of tied llamas": ("tied llama", False, "mixtral"),
    "Mixtral of mistrals": ("mistral", False, "mixtral"),
    "Qwen of qwen2": ("qwen2", True, "qwen2_moe"),
    "Qwen of llamas": ("llama", True, "qwen2_moe"),
    "Qwen of mistrals": ("mistral", True, "qwen2_moe"),
    "Qwen3 of qwen3": ("qwen3", False, "qwen3_moe"),
}
TOKENS = torch.arange(3, 30)[None]
Folders = dict[str, str]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Folders]:
    """Save a family's base and two fine-tunes with a tokenizer, once; by name and dtype."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "configs/quickstart/models/base")
    # mergekit puts it before each prompt.
    tokenizer.bos_token = "<eos>"
    built: dict[tuple[str, str], Folders] = {}

    def build(name: str, dtype: str = "float32") -> Folders:
        if (name, dtype) not in built:
            config, more = DENSE[name]
            torch.manual_seed(0)
            sizes = {**SIZES, "vocab_size": len(tokenizer), **more}
            model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**sizes))
            folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
            for short in ("base", "x", "y"):
                deepcopy(model).to(getattr(torch, dtype)).save_pretrained(folder / short)
                tokenizer.save_pretrained(folder / short)
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter += 0.02 * torch.randn_like(parameter)
            built[name, dtype] = {short: str(folder / short) for short in ("base", "x", "y")}
        return built[name, dtype]

    return build


def config_of(folders: Folders, mode: str, shared: bool = False, **more: Any) -> dict[str, Any]:
    """A recipe of two experts, with prompts of different lengths, negative ones among them."""
    config: dict[str, Any] = {
        "base_model": folders["base"],
        "gate_mode": mode,
        "dtype": "float32",
        "experts": [
            {
                "source_model": folders["x"],
                "positive_prompts": ["a b c", "c a"],
                "negative_prompts": ["b b"],
                "residual_scale": 0.25,
            },
            {"source_model": folders["y"], "positive_prompts": ["b a a c", "x y"]},
        ],
    }
    if shared:
        expert = {"source_model": folders["base"], "positive_prompts": ["a c"], "residual_scale": 0.125}
        config["shared_experts"] = [expert]
    return config | more


def joined(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Spell experts as Transformers 5 does: one tensor for all, and `mlp` for every block."""
    tensors = {name.replace("block_sparse_moe", "mlp"): tensor for name, tensor in tensors.items()}
    for old, new in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
        tensors = {name.replace(f".{old}.", f".{new}."): tensor for name, tensor in tensors.items()}
    found = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in sorted({name.partition("mlp.")[0] for name in tensors if ".experts.0." in name}):
        rows = []
        while QWEN.names(layer, len(rows))[0] in tensors:
            rows.append([tensors[name] for name in QWEN.names(layer, len(rows))])
        found[f"{layer}mlp.experts.gate_up_proj"] = torch.stack([torch.cat([g, u]) for g, u, _ in rows])
        found[f"{layer}mlp.experts.down_proj"] = torch.stack([down for _, _, down in rows])
    return found or tensors


@pytest.fixture(scope="module")
def their_mixture(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[dict[str, Any]], dict[str, Tensor]]:
    """Make a mixture with mergekit-moe, in process; experts joined."""
    moe = pytest.importorskip("mergekit.scripts.moe", reason="mergekit is the oracle")
    from click.testing import CliRunner

    def make(config: dict[str, Any]) -> dict[str, Tensor]:
        folder = tmp_path_factory.mktemp("mergekit-moe")
        (folder / "recipe.yml").write_text(yaml.safe_dump(config))
        done = CliRunner().invoke(moe.main, [str(folder / "recipe.yml"), str(folder / "out"), "--quiet"])
        assert done.exception is None, done.output
        tensors = load_file(folder / "out" / "model.safetensors")
        is_apart = any(".experts.0." in name for name in tensors)
        return joined(tensors) if is_apart else tensors

    return make


# ---- parity -------------------------------------------------------------------------------------

MODES = ("hidden", "hidden_last", "hidden_avg", "cheap_embed")
FAST = {
    ("Mixtral of llamas", "hidden_avg"),
    ("Qwen of qwen2", "hidden"),
    ("Qwen3 of qwen3", "cheap_embed"),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("mixture", "mode"),
    [
        pytest.param(name, mode, marks=() if (name, mode) in FAST else pytest.mark.slow)
        for name in MIXTURES
        for mode in MODES
    ],
)
def test_a_mixture_is_mergekits(
    dense: Any, their_mixture: Any, mixture: str, mode: str, dtype: str
) -> None:
    """Router rows come from bfloat16 on one thread in both, so nothing is left to rounding."""
    family, shared, _ = MIXTURES[mixture]
    config = config_of(dense(family, dtype), mode, shared, dtype=dtype)
    found = joined(dict(merged_tensors(Recipe.parse(config))))
    expected = their_mixture(config)
    # A Mixtral of tied models is untied here, since vLLM's has no tied head.
    head = found.pop("lm_head.weight") if "lm_head.weight" not in expected else None
    assert head is None or torch.equal(head, found["model.embed_tokens.weight"])
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5, msg=name)


# ---- laws ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixture", MIXTURES)
def test_experts_that_are_all_the_base_give_its_logits(dense: Any, tmp_path: Path, mixture: str) -> None:
    """Top-k weights sum to one; a shared expert is switched off. The folder loads bit for bit."""
    from transformers import AutoModelForCausalLM

    family, shared, model_type = MIXTURES[mixture]
    folders = dense(family)
    config: dict[str, Any] = {
        "base_model": folders["x"],
        "gate_mode": "random",
        "experts": [{"source_model": folders["x"]}] * 3,
    }
    if shared:
        config["shared_experts"] = [{"source_model": folders["y"], "residual_scale": 0.0}]
    recipe = Recipe.parse(config)
    live = load_merged(recipe)
    save_merged(recipe, tmp_path / "out")
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    assert again.config.model_type == model_type
    with torch.no_grad():
        logits = live(TOKENS).logits
        assert torch.equal(again(TOKENS).logits, logits)
        alone = load_merged(model_alone(folders["x"]))(TOKENS).logits
    torch.testing.assert_close(logits, alone, rtol=0, atol=2e-6)


def test_an_expert_is_its_models_mlp_with_its_last_matrix_scaled(dense: Any) -> None:
    folders = dense("llama")
    recipe = Recipe.parse(config_of(folders, "random"))
    found = dict(merged_tensors(recipe))
    x = load_file(Path(folders["x"]) / "model.safetensors")
    for new, old, scale in (("w1", "gate", 1.0), ("w3", "up", 1.0), ("w2", "down", 0.25)):
        expert = found[f"model.layers.1.block_sparse_moe.experts.0.{new}.weight"]
        assert torch.equal(expert, scale * x[f"model.layers.1.mlp.{old}_proj.weight"])


def test_noise_is_normal_and_stays_when_other_experts_go(dense: Any) -> None:
    folders = dense("llama")
    noisy = {"source_model": folders["y"], "noise_scale": 0.01, "residual_scale": 0.5}
    name = "model.layers.0.block_sparse_moe.experts.{}.w{}.weight"

    def tensors(*experts: dict[str, Any], **more: Any) -> dict[str, Tensor]:
        config = {"base_model": folders["base"], "gate_mode": "random", "experts_per_token": 1}
        return dict(merged_tensors(Recipe.parse({**config, "experts": list(experts), **more})))

    both = tensors({"source_model": folders["x"]}, noisy)
    alone = tensors(noisy)
    y = load_file(Path(folders["y"]) / "model.safetensors")
    for part, dense_name, scale in ((1, "gate", 1.0), (2, "down", 0.5)):
        assert torch.equal(both[name.format(1, part)], alone[name.format(0, part)])
        noise = alone[name.format(0, part)] / scale - y[f"model.layers.0.mlp.{dense_name}_proj.weight"]
        assert float(noise.std()) == pytest.approx(0.01, rel=0.05)
        assert abs(float(noise.mean())) < 0.01 * 4 / math.sqrt(noise.numel())
    # A router's row of an expert stays as well; another seed gives other noise.
    row = "model.layers.0.block_sparse_moe.gate.weight"
    assert torch.equal(both[row][1], alone[row][0])
    other = tensors(noisy, random_seed=1)
    assert not torch.equal(other[name.format(0, 1)], alone[name.format(0, 1)])


def test_drawn_gates_have_mergekits_distributions(dense: Any) -> None:
    folders = dense("llama")
    experts = [{"source_model": folders["x"]}] * 40
    rows = {}
    for mode in ("random", "uniform_random"):
        config = {"base_model": folders["base"], "gate_mode": mode, "experts": experts}
        stream = merged_tensors(Recipe.parse(config), names=[ROUTER])
        rows[mode] = dict(stream)[ROUTER]
    assert float(rows["random"].std()) == pytest.approx(1.0, rel=0.05)
    bound = 1 / math.sqrt(SIZES["hidden_size"])
    assert 0.99 * bound < float(rows["uniform_random"].abs().max()) <= bound
    assert float(rows["uniform_random"].std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)


ROUTER = "model.layers.1.block_sparse_moe.gate.weight"


def test_numbers_of_a_stream_depend_on_their_index_alone() -> None:
    key = MaskKey(3, "m", 0, "t")
    far = (1 << 32) - 5
    for draw in (uniforms, normals):
        assert torch.equal(draw(key, 0, 1000)[100:200], draw(key, 100, 200))
        assert torch.equal(draw(key, far, far + 10)[5:], draw(key, far + 5, far + 10))
        assert not torch.equal(draw(key, 0, 10), draw(key, 1 << 32, (1 << 32) + 10))


def test_an_expert_may_be_the_result_of_a_merge(dense: Any) -> None:
    folders = dense("llama")
    mean = {
        "merge_method": "linear",
        "models": [{"model": folders[name], "parameters": {"weight": 1.0}} for name in "xy"],
    }
    config = config_of(folders, "hidden", intermediate={"mean": mean})
    config["experts"][0] |= {"source_model": "mean", "residual_scale": 1.0}
    found = dict(merged_tensors(Recipe.parse(config)))
    merged = dict(merged_tensors(Recipe.parse(mean)))
    for new, old in (("w1", "gate"), ("w2", "down")):
        expert = found[f"model.layers.0.block_sparse_moe.experts.0.{new}.weight"]
        assert torch.equal(expert, merged[f"model.layers.0.mlp.{old}_proj.weight"])


def test_prompts_are_run_once_for_all_candidates(dense: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    calls = []
    forward = LlamaForCausalLM.forward

    def counted(self: Any, *args: Any, **keywords: Any) -> Any:
        calls.append(keywords["input_ids"].shape)
        return forward(self, *args, **keywords)

    monkeypatch.setattr(LlamaForCausalLM, "forward", counted)
    sources = Sources(keep=True)
    config = config_of(dense("llama"), "hidden")
    first = dict(merged_tensors(Recipe.parse(config), sources))
    n = len(calls)
    assert n == 3  # two experts' positive prompts, one's negative ones
    config["experts"][0]["residual_scale"] = 1.5
    config |= {"experts": config["experts"][::-1], "experts_per_token": 1}
    second = dict(merged_tensors(Recipe.parse(config), sources))
    assert len(calls) == n
    assert torch.equal(first[ROUTER], second[ROUTER].flip(0))


# ---- recipe and errors --------------------------------------------------------------------------


def test_a_recipe_reads_back(dense: Any) -> None:
    config = config_of(
        dense("llama"), "hidden", merge_method="moe", random_seed=3, architecture="mixtral"
    )
    recipe = Recipe.parse(config)
    assert isinstance(recipe, MoeRecipe)
    assert Recipe.parse(yaml.safe_load(recipe.to_yaml())) == recipe
    assert recipe.references() == [dense("llama")[name] for name in ("base", "x", "y")]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no experts": ({"experts": []}, "experts is []; it must be a list of experts"),
    "no base": ({"base_model": None}, "base_model is missing"),
    "another method": ({"merge_method": "ties"}, "merge_method is 'ties'; input should be 'moe'"),
    "another body": ({"models": [{"model": "a"}]}, "models has no place beside experts"),
    "a slip": ({"expert_per_token": 1}, "did you mean 'experts_per_token'?"),
    "too many a token": ({"experts_per_token": 3}, "experts_per_token is 3; there are 2 experts"),
    "no such mode": ({"gate_mode": "hiden"}, "gate_mode is 'hiden'; input should be 'hidden'"),
    "no such architecture": ({"architecture": "gpt"}, "use one of: mixtral, qwen, qwen3"),
    "one that needs code": ({"architecture": "deepseek"}, "would run code from the Hub"),
    "one that does not fit": ({"architecture": "qwen3"}, "qwen3 takes qwen3 models, the base is llama"),
    "no shared expert": (
        {"architecture": "Qwen"},
        "qwen has exactly one shared expert, the recipe has 0",
    ),
}


@pytest.mark.parametrize(("change", "told"), REFUSED.values(), ids=REFUSED)
def test_a_recipe_that_makes_no_mixture(dense: Any, change: dict[str, Any], told: str) -> None:
    config = {**config_of(dense("llama"), "hidden"), **change}
    with pytest.raises(RecipeError) as caught:
        plan_merge(Recipe.parse(config), Sources())
    (fault,) = caught.value.faults
    assert told in fault


def expert_faults(config: dict[str, Any], **change: Any) -> list[str]:
    config = deepcopy(config)
    config["experts"][1] |= change
    with pytest.raises(MergeError) as caught:
        plan_merge(Recipe.parse(config), Sources())
    return caught.value.faults


def test_experts_that_do_not_fit(dense: Any, llama_builder: Any, tmp_path: Path) -> None:
    llamas = dense("llama")
    config = config_of(llamas, "hidden")
    (fault,) = expert_faults(config, positive_prompts=None)
    assert fault.startswith("experts[1].positive_prompts is missing; gate_mode hidden")
    (fault,) = expert_faults(config, positive_prompts="a")
    assert "experts[1].positive_prompts is 'a'; it must be a list of texts" in fault
    (fault,) = expert_faults(config, positive_prompts=["a b c", "c a"], negative_prompts=["b b"])
    assert "the router cannot tell them apart" in fault
    (fault,) = expert_faults(config, noise_scale=-1)
    assert fault.startswith("experts[1].noise_scale is -1")
    (fault,) = expert_faults(config, source_model=dense("qwen2")["y"])
    assert "experts[1].source_model" in fault
    assert "a model of type qwen2" in fault
    llama_builder().save_pretrained(tmp_path / "deep")
    (fault,) = expert_faults(config, source_model=str(tmp_path / "deep"))
    assert "which has 4 layers; the base has 2" in fault
    llama_builder(num_hidden_layers=2, intermediate_size=60).save_pretrained(tmp_path / "thin")
    (fault,) = expert_faults(config, source_model=str(tmp_path / "thin"))
    assert "model.layers.0.mlp.gate_proj.weight is [60, 48] where the base has [100, 48]" in fault
    for file in Path(dense("mistral")["base"]).glob("tokenizer*"):
        file.rename(tmp_path / file.name)
    with pytest.raises(CheckpointError, match="has no tokenizer in"):
        dict(merged_tensors(Recipe.parse(config_of(dense("mistral"), "hidden"))))
    for file in tmp_path.glob("tokenizer*"):
        file.rename(Path(dense("mistral")["base"]) / file.name)


def test_the_card_says_what_the_mixture_is(dense: Any) -> None:
    recipe, sources = Recipe.parse(config_of(dense("qwen2"), "hidden", shared=True)), Sources()
    card = model_card(recipe, sources, plan_merge(recipe, sources), "mix", recipe.to_yaml())
    assert "of 2 experts and 1 shared, of which a token reaches 2" in card
    assert "- moe" in card


# ---- mixtures that exist ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Mixtral, by expert", "Qwen2-MoE, by expert", "Mixtral, fused"])
def test_a_live_mixture_is_filled_from_either_format(stored: Any, tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM

    family = stored(name, "float32")
    models = [{"model": family.folders[short], "parameters": {"weight": 1.0}} for short in "xy"]
    recipe = Recipe.parse({"merge_method": "linear", "models": models})
    live = load_merged(recipe)
    save_merged(recipe, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for parameter, other in zip(live.parameters(), again.parameters(), strict=True):
        assert torch.equal(parameter, other)


def test_a_missing_expert_is_told(stored: Any) -> None:
    family = stored("Mixtral, by expert", "float32")
    recipe, sources = model_alone(family.folders["x"]), Sources()
    model = build_model(merged_config(recipe, sources), Path(family.folders["x"]), "cpu")
    lacking = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    stream = [(name, tensor) for name, tensor in merged_tensors(recipe, sources) if name != lacking]
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.mlp\.experts\.gate_up_proj of the model built"
    ):
        fill(model, stream)


def test_a_joined_tensor_taken_apart_is_the_one_that_was_joined() -> None:
    name, tensor = "model.layers.3.mlp.experts.gate_up_proj", torch.randn(3, 10, 4)
    parts = dict(single_experts(name, tensor))
    assert list(parts)[:2] == [
        f"model.layers.3.mlp.experts.0.{part}_proj.weight" for part in ("gate", "up")
    ]
    parts |= dict(respelled([(name.replace("gate_up", "down"), torch.randn(3, 4, 5))], QWEN))
    assert torch.equal(joined(parts)[name], tensor)


# Methods that compute each entry for itself, those of random masks at full density.
ENTRYWISE = ("task_arithmetic", "dare_ties", "della", "nearswap", "ram", "ramplus_tl")


@pytest.mark.parametrize(
    ("name", "method"),
    [("Qwen2-MoE, by expert", "task_arithmetic"), *(("Mixtral, by expert", m) for m in ENTRYWISE)],
)
def test_merging_expert_by_expert_is_merging_as_mergekit_does(
    stored: Any, theirs: Any, name: str, method: str
) -> None:
    """It joins the experts first, which is the same where each entry is computed for itself."""
    family = stored(name, "float32")
    takes_weights = "weight" in METHODS[method].per_model
    weights = {"x": 0.7} if method == "nearswap" else {"x": 0.7, "y": -0.2}
    config = {
        "merge_method": method,
        "base_model": family.folders["base"],
        "models": [
            {"model": family.folders[short], "parameters": {"weight": weight} if takes_weights else {}}
            for short, weight in weights.items()
        ],
        "parameters": {"t": 0.01} if method == "nearswap" else {},
        "dtype": "float32",
    }
    found, expected = joined(dict(merged_tensors(Recipe.parse(config)))), theirs(config)
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3-MoE"])
def test_joined_experts_merge_with_single_ones(stored: Any, tmp_path: Path, name: str) -> None:
    """As if all were stored one by one, whichever is stored how; the result loads."""
    from transformers import AutoModelForCausalLM

    joined_ones = stored(f"{name}, fused", "float32")
    single = {}
    for short in ("base", "x", "y"):
        shutil.copytree(joined_ones.folders[short], tmp_path / short)
        tensors = joined_ones.tensors[joined_ones.folders[short]]
        apart = respelled(tensors.items(), MIXTRAL if name == "Mixtral" else QWEN)
        save_file({key: t.contiguous() for key, t in apart}, tmp_path / short / "model.safetensors")
        single[short] = str(tmp_path / short)

    def recipe(base: str, x: str, y: str) -> Recipe:
        own = [(x, {"weight": 0.7, "density": 0.4}), (y, {"weight": 0.5, "density": 0.6})]
        models = [{"model": model, "parameters": parameters} for model, parameters in own]
        return Recipe.parse({"merge_method": "ties", "base_model": base, "models": models})

    expected = dict(merged_tensors(recipe(*single.values())))
    assert any(".experts.2." in key for key in expected)
    whole = [joined_ones.folders[short] for short in ("base", "x", "y")]
    for i in range(3):
        mixed = recipe(*(whole[j] if j == i else folder for j, folder in enumerate(single.values())))
        sources = Sources()
        found = dict(merged_tensors(mixed, sources))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    save_merged(mixed, tmp_path / "out", sources=sources)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for parameter, other in zip(load_merged(mixed).parameters(), again.parameters(), strict=True):
        assert torch.equal(parameter, other)
    needs = estimate(mixed, sources, tmp_path / "elsewhere")
    assert needs.n_tensors == len(expected)
    # Alone, joined experts stay joined.
    assert any(".experts.gate_up_proj" in key for key, _ in merged_tensors(recipe(*whole), sources))
