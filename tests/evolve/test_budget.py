"""Budgets are hard: nothing is begun that would exceed one, over all runs, and the verdict is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from evolve.budget import most_candidates
from evolve.errors import SearchFileError, SearchStoppedError
from evolve.loop import StudyResult, run
from evolve.plan import make_plan
from evolve.report import result_json
from evolve.search_file import SearchFile
from evolve.workers.start import Workers

ROOT = Path(__file__).resolve().parents[2]
# Three tasks of ten documents.
A_CANDIDATE = 30


@pytest.fixture(autouse=True)
def _at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def limited(n: int = 30, limit: int = 10, **search: Any) -> SearchFile:
    file = SearchFile.load(ROOT / "configs/quickstart.yml")
    return file.changed(
        search={"n_iterations": n, "racing": "none", **search}, scoring={"limit": limit, "holdout": 10}
    )


def params(result: StudyResult) -> list[dict[str, Any]]:
    return [trial.params for trial in result.study.trials()]


def test_documents_are_a_hard_limit_that_can_be_raised(tmp_path: Path) -> None:
    file = limited(max_documents=3 * A_CANDIDATE + 10)
    assert most_candidates(make_plan(file)) == 3
    result = run(file, folder=tmp_path / "s")
    data = result_json(result)
    assert (data["n_trials"], data["documents_scored"]) == (3, 3 * A_CANDIDATE)
    assert data["best"]["holdout"]
    assert data["ended"] == "search.max_documents 100: 90 are spent, a candidate is asked 30"
    again = run(file, folder=tmp_path / "s")
    assert again.was_complete
    assert again.verdict == result.verdict
    longer = run(limited(max_documents=5 * A_CANDIDATE), folder=tmp_path / "s")
    assert len(params(longer)) == 5
    assert params(longer)[:3] == params(result)
    whole = run(limited(5), folder=tmp_path / "whole")
    assert params(whole) == params(longer)
    assert result_json(whole)["ended"] is None


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"racing": "always"}, id="raced"),
        pytest.param({"signal": "both"}, id="signal", marks=pytest.mark.slow),
    ],
)
def test_what_finals_need_is_held_back_for_them(change: dict[str, Any], tmp_path: Path) -> None:
    file = limited(20, limit=20, **change)
    result = run(file.changed(search={"max_documents": 420}), folder=tmp_path / "s")
    data = result_json(result)
    assert data["documents_scored"] <= 420
    assert len(result.study.finalists()) >= 3
    assert data["best"]["holdout"]
    assert 1 < data["n_trials"] < 20 or data["documents_scored"] > 420 - 3 * 20


def test_documents_of_earlier_finals_count_and_none_twice(tmp_path: Path) -> None:
    for limit in (6 * A_CANDIDATE, 10 * A_CANDIDATE):
        result = run(limited(signal="likelihood", max_documents=limit), folder=tmp_path / "s")
        scored = result_json(result)["documents_scored"]
        files = list((tmp_path / "s/outcomes").glob("final-*"))
        assert scored == A_CANDIDATE * (len(params(result)) + len(files)) <= limit
    # The first finals took three candidates' documents, and as many are held back for the second.
    assert len(params(result)) == 4


def test_a_limit_lowered_to_what_is_spent_leaves_no_finals_and_says_so(tmp_path: Path) -> None:
    def kill(event: str, study: Any, _: Any) -> None:
        if event == "told" and study.n_finished == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(limited(signal="likelihood"), folder=tmp_path / "s", progress=kill)
    lowered = limited(signal="likelihood", max_documents=5 * A_CANDIDATE)
    with pytest.raises(SearchStoppedError, match=r"max_documents is 150, and 150 are .* allow 240 or"):
        run(lowered, folder=tmp_path / "s")
    result = run(lowered.changed(search={"max_documents": 240}), folder=tmp_path / "s")
    assert result_json(result)["documents_scored"] == 240


@pytest.mark.parametrize(("search", "least"), [({}, 30), ({"racing": "always"}, 108)])
def test_a_limit_under_which_nothing_can_begin_is_refused(
    search: dict[str, Any], least: int, tmp_path: Path
) -> None:
    with pytest.raises(
        SearchFileError, match=f"search.max_documents is {least - 1}.*allow {least} or more"
    ):
        run(limited(max_documents=least - 1, **search), folder=tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_time_counts_over_all_runs(tmp_path: Path) -> None:
    first = run(limited(2), folder=tmp_path / "s")
    spent = first.study.note("seconds_total")
    ended = run(limited(timeout_s=spent), folder=tmp_path / "s")
    assert params(ended) == params(first)
    assert result_json(ended)["ended"].startswith("search.timeout_s")
    assert ended.verdict == first.verdict
    more = run(limited(timeout_s=spent + 6), folder=tmp_path / "s")
    assert len(params(more)) > 2


def test_where_nothing_could_begin_the_limit_is_named(tmp_path: Path) -> None:
    data = result_json(run(limited(2, timeout_s=0.001), folder=tmp_path / "s"))
    assert data["n_trials"] == 0
    assert data["verdict"].startswith("no verdict: no candidate was begun, it ended at search.timeout_s")


def test_gpu_hours_are_those_that_gpus_are_held(tmp_path: Path) -> None:
    # A worker may hold GPUs that this machine does not have.
    file = limited(300, max_gpu_hours=2 / 3600)
    result = run(file, folder=tmp_path / "s", workers=Workers(gpus_each=1))
    data = result_json(result)
    assert 0 < data["n_trials"] < 300
    assert data["ended"].startswith("search.max_gpu_hours")
    assert data["gpu_hours"] > 0
    assert result_json(run(limited(3), folder=tmp_path / "without"))["gpu_hours"] == 0
