"""Racing: what a part of the documents says of all, and whole raced searches."""

from __future__ import annotations

import contextlib
import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from evolve.cli import app
from evolve.errors import SearchFileError
from evolve.evaluation import EvalOptions, evaluate_models
from evolve.loop import StudyResult, run
from evolve.plan import make_plan
from evolve.racing import GENERATION, Race, Values
from evolve.report import result_json
from evolve.search_file import SearchFile
from evolve.study import Study
from evolve.tasks import Outcome

ROOT = Path(__file__).resolve().parents[2]
N = 24


def race(n: int = 200, n_candidates: int = 120, **more: Any) -> Race:
    documents = {key: [(key, i) for i in range(n)] for key in "ab"}
    return Race(documents, {"a": 1.0, "b": -1.0}, n_candidates, 3, **more)


def answered(over: Race, number: int, outcomes: dict[str, np.ndarray], halves: int = 2) -> Values:
    found: dict[str, dict[tuple[str, int], float]] = {}
    for block in over.blocks(number)[:halves]:
        for key, documents in block.items():
            found.setdefault(key, {}).update({d: float(outcomes[key][d[1]]) for d in documents})
    return found


def test_what_is_asked_whole_is_known() -> None:
    over = race(50)
    values = {key: {(key, i): float(i % 3 == 0) for i in range(50)} for key in "ab"}
    for key, estimate in over.estimates(values).items():
        assert estimate.value == np.mean(list(values[key].values()))
        assert estimate.standard_error == 0


@given(st.integers(0, 40), st.integers(0, 40))
def test_some_candidates_in_a_row_are_asked_the_same_documents(one: int, other: int) -> None:
    over = race()
    assert (over.blocks(one) == over.blocks(other)) == (one // GENERATION == other // GENERATION)


def test_blocks_go_through_all_documents() -> None:
    over = race(50)
    asked = {d for number in range(0, 80) for block in over.blocks(number) for d in block["a"]}
    assert len(asked) == 50


def test_a_blocks_first_half_was_asked_before() -> None:
    over = race()
    for number in range(GENERATION, 60):
        before = [d for block in over.blocks(number - GENERATION) for d in block["a"]]
        assert set(over.blocks(number)[0]["a"]) <= set(before)


def test_estimates_do_not_blame_a_candidate_for_its_documents() -> None:
    """Outcomes of y = quality + ease: after some candidates the error is less than the plain mean's."""
    rng = np.random.default_rng(0)
    ease = rng.normal(0, 0.3, 200)
    over = race()
    errors = []
    for number in range(240):
        quality = rng.normal(0.5, 0.1)
        values = answered(over, number, {key: quality + ease for key in "ab"})
        truth = quality + ease.mean()
        plain = np.mean(list(values["a"].values()))
        errors.append((over.estimates(values)["a"].value - truth, plain - truth))
        over.tell(number, values)
    ours, plain = np.sqrt(np.mean(np.square(errors[120:]), axis=0))
    assert ours < 0.8 * plain


def test_standard_errors_are_as_large_as_the_errors() -> None:
    rng = np.random.default_rng(1)
    over = race()
    z = []
    for number in range(300):
        outcomes = {key: (rng.random(200) < 0.4).astype(float) for key in "ab"}
        values = answered(over, number, outcomes)
        for key, estimate in over.estimates(values).items():
            z.append((estimate.value - outcomes[key].mean()) / estimate.standard_error)
        over.tell(number, values)
    assert 0.8 < np.std(z) < 1.2
    assert abs(np.mean(z)) < 0.15


def test_who_is_worse_on_every_document_is_dropped_and_who_is_as_good_is_not() -> None:
    right, wrong = np.ones(200), np.zeros(200)
    over = race()
    over.tell(0, answered(over, 0, {"a": right, "b": wrong}))  # of b less is better
    assert over.is_hopeless(1, answered(over, 1, {"a": wrong, "b": right}, halves=1))
    assert not over.is_hopeless(1, answered(over, 1, {"a": right, "b": wrong}, halves=1))
    # Later ones are asked other documents: there is nobody to compare them with.
    assert not over.is_hopeless(40, answered(over, 40, {"a": wrong, "b": right}, halves=1))


def test_with_many_objectives_only_who_is_worse_in_all_is_dropped() -> None:
    right, wrong = np.ones(200), np.zeros(200)
    over = race(has_many_objectives=True)
    over.tell(0, answered(over, 0, {"a": right, "b": wrong}))
    assert not over.is_hopeless(1, answered(over, 1, {"a": wrong, "b": wrong}, halves=1))
    assert over.is_hopeless(1, answered(over, 1, {"a": wrong, "b": right}, halves=1))


def test_a_weight_of_0_is_an_objective_like_any_other_of_many() -> None:
    right, wrong = np.ones(200), np.zeros(200)
    documents = {key: [(key, i) for i in range(200)] for key in "ab"}
    for many in (True, False):
        over = Race(documents, {"a": 0.0, "b": -0.0}, 120, 3, has_many_objectives=many)
        over.tell(0, answered(over, 0, {"a": right, "b": wrong}))
        assert not over.is_hopeless(1, answered(over, 1, {"a": wrong, "b": wrong}, halves=1))
        assert over.is_hopeless(1, answered(over, 1, {"a": wrong, "b": right}, halves=1)) == many


def test_outcomes_outside_a_scores_own_block_count_for_nothing() -> None:
    """A leaf's documents are asked for every score: of scores over other documents, more than its own."""
    documents = {
        "a": [("a", i) for i in range(60)],
        "ab": [(leaf, i) for leaf in "ab" for i in range(60)],
    }
    over = Race(documents, {"a": 1.0, "ab": -1.0}, 60, 3)
    for number in range(8):
        first, second = over.blocks(number)
        assert not set(first["ab"] + second["ab"]) <= set(first["a"] + second["a"])
        asked = {document for half in (first, second) for its in half.values() for document in its}
        outcomes = {
            key: [Outcome(*document, 1.0) for document in sorted(asked) if document in its]
            for key, its in documents.items()
        }
        for n_halves, block in ((1, first), (2, {key: first[key] + second[key] for key in first})):
            found = over.values(number, outcomes, n_halves)
            assert {key: set(its) for key, its in found.items()} == {k: set(v) for k, v in block.items()}
        recorded = over.recorded(number, found)
        assert over.recalled(number, recorded) == found
        over.tell(number, found)


def test_documents_that_all_agree_on_are_asked_last() -> None:
    over = race(40)
    for number in range(100):
        outcomes = {key: np.arange(40) % 2 * 1.0 for key in "ab"}
        outcomes["a"][:10] = number % 3 == 0
        over.tell(number, answered(over, number, outcomes))
    order = over.rounds()[-1].documents["a"]
    assert {i for _, i in order[:10]} == set(range(10))


def test_rounds_ask_fewer_candidates_more_documents() -> None:
    rounds = race().rounds()
    assert [r.n_candidates for r in rounds] == sorted((r.n_candidates for r in rounds), reverse=True)
    for one, other in itertools.pairwise(rounds):
        assert set(one.documents["a"]) < set(other.documents["a"])


def test_the_share_of_the_documents_is_foretold() -> None:
    assert 0.1 < race().share() < 0.15
    assert race().is_worthwhile()
    assert not race(n=20).is_worthwhile()
    assert not race(n_candidates=40).is_worthwhile()


# ---- whole searches -----------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def raced(n: int = N, **search: Any) -> SearchFile:
    file = SearchFile.load(ROOT / "configs/quickstart.yml")
    return file.changed(
        search={"n_iterations": n, "racing": "always", **search},
        scoring={"limit": 60, "holdout": 20},
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> StudyResult:
    with contextlib.chdir(ROOT):
        return run(raced(), folder=tmp_path_factory.mktemp("raced") / "s")


def record(study: Study) -> list[Any]:
    return [(t.number, t.params, t.values, t.user_attrs["scores"]) for t in study.trials()]


def test_a_raced_search_asks_few_documents_and_scores_its_finalists_on_all(
    finished: StudyResult,
) -> None:
    study = finished.study
    assert result_json(finished)["documents_scored"] < 0.5 * N * 180
    asked = [t.user_attrs["documents"] for t in study.trials()]
    assert max(asked) == 18
    best = study.best()
    assert best is not None
    outcomes = study.search_outcomes(best.number)
    assert {key: len(values) for key, values in outcomes.items()} == dict.fromkeys(study.scores(best), 60)
    assert len(study.finalists()) == 3
    objectives = [finalist.rating.objective for finalist in study.finalists().values()]
    assert objectives == sorted(objectives, reverse=True)


def test_estimates_have_standard_errors(finished: StudyResult) -> None:
    for trial in finished.study.trials():
        errors = trial.user_attrs["standard_errors"]
        assert errors.keys() == trial.user_attrs["scores"].keys()
        assert all(0 < error < 0.5 for error in errors.values())


def test_an_exported_trial_says_which_scores_are_estimates(finished: StudyResult) -> None:
    study = finished.study
    number = next(t.number for t in study.trials() if t.number not in study.finalists())
    for trial, is_estimated in ((number, True), (next(iter(study.finalists())), False)):
        told = CliRunner().invoke(app, ["export", str(study.folder), "--trial", str(trial)])
        scores = [line for line in told.stdout.splitlines() if line.startswith("# search ")]
        assert scores
        assert {"estimated from a part of the documents" in line for line in scores} == {is_estimated}


def test_the_winner_ships_as_scored(finished: StudyResult) -> None:
    best = finished.study.best()
    assert best is not None
    recipe = str(finished.study.folder / "best.yml")
    (scored,) = evaluate_models([recipe], EvalOptions(like=finished.study.folder))
    assert scored["scores"] == finished.study.scores(best)


@pytest.mark.parametrize(("event", "n"), [("answered", 9), ("told", 15), ("final", 3)])
def test_it_ends_the_same_wherever_it_is_interrupted(
    finished: StudyResult, tmp_path: Path, event: str, n: int
) -> None:
    seen: list[str] = []

    def kill(what: str, *_: Any) -> None:
        seen.append(what)
        if seen.count(event) == n and what == event:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(raced(), folder=tmp_path / "s", progress=kill)
    again = run(raced(), folder=tmp_path / "s")
    assert record(again.study) == record(finished.study)
    assert again.study.finalists() == finished.study.finalists()
    assert (again.study.folder / "best.yml").read_text() == (
        finished.study.folder / "best.yml"
    ).read_text()


def test_the_last_fifth_is_drawn_around_the_best_of_all_before(finished: StudyResult) -> None:
    trials = finished.study.trials()
    around = [trial.user_attrs.get("polish", {}).get("around") for trial in trials]
    assert [numbers is not None for numbers in around] == [False] * (N - N // 5) + [True] * (N // 5)
    assert all(
        max(numbers) < trial.number for trial, numbers in zip(trials, around, strict=True) if numbers
    )


def test_a_search_that_goes_on_races_as_it_began(tmp_path: Path) -> None:
    auto = {"racing": "auto", "signal": "likelihood"}
    run(raced(8, **auto), folder=tmp_path / "s")
    result = run(raced(70, **auto).changed(search={"timeout_s": 0.001}), folder=tmp_path / "s")
    assert all("standard_errors" not in t.user_attrs for t in result.study.trials())


def test_many_objectives_and_a_signal_race_too(tmp_path: Path) -> None:
    file = raced(14, objective="pareto", sampler="nsga2", signal="likelihood")
    result = run(file, folder=tmp_path / "s")
    assert result.study.finalists()
    members = {t.number for t in result.study.front()}
    assert members <= set(result.study.finalists())


@pytest.mark.parametrize("signal", ["likelihood", "both"])
def test_an_objective_over_several_tasks_races_and_goes_on(tmp_path: Path, signal: str) -> None:
    data = raced(8, signal=signal).as_dict()
    data["tasks"].append({"name": "output_tokens", "weight": 0.01})
    run(SearchFile(data).changed(search={"n_iterations": 5}), folder=tmp_path / "s")
    study = run(SearchFile(data), folder=tmp_path / "s").study
    assert [trial.state.name for trial in study.trials()] == ["COMPLETE"] * 8


def test_auto_races_where_it_saves_most_documents() -> None:
    def resolved(n: int, limit: int, signal: str = "likelihood") -> str:
        file = raced(n, racing="auto", signal=signal).changed(scoring={"limit": limit})
        return make_plan(file).search_file.search.racing

    assert resolved(100, 200) == "always"
    assert resolved(100, 20) == "none"
    assert resolved(20, 200) == "none"
    assert resolved(100, 200, "metric") == resolved(100, 200, "both") == "none"


@pytest.mark.parametrize(
    "task",
    [{"name": "seconds_per_document"}, {"name": "statistics:fmean", "direction": "maximize"}],
    ids=lambda task: task["name"],
)
def test_what_cannot_be_told_from_a_part_is_not_raced(task: dict[str, Any]) -> None:
    data = raced(100, signal="likelihood").changed(scoring={"limit": 200}).as_dict()
    data["tasks"].append(task)
    with pytest.raises(SearchFileError, match=f"search.racing is always, but {task['name']} cannot"):
        make_plan(SearchFile(data))
    data["search"]["racing"] = "auto"
    assert make_plan(SearchFile(data)).search_file.search.racing == "none"


def test_one_in_30_reaches_the_finals() -> None:
    assert race(n_candidates=120).n_finalists == 4


def test_of_a_front_as_many_reach_the_finals_as_the_last_round_has_places() -> None:
    over = race(n_candidates=120, has_many_objectives=True)
    assert over.n_finalists == over.rounds()[-1].n_candidates == 10
    assert race(n_candidates=30, has_many_objectives=True).n_finalists == 5
    assert race().share() < over.share() < race().share() + 0.06


def test_a_block_may_have_no_value_of_a_task(tmp_path: Path) -> None:
    """A task may give only some documents a value; of few documents that may be none."""
    for name in ("quickstart_data.py", "qs_sort.jsonl"):
        shutil.copy(ROOT / "tasks" / name, tmp_path)
    plain = (ROOT / "tasks/qs_sort.yaml").read_text().partition("metric_list")[0]
    (tmp_path / "some.yaml").write_text(
        plain.replace("task: qs_sort", "task: some")
        + "process_results: !function some.value\n"
        + "metric_list: [{metric: m, aggregation: mean, higher_is_better: true}]\n"
    )
    (tmp_path / "some.py").write_text(
        "def value(doc, results):\n"
        "    return {'m': float(results[0] == doc['answer'])} if 'a' in doc['answer'] else {}\n"
    )
    data = raced(8).as_dict()
    data["tasks"] = [{"name": "some"}, {"name": "qs_reverse"}]
    data["scoring"]["task_paths"].append(str(tmp_path))
    study = run(SearchFile(data), folder=tmp_path / "s").study
    assert [trial.state.name for trial in study.trials()] == ["COMPLETE"] * 8
    n_values = [len(trial.user_attrs["raced"]["some"]) for trial in study.trials()]
    assert 0 in n_values


@pytest.mark.parametrize("limit", [30, 32])
def test_a_round_may_have_nothing_new_of_a_task(tmp_path: Path, limit: int) -> None:
    """Of few documents a block may hold all that a round asks, of every task or of one."""
    data = raced(12).as_dict()
    data["scoring"] |= {"limit": limit}
    result = run(SearchFile(data), folder=tmp_path / "s")
    assert result.study.has_finals
