"""`evolve extract-lora`, as a command."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import yaml

from evolve.cli import main
from evolve.loop import run as search_run
from evolve.search_file import SearchFile
from merge_core.merge import merged_tensors, save_merged
from merge_core.plan import model_alone
from merge_core.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]


def run(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["evolve", "extract-lora", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_what_is_extracted_stands_for_the_model_in_a_recipe(llamas, tmp_path, monkeypatch, capsys):
    out = tmp_path / "adapter"
    assert run(monkeypatch, llamas.x, llamas.base, out, "--max-rank", 200, "--embed-lora") == 0
    assert "factors of" in capsys.readouterr().out
    expected = dict(merged_tensors(model_alone(llamas.x)))
    for name, tensor in merged_tensors(model_alone(f"{llamas.base}+{out}")):
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["recipe.yml", "recipe"])
def test_a_recipe_is_extracted_like_a_model(name, llamas, tmp_path, monkeypatch):
    recipe = tmp_path / name
    recipe.write_text(f"merge_method: passthrough\nmodels: [{{model: {llamas.y}}}]\n")
    assert run(monkeypatch, recipe, llamas.base, tmp_path / "a", "--max-rank", 2) == 0
    assert run(monkeypatch, llamas.y, llamas.base, tmp_path / "b", "--max-rank", 2) == 0
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--include-regex", "("], "--include-regex is '('; it must be a regular expression"),
        (["--max-rank", "0"], "max-rank"),
    ],
)
def test_bad_options_are_one_error_line(arguments, message, llamas, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, llamas.x, llamas.base, tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_output_folder_in_use_is_refused(llamas, tmp_path, monkeypatch, capsys):
    (tmp_path / "kept").write_text("mine")
    assert run(monkeypatch, llamas.x, llamas.base, tmp_path) == 2
    assert "--overwrite" in capsys.readouterr().err


@pytest.mark.slow
def test_a_search_over_adapters_is_the_search_over_the_models_they_make(tmp_path, monkeypatch):
    """Same candidates, same outcomes, same winner: only the references differ."""
    monkeypatch.chdir(ROOT)
    base = "configs/quickstart/models/base"
    results = {}
    for name in ("reverse", "sort"):
        model = f"configs/quickstart/models/{name}"
        assert run(monkeypatch, model, base, tmp_path / name, "--max-rank", 8, "--quiet") == 0
        save_merged(model_alone(f"{base}+{tmp_path / name}"), tmp_path / f"full-{name}")
    for kind, prefix in (("adapters", f"{base}+{tmp_path}/"), ("full", f"{tmp_path}/full-")):
        weight = {"low": 0.0, "high": 1.5, "start": 0.7}
        entries = [
            {"model": f"{prefix}{name}", "parameters": {"weight": weight}} for name in ("reverse", "sort")
        ]
        search = {
            "merge_method": "task_arithmetic",
            "base_model": base,
            "models": entries,
            "dtype": "float32",
            "tasks": ["qs_reverse", "qs_sort"],
            "search": {"n_iterations": 4, "sampler": "cma"},
            "scoring": {"task_paths": ["tasks"], "limit": 10, "holdout": 10},
        }
        file = tmp_path / f"{kind}.yml"
        file.write_text(yaml.safe_dump(search))
        results[kind] = search_run(SearchFile.load(file), folder=tmp_path / kind)
    found, expected = (
        [(t.params, t.user_attrs["scores"]) for t in results[kind].study.trials()] for kind in results
    )
    assert found == expected
    best = Recipe.load(tmp_path / "adapters" / "best.yml")
    assert all("+" in entry.model for entry in best.models or ())
    save_merged(best, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").is_file()
