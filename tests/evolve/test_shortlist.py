"""The end of a search: a frozen shortlist, one winner everywhere, tasks that are only reported."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evolve import session
from evolve.errors import ResumeRefusedError, SearchFileError
from evolve.export import export_yaml
from evolve.judge import frozen_shortlist, shortlist
from evolve.loop import StudyResult, run
from evolve.memory import Memory
from evolve.plan import make_plan
from evolve.provenance import head_lines
from evolve.report import print_result, result_json
from evolve.search_file import SearchFile
from evolve.study import Study, load_outcomes
from evolve.workers import Pool
from evolve.workers.start import start_pool
from evolve.workers.worker import Job, Result
from merge_core.card import head_notices
from merge_core.merge import save_merged
from merge_core.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def small(n: int, **sections: Any) -> SearchFile:
    """The quickstart without one of its tasks, cut to seconds, by random search."""
    data = SearchFile.load(ROOT / "configs/quickstart.yml").as_dict()
    data["tasks"] = ["qs_sort", "qs_largest"]
    data["search"] |= {"n_iterations": n, "sampler": "random", "racing": "none"}
    data["scoring"] |= {"limit": 10, "holdout": 30}
    return SearchFile(data | sections)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> StudyResult:
    patch = pytest.MonkeyPatch()
    patch.chdir(ROOT)
    try:
        return run(small(8, report_only=["qs_reverse"]), folder=tmp_path_factory.mktemp("whole") / "s")
    finally:
        patch.undo()


def test_the_shortlist_is_the_best_of_the_search_and_all_of_it_is_scored(finished: StudyResult) -> None:
    study, verdict = finished.study, finished.verdict
    assert verdict is not None
    by_search = sorted(study.trials(), key=lambda t: (-(t.value or 0.0), t.number))[:3]
    numbers = [member.trial for member in verdict.shortlist]
    assert numbers == [trial.number for trial in by_search] == study.note("shortlist")["trials"]
    plan = make_plan(small(8, report_only=["qs_reverse"]))
    for member in verdict.shortlist:
        outcomes = load_outcomes(study.outcomes.path(f"holdout-{member.trial}"))["holdout"]
        objective = plan.tasks.objective(plan.tasks.scores(outcomes))
        assert objective == pytest.approx(member.holdout_objective)
    best = max(verdict.shortlist, key=lambda member: member.holdout_objective)
    assert verdict.trial == best.trial


def test_everything_agrees_on_the_winner(finished: StudyResult) -> None:
    study, verdict = finished.study, finished.verdict
    assert verdict is not None
    data = json.loads(json.dumps(result_json(finished)))
    assert finished.best is not None
    assert finished.best.number == data["best"]["number"] == verdict.trial
    assert [member["number"] for member in data["pareto"]] == [verdict.trial]
    assert [path.name for path in (study.folder / "pareto").iterdir()] == [f"trial-{verdict.trial}.yml"]
    text = (study.folder / "best.yml").read_text()
    assert f", trial {verdict.trial}, seed" in text.splitlines()[0]
    assert "# holdout qs_sort: " in text
    assert (study.folder / f"pareto/trial-{verdict.trial}.yml").read_text() == text
    assert Recipe.load(study.folder / "best.yml") == finished.recipe
    reopened = Study.open(study.folder).best()
    assert reopened is not None
    assert reopened.number == verdict.trial


def test_the_holdouts_choice_stands_until_a_trial_outdoes_the_finalists(
    finished: StudyResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = finished.study
    ranked = study.ranked()
    note, frozen = study.note("verdict"), study.note("shortlist")
    monkeypatch.setattr(study, "_current_finalists", list)

    def best(verdict: dict[str, Any], shortlist: dict[str, Any]) -> int:
        notes = {"verdict": note | verdict, "shortlist": frozen | shortlist}
        monkeypatch.setattr(study, "note", notes.get)
        found = study.best()
        assert found is not None
        return found.number

    for member in note["shortlist"]:
        assert best({"trial": member["trial"]}, {}) == member["trial"]
    others = [m for m in note["shortlist"] if m["trial"] != ranked[0].number]
    chosen = {"trial": others[-1]["trial"], "shortlist": others}
    numbers = [member["trial"] for member in others]
    assert best(chosen, {"trials": numbers}) == ranked[0].number
    # It was asked about too, and could not be scored; or is to be asked about next.
    assert best(chosen, {}) == others[-1]["trial"]
    assert best(chosen, {"finished": frozen["finished"] + 1}) == ranked[0].number


def test_equal_recipes_take_one_place(finished: StudyResult, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(small(8))
    first, second, *rest = finished.study.ranked()
    again = copy.copy(first)
    again.number = second.number
    monkeypatch.setattr(finished.study, "ranked", lambda: [first, again, *rest])
    assert shortlist(finished.study, plan) == [first.number, rest[0].number, rest[1].number]


def test_one_is_asked_where_there_is_no_holdout_or_a_front(finished: StudyResult) -> None:
    plan = make_plan(small(8))
    favourite = finished.study.ranked()[0].number
    without = plan.search_file.changed(scoring={"holdout": 0.0})
    pareto = plan.search_file.changed(search={"objective": "pareto", "sampler": "nsga2"})
    for file in (without, pareto):
        assert shortlist(finished.study, replace(plan, search_file=file)) == [favourite]


def test_a_longer_search_counts_everything_the_holdout_was_asked_about(tmp_path: Path) -> None:
    first = run(small(3), folder=tmp_path / "s")
    assert first.verdict is not None
    before = [member.trial for member in first.verdict.shortlist]
    plan = make_plan(small(8))
    assert frozen_shortlist(first.study, plan) == before  # nothing has finished since
    longer = run(small(8), folder=tmp_path / "s")
    assert longer.verdict is not None
    after = [member.trial for member in longer.verdict.shortlist]
    assert set(before) <= set(after)
    assert after[:3] == [trial.number for trial in longer.study.ranked()[:3]]
    assert f"for {len(after)} finalists" in longer.verdict.text


# ---- several workers -----------------------------------------------------------------------------


class Several:
    """A pool of three, around one that takes one by one; what was submitted last is answered first."""

    size = 3
    by_generation = False

    def __init__(self, pool: Pool, log: list[tuple[str, int]]) -> None:
        self._pool, self._log = pool, log
        self._jobs: list[Job] = []

    def submit(self, job: Job) -> None:
        self._jobs.append(job)
        assert len(self._jobs) <= self.size

    def wait(self) -> Result:
        self._log.append((self._jobs[-1].kind, len(self._jobs)))
        self._pool.submit(self._jobs.pop())
        return self._pool.wait()

    def memory(self, references: Sequence[str], dtype: str | None) -> Memory:
        return self._pool.memory(references, dtype)

    def close(self) -> None:
        self._pool.close()


def test_several_workers_share_the_end_and_find_what_one_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The finals, then baselines and shortlist, then repetitions and what is only reported."""
    file = small(8, report_only=["qs_reverse"]).changed(search={"signal": "likelihood"})
    one = run(file, folder=tmp_path / "one")
    log: list[tuple[str, int]] = []
    monkeypatch.setattr(session, "start_pool", lambda *args: Several(start_pool(*args), log))
    several = run(file, folder=tmp_path / "several")
    assert several.verdict == one.verdict
    assert several.study.finalists() == one.study.finalists()
    assert several.study.note("finals") == one.study.note("finals")
    jobs = [(kind, n) for kind, n in log if kind != "trial"]
    n_waits = [n for _, n in jobs]
    n_baselines = len(one.verdict.baselines) if one.verdict else 0
    end = [3] * (n_baselines + 3 - 2) + [2, 1]  # three are under way until no more are left
    assert n_waits == [3, 2, 1, *end, 3, 2, 1]
    assert {kind for kind, _ in jobs[:3]} == {"final"}
    assert {kind for kind, _ in jobs[-3:]} == {"noise", "winner"}


def test_rounds_of_a_race_are_shared_within_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each job of a round is counted before the next one is drawn."""
    data = SearchFile.load(ROOT / "configs/quickstart.yml").as_dict()
    data["search"] |= {"n_iterations": 12, "sampler": "random", "racing": "always"}
    data["scoring"] |= {"limit": 40, "holdout": 10}
    log: list[tuple[str, int]] = []
    monkeypatch.setattr(session, "start_pool", lambda *args: Several(start_pool(*args), log))
    whole = run(SearchFile(data), folder=tmp_path / "whole").study
    assert max(n for kind, n in log if kind == "final") == 3
    asked = sum(t.user_attrs["documents"] for t in whole.trials()) + whole.note("finals")["documents"]
    data["search"]["max_documents"] = asked - 40
    less = run(SearchFile(data), folder=tmp_path / "less").study
    spent = sum(t.user_attrs["documents"] for t in less.trials()) + less.note("finals")["documents"]
    assert spent <= asked - 40
    assert less.has_finals


# ---- report_only --------------------------------------------------------------------------------


def test_reported_tasks_are_scored_for_winner_and_baselines_only(
    finished: StudyResult, capsys: pytest.CaptureFixture[str]
) -> None:
    data = result_json(finished)
    assert list(data["best"]["scores"]) == list(data["best"]["holdout"]) == ["qs_sort", "qs_largest"]
    for scored in (data["best"], *data["baselines"]):
        assert list(scored["report_only"]) == ["qs_reverse"]
    study = finished.study
    assert finished.best is not None
    kept = load_outcomes(study.outcomes.path(f"report-{finished.best.number}"))["report"]
    assert len(kept["qs_reverse"]) == 10  # the limit; nothing is held out
    assert "report" in load_outcomes(study.outcomes.path("baseline-0"))
    assert "report" not in load_outcomes(study.outcomes.path("trial-0"))
    assert data["documents_scored"] == 8 * 20
    specialist = next(b for b in data["baselines"] if b["name"].endswith("reverse"))
    assert specialist["report_only"]["qs_reverse"]["value"] == 1.0
    found = data["verdict_notes"]["report_only"]["qs_reverse"][specialist["name"]]
    assert found["value"] == pytest.approx(data["best"]["report_only"]["qs_reverse"]["value"] - 1.0)
    assert ("lost on qs_reverse" in data["verdict"]) == (found["is_better"] is False)
    print_result(data, "s")
    assert "only reported" in capsys.readouterr().out
    assert study.note("documents")["qs_reverse"] == "10 reported, drawn by seed 0 from test"


def test_the_table_has_one_split_for_all(
    finished: StudyResult, capsys: pytest.CaptureFixture[str]
) -> None:
    """Baselines keep what they have on the holdout when the search goes on."""
    data = result_json(finished)
    data["best"]["holdout"] = {}
    for row in (data["best"], *data["baselines"]):
        row.pop("report_only")
    print_result(data, "s")
    table, _, _ = capsys.readouterr().out.partition("8 candidates (")
    assert "scores on search documents" in table
    assert "[" not in table  # intervals are of the holdout


def test_a_task_cannot_be_searched_on_and_only_reported() -> None:
    with pytest.raises(SearchFileError, match=r"report_only\[0\].name is 'qs_sort', which stands under"):
        small(2, report_only=["qs_sort"])


@pytest.mark.parametrize(
    ("tasks", "reported", "fault"),
    [
        (["both"], ["qs_sort"], "asks qs_sort like tasks[0].name 'both'"),
        (["qs_largest", "qs_sort"], ["both"], "asks qs_sort like tasks[1].name 'qs_sort'"),
        (["both"], ["all"], "asks qs_sort and 1 more like tasks[0].name 'both'"),
        (["qs_largest"], ["both"], None),
    ],
)
def test_what_is_searched_on_in_a_group_cannot_be_only_reported(
    tmp_path: Path, tasks: list[str], reported: list[str], fault: str | None
) -> None:
    score = "aggregate_metric_list: [{metric: exact_match, aggregation: mean, weight_by_size: true}]\n"
    for name, members in (("both", "qs_sort, qs_reverse"), ("all", "qs_sort, qs_reverse, qs_largest")):
        (tmp_path / f"{name}.yaml").write_text(f"group: {name}\ntask: [{members}]\n{score}")
    search = small(2, tasks=tasks, report_only=reported)
    search = search.changed(scoring={"task_paths": ["tasks", str(tmp_path)]})
    if fault is None:
        make_plan(search)
        return
    with pytest.raises(SearchFileError) as error:
        make_plan(search)
    assert len(error.value.faults) == 1
    assert f"report_only[0].name is {reported[0]!r}, which {fault}; " in error.value.faults[0]


def test_what_is_reported_is_checked_like_any_task() -> None:
    with pytest.raises(SearchFileError, match=r"report_only\[0\].name is 'qs_revers'.*'qs_reverse'"):
        make_plan(small(2, report_only=["qs_revers"]))


def test_another_split_or_other_reported_tasks_are_another_search(finished: StudyResult) -> None:
    with pytest.raises(ResumeRefusedError, match="report_only"):
        run(small(8, report_only=[{"name": "qs_reverse", "weight": 2.0}]), folder=finished.study.folder)
    file = small(8, report_only=["qs_reverse"]).changed(scoring={"split": "validation"})
    with pytest.raises(ResumeRefusedError, match="scoring"):
        run(file, folder=finished.study.folder)


# ---- notices ------------------------------------------------------------------------------------


def test_what_others_are_measured_on_is_said_at_the_head_and_on_the_card(
    finished: StudyResult, tmp_path: Path
) -> None:
    said = "searched on mmlu:test: not a leaderboard result"
    assert finished.recipe is not None
    head = head_lines(finished.recipe, "s", 1, 0, {}, notices=[said])
    text = export_yaml(finished.recipe, head)
    assert head_notices(text) == [said]
    path = tmp_path / "best.yml"
    path.write_text(text)
    save_merged(Recipe.load(path), tmp_path / "out", recipe_text=text)
    card = (tmp_path / "out/README.md").read_text()
    assert f"\n> {said}\n" in card.split("## Method")[0]


def test_the_verdict_says_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from evolve.tasks import TaskSet

    monkeypatch.setattr(TaskSet, "public", {"qs_sort": "test"}, raising=False)
    monkeypatch.setattr(
        TaskSet, "notices", lambda self: ["searched on mmlu:test: not a leaderboard result"]
    )
    result = run(small(2), folder=tmp_path / "s")
    data = result_json(result)
    assert data["verdict"].endswith("; searched on mmlu:test: not a leaderboard result")
    assert data["verdict_notes"]["notices"] == ["searched on mmlu:test: not a leaderboard result"]
    head = (tmp_path / "s/best.yml").read_text()
    assert head_notices(head) == data["verdict_notes"]["notices"]


def test_a_merge_with_another_random_seed_keeps_the_notice(tmp_path: Path) -> None:
    from merge_core.card import NOTICE

    models = ROOT / "configs/quickstart/models"
    recipe = tmp_path / "best.yml"
    entries = "".join(f"  - {{model: {models / name}}}\n" for name in ("sort", "reverse"))
    recipe.write_text(
        f"# {NOTICE}searched on x:test\nmerge_method: linear\nmodels:\n{entries}dtype: float32\n"
    )
    command = [sys.executable, "-m", "evolve.cli", "merge", str(recipe), str(tmp_path / "out")]
    subprocess.run([*command, "--random-seed", "3"], check=True, capture_output=True)
    assert "> searched on x:test" in (tmp_path / "out/README.md").read_text()
    assert "random_seed: 3" in (tmp_path / "out/mergekit_config.yml").read_text()
