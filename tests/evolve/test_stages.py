"""Stages of a search: rounds that shift the basis, and the local search at the end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from evolve.loop import run
from evolve.samplers import Sampler, make_sampler
from evolve.samplers.stages import BEYOND, N_ELITES, StagedSampler
from evolve.search_file import SearchFile
from evolve.space import SearchSpace, Space

ROOT = Path(__file__).resolve().parents[2]
N, ROUND, POLISH = 60, 25, 10


def space(n: int = 6) -> SearchSpace:
    weight = {"low": -2.0, "high": 2.0}
    models = [{"model": f"m{i}", "parameters": {"weight": weight}} for i in range(n)]
    parameters = {"normalize": {"choices": [False, True]}}
    return Space(
        {"merge_method": "task_arithmetic", "base_model": "b", "models": models, "parameters": parameters}
    )


def staged(over: SearchSpace) -> Sampler:
    def shifted(span: SearchSpace, seed: int) -> Sampler:
        return make_sampler("cma", span, seed)

    return StagedSampler(make_sampler("random", over, 3), shifted, over, 3, N, 2, POLISH)


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
