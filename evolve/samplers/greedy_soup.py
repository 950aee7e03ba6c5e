"""The greedy soup of Wortsman et al. 2022 (https://arxiv.org/abs/2203.05482, recipe 1) as a sampler.

Each model is scored by itself; then, in the order of their scores, each is added to the soup and
stays where the soup is no worse for it. The models are those that the search file can leave out,
`model: {choices: [MODEL, null]}`; every other variable stays at its start.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from optuna.trial import TrialState

from evolve.samplers import Proposal
from evolve.space import SearchSpace, Value, Variable
from merge_core.errors import RecipeError

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from evolve.search_file import SearchSettings

# What a candidate is worth: less is better.
_Rank = tuple[float, float]


class GreedySoup:
    """At most 2M - 1 candidates of M models, each a pure function of the scores so far.

    What the record has already, such as the soup of all models, is not scored again.
    """

    def __init__(self, space: SearchSpace) -> None:
        self._space = space
        self._on = {v.name: models[0] for v in space.variables if len(models := _models(v)) == 1}
        self._members = [name for name in self._on if self._is_valid([name])]

    @property
    def n_members(self) -> int:
        """How many models can be left out, and also be merged alone."""
        return len(self._members)

    def propose(self, number: int, trials: Sequence[FrozenTrial], attempt: int = 0) -> Proposal | None:
        """Propose trial `number`, see Sampler; None where the soup is made, or waits for scores."""
        if attempt:
            return None
        known = {_key(trial.params): trial for trial in trials}
        alone: dict[str, _Rank] = {}
        is_waiting = False
        for name in self._members:
            trial = known.get(self._key_of([name]))
            if trial is None:
                return self._proposal([name])
            is_waiting |= not trial.state.is_finished()
            if (rank := _rank(trial)) is not None:
                alone[name] = rank
        if is_waiting or not alone:
            return None
        best, *others = sorted(alone, key=lambda name: alone[name])
        soup, rank = [best], alone[best]
        for name in others:
            trial = known.get(self._key_of([*soup, name]))
            if trial is None:
                return self._proposal([*soup, name])
            if not trial.state.is_finished():
                return None
            if (with_it := _rank(trial)) is not None and with_it <= rank:
                soup, rank = [*soup, name], with_it
        return None

    def _values(self, soup: Collection[str]) -> dict[str, Value]:
        chosen = {name: on if name in soup else None for name, on in self._on.items()}
        return {**self._space.starts(), **chosen}

    def _key_of(self, soup: Collection[str]) -> str:
        return _key(self._space.active(self._values(soup)))

    def _proposal(self, soup: Collection[str]) -> Proposal:
        values = self._values(soup)
        return Proposal(values, {"soup": [values[name] for name in soup]})

    def _is_valid(self, soup: Collection[str]) -> bool:
        try:
            self._space.recipe(self._values(soup))
        except RecipeError:
            return False
        return True


def _models(variable: Variable) -> list[Value]:
    """Return the models that an entry can have beside none; empty where it is no such variable."""
    is_entry = variable.name.endswith((".model", ".source_model"))
    choices = variable.choices or ()
    return [choice for choice in choices if choice is not None] if is_entry and None in choices else []


def _key(values: dict[str, Value]) -> str:
    return repr(sorted(values.items()))


def _rank(trial: FrozenTrial) -> _Rank | None:
    """Return what a candidate is worth: constraints first, then the value; None where it failed."""
    if trial.state != TrialState.COMPLETE:
        return None
    return sum(max(0.0, v) for v in trial.constraints.values()), -trial.values[0]


def soup_faults(settings: SearchSettings, space: SearchSpace) -> list[str]:
    """List what keeps a search from being a greedy soup: its settings, its models."""
    given = {
        "objective": (settings.objective, "weighted_sum"),
        "rounds": (settings.rounds, 1),
        "polish": (0 if settings.polish == "auto" else settings.polish, 0),
        "racing": (settings.racing if settings.racing == "always" else "none", "none"),
    }
    faults = [
        f"search.{key} is {value}; greedy_soup compares whole scores of one objective and ends by "
        f"itself, write {key}: {wanted}"
        for key, (value, wanted) in given.items()
        if value != wanted
    ]
    faults += [
        f"search.sampler is greedy_soup, and {variable.name} chooses among {len(models)} models; give "
        f"each an entry of its own, model: {{choices: [MODEL, null]}}"
        for variable in space.variables
        if len(models := _models(variable)) > 1
    ]
    if (n := GreedySoup(space).n_members) < 2:
        faults.append(
            f"search.sampler is greedy_soup, and {n} models of the recipe can be left out and merged "
            f"alone; write model: {{choices: [MODEL, null]}} for each, with a method such as linear"
        )
    return faults
