"""Whole searches of mergekit-evolve files on the quickstart's models."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from evolve.evaluation import EvalOptions, evaluate_models
from evolve.loop import StudyResult, run
from evolve.plan import make_plan
from evolve.search_file import ScoringSettings, SearchFile
from evolve.study import Study, load_outcomes
from evolve.tasks import TaskSet
from merge_core.merge import merged_tensors, save_merged
from merge_core.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "configs/mergekit_evolve.yml"


@pytest.fixture(autouse=True)
def _at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def example(n: int = 6, **scoring: Any) -> SearchFile:
    return SearchFile.load(EXAMPLE).changed(
        search={"n_iterations": n}, scoring={"limit": 8, "holdout": 12, **scoring}
    )


def told(study: Study) -> list[Any]:
    return [(t.number, t.params, t.value, t.user_attrs.get("scores", {})) for t in study.trials()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> StudyResult:
    with contextlib.chdir(ROOT):
        return run(example(), folder=tmp_path_factory.mktemp("whole") / "s")


def test_the_example_runs_and_its_objective_is_the_sum_as_written(finished: StudyResult) -> None:
    trials = finished.study.trials()
    assert len(trials) == 6
    assert len(trials[0].params) == 2 * 3 * 2  # groups, models, weight and density
    for trial in trials:
        scores = trial.user_attrs["scores"]
        expected = scores["qs_reverse"] + 0.5 * scores["qs_sort"] + scores["qs_largest"]
        assert trial.value == pytest.approx(expected)


def test_the_first_documents_are_searched_and_those_after_them_judge(finished: StudyResult) -> None:
    folder = finished.study.folder / "outcomes"
    search = load_outcomes(folder / "trial-0.parquet")["search"]
    assert [o.document for o in search["qs_sort"]] == list(range(8))
    holdout = load_outcomes(folder / "baseline-0.parquet")["holdout"]
    assert [o.document for o in holdout["qs_sort"]] == list(range(8, 20))
    assert finished.verdict is not None
    assert finished.verdict.gain is not None


def test_best_yml_names_the_users_models_and_scores_as_recorded(finished: StudyResult) -> None:
    best = finished.study.folder / "best.yml"
    recipe = Recipe.load(best)
    assert recipe == finished.recipe
    assert recipe.references() == [
        f"configs/quickstart/models/{name}" for name in ("base", "reverse", "sort", "largest")
    ]
    (scored,) = evaluate_models([str(best)], EvalOptions(like=finished.study.folder))
    assert finished.best is not None
    assert scored["scores"] == finished.best.user_attrs["scores"]


def test_a_candidates_scores_are_lm_evals_with_the_same_limit(
    finished: StudyResult, tmp_path: Path
) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    trial = finished.study.trials()[3]
    save_merged(make_plan(example()).space.recipe(trial.params), tmp_path / "out")
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tmp_path / "out"), "dtype": "bfloat16"},
        tasks=list(trial.user_attrs["scores"]),
        limit=8,
        device="cpu",
        batch_size=8,
        task_manager=TaskManager(include_path=str(ROOT / "tasks"), include_defaults=False),
        bootstrap_iters=0,
    )["results"]
    metrics = {"qs_reverse": "exact_match", "qs_sort": "exact_match", "qs_largest": "acc"}
    theirs = {task: results[task][f"{metric},none"] for task, metric in metrics.items()}
    assert theirs == trial.user_attrs["scores"]


def test_the_resolved_file_is_the_same_search(finished: StudyResult, tmp_path: Path) -> None:
    resolved = SearchFile.load(finished.study.folder / "search.yml")
    assert resolved.as_dict() == finished.study.search_file().as_dict()
    again = run(resolved, folder=finished.study.folder)
    assert again.was_complete
    command = [sys.executable, "-m", "evolve.cli"]
    folder = str(finished.study.folder)
    flags = ["--storage-path", folder, "--max-fevals", "6", "--save-final-model"]
    subprocess.run([*command, "run", f"{folder}/search.yml", *flags], cwd=ROOT, check=True)
    written = dict(load_file(finished.study.folder / "final_model/model.safetensors"))
    assert finished.recipe is not None
    for name, tensor in merged_tensors(finished.recipe):
        assert torch.equal(written[name], tensor)
    for what in (["status", "--json"], ["export", "--trial", "3"]):
        printed = subprocess.run(
            [*command, what[0], str(finished.study.folder), *what[1:]],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        if what[0] == "status":
            assert json.loads(printed)["best"]["recipe"]["merge_method"] == "ties"
        else:
            (tmp_path / "recipe.yml").write_text(printed)
            plan = make_plan(resolved)
            assert Recipe.load(tmp_path / "recipe.yml") == plan.space.recipe(told(again.study)[3][1])


@pytest.mark.slow
def test_kill_9_changes_nothing(finished: StudyResult, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    search = tmp_path / "search.yml"
    search.write_text(example().to_yaml())
    process = subprocess.Popen(
        [sys.executable, "-m", "evolve.cli", "run", str(search), "--storage-path", str(folder)],
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (folder / "outcomes/trial-2.parquet").exists():
            break
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert told(run(SearchFile.load(search), folder=folder).study) == told(finished.study)


@pytest.mark.parametrize(
    ("limit", "text"),
    [(None, "without a limit every document"), (400, "which takes every document of qs")],
)
def test_where_no_document_is_left_there_is_no_verdict(limit: int | None, text: str) -> None:
    data = example().as_dict()
    data["scoring"]["limit"] = limit
    plan = make_plan(SearchFile(data))
    assert [note for note in plan.notes if text in note]
    assert plan.search_file.scoring.holdout == 0
    assert {task.n_documents("search") for task in plan.tasks.tasks} == {400}
    assert {task.n_documents("holdout") for task in plan.tasks.tasks} == {0}


def test_a_negative_weight_asks_for_less() -> None:
    data = example().as_dict()
    data["tasks"] = [
        {"name": "qs_reverse", "metric": "exact_match,none", "weight": -2},
        {"name": "qs_largest", "weight": 3},
    ]
    plan = make_plan(SearchFile(data).changed(search={"signal": "both"}))
    assert plan.tasks.objective({"qs_reverse": 0.5, "qs_largest": 0.25}) == -2 * 0.5 + 3 * 0.25
    assert [task.sign for task in plan.tasks.following("both").tasks] == [-1, 1, -1, 1]
    (note,) = (note for note in plan.notes if "weight" in note)
    assert "tasks[0].weight is -2" in note


def test_settings_of_cma_that_another_sampler_does_not_read_are_noted() -> None:
    def noted(file: SearchFile, **search: Any) -> list[str]:
        notes = make_plan(file.changed(search=search)).notes
        return [note.partition(" is ")[0] for note in notes if "which only cma reads" in note]

    own = SearchFile.load(ROOT / "configs/quickstart.yml")
    both = {"sigma0": 0.25, "population_size": 8}
    assert noted(own, sampler="cma", **both) == []
    assert noted(own, sampler="nsga2", **both) == ["search.sigma0", "search.population_size"]
    assert noted(example(), sampler="random") == []  # such a file's sigma0 has a default


def test_slerp_scores_every_model_alone(tmp_path: Path) -> None:
    data = example(3, limit=4, holdout=4).as_dict()
    models = data["genome"]["models"]
    data["genome"] = {"models": models, "merge_method": "slerp", "layer_granularity": 2}
    result = run(SearchFile(data), folder=tmp_path / "s")
    assert result.verdict is not None
    assert [b.name for b in result.verdict.baselines] == [*models, "average", "starts"]


# ---- documents --------------------------------------------------------------------------------


def drawn(seed: int = 0, **scoring: Any) -> dict[str, tuple[int, ...]]:
    from evolve.search_file import TaskSpec

    tasks = TaskSet([TaskSpec(name="qs_sort")], ScoringSettings(**scoring), seed)
    (leaf,) = tasks.tasks[0].leaves
    return dict(leaf.documents)


def test_the_first_documents_are_lm_evals() -> None:
    first = drawn(draw="first", limit=30, holdout=0.1)
    assert first["search"] == tuple(range(30))
    assert first["holdout"] == tuple(range(30, 70))
    assert drawn(seed=5, draw="first", limit=30, holdout=0.1) == first
    most = drawn(draw="first", limit=350, holdout=0.5)
    assert (most["search"], most["holdout"]) == (tuple(range(350)), tuple(range(350, 400)))


def test_shuffled_documents_are_the_seeds() -> None:
    one = drawn(draw="shuffled", limit=30, holdout=40)
    assert len(one["search"]) == 30
    assert len(one["holdout"]) == 40
    assert not set(one["search"]) & set(one["holdout"])
    assert one == drawn(draw="shuffled", limit=30, holdout=40)
    assert one["search"] != drawn(seed=1, draw="shuffled", limit=30, holdout=40)["search"]
    assert set(one["search"]) < set(drawn(draw="shuffled", limit=60, holdout=40)["search"])
