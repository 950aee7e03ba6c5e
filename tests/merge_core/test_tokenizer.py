"""Vocabularies by token: parity with mergekit 0.1.5 row by row, the merged tokenizer, and laws."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from merge_core.errors import CheckpointError, RecipeError
from merge_core.estimate import estimate
from merge_core.merge import merged_tensors, save_merged
from merge_core.plan import Sources, files_folder, plan_merge
from merge_core.recipe import Recipe
from merge_core.tokenizer.settings import TEMPLATES

from .vocabularies import (
    EMBEDDING,
    HEAD,
    TEXTS,
    TURNS,
    Named,
    assert_same_rows,
    build_vocabularies,
    read,
    recipe_of,
    rows,
    saved,
    saved_by_mergekit,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> Named:
    return build_vocabularies(tmp_path_factory.mktemp("vocabularies"))


@pytest.fixture(scope="module")
def sources() -> Sources:
    return Sources()


TOKENS = {
    "<x>": {"source": {"kind": "zero"}},
    "<tool>": {"source": "b", "force": True},
    "er": {"source": "b"},
    "the": {"source": "b", "force": True},
    "<new>": {"source": {"kind": "model_token", "model": "a", "token": "cat"}},
    "<newer>": {"source": {"kind": "model_token", "model": "b", "token_id": 7}, "force": True},
    "o": {"source": {"kind": "zero"}, "force": True},
}
TIES = {"merge_method": "ties", "parameters": {"density": 0.7}}
CASES: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "union": ("a b", "a", {"tokenizer_source": "union"}),
    "union, the other base": ("a b", "b", {"tokenizer_source": "union"}),
    "union of three": ("b c a", "a", {"tokenizer_source": "union"}),
    "union by ties": ("b c", "a", {**TIES, "tokenizer_source": "union"}),
    "union without a base": ("b c", None, {"tokenizer": {}}),
    "union of equal ids": ("a padded", "a", {"tokenizer_source": "union"}),
    "base": ("a b", "a", {"tokenizer_source": "base"}),
    "base with padding": ("padded b", "padded", {"tokenizer_source": "base"}),
    "a model": ("a b", "a", {"tokenizer_source": "b"}),
    "a model that is not merged": ("a c", "a", {"tokenizer_source": "b"}),
    "single tokens": ("a b c", "a", {"tokenizer": {"tokens": TOKENS}}),
    "single tokens of a model": (
        "a b c", "a", {"tokenizer": {"source": "b", "tokens": TOKENS, "pad_to_multiple_of": 32}},
    ),
    "padded up": ("padded b", "padded", {"tokenizer": {"pad_to_multiple_of": 16}}),
    "padded to its size": ("a b", "a", {"tokenizer": {"source": "base", "pad_to_multiple_of": 15}}),
    "tied": ("tied tied_b", "tied", {"tokenizer_source": "union"}),
    "tied and untied": ("tied b", "tied", {"tokenizer_source": "union"}),
    "an added token that is plain elsewhere": ("plain b", "plain", {"tokenizer_source": "union"}),
    "added tokens with other rules": ("d b", "d", {"tokenizer_source": "union"}),
    "tokens without rows in another": ("a short_b", "a", {"tokenizer_source": "union"}),
}  # fmt: skip


# The table is whole with the slow tests.
FAST = ("union of three", "a model", "single tokens", "padded up", "tied and untied")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=() if name in FAST else pytest.mark.slow)
        for name, case in CASES.items()
    ],
)
def test_as_mergekit(case, names, sources, tmp_path):
    models, base, keys = case
    config = recipe_of(names, models, base, **keys)
    ours, theirs = (
        saved(config, tmp_path / "ours", sources),
        saved_by_mergekit(config, tmp_path / "theirs"),
    )
    assert_same_rows(ours, theirs)
    if base is None:
        return  # mergekit then takes either model's tokenizer, by chance
    for text in TEXTS:
        assert ours.tokenizer.tokenize(text) == theirs.tokenizer.tokenize(text)
    assert ours.tokenizer.special_tokens_map == theirs.tokenizer.special_tokens_map
    assert ours.tokenizer.chat_template == theirs.tokenizer.chat_template


# ---- laws ---------------------------------------------------------------------------------------


def test_one_model_of_weight_one_keeps_its_rows_and_takes_the_others_for_what_it_lacks(names, tmp_path):
    config = recipe_of(names, "a b", "a", tokenizer_source="union", parameters={"normalize": False})
    for entry, weight in zip(config["models"], (0.0, 1.0), strict=True):
        entry["parameters"]["weight"] = weight
    merged = saved(config, tmp_path / "out")
    a, b = read(Path(names["a"])), read(Path(names["b"]))
    for name in (EMBEDDING, HEAD):
        expected = {**rows(a, name), **rows(b, name)}
        found = rows(merged, name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[token], row) for token, row in expected.items())


def test_appended_ids_are_those_of_the_recipe_and_the_models(names):
    config = recipe_of(names, "a d b", "a", tokenizer={"tokens": {"<new>": TOKENS["<x>"]}})
    plan = plan_merge(Recipe.parse(config), Sources())
    vocabulary = plan[0].vocabulary
    assert vocabulary is not None
    by_id = sorted(vocabulary.ids, key=lambda token: vocabulary.ids[token])
    own = {name: AutoTokenizer.from_pretrained(names[name]).get_vocab() for name in "abd"}
    plain = [token for token, _ in sorted(own["b"].items(), key=lambda entry: entry[1])]
    special = ["<tool>", "<z>", "<pad>", "<|im_start|>", "<|im_end|>", "<new>"]
    plain = [token for token in plain if token not in own["a"] and token not in special]
    assert by_id == [*sorted(own["a"], key=own["a"].__getitem__), *plain, *special]


def test_models_of_the_same_ids_merge_as_without_a_section(names, sources):
    plain = recipe_of(names, "a bare", "a")
    for source in ("union", "base", "a"):
        config = {**plain, "tokenizer_source": names.get(source, source)}
        found, expected = (dict(merged_tensors(Recipe.parse(c), sources)) for c in (config, plain))
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        # Nothing is new, so that the folder is the base's, and the tables are views of its files.
        assert files_folder(Recipe.parse(config), sources) == Path(names["a"])
        vocabulary = plan_merge(Recipe.parse(config), sources)[0].vocabulary
        assert vocabulary is not None
        assert all(vocabulary.keeps_rows(model) for model in vocabulary.rows)


def test_a_search_keeps_rebuilt_tables_and_tells_vocabularies_apart(names):
    ties = {**TIES, "parameters": {"density": 0.3}}
    settings = [{"source": "union"}, {"tokens": TOKENS}, {"source": "b"}, {"source": "union"}]
    sources = Sources(keep=True)
    for tokenizer in settings:
        recipe = Recipe.parse(recipe_of(names, "b c", "a", **ties, tokenizer=tokenizer))
        kept = dict(merged_tensors(recipe, sources))
        assert all(torch.equal(kept[name], tensor) for name, tensor in merged_tensors(recipe))
    assert sources.residence.places()["pinned"] > 0


def test_bfloat16_rows_are_rounded_once(names, sources):
    config = recipe_of(names, "a b c", "a", tokenizer={"pad_to_multiple_of": 64}, dtype="bfloat16")
    merged = dict(merged_tensors(Recipe.parse(config), sources))[EMBEDDING]
    plan = plan_merge(Recipe.parse(config), sources)
    n = plan[0].vocabulary.n_tokens
    exact = merged[:n].double().mean(dim=0)
    assert merged.dtype == torch.bfloat16
    assert merged.shape[0] == 64 > n
    # The merge of the models' means is the mean of the merge, but for each one's rounding.
    torch.testing.assert_close(merged[n:].double(), exact.expand(64 - n, -1), rtol=0.02, atol=0.01)


def test_a_result_with_a_vocabulary_of_its_own_is_a_model_like_a_written_one(names, tmp_path):
    inner = recipe_of(names, "a b", "a", tokenizer_source="union")
    saved(inner, tmp_path / "inner")
    outer = recipe_of(names, "c", None, tokenizer_source="union")

    def of(model: str) -> dict[str, Any]:
        return {**outer, "models": [{"model": model, "parameters": {"weight": 0.6}}, *outer["models"]]}

    at_once = saved({**of("inner"), "intermediate": {"inner": inner}}, tmp_path / "at_once")
    in_steps = saved(of(str(tmp_path / "inner")), tmp_path / "in_steps")
    assert at_once.tokenizer.get_vocab() == in_steps.tokenizer.get_vocab()
    assert all(torch.equal(at_once.tensors[name], t) for name, t in in_steps.tensors.items())


# ---- the merged folder --------------------------------------------------------------------------


def test_the_folder_is_a_model_that_loads_and_answers(names, tmp_path):
    model_token = {"kind": "model_token", "model": "tied", "token": "cat"}
    tokenizer = {"tokens": {"<new>": {"source": model_token}}, "pad_to_multiple_of": 8}
    config = recipe_of(names, "tied tied_b", "tied", tokenizer=tokenizer)
    merged = saved(config, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert HEAD not in merged.tensors
    assert model.get_input_embeddings().weight.shape[0] == merged.config["vocab_size"] == 56
    ids = merged.tokenizer("<new> der hund <|im_start|>", return_tensors="pt").input_ids
    assert ids.max() < len(merged.tokenizer) <= 56
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3


def test_special_ids_and_generation_settings_follow_the_tokenizer(names, tmp_path):
    base, other = (shutil.copytree(names[name], tmp_path / name) for name in "ab")
    for folder, length in ((base, 3), (other, 7)):
        (folder / "generation_config.json").write_text(json.dumps({"max_new_tokens": length}))
    for source, owner in (("base", base), (str(other), other), ("union", base)):
        out = tmp_path / "out"
        config = recipe_of({"a": str(base), "b": str(other)}, "a b", "a", tokenizer_source=source)
        save_merged(Recipe.parse(config), out, overwrite=True)
        found, theirs = (json.loads((f / "config.json").read_text()) for f in (out, owner))
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            assert found[key] == theirs[key]
        settings = json.loads((out / "generation_config.json").read_text())
        assert settings == json.loads((owner / "generation_config.json").read_text())
    assert AutoTokenizer.from_pretrained(out).eos_token == "</s>"


@pytest.mark.parametrize("base", ["short", "short_b"])
def test_tokens_without_a_row_are_left_out_with_what_needs_them(names, tmp_path, base):
    merged = saved(recipe_of(names, f"{base} a", base, tokenizer_source="base"), tmp_path / "out")
    assert sorted(merged.tokenizer.get_vocab().values()) == list(range(merged.config["vocab_size"]))
    assert all(max(merged.tokenizer(text).input_ids) < merged.config["vocab_size"] for text in TEXTS)
    warnings = plan_merge(Recipe.parse(recipe_of(names, base, base, tokenizer_source="base")), Sources())
    assert "have no row in its tables" in warnings.warnings[0]


def test_ids_with_gaps_keep_their_rows_and_get_no_new_ones(names, tmp_path):
    merged = saved(recipe_of(names, "gaps", "gaps", tokenizer_source="base"), tmp_path / "out")
    own = read(Path(names["gaps"]))
    assert merged.config["vocab_size"] == own.config["vocab_size"] == 35
    weight = 0.3 / 0.3
    found, expected = rows(merged, EMBEDDING), rows(own, EMBEDDING)
    assert all(torch.allclose(found[token], weight * row) for token, row in expected.items())
    mean = torch.stack(list(found.values())).mean(dim=0)
    torch.testing.assert_close(merged.tensors[EMBEDDING][25:30], mean.expand(5, -1))
    with pytest.raises(
        CheckpointError, match=r"have gaps \(no token has id 25\).*use tokenizer_source: base"
    ):
        plan_merge(Recipe.parse(recipe_of(names, "gaps b", "gaps", tokenizer_source="union")), Sources())


def test_a_merge_foretells_the_bytes_of_its_tokenizer(names, sources, tmp_path):
    config = recipe_of(names, "a b", "a", tokenizer_source="union")
    needs = estimate(Recipe.parse(config), sources, tmp_path / "out", timed=False)
    saved(config, tmp_path / "out", sources)
    written = [
        p for p in (tmp_path / "out").iterdir() if p.name not in ("README.md", "mergekit_config.yml")
    ]
    assert needs.write_bytes == pytest.approx(sum(p.stat().st_size for p in written), abs=200)


# ---- chat templates -----------------------------------------------------------------------------


def said(*messages: str) -> list[dict[str, str]]:
    return [dict(zip(("role", "content"), text.split(": ", 1), strict=True)) for text in messages]


TALKS = [
    said("user: hi "),
    said("system:  be brief", "user: hi"),
    said("user: q", "assistant:  a ", "user: r\nx"),
    said("system: s", "user: q", "assistant: a", "user: r"),
    said("user: q", "assistant: a"),
    said("assistant: a", "user: q"),
    said("user: q", "user: r"),
    said("system: s"),
    said("user_context: c", "user: q"),
    said("user: q", "user_context: c", "assistant: a", "user: r"),
    said("user: a", "assistant: b", "system: late", "user: c"),
    said("tool: t", "user: q"),
]


def rendered(tokenizer: Any, talk: list[dict[str, str]], invites: bool) -> str:
    try:
        return tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=invites)
    except Exception:  # jinja2's own, raised by the template
        return "refused"


@pytest.mark.parametrize(
    "template",
    [
        pytest.param(template, marks=() if template in ("chatml", "auto") else pytest.mark.slow)
        for template in (*TEMPLATES, TURNS, "auto")
    ],
)
def test_chat_templates_say_what_mergekits_say(template, names, sources, tmp_path):
    config = recipe_of(names, "a b tied_b", "a", tokenizer_source="union", chat_template=template)
    if template == "llama3":  # one of them without a vocabulary of its own
        config = recipe_of(names, "a c", "a", tokenizer_source="base", chat_template=template)
    ours, theirs = (
        saved(config, tmp_path / "ours", sources),
        saved_by_mergekit(config, tmp_path / "theirs"),
    )
    for talk in TALKS:
        for invites in (False, True):
            assert rendered(ours.tokenizer, talk, invites) == rendered(theirs.tokenizer, talk, invites)


def test_a_template_alone_changes_nothing_else(names, sources, tmp_path):
    merged = saved(recipe_of(names, "a", "a", chat_template="chatml"), tmp_path / "out", sources)
    own = Path(names["a"])
    assert merged.tokenizer.apply_chat_template(said("user: q"), tokenize=False).startswith(
        "<|im_start|>"
    )
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (own / "tokenizer.json").read_bytes()
    with pytest.raises(CheckpointError, match=r"chat_template is 'chatml'; .*bare has no tokenizer"):
        files_folder(Recipe.parse(recipe_of(names, "bare", chat_template="chatml")), sources)


# ---- faults and warnings ------------------------------------------------------------------------

FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "both keys": ({"tokenizer_source": "union", "tokenizer": {}}, "not both"),
    "an unknown key": ({"tokenizer": {"sorce": "union"}}, "did you mean 'source'"),
    "no source": ({"tokenizer": {"tokens": {"x": {}}}}, r"^tokenizer\.tokens\.x\.source is missing"),
    "an unknown kind": ({"tokenizer": {"tokens": {"x": {"source": {"kind": "mean"}}}}}, "kind 'mean'"),
    "a kind without its keys": (
        {"tokenizer": {"tokens": {"x": {"source": {"kind": "model_token", "model": "m"}}}}},
        "either token or token_id",
    ),
    "zero with a model": (
        {"tokenizer": {"tokens": {"x": {"source": {"kind": "zero", "model": "m"}}}}}, "remove it",
    ),
    "rows of nothing": ({"tokenizer": {"pad_to_multiple_of": 0}}, "greater than or equal to 1"),
    "a template's name": ({"chat_template": "chatlm"}, "did you mean 'chatml'"),
    "too short a template": ({"chat_template": "{{ x }}"}, "use one of: alpaca, auto"),
}  # fmt: skip


@pytest.mark.parametrize(("keys", "fault"), FAULTS.values(), ids=FAULTS)
def test_faults_of_the_section(keys, fault, names):
    with pytest.raises(RecipeError, match=fault):
        Recipe.parse(recipe_of(names, "a b", "a", **keys))


UNFIT: dict[str, tuple[str, dict[str, Any], str]] = {
    "no such token": ("a b", {"tokens": {"er": {"source": "a"}}}, "has no token 'er'; name one"),
    "no such row": (
        "a b", {"tokens": {"q": {"source": {"kind": "model_token", "model": "a", "token_id": 99}}}},
        "token_id is 99; .* has 30 rows",
    ),
    "a model that is not merged": (
        "a b", {"tokens": {"<x>": {"source": "c"}}}, r"not merged \(model.embed_tokens.weight of .*c'",
    ),
    "no tokenizer": ("bare b", {"source": "bare"}, "no tokenizer can be loaded from"),
}  # fmt: skip


@pytest.mark.parametrize(("models", "tokenizer", "fault"), UNFIT.values(), ids=UNFIT)
def test_faults_of_the_models(models, tokenizer, fault, names, sources):
    config = recipe_of(names, models, models.split()[0], tokenizer=tokenizer)
    with pytest.raises(CheckpointError, match=fault):
        plan_merge(Recipe.parse(config), sources)


def test_a_table_of_other_rows_than_config_says_is_refused(names, sources, tmp_path):
    folder = shutil.copytree(names["a"], tmp_path / "odd")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 29}))
    recipe = recipe_of({**names, "odd": str(folder)}, "a odd", "a", tokenizer_source="union")
    with pytest.raises(CheckpointError, match=r"vocab_size 29, but model\.embed_tokens\.weight has 30"):
        plan_merge(Recipe.parse(recipe), sources)


def test_what_changes_prompts_is_said(names, sources):
    config = recipe_of(names, "a b bare", "a", tokenizer_source="union")
    ends, templates, bare, plain = (
        next((w for w in plan_merge(Recipe.parse(config), sources).warnings if part in w), "")
        for part in ("end their texts", "chat template", "has no tokenizer", "merge rules")
    )
    assert f"{names['a']} '</s>', {names['b']} '<|im_end|>'" in ends
    assert f"of {names['b']} is another than that of {names['a']}" in templates
    assert "its ids are taken to be those of" in bare
    assert "20 tokens of" in plain
    config = recipe_of(names, "a c padded", "a", tokenizer_source="base", chat_template="chatml")
    assert not plan_merge(Recipe.parse(config), sources).warnings


@pytest.mark.parametrize("keys", [{"tokenizer": {"source": "a", "tokens": TOKENS}}, {"tokenizer": {}}])
def test_a_section_goes_through_yaml(names, keys, tmp_path):
    recipe = Recipe.parse(recipe_of(names, "a b", "a", **keys, chat_template="auto"))
    (tmp_path / "recipe.yml").write_text(recipe.to_yaml())
    assert Recipe.load(tmp_path / "recipe.yml") == recipe
