"""Which sampler suits a search."""

from __future__ import annotations

from evolve.errors import SearchFileError
from evolve.space import SearchSpace


def resolve_sampler(
    name: str, space: SearchSpace, n_iterations: int, n_objectives: int = 1
) -> tuple[str, str]:
    """Choose the sampler for `auto`.

    Returns:
        Name, and why in one clause.

    Raises:
        SearchFileError: the sampler cannot have so many objectives.
    """
    if name == "cma" and n_objectives > 1:
        raise SearchFileError(
            f"search.sampler is cma, which has one objective, and search.objective pareto has "
            f"{n_objectives} here; use nsga2, tpe or gp"
        )
    if name != "auto":
        return name, "as asked"
    if n_objectives > 1:
        return "nsga2", f"{n_objectives} objectives"
    categories = [v.name for v in space.variables if v.choices is not None]
    if len(space.variables) < 2:
        return "tpe", "one variable"
    if categories:
        return "tpe", f"{len(categories)} of {len(space.variables)} variables are categories"
    return "cma", f"{len(space.variables)} numeric variables"
