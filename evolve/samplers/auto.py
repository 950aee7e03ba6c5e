"""Which sampler suits a search."""

from __future__ import annotations

from evolve.errors import SearchFileError
from evolve.space import SearchSpace

# A Gaussian process finds the larger front and, while CMA-ES has seen few generations, the better
# candidate (README); but what it costs to ask grows with the cube of the candidates, and steeply with
# the objectives.
GP_CANDIDATES, GP_CANDIDATES_OF_A_FRONT, GP_OBJECTIVES = 50, 200, 3


def resolve_sampler(
    name: str, space: SearchSpace, n_iterations: int, n_objectives: int = 1
) -> tuple[str, str]:
    """Choose the sampler for `auto`.

    Returns:
        Name, and why in one clause.

    Raises:
        SearchFileError: the sampler cannot have so many objectives.
    """
    if name in ("cma", "greedy_soup") and n_objectives > 1:
        raise SearchFileError(
            f"search.sampler is {name}, which has one objective, and search.objective pareto has "
            f"{n_objectives} here; use nsga2, tpe or gp"
        )
    if name != "auto":
        return name, "as asked"
    categories = [v.name for v in space.variables if v.choices is not None]
    if n_objectives > 1:
        if n_objectives <= GP_OBJECTIVES and n_iterations <= GP_CANDIDATES_OF_A_FRONT and not categories:
            return "gp", f"{n_objectives} objectives, {n_iterations} candidates"
        return "nsga2", f"{n_objectives} objectives"
    if space.is_local:
        return "cma", f"{len(space.variables)} variables, which a search changes a few at a time"
    if len(space.variables) < 2:
        return "tpe", "one variable"
    if categories:
        return "tpe", f"{len(categories)} of {len(space.variables)} variables are categories"
    if n_iterations <= GP_CANDIDATES:
        return "gp", f"{n_iterations} candidates of {len(space.variables)} numeric variables"
    return "cma", f"{len(space.variables)} numeric variables"
