"""Whole searches on the quickstart's models: resume, failures, scored = shipped."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.trial import TrialState

from evolve.engines.hf import HfEngine
from evolve.errors import ResumeRefusedError, SearchStoppedError, StorageError
from evolve.evaluation import EvalOptions, evaluate_models
from evolve.loop import StudyResult, run
from evolve.report import result_json
from evolve.search_file import SearchFile
from evolve.study import Study, load_outcomes
from evolve.study.alone import alone_in
from evolve.workers.start import Workers
from merge_core.merge import merged_tensors, save_merged
from merge_core.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def small(n: int = 8, **changes: Any) -> SearchFile:
    """The quickstart, cut to seconds."""
    file = SearchFile.load(ROOT / "configs/quickstart.yml")
    return file.changed(
        search={"n_iterations": n, **changes.pop("search", {})},
        scoring={"limit": 10, "holdout": 10, **changes},
    )


def told(study: Study) -> list[tuple[int, dict[str, Any], float | None, dict[str, float]]]:
    return [(t.number, t.params, t.value, t.user_attrs.get("scores", {})) for t in study.trials()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> StudyResult:
    """An undisturbed search of 8 candidates."""
    with contextlib.chdir(ROOT):
        return run(small(), folder=tmp_path_factory.mktemp("whole") / "s")


def test_a_search_records_every_candidate_and_its_outcomes(finished: StudyResult) -> None:
    trials = finished.study.trials()
    assert [t.state for t in trials] == [TrialState.COMPLETE] * 8
    assert trials[0].params == {f"models[{i}].weight": 0.5 for i in range(3)}  # the starts come first
    for trial in trials:
        outcomes = load_outcomes(finished.study.outcomes.path(f"trial-{trial.number}"))["search"]
        assert {task: len(values) for task, values in outcomes.items()} == {
            "qs_reverse": 10,
            "qs_sort": 10,
            "qs_largest": 10,
        }
        for task, values in outcomes.items():
            assert trial.user_attrs["scores"][task] == sum(o.value for o in values) / 10


def test_the_result_is_the_json_contract(finished: StudyResult) -> None:
    data = json.loads(json.dumps(result_json(finished)))
    keys = "study n_trials states best pareto baselines gain verdict seconds documents_scored noise "
    keys += "verdict_notes hypervolume violations gpu_hours ended"
    assert list(data) == keys.split()
    assert data["pareto"] == [{key: data["best"][key] for key in ("number", "scores")}]
    assert data["hypervolume"] is data["violations"] is None
    assert data["n_trials"] == sum(data["states"].values()) == 8
    assert data["documents_scored"] == 8 * 30
    assert list(data["best"]) == ["number", "objective", "scores", "holdout", "recipe"]
    assert data["best"]["objective"] == pytest.approx(sum(data["best"]["scores"].values()))
    assert [list(b) for b in data["baselines"]] == [["name", "scores", "holdout"]] * 6
    assert list(data["gain"]) == ["value", "low", "high", "over", "shown"]
    assert set(data["seconds"]) == {"merge", "load", "score", "total"}


def test_best_yml_is_the_recipe_that_was_scored_and_ships_as_scored(
    finished: StudyResult, tmp_path: Path
) -> None:
    assert finished.best is not None
    recipe = Recipe.load(finished.study.folder / "best.yml")
    assert recipe == finished.recipe
    save_merged(recipe, tmp_path / "out")
    (scored,) = evaluate_models([str(tmp_path / "out")], EvalOptions(like=finished.study.folder))
    assert scored["scores"] == finished.best.user_attrs["scores"]
    (holdout,) = evaluate_models(
        [str(tmp_path / "out")], EvalOptions(like=finished.study.folder, split="holdout")
    )
    assert finished.verdict is not None
    assert holdout["scores"] == {task: i.value for task, i in finished.verdict.holdout.items()}


def test_a_finished_search_repeats_its_result_without_computing(finished: StudyResult) -> None:
    def fail(event: str, study: Study, plan: object) -> None:
        raise AssertionError(f"computed: {event}")

    again = run(small(), folder=finished.study.folder, progress=fail)
    assert again.was_complete
    assert again.verdict == finished.verdict
    assert told(again.study) == told(finished.study)


def test_more_iterations_go_on_where_the_search_ended(finished: StudyResult, tmp_path: Path) -> None:
    run(small(3), folder=tmp_path / "s")
    longer = run(small(8), folder=tmp_path / "s")
    assert told(longer.study) == told(finished.study)


def test_kill_9_at_any_moment_changes_nothing(finished: StudyResult, tmp_path: Path) -> None:
    search = tmp_path / "search.yml"
    search.write_text(small().to_yaml())
    folder = tmp_path / finished.study.folder.name
    command = [sys.executable, "-m", "evolve.cli", "run", str(search), "--storage-path", str(folder)]
    # Killed as soon as so many trials are there, whatever the process is doing then.
    for n_trials in (2, 6):
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if len(list((folder / "outcomes").glob("trial-*.parquet"))) >= n_trials:
                break
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    resumed = run(SearchFile.load(search), folder=folder)
    assert told(resumed.study) == told(finished.study)
    assert (folder / "best.yml").read_text() == (finished.study.folder / "best.yml").read_text()


def test_a_signal_pauses_with_130_and_nothing_is_lost(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "evolve.cli", "run", "configs/quickstart.yml", "--limit", "10"]
    process = subprocess.Popen(
        [*command, "--storage-path", str(tmp_path / "s")], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    while not list(tmp_path.glob("s/outcomes/trial-2.parquet")):  # then 0 and 1 have been told
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "paused" in err
    states = [t.state for t in Study.open(tmp_path / "s").trials()]
    assert set(states[:2]) == {TrialState.COMPLETE}
    assert set(states) <= {TrialState.COMPLETE, TrialState.RUNNING}


@pytest.mark.slow
def test_a_second_signal_stops_at_once_and_nothing_finished_is_lost(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "evolve.cli", "run", "configs/quickstart.yml", "--limit", "10"]
    process = subprocess.Popen(
        [*command, "--storage-path", str(tmp_path / "s")], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    while not list(tmp_path.glob("s/outcomes/trial-2.parquet")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "paused" in err
    states = [t.state for t in Study.open(tmp_path / "s").trials()]
    assert set(states[:2]) == {TrialState.COMPLETE}


@pytest.mark.parametrize("file", ["outcomes/trial-3.parquet", "best.yml"])
def test_a_full_disk_pauses_and_leaves_nothing_half_written(
    finished: StudyResult, tmp_path: Path, file: str
) -> None:
    folder = tmp_path / "s"
    run(small(2), folder=folder)
    (folder / "best.yml").write_text("of another trial")  # to be written anew
    part = folder / f"{file}.part-{os.getpid()}"
    part.symlink_to("/dev/full")
    with pytest.raises(StorageError, match=r"disk of .* is full; .*run the same command again"):
        run(small(), folder=folder)
    assert not part.is_symlink()
    assert not list(folder.rglob("*.part*"))
    resumed = run(small(), folder=folder)
    assert told(resumed.study) == told(finished.study)
    assert Recipe.load(folder / "best.yml") == finished.recipe


@pytest.mark.parametrize(
    ("change", "topic"),
    [
        (lambda: small(search={"seed": 1}), "seed"),
        (lambda: small(limit=11), "scoring"),
        (lambda: small(search={"sampler": "tpe"}), "sampler"),
        (lambda: SearchFile({**small().as_dict(), "tasks": ["qs_sort"]}), "tasks"),
        (lambda: SearchFile({**small().as_dict(), "dtype": "bfloat16"}), "recipe"),
    ],
    ids=["seed", "limit", "sampler", "tasks", "recipe"],
)
def test_another_search_in_the_same_folder_is_refused(
    finished: StudyResult, change: Callable[[], SearchFile], topic: str
) -> None:
    with pytest.raises(ResumeRefusedError) as raised:
        run(change(), folder=finished.study.folder)
    assert topic in str(raised.value)
    assert "--storage-path" in str(raised.value)


def failing(n: int, low: float) -> SearchFile:
    """`linear` with weights of opposite sign: where they cancel, the merge fails."""
    data = small(n).as_dict()
    models = [m["model"] for m in data["models"]][:2]
    step = {"low": low, "high": 1.0, "step": 1.0, "start": 1.0}
    data |= {
        "merge_method": "linear",
        "models": [
            {"model": models[0], "parameters": {"weight": step}},
            {"model": models[1], "parameters": {"weight": step}},
        ],
    }
    data["search"] |= {"sampler": "random", "max_failed_share": 0.99}
    return SearchFile(data)


def test_a_failed_candidate_is_a_failed_trial_and_never_wins(tmp_path: Path) -> None:
    result = run(failing(12, -1.0), folder=tmp_path / "s")
    failed = [t for t in result.study.trials() if t.state == TrialState.FAIL]
    assert 0 < len(failed) < 12
    assert all(t.user_attrs["failure"]["kind"] == "merge" for t in failed)
    assert all("sum to zero" in t.user_attrs["failure"]["text"] for t in failed)
    assert all(t.value is None for t in failed)
    assert result.best is not None
    assert result.best.number not in [t.number for t in failed]


def test_choices_that_do_not_go_together_are_not_tried(tmp_path: Path) -> None:
    data = small(8).as_dict()
    base, (one, two, _) = data["base_model"], [m["model"] for m in data["models"]]
    data["models"] = [
        {"model": {"choices": [model, base]}, "parameters": {"weight": {"low": 0.4, "high": 0.9}}}
        for model in (one, two)
    ]
    data["search"] |= {"sampler": "random"}
    trials = run(SearchFile(data), folder=tmp_path / "s").study.trials()
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 8
    for trial in trials:  # nothing is merged where both are the base
        assert any(trial.params[f"models[{i}].model"] != base for i in (0, 1))


def test_known_recipes_are_the_first_candidates(finished: StudyResult) -> None:
    models = [f"configs/quickstart/models/{name} alone" for name in ("reverse", "sort", "largest")]
    names = [trial.user_attrs.get("known") for trial in finished.study.trials()]
    assert names == ["starts", *models, "average", "centres", None, None]


def test_a_seed_recipe_is_tried_and_is_part_of_what_the_search_is(
    finished: StudyResult, tmp_path: Path
) -> None:
    assert finished.recipe is not None
    own = tmp_path / "own.yml"
    own.write_text(finished.recipe.to_yaml())
    file = small(2, search={"seed_recipes": [str(own)], "sampler": "random"})
    result = run(file, folder=tmp_path / "s")
    first, second = result.study.trials()
    if finished.best is not None and finished.best.number != 0:
        assert second.user_attrs["known"] == str(own)
        assert second.params == finished.best.params
    with pytest.raises(ResumeRefusedError, match="seed_recipes"):
        run(small(2, search={"sampler": "random"}), folder=tmp_path / "s")
    assert first.user_attrs["known"] == "starts"


def test_a_search_ends_where_every_candidate_is_scored(tmp_path: Path) -> None:
    data = small(20).as_dict()
    for model, weight in zip(data["models"], ({"choices": [0.5, 1.0]}, 0.5, 0.5), strict=True):
        model["parameters"] = {"weight": weight}
    file = SearchFile(data).changed(search={"sampler": "cma"})
    for _ in range(2):
        result = run(file, folder=tmp_path / "s")
        assert len(result.study.trials()) == 2
        assert result.study.note("exhausted") == "all 2 candidates of the space are scored"
    assert result.was_complete


def test_too_many_failures_stop_the_search_and_name_the_cause(tmp_path: Path) -> None:
    file = failing(12, -1.0)
    file = file.changed(search={"max_failed_share": 0.01})
    with pytest.raises(SearchStoppedError, match="sum to zero"):
        run(file, folder=tmp_path / "s")


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_works(
    finished: StudyResult,
) -> None:
    folder = finished.study.folder
    before = (folder / "search.yml").read_text()
    with alone_in(folder), pytest.raises(ResumeRefusedError, match="at work"):
        run(small(9), folder=folder)
    assert (folder / "search.yml").read_text() == before


def test_without_a_holdout_the_verdict_says_so(tmp_path: Path) -> None:
    result = run(small(2, holdout=0), folder=tmp_path / "s")
    data = result_json(result)
    assert data["best"]["holdout"] == {}
    assert data["verdict"] == "no gain shown: no holdout"
    assert data["gain"] is None


def test_after_many_candidates_in_place_the_engine_equals_a_fresh_one(finished: StudyResult) -> None:
    recipes = [Recipe.parse(_recipe_of(finished, t.params)) for t in finished.study.trials()]
    resident = HfEngine.of(recipes[0], "cpu")
    for recipe in recipes * 3:
        resident.load(merged_tensors(recipe))
    fresh = HfEngine.of(recipes[-1], "cpu")
    ids = torch.arange(20).reshape(2, 10)
    assert torch.equal(resident.model(ids).logits, fresh.model(ids).logits)


def _recipe_of(result: StudyResult, params: dict[str, Any]) -> dict[str, Any]:
    assert result.recipe is not None
    config = result.recipe.as_config()
    for i, model in enumerate(config["models"]):
        model["parameters"]["weight"] = params[f"models[{i}].weight"]
    return config


@pytest.mark.slow
def test_two_ray_workers_find_what_one_finds_in_each_candidate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a cluster of their own, whichever one Ray would find by itself."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    result = run(small(6, search={"sampler": "random"}), folder=tmp_path / "two", workers=Workers(2))
    alone = run(small(6, search={"sampler": "random"}), folder=tmp_path / "one")
    assert told(result.study) == told(alone.study)
    assert result.verdict == alone.verdict
