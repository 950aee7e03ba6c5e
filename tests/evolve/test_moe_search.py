"""Searches over mixtures of experts, on the quickstart's models."""

from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from evolve.baselines import baseline_jobs
from evolve.errors import SearchFileError
from evolve.evaluation import EvalOptions, evaluate_models
from evolve.export import mergekit_notes
from evolve.loop import run
from evolve.search_file import SearchFile
from evolve.space import Space
from evolve.workers.worker import Prompting
from merge_core.errors import RecipeError
from merge_core.merge import save_merged
from merge_core.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
MODELS = "configs/quickstart/models"


@pytest.fixture(autouse=True)
def _at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def expert(name: Any, *prompts: str, **more: Any) -> dict[str, Any]:
    return {"source_model": name, "positive_prompts": list(prompts), **more}


MIXTURE: dict[str, Any] = {
    "base_model": f"{MODELS}/sort",
    "gate_mode": {"choices": ["hidden", "cheap_embed"]},
    "experts_per_token": {"low": 1, "high": 2, "step": 1, "start": 2},
    "experts": [
        expert(f"{MODELS}/sort", "sort: d a c =", residual_scale={"low": 0.5, "high": 1.5}),
        expert(
            f"{MODELS}/largest", "largest: 3 1 2 =", noise_scale={"low": 0.0, "high": 0.01, "start": 0.0}
        ),
        expert({"choices": [f"{MODELS}/reverse", None]}, "reverse: a b ="),
    ],
    "dtype": "float32",
}


def test_everything_about_experts_can_be_searched() -> None:
    space = Space(MIXTURE)
    assert [variable.name for variable in space.variables] == [
        "gate_mode",
        "experts_per_token",
        "experts[0].residual_scale",
        "experts[1].noise_scale",
        "experts[2].source_model",
    ]
    on = space.recipe(space.starts())
    off = space.recipe({**space.starts(), "experts[2].source_model": None, "experts_per_token": 1})
    assert [len(recipe.as_config()["experts"]) for recipe in (on, off)] == [3, 2]
    for recipe in (on, off):
        assert space.recipe(space.values(recipe)) == recipe
        assert Recipe.parse(recipe.as_config()) == recipe
    assert space.references() == [f"{MODELS}/{name}" for name in ("sort", "largest", "reverse")]
    assert space.notes == []


def test_too_few_experts_are_an_invalid_point() -> None:
    experts = [expert({"choices": [f"{MODELS}/{name}", None]}, name) for name in ("sort", "largest")]
    space = Space({**MIXTURE, "experts": [expert(f"{MODELS}/reverse", "c"), *experts]})
    off = dict.fromkeys(("experts[1].source_model", "experts[2].source_model"))
    with pytest.raises(RecipeError, match="experts_per_token is 2; there are 1 experts"):
        space.recipe({**space.starts(), **off})
    assert (
        len(space.recipe({**space.starts(), **off, "experts_per_token": 1}).as_config()["experts"]) == 1
    )


def test_faults_of_a_mixtures_search_file() -> None:
    with pytest.raises(SearchFileError, match="did you mean 'experts_per_token'"):
        SearchFile({**MIXTURE, "expert_per_token": 1, "tasks": ["qs_sort"]})
    slip = {
        **MIXTURE,
        "experts": [{**MIXTURE["experts"][0], "residual_scal": 1.0}, *MIXTURE["experts"][1:]],
    }
    with pytest.raises(SearchFileError, match="did you mean 'residual_scale'"):
        Space(slip)


def test_the_exported_recipe_says_what_mergekit_makes_of_it() -> None:
    space = Space(MIXTURE)
    assert mergekit_notes(space.recipe(space.starts()))[0].startswith("mergekit-moe makes this model")
    noisy = space.recipe({**space.starts(), "experts[1].noise_scale": 0.01})
    assert mergekit_notes(noisy)[0].startswith("mergekit draws other random gates and noise")


def test_the_average_is_that_of_the_experts() -> None:
    """A mixture's base may be one of them, and others may be switched off at the start."""
    space = Space(MIXTURE)
    start = space.recipe({**space.starts(), "experts[2].source_model": None})
    *alone, average, _ = baseline_jobs(start, Prompting(f"{MODELS}/sort", False), space.references())
    assert [job.name for job in alone] == space.references()
    assert average.recipe.references() == [f"{MODELS}/sort", f"{MODELS}/largest"]


@pytest.mark.slow
def test_a_search_over_experts_ships_what_it_scored(tmp_path: Path) -> None:
    file = SearchFile(
        {
            **MIXTURE,
            "tasks": ["qs_largest"],
            "search": {"sampler": "random", "n_iterations": 6, "seed": 1},
            "scoring": {"limit": 8, "holdout": 4, "task_paths": ["tasks"]},
        }
    )
    result = run(file, folder=tmp_path / "s")
    trials = result.study.trials()
    assert all(trial.state == TrialState.COMPLETE for trial in trials)
    assert len({trial.params["experts[2].source_model"] for trial in trials}) == 2
    save_merged(Space(MIXTURE).recipe(trials[-1].params), tmp_path / "out")
    (scored,) = evaluate_models([str(tmp_path / "out")], EvalOptions(like=result.study.folder))
    assert scored["scores"] == trials[-1].user_attrs["scores"]
