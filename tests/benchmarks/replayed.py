"""Samplers, signals, racing and fronts compared on the replay bench, with many seeds.

    python tests/benchmarks/replayed.py samplers | signals | fronts   [--seeds 10] [--n N]
    python tests/benchmarks/replayed.py racing [--sampler cma] [--signal likelihood] [--first 0] [...]

Each search runs the product's own samplers, proposer and racing; only merge, load and score are
replayed (see replay.py). Half of the documents, drawn by seed, rank candidates, the others are the
holdout. A winner's score is its sum of two exact-match scores on the holdout; "expected" is that
sum over all documents, without the draw of each outcome. Differences are paired by seed; their 95%
intervals are Student's over the seeds.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import cma
import numpy as np
from optuna.trial import FrozenTrial, TrialState, create_trial
from replay import TASKS, Replay
from scipy.stats import t as student

from evolve.automatic import resolve_polish
from evolve.front import hypervolume, non_dominated
from evolve.known import known_recipes
from evolve.objectives import Rating
from evolve.racing import FINALISTS, Race, Values
from evolve.samplers.auto import resolve_sampler
from evolve.samplers.proposer import Proposer
from evolve.samplers.stages import sampler_of
from evolve.search_file import SearchSettings
from evolve.smoothing import smoothed
from evolve.space import SearchSpace, Space, Value

MODELS = ("addition", "roman")
N_LAYERS, LAYERS_A_GROUP = 30, 10
# Finalists of a search that is not raced, scored by metric: as in evolve/finals.py.
N_FINALISTS = 6
# What each signal reads of a replayed outcome: 0 is exact match, 1 the likelihood.
KINDS = {"metric": (0,), "likelihood": (1,), "both": (0, 1)}


def space() -> SearchSpace:
    """The recorded space: TIES, a weight and a density for each of 3 layer groups and 2 models."""
    parameters = {
        "weight": {"low": 0.0, "high": 2.0, "start": 0.8},
        "density": {"low": 0.1, "high": 1.0, "start": 0.5},
    }
    template = {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": model, "parameters": parameters} for model in MODELS],
        "parameters": {"normalize": False},
        "dtype": "bfloat16",
    }
    return Space(template, LAYERS_A_GROUP, lambda *_: N_LAYERS)


class Bench:
    """The replayed documents of one seed: which rank candidates, and which are the holdout."""

    def __init__(self, seed: int) -> None:
        self.replay = replay()
        self.space = space()
        self.seed = seed
        rng = np.random.default_rng(seed)
        drawn = [rng.permutation(documents) for documents in self.replay.documents]
        self.search = [np.sort(each[: len(each) // 2]) for each in drawn]
        self.holdout = [np.sort(each[len(each) // 2 :]) for each in drawn]
        self._answers: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}

    def point(self, values: Mapping[str, Value]) -> np.ndarray:
        return np.array([v.to_unit(values[v.name]) for v in self.space.variables])

    def answers(self, point: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        key = point.tobytes()
        if key not in self._answers:
            self._answers[key] = self.replay.outcomes(point)
        return self._answers[key]

    def scores(self, point: np.ndarray, signal: int = 0, holdout: bool = False) -> list[float]:
        answers = self.answers(point)[signal]
        return [float(answers[its].mean()) for its in (self.holdout if holdout else self.search)]

    def standard_error(self, point: np.ndarray) -> float:
        answers = self.answers(point)[0]
        return math.sqrt(sum(answers[its].var() / len(its) for its in self.search))

    def race(self, n: int, signal: str) -> Race:
        documents = {
            (task, kind): [(task, int(d)) for d in its]
            for task, its in zip(TASKS, self.search, strict=True)
            for kind in KINDS[signal]
        }
        named = {f"{task}:{kind}": every for (task, kind), every in documents.items()}
        return Race(named, dict.fromkeys(named, 1.0), n, self.seed)


@cache
def replay() -> Replay:
    return Replay()


def search(
    bench: Bench,
    sampler: str,
    n: int,
    rate: Callable[[int, np.ndarray], Rating],
    n_objectives: int = 1,
    is_raced: bool = False,
) -> list[FrozenTrial]:
    """Search with the product's proposer; `rate` evaluates a candidate by number and point."""
    over = bench.space
    name, _ = resolve_sampler(sampler, over, n, n_objectives, is_raced)
    racing = "always" if is_raced else "none"
    asked = SearchSettings.model_validate(
        {"sampler": name, "n_iterations": n, "seed": bench.seed, "racing": racing}
    )
    settings = asked.model_copy(update={"polish": resolve_polish(asked, over)})
    known = known_recipes(over, {}, lambda _: N_LAYERS)
    proposer = Proposer(over, sampler_of(settings, over, n_objectives), known, bench.seed)
    trials: list[FrozenTrial] = []
    for number in range(n):
        proposal = proposer.propose(number, trials)
        assert proposal is not None
        rating = rate(number, bench.point(proposal.values))
        made = create_trial(
            params=proposal.values,
            distributions=over.distributions(),
            values=rating.values,
            user_attrs={**proposal.attributes, "told": number, "objective_error": rating.error},
        )
        made.number = number
        trials.append(made)
    return trials


def rated(values: list[float], error: float = 0.0) -> Rating:
    """Return what the sampler is told of a candidate, and how sure that is."""
    return Rating(values, sum(values), error)


@dataclass
class Found:
    """A search's winner, and the share of document evaluations that it took."""

    point: np.ndarray
    share: float = 1.0


def full(bench: Bench, sampler: str, n: int, signal: str = "metric") -> Found:
    """Search with every document; where another signal is followed, finals by metric."""
    kinds = KINDS[signal]
    points: list[np.ndarray] = []

    def rate(number: int, point: np.ndarray) -> Rating:
        points.append(point)
        return rated([sum(sum(bench.scores(point, kind)) for kind in kinds)])

    trials = search(bench, sampler, n, rate)
    ranked = sorted(range(n), key=lambda i: (-trials[i].values[0], i))[:N_FINALISTS]
    return Found(points[max(ranked, key=lambda i: sum(bench.scores(points[i])))])


def raced(bench: Bench, sampler: str, n: int, signal: str = "metric") -> Found:
    """Search block by block, as evolve/heats.py and evolve/finals.py do."""
    race = bench.race(n, signal)
    points: list[np.ndarray] = []
    known: list[dict[str, dict[tuple[str, int], float]]] = []

    def ask(point: np.ndarray, documents: Mapping[str, Sequence[tuple[str, int]]]) -> dict[str, dict]:
        answers = bench.answers(point)
        return {
            name: {d: float(answers[int(name[-1])][d[1]]) for d in its} for name, its in documents.items()
        }

    def rate(number: int, point: np.ndarray) -> Rating:
        first, second = race.blocks(number)
        found = ask(point, first)
        if not race.is_hopeless(number, found):
            more = ask(point, second)
            found = {name: found[name] | more[name] for name in found}
        estimates = race.estimates(found).values()
        race.tell(number, found)
        points.append(point)
        known.append(found)
        error = math.hypot(*(each.standard_error for each in estimates))
        return rated([sum(each.value for each in estimates)], error)

    search(bench, sampler, n, rate, is_raced=True)
    ranked, value = list(range(n)), smoothed_values(race, points, known)
    for each in race.rounds():
        ranked = sorted(ranked, key=lambda i: (-value[i], i))[: each.n_candidates]
        for i in ranked:
            more = ask(points[i], each.documents)
            known[i] = {name: known[i][name] | more[name] for name in more}
        value = smoothed_values(race, points, known)
    ranked.sort(key=lambda i: (-value[i], i))
    finalists = ranked[: race.n_of(FINALISTS)]
    n_documents = sum(map(len, bench.search))
    asked = sum(len(its) for found in known for its in found.values()) / len(KINDS[signal])
    asked += len(finalists) * n_documents
    winner = max(finalists, key=lambda i: sum(bench.scores(points[i])))
    return Found(points[winner], asked / (n * n_documents))


def smoothed_values(race: Race, points: Sequence[np.ndarray], known: Sequence[Values]) -> np.ndarray:
    """Return candidates' objectives, as evolve/heats.py rates them; shape (candidates,)."""
    estimates = [race.estimates(values) for values in known]
    by_score = [
        smoothed(
            np.array(points),
            np.array([each[key].value for each in estimates]),
            np.array([each[key].standard_error for each in estimates]),
        )
        for key in estimates[0]
    ]
    total: np.ndarray = sum(by_score)
    return total


def like_mergekit_evolve(bench: Bench, n: int) -> Found:
    """Search as mergekit-evolve does: start 1/M and density 1, sigma 1/6, no bounds, values folded."""
    names = [v.name for v in bench.space.variables]
    start = [1.0 if "density" in name else 1 / len(MODELS) for name in names]
    rng = np.random.RandomState(bench.seed)
    options = {"randn": rng.randn, "seed": np.nan, "verbose": -9, "verb_log": 0}
    strategy = cma.CMAEvolutionStrategy(start, 1 / 6, options)
    best, found = -math.inf, np.zeros(len(names))
    told = 0
    while told < n:
        vectors = strategy.ask()
        losses = []
        for vector in vectors:
            folded = np.abs(vector)
            values = {
                name: float(min(1.0, max(0.1, value)) if "density" in name else value)
                for name, value in zip(names, folded, strict=True)
            }
            point = bench.point(values)
            value = sum(bench.scores(point))
            losses.append(-value)
            told += 1
            if value > best and told <= n:
                best, found = value, point
        strategy.tell(vectors, losses)
    return Found(found)


# ---- comparisons --------------------------------------------------------------------------------


def interval(differences: Sequence[float]) -> str:
    """Spell the mean of paired differences with its interval."""
    d = np.array(differences)
    half = student.ppf(0.975, len(d) - 1) * d.std(ddof=1) / math.sqrt(len(d))
    return f"{d.mean():+.3f} [{d.mean() - half:+.3f}, {d.mean() + half:+.3f}]"


def compare(arms: Mapping[str, Callable[[Bench], Found]], n_seeds: int, over: str) -> None:
    """Print each arm's holdout and expected score, and the difference to one of them."""
    holdout: dict[str, list[float]] = {name: [] for name in arms}
    expected: dict[str, list[float]] = {name: [] for name in arms}
    for seed in range(n_seeds):
        for name, arm in arms.items():
            bench = Bench(seed)
            found = arm(bench)
            holdout[name].append(sum(bench.scores(found.point, holdout=True)))
            expected[name].append(sum(bench.replay.expected(found.point)))
    for name in arms:
        line = f"{name:14} holdout {np.mean(holdout[name]):.3f}, expected {np.mean(expected[name]):.3f}"
        if name != over:
            difference = np.subtract(holdout[over], holdout[name])
            line += f"; {over} minus it {interval(difference)}"
            line += f", expected {interval(np.subtract(expected[over], expected[name]))}"
        print(line, flush=True)


def samplers(n_seeds: int, n: int) -> None:
    """Compare samplers, mergekit-evolve's set-up among them."""
    names = ["auto", "cma", "tpe", "gp", "random"]
    arms = {name: lambda bench, name=name: full(bench, name, n) for name in names}
    arms["mergekit-evolve"] = lambda bench: like_mergekit_evolve(bench, n)
    compare(arms, n_seeds, "auto")


def signals(n_seeds: int, n: int) -> None:
    """Compare what a sampler may follow."""
    arms = {name: lambda bench, name=name: full(bench, "auto", n, name) for name in KINDS}
    compare(arms, n_seeds, "likelihood")


def racing(seeds: Sequence[int], n: int, sampler: str, signals: Sequence[str]) -> None:
    """Compare raced searches with full ones: documents asked, and how the winner's scores compare."""
    for signal in signals:
        rows = []
        for seed in seeds:
            bench = Bench(seed)
            whole, part = full(bench, sampler, n, signal), raced(bench, sampler, n, signal)
            error = bench.standard_error(whole.point)
            each = []
            for score in (
                lambda p, b=bench: sum(b.scores(p)),
                lambda p, b=bench: sum(b.scores(p, holdout=True)),
                lambda p, b=bench: sum(b.replay.expected(p)),
            ):
                each += [
                    score(whole.point),
                    score(part.point),
                    score(part.point) >= score(whole.point) - error,
                ]
            rows.append([part.share, error, *each])
        table = np.array(rows, float)
        mean = table.mean(axis=0)
        print(
            f"{signal}: {mean[0]:.1%} of the documents (at most {table[:, 0].max():.1%}); one standard "
            f"error is {mean[1]:.3f}"
        )
        for i, name in enumerate(("search documents", "holdout", "expected")):
            a, b, _ = mean[2 + 3 * i : 5 + 3 * i]
            within = int(table[:, 4 + 3 * i].sum())
            print(
                f"  {name:16} full {a:.3f}, raced {b:.3f}; within one standard error on {within} of "
                f"{len(seeds)}",
                flush=True,
            )


def fronts(n_seeds: int, n: int) -> None:
    """Compare the hypervolume of fronts, on the search documents, from the reference point 0."""
    volumes: dict[str, list[float]] = {}
    for name in ("random", "nsga2", "tpe", "gp"):
        volumes[name] = []
        for seed in range(n_seeds):
            bench = Bench(seed)
            trials = search(bench, name, n, lambda _, p, b=bench: rated(b.scores(p)), n_objectives=2)
            values = np.array([trial.values for trial in trials if trial.state == TrialState.COMPLETE])
            volumes[name].append(hypervolume(values[non_dominated(values)], np.zeros(2)))
        line = f"{name:8} hypervolume {np.mean(volumes[name]):.4f}"
        if name != "random":
            line += f"; minus random {interval(np.subtract(volumes[name], volumes['random']))}"
        print(line, flush=True)


def main() -> None:
    """Run one comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    compared = {"samplers": samplers, "signals": signals, "fronts": fronts}
    parser.add_argument("what", choices=[*compared, "racing"])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--n", type=int, help="candidates; default 120, for fronts 88")
    parser.add_argument("--sampler", default="auto", help="of the searches that are raced")
    parser.add_argument("--signal", choices=KINDS, action="append", help="followed; default: each")
    parser.add_argument("--first", type=int, default=0, help="the first seed that is raced")
    given = parser.parse_args()
    n = given.n or (88 if given.what == "fronts" else 120)
    if given.what == "racing":
        racing(
            range(given.first, given.first + given.seeds), n, given.sampler, given.signal or list(KINDS)
        )
    else:
        compared[given.what](given.seeds, n)


if __name__ == "__main__":
    main()
