"""The greedy soup finds what its definition says, in any order of answers, and ends by itself."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import FrozenTrial, TrialState

from evolve.errors import SearchFileError
from evolve.loop import run
from evolve.samplers.greedy_soup import soup_faults
from evolve.search_file import SearchFile, SearchSettings
from evolve.space import Space, Value

from ..benchmarks.unstored import search, weights

ROOT = Path(__file__).resolve().parents[2]
MODELS = "configs/quickstart/models"


def soups(n: int, **keys: Any) -> Space:
    models = [{"model": {"choices": [f"m{i}", None]}, "parameters": {"weight": 1.0}} for i in range(n)]
    return Space({"merge_method": "linear", "models": models, **keys})


def members(values: Mapping[str, Value]) -> frozenset[int]:
    return frozenset(int(str(model)[1:]) for model in values.values() if model is not None)


def by_definition(scores: Mapping[frozenset[int], float | None], n: int) -> list[frozenset[int]]:
    """Recipe 1 of the paper, over a table of scores: the soups that are scored, the last one first."""
    alone = {i: score for i in range(n) if (score := scores[frozenset([i])]) is not None}
    best, *others = sorted(alone, key=lambda i: (-alone[i], i))
    soup, asked = frozenset([best]), [frozenset([i]) for i in range(n)]
    for i in others:
        asked.append(soup | {i})
        score = scores[soup | {i}]
        if score is not None and score >= (scores[soup] or 0.0):
            soup |= {i}
    return [soup, *asked]


@st.composite
def tables(draw: st.DrawFn) -> tuple[int, dict[frozenset[int], float | None]]:
    n = draw(st.integers(2, 5))
    subsets = [frozenset(c) for k in range(1, n + 1) for c in combinations(range(n), k)]
    # Few values, so that many are equal; None is a failure.
    value = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0, None])
    scores: dict[frozenset[int], float | None] = {subset: draw(value) for subset in subsets}
    scores[frozenset([0])] = scores[frozenset([0])] or 0.0
    return n, scores


@given(tables(), st.integers(0, 3), st.sampled_from([None, 1, 2]))
def test_it_scores_what_the_definition_does(
    table: tuple[int, dict[frozenset[int], float | None]], pending: int, renew: int | None
) -> None:
    n, scores = table
    soup, *asked = by_definition(scores, n)
    trials = search(soups(n), lambda v: scores[members(v)], 50, "greedy_soup", renew=renew)
    assert [members(trial.params) for trial in trials] == list(dict.fromkeys(asked))
    assert soup in map(members, (trial.params for trial in trials))
    assert len(trials) <= 2 * n - 1


def test_a_soup_that_is_known_is_not_scored_again() -> None:
    starts = {f"models[{i}].model": f"m{i}" for i in range(3)}
    trials = search(soups(3), lambda v: len(members(v)), 50, "greedy_soup", known={"starts": starts})
    assert [sorted(members(trial.params)) for trial in trials] == [[0, 1, 2], [0], [1], [2], [0, 1]]


def test_it_waits_for_what_is_under_way() -> None:
    from evolve.samplers import make_sampler

    sampler = make_sampler("greedy_soup", soups(2), 0)
    told = search(soups(2), lambda v: 1.0, 2, "greedy_soup")
    running: FrozenTrial = told[1]
    running.state, running.values = TrialState.RUNNING, None
    assert sampler.propose(2, told) is None
    running.state, running.values = TrialState.COMPLETE, [0.5]
    proposal = sampler.propose(2, told)
    assert proposal is not None
    assert proposal.attributes == {"soup": ["m0", "m1"]}


def test_what_a_soup_cannot_have_is_said() -> None:
    settings = SearchSettings(rounds=2, racing="always", objective="pareto")
    faults = soup_faults(settings, weights(2))
    for said in ("search.rounds is 2", "search.racing is always", "search.objective is pareto"):
        assert any(said in fault for fault in faults)
    assert any("write model: {choices: [MODEL, null]}" in fault for fault in faults)
    assert soup_faults(SearchSettings(), soups(2)) == []
    models = [
        {"model": {"choices": c}, "parameters": {"weight": 1.0}} for c in (["a", "b", None], ["c", None])
    ]
    (one, *_) = soup_faults(SearchSettings(), Space({"merge_method": "linear", "models": models}))
    assert "models[0].model chooses among 2 models; give each an entry of its own" in one


def test_what_is_no_model_stays_at_its_start() -> None:
    over = soups(2, out_dtype={"choices": ["float32", None]})
    trials = search(over, lambda v: 1.0, 50, "greedy_soup")
    assert {trial.params["out_dtype"] for trial in trials} == {"float32"}


@pytest.mark.slow
def test_a_soup_of_real_models_ends_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names = ("reverse", "sort", "largest")
    data = {
        "merge_method": "linear",
        "models": [{"model": {"choices": [f"{MODELS}/{name}", None]}} for name in names],
        "dtype": "float32",
        "tasks": ["qs_reverse", "qs_sort", "qs_largest"],
        "search": {"sampler": "greedy_soup", "n_iterations": 20},
        "scoring": {"limit": 20, "holdout": 10},
    }
    cut = SearchFile(data, "soup")
    run(cut.changed(search={"n_iterations": 3}), folder=tmp_path / "s")
    result = run(cut, folder=tmp_path / "s")
    trials = result.study.trials()
    assert "the sampler needs no more" in str(result.study.note("exhausted"))
    singles = [t for t in trials if sum(v is not None for v in t.params.values()) == 1]
    assert len(singles) == 3
    assert len(trials) <= 6
    assert result.best is not None
    assert result.best.values[0] == max(t.values[0] for t in trials)
    with pytest.raises(SearchFileError, match="greedy_soup compares whole scores"):
        run(cut.changed(search={"polish": 2}), folder=tmp_path / "t")
