"""How a search stands is kept as trials are told, and is what ranking all of them says."""

from __future__ import annotations

import numpy as np
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from evolve.front import front, ranking
from evolve.study.standing import Standing, total_violation


def drawn(
    rng: np.random.Generator, n: int, n_values: int, n_levels: int, share: float
) -> list[FrozenTrial]:
    """Trials with few distinct values, so that many are equal; a share of them violates a constraint."""
    trials = []
    for number in range(n):
        failed = rng.random() < 0.1
        broken = rng.random() < share
        trial = create_trial(
            state=TrialState.FAIL if failed else TrialState.COMPLETE,
            values=None if failed else rng.integers(0, n_levels, n_values).astype(float).tolist(),
            user_attrs={} if failed else {"objective": float(rng.integers(0, n_levels))},
            system_attrs={"constraints:c": float(rng.integers(1, 3)) if broken else -1.0},
        )
        trial.number = number
        trials.append(trial)
    return trials


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("n_values", [1, 2, 3])
@pytest.mark.parametrize("n_levels", [2, 4, 1000])
def test_the_standing_is_that_of_a_whole_ranking(n_values: int, n_levels: int, share: float) -> None:
    rng = np.random.default_rng([n_values, n_levels, round(10 * share)])
    for n in (1, 5, 40):
        trials = drawn(rng, n, n_values, n_levels, share)
        standing, told = Standing(), []
        for i in rng.permutation(n):  # several workers tell in any order
            standing.add(trials[i])
            told = sorted([*told, trials[i]], key=lambda trial: trial.number)
            complete = [trial for trial in told if trial.state == TrialState.COMPLETE]
            if not complete:
                assert standing.leader() is None
                continue
            values = np.array([trial.values for trial in complete])
            violations = [total_violation(trial) for trial in complete]
            sums = [trial.user_attrs["objective"] for trial in complete]
            assert standing.leader() is complete[ranking(values, violations, sums)[0]]
            assert [t.number for t in standing.front] == sorted(
                complete[i].number for i in front(values, violations)
            )
        assert standing.n_finished == n
        assert standing.states[TrialState.COMPLETE] == len(complete)
