"""What every sampler keeps to, and what CMA-ES finds."""

from collections.abc import Callable

import numpy as np
import pytest
from optuna.trial import FrozenTrial, TrialState

from evolve.samplers import Sampler, derived_rng, make_sampler
from evolve.samplers.auto import resolve_sampler, sampler_faults
from evolve.samplers.cma import losses
from evolve.samplers.stages import sampler_of
from evolve.search_file import SearchSettings
from evolve.space import Space

from ..benchmarks.unstored import Values, numbers, running, search, weights

NAMES = ["cma", "tpe", "gp", "nsga2", "nsga3", "qmc", "random"]


def mixed() -> Space:
    """Numbers, a whole number, steps, categories, and variables that only some choices read."""
    models = [
        {
            "model": "m0",
            "parameters": {
                "weight": {"low": 0.0, "high": 1.0},
                "density": {"low": 0.1, "high": 1.0, "step": 0.1},
            },
        },
        {"model": {"choices": ["m1", None]}, "parameters": {"weight": {"low": 0.0, "high": 1.0}}},
        {"model": "m2", "parameters": {"weight": {"choices": [0.25, 0.5, 0.75]}}},
    ]
    return Space(
        {
            "merge_method": {"choices": ["linear", "ties", "dare_ties"]},
            "base_model": "base",
            "models": models,
        }
    )


def mixed_sphere(values: Values) -> float:
    """Best at ties, all models on, weights of 0.3, 0.6 and 0.75, density 0.4."""
    optimum = {"models[0].weight": 0.3, "models[1].weight": 0.6, "models[0].density": 0.4}
    loss = sum((float(values.get(name, 1.0)) - best) ** 2 for name, best in optimum.items())  # type: ignore[arg-type]
    loss += 0.2 * (values["merge_method"] != "ties") + 0.2 * (values["models[1].model"] is None)
    return -loss - 0.2 * (values["models[2].weight"] != 0.75)


SPACES: dict[str, Callable[[], Space]] = {
    "numbers": lambda: weights(4),
    "mixed": mixed,
    "one": lambda: weights(1),
    "steps": lambda: weights(3, step=0.25),
    "categories": lambda: weights_of_choices(3),
}


# Each proposal takes the Gaussian process 0.1 s and more.
CASES = [(name, kind) for name in NAMES for kind in SPACES if name != "gp" or kind == "mixed"]


def weights_of_choices(n: int) -> Space:
    choices = {"choices": [0.0, 0.25, 0.5, 1.0]}
    models = [{"model": f"m{i}", "parameters": {"weight": choices}} for i in range(n)]
    return Space({"merge_method": "task_arithmetic", "base_model": "base", "models": models})


def sphere(values: Values) -> float:
    x = np.array([v for v in values.values() if isinstance(v, float)])
    return -float(((x - 0.675) ** 2).sum())


def params(trials: list[FrozenTrial]) -> list[dict[str, object]]:
    return [trial.params for trial in trials]


def best(trials: list[FrozenTrial]) -> float:
    return max(trial.values[0] for trial in trials if trial.values)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_same_seed_same_search_also_when_resumed_at_any_trial(name: str, kind: str) -> None:
    over = SPACES[kind]()
    n = 13 if name == "gp" else 25
    undisturbed = params(search(over, sphere, n, name, 3))
    for renew in (1, 7) if kind in ("numbers", "mixed") and name != "gp" else (5,):
        assert params(search(over, sphere, n, name, 3, renew=renew)) == undisturbed
    assert params(search(over, sphere, n, name, 4)) != undisturbed


@pytest.mark.parametrize("name", NAMES)
def test_the_global_random_state_has_no_influence(name: str) -> None:
    def reseeding(values: Values) -> float:
        np.random.seed(1234)  # what lm-eval does
        return sphere(values)

    n = 13 if name == "gp" else 20
    assert params(search(weights(3), sphere, n, name)) == params(search(weights(3), reseeding, n, name))


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_proposals_lie_in_the_space_and_none_twice(name: str, kind: str) -> None:
    over = SPACES[kind]()
    n = 14 if name == "gp" else 40
    trials = search(over, lambda v: sum(x for x in v.values() if isinstance(x, float)), n, name)
    for trial in trials:
        assert over.values(over.recipe(trial.params)) == pytest.approx(trial.params)
        assert over.active(trial.params) == trial.params
    assert len({repr(trial.params) for trial in trials}) == len(trials) == n


@pytest.mark.parametrize("name", ["tpe", "gp", "nsga2", "nsga3", "qmc", "random"])
def test_samplers_take_several_objectives_and_constraints(name: str) -> None:
    def two(values: Values) -> list[float]:
        x = numbers(values)
        return [-float(((x - 0.2) ** 2).sum()), -float(((x - 0.8) ** 2).sum())]

    n = 12 if name == "gp" else 40
    trials = search(weights(2), two, n, name, n_objectives=2)
    assert len(trials) == n
    for trial in trials:
        trial.system_attrs["constraints:a"] = 1.0  # what Trial.set_constraint keeps
    sampler = make_sampler(name, weights(2), 0, 2)
    sampler.propose(n, trials)


@pytest.mark.parametrize("name", ["cma", "tpe", "nsga2"])
def test_samplers_keep_away_from_what_violates_a_constraint(name: str) -> None:
    """The best of all lies where the constraint is violated."""
    over = weights(2)
    trials: list[FrozenTrial] = []
    sampler = make_sampler(name, over, 0)
    for number in range(120):
        trial = running(number, sampler.propose(number, trials), over.distributions())
        x = numbers(trial.params)
        trial.state, trial.values = TrialState.COMPLETE, [float(x.sum())]
        trial.system_attrs["constraints:a"] = float(x[0] - 0.25)
        trial.user_attrs["told"] = number
        trials.append(trial)
    assert np.mean([trial.params["models[0].weight"] <= 0.25 for trial in trials[-40:]]) > 0.4
    assert np.mean([trial.params["models[1].weight"] for trial in trials[-40:]]) > 0.6


def test_a_gaussian_process_keeps_to_the_steps() -> None:
    over = weights(2, step=0.01)
    trials = search(over, sphere, 20, "gp")
    steps = {v.name: {v.from_unit(i / 100) for i in range(101)} for v in over.variables}
    assert all(value in steps[name] for trial in trials for name, value in trial.params.items())


def test_feasible_candidates_rank_first_and_failures_last() -> None:
    over = weights(1)
    trials = search(over, lambda v: None if v["models[0].weight"] < 0.2 else 1.0, 12, "qmc")  # type: ignore[operator]
    for trial, violation in zip(trials, (0.5, 0.1, -0.1), strict=False):
        trial.state, trial.values = TrialState.COMPLETE, [5.0]
        trial.system_attrs["constraints:a"] = violation
    ranked = sorted(range(len(trials)), key=losses(trials).__getitem__)
    assert ranked[0] == 2
    n_failed = sum(trial.state == TrialState.FAIL for trial in trials)
    assert n_failed > 0
    assert [trials[i].state for i in ranked[-n_failed:]] == [TrialState.FAIL] * n_failed
    assert ranked[-n_failed - 2 : -n_failed] == [1, 0]


def test_auto_chooses_by_what_is_searched() -> None:
    method = {"choices": ["task_arithmetic", "ties"]}
    models = [{"model": "a", "parameters": {"weight": {"low": 0, "high": 1}}}]
    switch = Space({"merge_method": method, "base_model": "base", "models": models})
    assert resolve_sampler("auto", weights(4), 100)[0] == "gp"
    assert resolve_sampler("auto", weights(4), 1000)[0] == "cma"
    assert resolve_sampler("auto", weights(4), 100, is_raced=True)[0] == "cma"
    assert resolve_sampler("auto", weights(40), 100)[0] == "cma"
    assert resolve_sampler("auto", weights(1), 100)[0] == "tpe"
    assert resolve_sampler("auto", switch, 100)[0] == "tpe"
    assert resolve_sampler("auto", weights(4), 100, 2)[0] == "gp"
    assert resolve_sampler("auto", weights(4), 1000, 2)[0] == "nsga2"
    assert resolve_sampler("auto", weights(4), 100, 4)[0] == "nsga2"


def test_several_objectives_are_not_for_cma() -> None:
    [fault] = sampler_faults(SearchSettings(sampler="cma"), weights(4), 2)
    assert "use nsga2, tpe or gp" in fault
    assert sampler_faults(SearchSettings(sampler="cma"), weights(4), 1) == []
    assert sampler_faults(SearchSettings(sampler="gp"), weights(4), 2) == []


# ---- CMA-ES -----------------------------------------------------------------------------------


def test_cma_proposes_what_pycma_itself_does_given_the_same_normal_numbers() -> None:
    import cma

    over, seed = weights(5), 3
    trials = search(over, sphere, 80, "cma", seed)
    popsize = 8

    class Normal:
        generation = 0

        def __call__(self, *shape: int) -> np.ndarray:
            keyed = (derived_rng(seed, 0, self.generation, i, 0) for i in range(shape[0]))
            return np.array([rng.randn(*shape[1:]) for rng in keyed])

    normal = Normal()
    options = {"bounds": [0, 1], "popsize": popsize, "randn": normal, "seed": np.nan, "verbose": -9}
    strategy = cma.CMAEvolutionStrategy(5 * [0.5], 0.25, {**options, "verb_log": 0})
    for normal.generation in range(10):
        vectors = strategy.ask()
        strategy.tell(vectors, [float(((x - 0.675) ** 2).sum()) for x in vectors])
        own = [numbers(t.params) for t in trials[normal.generation * popsize :][:popsize]]
        np.testing.assert_allclose(own, vectors, atol=1e-9)


@pytest.mark.parametrize("case", ["as usual", "renewed", "late", "failed", "all of it"])
def test_cma_finds_the_optimum_of_a_sphere(case: str) -> None:
    calls = iter(range(10**6))

    def failing(values: Values) -> float | None:
        return None if next(calls) % 7 == 0 else sphere(values)

    trials = search(
        weights(6),
        failing if case in ("failed", "all of it") else sphere,
        450,
        renew=150 if case in ("renewed", "all of it") else None,
        pending=3 if case in ("late", "all of it") else 0,
    )
    assert best(trials) > -1e-4


@pytest.mark.parametrize("pending", [0, 3])
def test_cma_with_late_and_failed_candidates_goes_on_as_if_undisturbed(pending: int) -> None:
    def failing(values: Values) -> float | None:
        return None if sum(values.values()) % 1 < 0.15 else sphere(values)  # type: ignore[arg-type]

    for over in (weights(3), weights(3, step=0.125)):
        once, renewed = (search(over, failing, 70, pending=pending, renew=n) for n in (None, 3))
        assert params(once) == params(renewed)


def test_cma_finds_the_optimum_of_a_mixed_space() -> None:
    for seed in range(2):
        trials = search(mixed(), mixed_sphere, 400, "cma", seed)
        assert best(trials) > -0.002
        assert best(trials) > best(search(mixed(), mixed_sphere, 400, "random", seed))


def test_cma_goes_on_after_its_draws_were_turned_down() -> None:
    """Where it closes in on few choices most draws are earlier candidates, in the end eight in a row."""
    models = [{"model": f"m{i}", "parameters": {"weight": {"choices": [0.0, 1.0]}}} for i in range(8)]
    over = Space({"merge_method": "task_arithmetic", "base_model": "base", "models": models})
    trials = search(over, lambda v: sum(float(x) for x in v.values()), 120, "cma")  # type: ignore[arg-type]
    own = [trial.number for trial in trials if "cma" in trial.user_attrs]
    first_lost = next(number for number in range(own[0], 120) if number not in own)
    assert sum(number > first_lost for number in own) > (120 - first_lost) / 3


@pytest.mark.parametrize("name", ["random", "cma", "nsga2"])
def test_rounds_over_choices_are_the_same_when_resumed(name: str) -> None:
    """Most proposals are earlier candidates there; none of a round's own may say how it began."""
    settings = SearchSettings(sampler=name, rounds=3, polish=0, n_iterations=40)  # type: ignore[arg-type]
    over = weights_of_choices(4)

    def build() -> Sampler:
        return sampler_of(settings, over, 1)

    undisturbed = params(search(over, uneven, 40, build))
    assert params(search(over, uneven, 40, build, renew=1)) == undisturbed


def uneven(values: Values) -> float:
    """No two candidates are worth the same, and none leads to another."""
    return float(np.sin(1000 * sum((i + 1) ** 0.5 * x for i, x in enumerate(numbers(values)))))


def test_cma_begins_at_the_start_of_a_long_list_of_choices() -> None:
    choices = {"choices": [f"m{i}" for i in range(120)]}
    models = [{"model": model, "parameters": {"weight": 1.0}} for model in (choices, "other")]
    over = Space({"merge_method": "linear", "models": models})
    sampler = make_sampler("cma", over, 0)
    drawn = [sampler.propose(i, [], attempt=i).values["models[0].model"] for i in range(40)]  # type: ignore[union-attr]
    assert max(set(drawn), key=drawn.count) == "m0"


def test_cma_finds_the_optimum_of_one_variable() -> None:
    assert best(search(weights(1), sphere, 100)) > -1e-5


def test_cma_begins_again_with_twice_the_population_once_it_has_converged() -> None:
    def two_valleys(values: Values) -> float:
        """The wider valley, where the search begins, is not the deeper one."""
        x = numbers(values)
        return -min(0.1 + ((x - 0.4) ** 2).sum(), 2 * ((x - 0.9) ** 2).sum())

    trials = search(weights(2), two_valleys, 900, renew=300)
    runs = [trial.user_attrs["cma"]["run"] for trial in trials]
    assert runs == sorted(runs)
    assert runs[-1] >= 2
    first = [t.user_attrs["cma"] for t in trials if t.user_attrs["cma"]["run"] == 0]
    second = [t.user_attrs["cma"] for t in trials if t.user_attrs["cma"]["run"] == 1]
    assert [sum(r["generation"] == 1 for r in run) for run in (first, second)] == [6, 12]
    assert best(trials) > -1e-4


def test_equal_scores_are_no_reason_to_begin_again() -> None:
    trials = search(weights(3), lambda values: 0.0, 300)
    assert {trial.user_attrs["cma"]["run"] for trial in trials} == {0}


def test_a_generation_that_fails_whole_does_not_end_the_search() -> None:
    calls = iter(range(10**6))
    trials = search(weights(3), lambda v: None if next(calls) < 20 else sphere(v), 60)
    assert len(trials) == 60


def test_cma_takes_its_first_step_and_generation_from_the_settings() -> None:
    def spread(sigma0: float | None) -> float:
        sampler = make_sampler("cma", weights(4), 0, sigma0=sigma0)
        drawn = [numbers(sampler.propose(0, [], attempt).values) for attempt in range(40)]
        return float(np.std(drawn))

    assert spread(0.02) < spread(0.1) < spread(None)
    trials = search(weights(4), sphere, 30, population_size=5)
    assert [trial.user_attrs["cma"]["generation"] for trial in trials] == [i // 5 for i in range(30)]


# ---- others -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nsga2", "nsga3"])
def test_generations_are_carried_from_trial_to_trial(name: str) -> None:
    known = {f"known {i}": {f"models[{j}].weight": i / 10 for j in range(4)} for i in range(5)}
    trials = search(weights(4, high=2.0), sphere, 112, name, renew=1, known=known)
    assert [t.user_attrs.get("known") for t in trials[:5]] == list(known)
    generations = [t.user_attrs.get("generation", 0) for t in trials]
    assert generations == sorted(generations)
    assert generations.count(0) == 16  # the known ones are of the first
    assert generations[-1] >= 5
    values = [trial.values[0] for trial in trials]
    assert np.mean(values[-16:]) > np.mean(values[5:16]) + 0.3


def test_a_quasi_random_sequence_fills_the_space_evenly() -> None:
    trials = search(weights(2), sphere, 64, "qmc")
    cells = {tuple((numbers(trial.params) * 8).astype(int)) for trial in trials}
    assert len(cells) == 64  # one in each cell of an 8 by 8 grid
