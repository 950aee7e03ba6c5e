"""Whole searches for a Pareto front, and under constraints, on the quickstart's models."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from optuna.trial import FrozenTrial
from typer.testing import CliRunner

from evolve.cli import app
from evolve.errors import ResumeRefusedError, SearchFileError
from evolve.judge import shortlist
from evolve.loop import StudyResult, run
from evolve.objectives import Rating
from evolve.plan import Plan, make_plan
from evolve.report import print_result, result_json
from evolve.samplers import Proposal
from evolve.search_file import SearchFile
from evolve.study import Study
from evolve.workers.worker import Seconds
from merge_core.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
TASKS = ["qs_sort", "qs_largest"]


@pytest.fixture(autouse=True)
def _at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def small(n: int = 14, **search: Any) -> SearchFile:
    """The quickstart for a front over two skills, cut to seconds."""
    data = SearchFile.load(ROOT / "configs/quickstart.yml").as_dict()
    data["tasks"] = TASKS
    data["search"] |= {"objective": "pareto", "sampler": "nsga2", "n_iterations": n, "racing": "none"}
    data["search"] |= search
    data["scoring"] |= {"limit": 10, "holdout": 10}
    return SearchFile(data)


def front_by_definition(trials: list[FrozenTrial]) -> list[int]:
    """Numbers of the trials whose scores no other's are above, of those that meet their constraints."""
    scores = {
        t.number: tuple(t.user_attrs["scores"].values())
        for t in trials
        if t.values and all(v <= 0 for v in t.user_attrs.get("violations", {}).values())
    }
    return [
        number
        for number, own in scores.items()
        if not any(s != own and all(a >= b for a, b in zip(s, own, strict=True)) for s in scores.values())
    ]


def watch(event: str, study: Study | None, plan: Plan) -> None:
    """Whenever a trial was told, the folder holds the front and nothing else."""
    if event == "told" and study:
        files = {path.name for path in (study.folder / "pareto").iterdir()}
        assert files == {f"trial-{n}.yml" for n in front_by_definition(study.finished())}


def told(study: Study) -> list[tuple[Any, ...]]:
    return [(t.number, t.params, t.values, t.user_attrs.get("violations")) for t in study.trials()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> StudyResult:
    with contextlib.chdir(ROOT):
        return run(small(), folder=tmp_path_factory.mktemp("pareto") / "s", progress=watch)


def test_trials_have_a_value_a_task(finished: StudyResult) -> None:
    for trial in finished.study.trials():
        assert trial.values == list(trial.user_attrs["scores"].values())


def test_the_result_has_every_member_and_the_knee_is_the_best(finished: StudyResult) -> None:
    data = json.loads(json.dumps(result_json(finished)))
    numbers = front_by_definition(finished.study.trials())
    assert [member["number"] for member in data["pareto"]] == numbers
    assert data["best"]["number"] in numbers
    assert data["best"]["objective"] == pytest.approx(sum(data["best"]["scores"].values()))
    volume = data["hypervolume"]
    assert len(volume["over_time"]) == data["n_trials"]
    assert volume["over_time"] == sorted(volume["over_time"])
    assert volume["value"] == volume["over_time"][-1] > 0


def test_best_yml_is_the_knees_file_in_the_folder(finished: StudyResult) -> None:
    folder = finished.study.folder
    assert finished.best is not None
    best = (folder / "best.yml").read_text()
    assert best == (folder / "pareto" / f"trial-{finished.best.number}.yml").read_text()
    assert "holdout qs_sort" in best


def test_of_two_extremes_the_one_with_the_larger_weighted_sum_is_the_best_and_meets_the_holdout(
    tmp_path: Path,
) -> None:
    plan = make_plan(small())
    with Study.create_or_resume(tmp_path / "s", None, plan.search_file, {}, 2) as study:
        for number, values in enumerate([[0.0, 0.9], [1.0, 0.4]]):
            study.begin(number, Proposal(plan.space.starts()), plan.space)
            scores = dict(zip(TASKS, values, strict=True))
            rating = Rating(values, sum(values))
            study.complete(number, rating, scores, {}, Seconds(0.1, 0.1, 0.1), {})
        assert study.best() is study.trials()[1]
        assert shortlist(study, plan) == [1]


def test_the_table_shows_the_front_and_marks_the_knee(
    finished: StudyResult, capsys: pytest.CaptureFixture[str]
) -> None:
    data = result_json(finished)
    print_result(data, "s")
    shown = capsys.readouterr().out
    assert f"{len(data['pareto'])} candidates" in shown
    assert f"{data['best']['number']} (knee, best.yml)" in shown
    assert "hypervolume" in shown


def test_a_search_in_pieces_is_the_same_search(finished: StudyResult, tmp_path: Path) -> None:
    folder = tmp_path / finished.study.folder.name

    def stop(event: str, study: Study | None, plan: Plan) -> None:
        if event == "answered" and study and len(study.finished()) == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(small(), folder=folder, progress=stop)
    # What a kill between the steps may leave: no member in its place, an old one, half a file.
    study = Study.open(folder)
    member = study.front()[-1].number
    (folder / "pareto" / f"trial-{member}.yml").unlink()
    (folder / "pareto" / "trial-99.yml").write_text("old")
    (folder / "pareto" / "trial-98.yml.part-1").write_text("half")
    resumed = run(small(), folder=folder, progress=watch)
    assert told(resumed.study) == told(finished.study)
    for path in (finished.study.folder / "pareto").iterdir():
        assert (folder / "pareto" / path.name).read_text() == path.read_text()


def test_every_member_can_be_exported(finished: StudyResult, tmp_path: Path) -> None:
    folder = finished.study.folder
    recipes = {t.number: t.params for t in finished.study.front()}
    told = CliRunner().invoke(app, ["export", str(folder), "--pareto"])
    assert told.exit_code == 0
    documents = list(yaml.safe_load_all(told.stdout))
    found = [[m["parameters"]["weight"] for m in document["models"]] for document in documents]
    assert found == [list(params.values()) for params in recipes.values()]
    CliRunner().invoke(app, ["export", str(folder), "--pareto", "-o", str(tmp_path / "members")])
    for number in recipes:
        alone = CliRunner().invoke(app, ["export", str(folder), "--trial", str(number)])
        assert (tmp_path / "members" / f"trial-{number}.yml").read_text() == alone.stdout
        assert Recipe.load(tmp_path / "members" / f"trial-{number}.yml")
    assert len(list((tmp_path / "members").iterdir())) == len(recipes)


def test_with_one_objective_the_front_is_the_best_alone(tmp_path: Path) -> None:
    result = run(small(5, objective="weighted_sum", sampler="random"), folder=tmp_path / "s")
    assert result.best is not None
    assert [t.number for t in result.study.front()] == [result.best.number]
    assert [p.name for p in (tmp_path / "s/pareto").iterdir()] == [f"trial-{result.best.number}.yml"]


def test_cma_is_refused_for_several_objectives() -> None:
    with pytest.raises(SearchFileError, match="nsga2"):
        make_plan(small(sampler="cma"))


# ---- constraints ----------------------------------------------------------------------------------


def test_a_constraint_that_excludes_part_of_the_front_is_kept(
    finished: StudyResult, tmp_path: Path
) -> None:
    members = [t.user_attrs["scores"]["qs_sort"] for t in finished.study.front()]
    limit = (min(members) + max(members)) / 2
    assert min(members) < limit < max(members)
    rule = {"task": "qs_sort", "not_below": limit}
    result = run(small(constraints=[rule]), folder=tmp_path / "s", progress=watch)
    front = result.study.front()
    assert front
    assert all(t.user_attrs["scores"]["qs_sort"] >= limit for t in front)
    for trial in result.study.trials():
        (violation,) = trial.user_attrs["violations"].values()
        assert violation == pytest.approx(limit - trial.user_attrs["scores"]["qs_sort"])
        assert list(trial.constraints.values()) == [violation]  # what Optuna's samplers read
    assert any(violation > 0 for t in result.study.trials() for violation in t.constraints.values())
    assert result.verdict is not None
    assert "on the holdout" in result.verdict.text
    assert list(result.verdict.violations["holdout"]) == [f"qs_sort not below {limit}"]


def test_the_base_is_scored_once_before_the_first_candidate(tmp_path: Path) -> None:
    rule = {"task": "qs_largest", "not_below": "base", "by": 0.1}
    file = small(4, constraints=[rule], objective="weighted_sum", sampler="random")
    events: list[str] = []
    result = run(file, folder=tmp_path / "s", progress=lambda event, study, plan: events.append(event))
    assert events.index("base") < events.index("told")
    assert events.count("base") == 1
    assert len(result.study.trials()) == 4
    assert result.verdict is not None
    base = next(b for b in result.verdict.baselines if b.name.endswith("base"))
    for trial in result.study.trials():
        expected = base.scores["qs_largest"] - 0.1 - trial.user_attrs["scores"]["qs_largest"]
        assert list(trial.constraints.values()) == [pytest.approx(expected)]
    longer = run(
        file.changed(search={"n_iterations": 5}),
        folder=tmp_path / "s",
        progress=lambda event, study, plan: events.append(event),
    )
    assert events.count("base") == 1
    assert len(longer.study.trials()) == 5


def test_where_no_candidate_meets_a_constraint_nothing_is_claimed(tmp_path: Path) -> None:
    rule = {"task": "qs_sort", "not_below": 1.5}
    result = run(small(6, constraints=[rule]), folder=tmp_path / "s", progress=watch)
    assert result.best is not None
    nearest = max(t.user_attrs["scores"]["qs_sort"] for t in result.study.trials())
    assert result.best.user_attrs["scores"]["qs_sort"] == nearest
    assert result.study.front() == []
    assert result.verdict is not None
    assert not result.verdict.is_shown
    assert "no candidate met every constraint" in result.verdict.text
    assert "'qs_sort not below 1.5' by" in result.verdict.text
    assert "NOT met" in (tmp_path / "s/best.yml").read_text()
    told = CliRunner().invoke(app, ["status", str(tmp_path / "s"), "--json"])
    assert json.loads(told.stdout)["pareto"] == []
    refused = CliRunner().invoke(app, ["export", str(tmp_path / "s"), "--pareto"])
    assert isinstance(refused.exception, SearchFileError)


def test_constraints_must_name_what_is_scored_and_have_a_base() -> None:
    rules = [{"task": "qs_srt", "not_below": 0.5}, {"task": "qs_sort", "not_below": "base"}]
    data = small(constraints=rules).as_dict()
    data["merge_method"] = "linear"
    del data["base_model"]
    with pytest.raises(SearchFileError) as raised:
        make_plan(SearchFile(data))
    one, two = raised.value.faults
    assert "search.constraints[0].task is 'qs_srt'" in one
    assert "did you mean 'qs_sort'" in one
    assert "search.constraints[1].not_below is base" in two


def test_lower_is_better_scores_are_mirrored() -> None:
    data = small(constraints=[{"task": "output_tokens", "not_below": "base", "by": 2}]).as_dict()
    data["tasks"] = ["qs_sort", "output_tokens"]
    objectives = make_plan(SearchFile(data)).objectives
    base = {"qs_sort": 0.0, "output_tokens": 5.0}
    for tokens, violation in ((4.0, -3.0), (7.0, 0.0), (9.0, 2.0)):
        scores = {"qs_sort": 0.5, "output_tokens": tokens}
        assert objectives.values(scores) == [0.5, -tokens]
        assert objectives.violations(scores, base) == {"output_tokens not below base by 2": violation}


def test_the_margin_itself_is_allowed() -> None:
    objectives = make_plan(
        small(constraints=[{"task": "qs_sort", "not_below": 0.5, "by": 0.02}])
    ).objectives
    (violation,) = objectives.violations({"qs_sort": 0.48, "qs_largest": 0.0}).values()
    assert violation == 0


def test_another_constraint_makes_another_search(finished: StudyResult) -> None:
    rule = {"task": "qs_sort", "not_below": 0.1}
    with pytest.raises(ResumeRefusedError, match="constraints"):
        run(small(constraints=[rule]), folder=finished.study.folder)
