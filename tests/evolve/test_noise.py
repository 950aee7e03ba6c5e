"""The noise floor: measured on the winner, kept with the study, heeded by the verdict."""

from pathlib import Path

import pytest

from evolve.judge import judge
from evolve.loop import run
from evolve.noise import Change, Noise, measured
from evolve.plan import make_plan
from evolve.report import result_json, study_json
from evolve.search_file import ScoringSettings, SearchFile, TaskSpec
from evolve.study import Study
from evolve.tasks import Outcome, Outcomes, TaskSet
from evolve.verdict import Verdict, conclude
from evolve.workers.start import Workers, start_pool

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tasks() -> TaskSet:
    scoring = ScoringSettings(task_paths=[str(ROOT / "tasks")])
    return TaskSet([TaskSpec(name="qs_sort"), TaskSpec(name="qs_largest", weight=2.0)], scoring, 0)


def outcomes(sort: list[float], largest: list[float]) -> Outcomes:
    return {
        key: [Outcome(key, i, value) for i, value in enumerate(values)]
        for key, values in (("qs_sort", sort), ("qs_largest", largest))
    }


def test_tasks_that_move_in_opposite_directions_do_not_cancel(tasks: TaskSet) -> None:
    recorded = outcomes([1, 0, 1, 0], [1, 0, 1, 0])
    again = outcomes([1, 1, 1, 0], [1, 0, 0, 0])  # one up in sort, one down in largest
    noise = measured(tasks, "holdout", recorded, {"again": recorded, "reordered": again})
    assert noise.tasks["qs_sort"] == {"again": Change(0, 0), "reordered": Change(0.25, 0.25)}
    assert noise.tasks["qs_largest"]["reordered"] == Change(0.25, -0.25)
    assert noise.floor == pytest.approx(0.25 + 2 * 0.25)
    assert noise.n_documents == 8


@pytest.mark.parametrize(("floor", "is_shown"), [(0.0, True), (0.4, True), (0.6, False)])
def test_a_gain_no_larger_than_the_noise_is_not_claimed(
    tasks: TaskSet, floor: float, is_shown: bool
) -> None:
    winner = outcomes([1] * 100, [0, 1] * 50)
    baseline = {"search": winner, "holdout": outcomes([0, 1] * 50, [0, 1] * 50)}
    noise = Noise("holdout", 200, floor, {})
    verdict = conclude(tasks, {3: winner}, {"base": baseline}, noise)
    assert verdict.gain is not None
    assert verdict.gain.value == pytest.approx(0.5)
    assert verdict.is_shown is is_shown
    assert verdict.text.startswith("gain shown" if is_shown else "no gain shown")
    assert ("moved it by up to 0.600" in verdict.text) is not is_shown


@pytest.mark.parametrize(("answer", "changed"), [("a", 0.0), ("b", 1.0)])
def test_the_clock_is_no_noise(
    answer: str, changed: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "constant.py").write_text("def half(documents):\n    return 0.5\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    specs = [TaskSpec(name="qs_sort"), TaskSpec(name="constant:half", direction="maximize")]
    both = TaskSet(specs, ScoringSettings(task_paths=[str(ROOT / "tasks")]), 0)

    def scored(answer: str, seconds: float) -> Outcomes:
        seen = {"answers": [answer], "values": {}, "tokens": 1, "seconds": seconds}
        return {
            "qs_sort": [Outcome("qs_sort", 0, 1.0)],
            "constant:half": [Outcome("qs_sort", 0, seen)],
        }

    noise = measured(both, "search", scored("a", 0.1), {"again": scored(answer, 0.2)})
    assert noise.tasks["constant:half"]["again"].changed == changed


@pytest.mark.parametrize("holdout", [10, 0])
def test_a_search_measures_it_once_and_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holdout: int
) -> None:
    monkeypatch.chdir(ROOT)
    file = SearchFile.load("configs/quickstart.yml")
    file = file.changed(search={"n_iterations": 2}, scoring={"limit": 10, "holdout": holdout})
    result = run(file, folder=tmp_path / "s")
    data = result_json(result)
    unchanged = {"changed": 0.0, "difference": 0.0}  # the same bits on the same machine
    assert data["noise"]["split"] == ("holdout" if holdout else "search")
    assert data["noise"]["n_documents"] == 30
    for changes in data["noise"]["tasks"].values():
        assert changes["again"] == unchanged
    assert result.verdict is not None
    recalled = Verdict.recalled(result.study.note("verdict"))
    assert recalled == result.verdict
    assert study_json(Study.open(tmp_path / "s"), result.recipe, recalled)["noise"] == data["noise"]
    # Judged again, as after a kill before the verdict was kept: nothing is scored a second time.
    plan = make_plan(file)
    pool = start_pool(plan, Workers())
    scored: list[None] = []
    assert judge(result.study, plan, pool, lambda: scored.append(None)) == result.verdict
    assert not scored
