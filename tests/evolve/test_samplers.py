from collections.abc import Callable, Sequence

import numpy as np
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from evolve.samplers import Sampler, make_sampler, resolve_sampler
from evolve.samplers.cma import CmaSampler
from evolve.space import Space

NAMES = ["cma", "tpe", "gp", "nsga2", "nsga3", "qmc", "random"]


def space(n: int, **extra: object) -> Space:
    weight = {"low": -2.0, "high": 2.0, **extra}
    models = [{"model": f"m{i}", "parameters": {"weight": weight}} for i in range(n)]
    return Space({"merge_method": "task_arithmetic", "base_model": "base", "models": models})


def trial(
    over: Space,
    sampler: Sampler,
    number: int,
    trials: Sequence[FrozenTrial],
    value: float | None,
    told: int | None,
) -> FrozenTrial:
    """Propose a trial and give it an end: a value, failure (None), or pending (told None)."""
    proposal = sampler.propose(number, trials)
    state = TrialState.COMPLETE if value is not None else TrialState.FAIL
    made = create_trial(
        params=proposal.values,
        distributions=over.distributions(),
        state=TrialState.RUNNING if told is None else state,
        value=value if told is not None else None,
        user_attrs={**proposal.attributes, **({} if told is None else {"told": told})},
    )
    made.number = number
    return made


def search(
    name: str,
    over: Space,
    n: int,
    f: Callable[[np.ndarray], float | None],
    renew: int = 10**9,
    seed: int = 3,
) -> list[FrozenTrial]:
    """Search with a sampler that is built anew after every `renew` trials, as a resume does."""
    trials: list[FrozenTrial] = []
    sampler = make_sampler(name, over, seed)
    for number in range(n):
        if number % renew == 0:
            sampler = make_sampler(name, over, seed)
        made = trial(over, sampler, number, trials, 0.0, number)
        value = f(np.array(list(made.params.values())))
        made.state = TrialState.COMPLETE if value is not None else TrialState.FAIL
        made.values = None if value is None else [value]
        trials.append(made)
    return trials


def sphere(x: np.ndarray) -> float:
    return -float(((x - 0.7) ** 2).sum())


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_search_also_when_resumed_at_any_trial(name: str) -> None:
    over = space(4)
    n = 14 if name == "gp" else 25  # each proposal takes the Gaussian process 0.1 s and more
    undisturbed = [t.params for t in search(name, over, n, sphere)]
    for renew in (1, 7):
        assert [t.params for t in search(name, over, n, sphere, renew)] == undisturbed
    assert [t.params for t in search(name, over, n, sphere, seed=4)] != undisturbed


@pytest.mark.parametrize("name", NAMES)
def test_the_global_random_state_has_no_influence(name: str) -> None:
    over = space(3)

    def reseeding(x: np.ndarray) -> float:
        np.random.seed(1234)  # what lm-eval does
        return sphere(x)

    assert [t.params for t in search(name, over, 20, sphere)] == [
        t.params for t in search(name, over, 20, reseeding)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_no_two_proposals_are_equal(name: str) -> None:
    trials = search(name, space(3), 20 if name == "gp" else 40, sphere)
    assert len({tuple(t.params.values()) for t in trials}) == len(trials)


@pytest.mark.parametrize("name", NAMES)
def test_proposals_stay_in_bounds(name: str) -> None:
    n = 16 if name == "gp" else 40
    trials = search(name, space(3), n, lambda x: float(x.sum()))  # pulls into a corner
    assert all(-2 <= value <= 2 for t in trials for value in t.params.values())


def test_cma_finds_the_optimum_of_a_sphere() -> None:
    trials = search("cma", space(6), 400, sphere)
    assert max(t.value or -9 for t in trials if t.value is not None) > -1e-3


def test_cma_takes_its_first_step_and_generation_from_the_settings() -> None:
    def spread(sigma0: float | None) -> float:
        sampler = make_sampler("cma", space(4), 0, sigma0=sigma0)
        return float(np.std([list(sampler.propose(i, []).values.values()) for i in range(40)]))

    assert spread(0.02) < spread(0.1) < spread(None)
    sampler = make_sampler("cma", space(4), 0, population_size=5)
    assert isinstance(sampler, CmaSampler)
    assert sampler.popsize == 5


def test_cma_finds_it_with_failed_candidates() -> None:
    calls = iter(range(10**6))
    trials = search("cma", space(6), 500, lambda x: None if next(calls) % 7 == 0 else sphere(x))
    assert max(t.value for t in trials if t.value is not None) > -1e-3


def test_a_generation_that_fails_whole_does_not_end_the_search() -> None:
    calls = iter(range(10**6))
    trials = search("cma", space(3), 60, lambda x: None if next(calls) < 20 else sphere(x))
    assert len(trials) == 60


def test_cma_proposes_while_candidates_are_pending_and_takes_late_ones() -> None:
    over = space(4)

    def run(renew: int) -> list[FrozenTrial]:
        trials: list[FrozenTrial] = []
        sampler = make_sampler("cma", over, 1)
        told = 0
        for number in range(150):
            if number % renew == 0:
                sampler = make_sampler("cma", over, 1)
            trials.append(trial(over, sampler, number, trials, None, None))
            # Three stay pending; the one told is not the oldest.
            pending = [t for t in trials if t.state == TrialState.RUNNING]
            if len(pending) > 3:
                ready = pending[1]
                ready.state = TrialState.COMPLETE
                ready.values = [sphere(np.array(list(ready.params.values())))]
                ready.user_attrs["told"] = told
                told += 1
        return trials

    once, renewed = run(10**9), run(5)
    assert [t.params for t in once] == [t.params for t in renewed]
    done = [t.value for t in once if t.value is not None]
    assert np.mean(done[-30:]) > np.mean(done[:30]) + 1


@pytest.mark.parametrize(
    ("over", "expected"),
    [(space(4), "cma"), (space(1), "tpe")],
    ids=["numbers", "one variable"],
)
def test_auto_chooses_by_the_space(over: Space, expected: str) -> None:
    assert resolve_sampler("auto", over)[0] == expected


@pytest.mark.parametrize("name", ["nsga2", "nsga3"])
def test_generations_are_carried_from_trial_to_trial(name: str) -> None:
    trials = search(name, space(4), 112, sphere, renew=1)
    generations = [t.user_attrs["generation"] for t in trials]
    assert generations == sorted(generations)
    assert generations[-1] >= 5
    values = [t.value for t in trials if t.value is not None]
    assert np.mean(values[-16:]) > np.mean(values[:16]) + 1


def test_a_quasi_random_sequence_fills_the_space_evenly() -> None:
    trials = search("qmc", space(2), 64, sphere)
    cells = {tuple(int((v + 2) * 2) for v in t.params.values()) for t in trials}
    assert len(cells) == 64  # one in each cell of an 8 by 8 grid


def test_steps_are_kept_by_every_sampler() -> None:
    for name in NAMES:
        for made in search(name, space(2, step=0.5), 15, sphere):
            assert all((value * 2) == int(value * 2) for value in made.params.values())
