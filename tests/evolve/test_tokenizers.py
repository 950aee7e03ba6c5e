"""Searches whose models number their tokens differently, or have tokens of their own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.trial import TrialState
from safetensors.torch import load_file, save_file

from evolve.baselines import baseline_jobs
from evolve.engines import EngineSettings
from evolve.errors import ResumeRefusedError
from evolve.evaluation import EvalOptions, evaluate_models
from evolve.loop import StudyResult, run
from evolve.search_file import SearchFile
from evolve.workers.worker import Prompting
from merge_core.merge import merged_tensors, save_merged
from merge_core.plan import Sources, files_folder, merged_config
from merge_core.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
MODELS = "configs/quickstart/models"
EMBEDDING = "model.embed_tokens.weight"
NEW = ["<call>", "<end of call>"]


@pytest.fixture(autouse=True)
def _at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def renumbered(source: Path, folder: Path, new: list[str]) -> Path:
    """Copy a tied model with a word-level tokenizer: other ids for the same tokens, and new ones.

    The special tokens keep their ids, which config.json names; rows of new tokens are zero.
    """
    shutil.copytree(source, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].__getitem__)
    n_special = max(token["id"] for token in tokenizer["added_tokens"]) + 1
    order = [*vocab[:n_special], *reversed(vocab[n_special:])]
    tensors = load_file(folder / "model.safetensors")
    rows = tensors[EMBEDDING][[vocab.index(token) for token in order]]
    tensors[EMBEDDING] = torch.cat([rows, rows.new_zeros(len(new), rows.shape[1])])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    tokenizer["model"]["vocab"] = {token: i for i, token in enumerate(order)}
    tokenizer["added_tokens"] += [
        {**tokenizer["added_tokens"][0], "id": len(order) + i, "content": token, "special": True}
        for i, token in enumerate(new)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": len(order) + len(new)}))
    return folder


@pytest.fixture(scope="module")
def other_sort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return renumbered(ROOT / MODELS / "sort", tmp_path_factory.mktemp("other") / "sort", [])


@pytest.fixture(scope="module")
def wider_sort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return renumbered(ROOT / MODELS / "sort", tmp_path_factory.mktemp("wider") / "sort", NEW)


def config_of(sort: Path | str, **keys: Any) -> dict[str, Any]:
    return {
        "merge_method": "task_arithmetic",
        "base_model": f"{MODELS}/base",
        "models": [
            {"model": f"{MODELS}/reverse", "parameters": {"weight": 0.7}},
            {"model": str(sort), "parameters": {"weight": 0.6}},
        ],
        "dtype": "float32",
        **keys,
    }


def test_the_ids_of_a_model_do_not_matter(other_sort: Path, tmp_path: Path) -> None:
    recipes = {
        "plain": config_of(f"{MODELS}/sort"),
        "union": config_of(other_sort, tokenizer_source="union"),
        "base": config_of(other_sort, tokenizer_source="base", chat_template="chatml"),
        "other": config_of(other_sort, tokenizer_source=str(other_sort)),
    }
    files = []
    for name, config in recipes.items():
        (tmp_path / f"{name}.yml").write_text(Recipe.parse(config).to_yaml())
        files.append(str(tmp_path / f"{name}.yml"))
    options = EvalOptions(tasks=("qs_reverse", "qs_sort"), limit=20, task_paths=("tasks",), verify=True)
    plain, *others = evaluate_models(files, options)
    assert plain["scores"]["qs_reverse"] > 0
    assert all(other["scores"] == plain["scores"] for other in others)
    plain_model, union, _, other = (dict(merged_tensors(Recipe.parse(c))) for c in recipes.values())
    assert all(torch.equal(union[name], tensor) for name, tensor in plain_model.items())
    assert not torch.equal(other[EMBEDDING], union[EMBEDDING])


def search_of(sort: Path, **keys: Any) -> SearchFile:
    config = config_of(sort, **keys)
    for entry in config["models"]:
        entry["parameters"] = {"weight": {"low": 0.0, "high": 1.0}}
    return SearchFile(
        {
            **config,
            "tasks": ["qs_reverse", "qs_sort"],
            "search": {"n_iterations": 3, "sampler": "random"},
            "scoring": {"limit": 8, "holdout": 8},
        }
    )


def assert_ships(result: StudyResult, folder: Path, out: Path, backend: str = "hf") -> None:
    """Score what was shipped: the written model, and the recipe."""
    assert result.best is not None
    save_merged(Recipe.load(folder / "best.yml"), out)
    for model in (out, folder / "best.yml"):
        (scored,) = evaluate_models([str(model)], EvalOptions(like=folder, backend=backend))
        assert scored["scores"] == result.best.user_attrs["scores"]


def test_a_search_over_a_union_ships_what_it_scored(wider_sort: Path, tmp_path: Path) -> None:
    search = search_of(wider_sort, tokenizer={"source": "union", "pad_to_multiple_of": 8})
    run(search.changed(search={"n_iterations": 1}), folder=tmp_path / "s")
    result = run(search, folder=tmp_path / "s")
    assert [trial.state for trial in result.study.trials()] == [TrialState.COMPLETE] * 3
    assert_ships(result, tmp_path / "s", tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["vocab_size"] == 56


def test_models_alone_keep_their_tokenizer_and_the_average_takes_the_merges(wider_sort: Path) -> None:
    start = Recipe.parse(config_of(wider_sort, tokenizer_source="union"))
    *alone, average, starts = baseline_jobs(start, Prompting(None, False))
    assert [job.promptings for job in alone] == [(Prompting(m, False),) for m in start.references()]
    assert average.recipe.tokenizer_source == "union"
    assert average.promptings == starts.promptings == (Prompting(None, False),)


@pytest.mark.slow
def test_tokenizers_may_be_a_category(wider_sort: Path, tmp_path: Path) -> None:
    search = search_of(wider_sort, tokenizer_source={"choices": ["base", "union", str(wider_sort)]})
    result = run(search.changed(search={"n_iterations": 6}), folder=tmp_path / "s")
    trials = result.study.trials()
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 6, [t.user_attrs for t in trials]
    assert len({str(trial.params["tokenizer_source"]) for trial in trials}) > 1
    assert_ships(result, tmp_path / "s", tmp_path / "out")


@pytest.mark.slow
def test_a_changed_tokenizer_makes_another_search(wider_sort: Path, tmp_path: Path) -> None:
    sort = shutil.copytree(wider_sort, tmp_path / "sort")
    search = search_of(sort, tokenizer_source="union").changed(search={"n_iterations": 1})
    run(search, folder=tmp_path / "s")
    path = sort / "tokenizer.json"
    path.write_text(path.read_text().replace(NEW[0], "<other>"))
    with pytest.raises(ResumeRefusedError, match=r"^tokenizers\.\S*: "):
        run(search.changed(search={"n_iterations": 2}), folder=tmp_path / "s")


def test_a_mergekit_evolve_file_takes_a_union(wider_sort: Path) -> None:
    genome = {
        "models": [f"{MODELS}/reverse", str(wider_sort)],
        "base_model": f"{MODELS}/base",
        "merge_method": "task_arithmetic",
        "tokenizer_source": "union",
    }
    space = SearchFile({"genome": genome, "tasks": ["qs_sort"]}).space(lambda model: 4)
    recipe = space.recipe(space.starts())
    assert recipe.tokenizer_source == "union"
    assert merged_config(recipe, Sources())["vocab_size"] == 47 + len(NEW)


@pytest.mark.slow
def test_the_example_runs(tmp_path: Path) -> None:
    search = SearchFile.load("configs/tokenizer.yml").changed(search={"n_iterations": 2})
    result = run(search, folder=tmp_path / "s")
    assert [trial.state for trial in result.study.trials()] == [TrialState.COMPLETE] * 2
    assert_ships(result, tmp_path / "s", tmp_path / "out")
    assert load_file(tmp_path / "out/model.safetensors")[EMBEDDING].shape[0] == 48


@pytest.mark.vllm
def test_vllm_takes_the_merged_vocabulary(tied_pair: Path, tmp_path: Path) -> None:
    from evolve.engines.vllm import VllmEngine

    other = renumbered(tied_pair / "b", tmp_path / "b", NEW)
    config = {
        "merge_method": "linear",
        "models": [
            {"model": str(tied_pair / "a"), "parameters": {"weight": 0.4}},
            {"model": str(other), "parameters": {"weight": 0.6}},
        ],
        "tokenizer": {"source": "union", "pad_to_multiple_of": 16},
    }
    recipe, sources = Recipe.parse(config), Sources()
    settings = EngineSettings(merged_config(recipe, sources), files_folder(recipe, sources))
    engine = VllmEngine(settings)
    try:
        engine.load_recipe(recipe, sources)
        assert engine.verify(recipe) == []
        lm = engine.lm()
        assert set(NEW) <= set(lm.tokenizer.get_vocab())
        ids = lm.tokenizer.encode(f"sort abc:{NEW[1]}")
        assert ids[-1] == lm.tokenizer.get_vocab()[NEW[1]]
    finally:
        engine.close()
