"""Stages of a search: rounds that shift the basis, and the local search at the end."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from pathlib import Path

import numpy as np
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from evolve.automatic import resolve_polish
from evolve.loop import run
from evolve.samplers import Sampler, make_sampler
from evolve.samplers.stages import (
    BEYOND,
    N_CENTRED,
    N_ELITES,
    AroundElite,
    LocalSearch,
    StagedSampler,
    sampler_of,
)
from evolve.search_file import SearchFile, SearchSettings
from evolve.space import SearchSpace, Space, Value

ROOT = Path(__file__).resolve().parents[2]
N, ROUND, POLISH = 60, 25, 10


def space(n: int = 6) -> SearchSpace:
    weight = {"low": -2.0, "high": 2.0}
    models = [{"model": f"m{i}", "parameters": {"weight": weight}} for i in range(n)]
    parameters = {"normalize": {"choices": [False, True]}}
    return Space(
        {"merge_method": "task_arithmetic", "base_model": "b", "models": models, "parameters": parameters}
    )


def numbers_alone() -> SearchSpace:
    weight = {"low": 0.0, "high": 2.0}
    models = [{"model": m, "parameters": {"weight": weight}} for m in "ab"]
    return Space({"merge_method": "task_arithmetic", "base_model": "b", "models": models})


def staged(over: SearchSpace) -> Sampler:
    def shifted(span: SearchSpace, seed: int) -> Sampler:
        return make_sampler("cma", span, seed)

    main, around_best = make_sampler("random", over, 3), LocalSearch(over, 3)
    return StagedSampler(main, shifted, around_best, over, 3, N, 2, POLISH)


def search(renew: int = 10**9) -> list[FrozenTrial]:
    over = space()
    trials: list[FrozenTrial] = []
    for number in range(N):
        if number % renew == 0:
            sampler = staged(over)
        proposal = sampler.propose(number, trials)
        x = np.array([v for v in proposal.values.values() if not isinstance(v, bool)])
        value = None if number % 7 == 5 else -float(((x - 0.7) ** 2).sum())
        made = create_trial(
            params=proposal.values,
            distributions=over.distributions(),
            state=TrialState.FAIL if value is None else TrialState.COMPLETE,
            value=value,
            user_attrs={**proposal.attributes, "told": number},
        )
        made.number = number
        trials.append(made)
    return trials


def best(trials: list[FrozenTrial]) -> float:
    return max(trial.value for trial in trials if trial.value is not None)


def test_each_stage_has_its_candidates() -> None:
    trials = search()
    stages = [
        "shift" if "shift" in t.user_attrs else "polish" if "polish" in t.user_attrs else ""
        for t in trials
    ]
    assert stages == [""] * ROUND + ["shift"] * (N - POLISH - ROUND) + ["polish"] * POLISH


def test_a_shifted_candidate_is_the_combination_of_elites_that_it_says() -> None:
    trials, over = search(), space()

    def unit(trial: FrozenTrial) -> np.ndarray:
        return np.array([v.to_unit(trial.params[v.name]) for v in over.variables if v.choices is None])

    elites = trials[ROUND].user_attrs["shift"]["elites"]
    assert len(elites) == N_ELITES
    values = [t.value if t.value is not None else -np.inf for t in trials[:ROUND]]
    assert elites == list(np.argsort(values)[::-1][:N_ELITES])
    points = [unit(trials[number]) for number in elites]
    for trial in trials[ROUND : N - POLISH]:
        u = trial.user_attrs["shift"]["u"]
        assert all(-BEYOND <= share <= 1 + BEYOND for share in u)
        mixed = points[0] + sum(share * (p - points[0]) for share, p in zip(u, points[1:], strict=True))
        assert unit(trial) == pytest.approx(np.clip(mixed, 0, 1))
        assert trial.params["normalize"] == trials[elites[0]].params["normalize"]


def test_stages_find_better_candidates_than_the_first_round() -> None:
    trials = search()
    assert best(trials[: N - POLISH]) > best(trials[:ROUND])
    assert best(trials) >= best(trials[: N - POLISH])
    for trial in trials[N - POLISH :]:
        before = [t for t in trials[: trial.number] if t.value is not None]
        assert trial.user_attrs["polish"]["from"] == max(before, key=lambda t: t.value).number


def estimated(
    over: SearchSpace, points: np.ndarray, errors: float, wanted: np.ndarray
) -> list[FrozenTrial]:
    """Tell candidates whose estimates are off by a normal error each, of quality -|x - wanted|^2."""
    rng = np.random.RandomState(0)
    trials = []
    for number, point in enumerate(points):
        values = {
            v.name: number % 2 == 0 if v.choices is not None else v.from_unit(point[i])
            for i, v in enumerate(over.variables)
        }
        made = create_trial(
            params=values,
            distributions=over.distributions(),
            value=-float(((point - wanted) ** 2).sum()) + errors * rng.randn(),
            user_attrs={"told": number, "objective_error": errors},
        )
        made.number = number
        trials.append(made)
    return trials


def test_the_centre_of_the_elite_is_nearer_the_optimum_than_the_luckiest_candidate() -> None:
    over, distances = space(), []
    numbers = [i for i, v in enumerate(over.variables) if v.choices is None]
    for seed in range(10):
        rng = np.random.RandomState(seed)
        wanted = rng.rand(len(over.variables)) * 0.4 + 0.3
        trials = estimated(over, rng.rand(80, len(over.variables)), 0.3, wanted)
        proposal = AroundElite(over, seed).propose(80, trials)
        luckiest = max(trials, key=lambda trial: trial.value or 0.0)

        def distance(values: Mapping[str, Value], wanted: np.ndarray = wanted) -> float:
            point = np.array([v.to_unit(values[v.name]) for v in over.variables if v.choices is None])
            return float(np.linalg.norm(point - wanted[numbers]))

        distances.append((distance(proposal.values), distance(luckiest.params)))
    centre, lucky = np.array(distances).T
    assert centre.mean() < 0.6 * lucky.mean()
    assert (centre < lucky).sum() >= 9


def test_candidates_around_the_elite_begin_with_its_centre_and_lie_as_close_as_it_does() -> None:
    over = space()
    rng = np.random.RandomState(1)
    trials = estimated(over, rng.rand(60, len(over.variables)), 0.0, np.full(len(over.variables), 0.5))
    sampler = AroundElite(over, 5)
    first = sampler.propose(60, trials)
    elite = [trials[number] for number in first.attributes["polish"]["around"]]
    assert len(elite) == N_CENTRED
    # Without errors the elite is simply the best, of those with the best one's category.
    alike = [t for t in trials if t.params["normalize"] == elite[0].params["normalize"]]
    assert elite == sorted(alike, key=lambda t: -(t.value or 0.0))[:N_CENTRED]
    weights = np.log(N_CENTRED + 0.5) - np.log(np.arange(1, N_CENTRED + 1))
    for variable in over.variables:
        if variable.choices is None:
            units = [variable.to_unit(trial.params[variable.name]) for trial in elite]
            mean = float(np.average(units, weights=weights))
            assert variable.to_unit(first.values[variable.name]) == pytest.approx(mean)
    begun = copy(trials[-1])
    begun.number, begun.params, begun.user_attrs = 60, first.values, dict(first.attributes)
    begun.state, begun.values = TrialState.RUNNING, None
    second = sampler.propose(61, [*trials, begun])
    assert second.values != first.values
    assert second.values == AroundElite(over, 5).propose(61, [*trials, begun]).values
    assert second.values != sampler.propose(61, [*trials, begun], attempt=1).values


def test_a_raced_search_draws_its_last_fifth_around_the_elite_unless_told_otherwise() -> None:
    raced = SearchSettings(sampler="gp", racing="always", n_iterations=100)
    over, mixed = numbers_alone(), space()
    assert resolve_polish(raced, over) == 20
    assert resolve_polish(raced.model_copy(update={"polish": 3}), mixed) == 3
    assert resolve_polish(raced.model_copy(update={"racing": "none"}), over) == 0
    assert resolve_polish(raced.model_copy(update={"objective": "pareto"}), over) == 0
    assert resolve_polish(raced, mixed) == 0
    staged_sampler = sampler_of(raced.model_copy(update={"polish": 20}), space(), 1)
    assert isinstance(staged_sampler, StagedSampler)
    assert isinstance(staged_sampler._around_best, AroundElite)


@pytest.mark.parametrize("renew", [1, 7])
def test_a_sampler_built_anew_goes_on_alike(renew: int) -> None:
    assert [t.params for t in search(renew)] == [t.params for t in search()]


@pytest.mark.parametrize("objective", ["weighted_sum", "pareto"])
def test_a_whole_search_goes_through_its_stages(
    objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    file = SearchFile.load(ROOT / "configs/quickstart.yml").changed(
        search={
            "n_iterations": 16,
            "rounds": 2,
            "polish": 4,
            "objective": objective,
            "sampler": "auto",
        },
        scoring={"limit": 5, "holdout": 5},
    )
    trials = run(file, folder=tmp_path / "s").study.trials()
    assert sum("shift" in t.user_attrs for t in trials) == 6
    assert sum("polish" in t.user_attrs for t in trials) == 4
