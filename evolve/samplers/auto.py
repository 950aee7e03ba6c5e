"""Which sampler suits a search."""

from __future__ import annotations

from evolve.samplers.greedy_soup import soup_faults
from evolve.search_file import SearchSettings
from evolve.space import SearchSpace

# A Gaussian process found better candidates and larger fronts on the replay and on the quickstart's
# models, not on the testbed's (configs/README.md); what it costs to ask grows with the cube of the
# candidates, and steeply with the objectives. Of estimates from a few documents it makes no more than
# cma does, and raced winners of cma were the more reliable ones.
GP_CANDIDATES, GP_VARIABLES, GP_OBJECTIVES = 200, 20, 3


def sampler_faults(settings: SearchSettings, space: SearchSpace, n_objectives: int) -> list[str]:
    """List what keeps the sampler that is asked for from such a search."""
    if settings.sampler == "greedy_soup":
        return soup_faults(settings, space)
    if settings.sampler == "cma" and n_objectives > 1:
        return [
            f"search.sampler is cma, which has one objective, and search.objective pareto has "
            f"{n_objectives} here; use nsga2, tpe or gp"
        ]
    return []


def resolve_sampler(
    name: str, space: SearchSpace, n_iterations: int, n_objectives: int = 1, is_raced: bool = False
) -> tuple[str, str]:
    """Choose the sampler for `auto`.

    Returns:
        Name, and why in one clause.
    """
    if name != "auto":
        return name, "as asked"
    n_variables = len(space.variables)
    categories = [v.name for v in space.variables if v.choices is not None]
    suits_gp = n_iterations <= GP_CANDIDATES and n_variables <= GP_VARIABLES and not categories
    if n_objectives > 1:
        if suits_gp and n_objectives <= GP_OBJECTIVES:
            return "gp", f"{n_objectives} objectives, {n_iterations} candidates"
        return "nsga2", f"{n_objectives} objectives"
    if space.is_local:
        return "cma", f"{n_variables} variables, which a search changes a few at a time"
    if n_variables < 2:
        return "tpe", "one variable"
    if categories:
        return "tpe", f"{len(categories)} of {n_variables} variables are categories"
    if suits_gp and not is_raced:
        return "gp", f"{n_iterations} candidates of {n_variables} numeric variables"
    return "cma", f"{n_variables} numeric variables" + (", raced" if is_raced else "")
