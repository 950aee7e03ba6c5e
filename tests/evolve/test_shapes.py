"""Searches whose candidates have different layers, methods and dtypes, on the quickstart's models."""

from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from evolve.errors import SearchFileError
from evolve.evaluation import EvalOptions, evaluate_models
from evolve.loop import StudyResult, run
from evolve.plan import make_plan
from evolve.search_file import SearchFile
from merge_core.merge import save_merged

ROOT = Path(__file__).resolve().parents[2]
MODELS = "configs/quickstart/models"


@pytest.fixture(autouse=True)
def _at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def file(recipe: dict[str, Any], n: int = 6, **scoring: Any) -> SearchFile:
    return SearchFile(
        {
            **recipe,
            "tasks": ["qs_sort", "qs_largest"],
            "search": {"sampler": "random", "n_iterations": n, "seed": 3},
            "scoring": {"limit": 20, "holdout": 10, "task_paths": ["tasks"], **scoring},
        }
    )


def ships_as_scored(result: StudyResult, number: int, folder: Path) -> None:
    """Merge a trial's recipe to a folder, and score that from scratch."""
    trial = result.study.trials()[number]
    save_merged(file_space(result).recipe(trial.params), folder)
    (scored,) = evaluate_models([str(folder)], EvalOptions(like=result.study.folder))
    assert scored["scores"] == trial.user_attrs["scores"]


def file_space(result: StudyResult) -> Any:
    return result.study.search_file().space(lambda model: 4)


FRANKENMERGE = {
    "merge_method": "passthrough",
    "slices": [
        {
            "sources": [
                {
                    "model": f"{MODELS}/sort",
                    "layer_range": [0, {"low": 2, "high": 4, "step": 1, "start": 4}],
                }
            ]
        },
        {
            "sources": [
                {
                    "model": {"choices": [f"{MODELS}/largest", None], "start": None},
                    "layer_range": [{"low": 2, "high": 4, "step": 1}, 4],
                }
            ]
        },
    ],
    "dtype": {"choices": ["float32", "bfloat16"]},
}


def test_each_shape_and_dtype_is_scored_by_an_engine_of_its_own(tmp_path: Path) -> None:
    result = run(file(FRANKENMERGE, 8), folder=tmp_path / "s")
    trials = result.study.trials()
    space = file_space(result)
    layers = {}
    for trial in trials:
        if trial.state != TrialState.COMPLETE:
            # [4, 4) has no layer: an invalid point, and told so.
            assert "layer_range is [4, 4]" in trial.user_attrs["failure"]["text"]
            continue
        ranges = [s.sources[0].layer_range for s in space.recipe(trial.params).slices or ()]
        layers[trial.number] = sum(end - start for start, end in ranges)
    assert len(set(layers.values())) > 1
    by_shape = {(layers[n], trials[n].params["dtype"]): n for n in layers}
    assert len({dtype for _, dtype in by_shape}) == 2
    last = sorted(by_shape.values())[-2:]
    for number in last:
        ships_as_scored(result, number, tmp_path / f"model-{number}")
    assert result.verdict is not None
    # The models alone have four layers, whatever the winner has.
    assert "could not be scored" not in result.verdict.text
    assert {f"{MODELS}/sort", f"{MODELS}/largest"} <= {b.name for b in result.verdict.baselines}


@pytest.mark.vllm
def test_vllm_engines_follow_the_shape_too(tied_pair: Path, tmp_path: Path) -> None:
    bound = {"low": 1, "high": 2, "step": 1}
    slices = [{"sources": [{"model": str(tied_pair / name), "layer_range": [0, bound]}]} for name in "ab"]
    recipe = {"merge_method": "passthrough", "slices": slices, "dtype": "float32"}
    result = run(file(recipe, 3, backend="vllm"), folder=tmp_path / "s")
    trials = result.study.trials()
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 3
    assert len({sum(trial.params.values()) for trial in trials}) > 1
    ships_as_scored(result, trials[-1].number, tmp_path / "model")


def test_methods_and_models_that_come_and_go_are_scored_as_shipped(tmp_path: Path) -> None:
    weight = {"low": -0.5, "high": 1.5}
    recipe = {
        "merge_method": {"choices": ["ties", "slerp", "linear"]},
        "base_model": f"{MODELS}/base",
        "models": [
            {
                "model": {"choices": [f"{MODELS}/sort", None]},
                "parameters": {"weight": weight, "density": {"low": 0.1, "high": 1.0}},
            },
            {"model": f"{MODELS}/largest", "parameters": {"weight": weight, "density": 0.8}},
        ],
        "parameters": {"t": {"low": -0.2, "high": 1.2}},
        "dtype": "float32",
    }
    result = run(file(recipe, 8), folder=tmp_path / "s")
    trials = [t for t in result.study.trials() if t.state == TrialState.COMPLETE]
    space = file_space(result)
    for trial in trials:
        assert set(trial.params) == set(space.active(trial.params))
        assert ("t" in trial.params) == (trial.params["merge_method"] == "slerp")
    by_method = {trial.params["merge_method"]: trial.number for trial in trials}
    assert len(by_method) > 1
    for method, number in by_method.items():
        ships_as_scored(result, number, tmp_path / method)


def test_layers_beyond_a_models_last_are_told_before_the_search() -> None:
    slices = [{"sources": [{"model": f"{MODELS}/sort", "layer_range": [0, None]}]}]
    slices[0]["sources"][0]["layer_range"] = [0, {"low": 2, "high": 7, "step": 1}]  # type: ignore[list-item]
    with pytest.raises(SearchFileError, match="7"):
        make_plan(file({"merge_method": "passthrough", "slices": slices}))
