"""`evolve methods`: every merge method with its inputs and parameters, from the one table."""

from __future__ import annotations

import json
import math
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from merge_core.errors import RecipeError, nearest

if TYPE_CHECKING:
    from merge_core.methods import Method, Parameter


def methods(
    name: Annotated[str | None, typer.Argument(help="only this method", metavar="[NAME]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON to stdout")] = False,
) -> None:
    """List the merge methods: what they take, their parameters, and their papers."""
    from merge_core.methods import METHODS

    if name is not None and name not in METHODS:
        raise RecipeError(f"NAME is {name!r}, which is not a merge method; {nearest(name, METHODS)}")
    chosen = [METHODS[name]] if name else list(METHODS.values())
    if as_json:
        print(json.dumps([as_data(method) for method in chosen]))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD,
        show_lines=True,
        caption="* one for each model; the others belong to the whole merge",
    )
    for column in ("method", "models", "parameters", "random", "paper"):
        table.add_column(column, no_wrap=column in ("method", "models"), overflow="fold")
    for method in chosen:
        table.add_row(
            method.name,
            _count(method),
            "\n".join(_parameters(method)) or "none",
            "yes" if method.is_random else "no",
            method.source.removeprefix("https://"),
        )
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 100).print(table)


def as_data(method: Method) -> dict[str, Any]:
    """Return a method as the JSON of `evolve methods --json` spells it; null means unbounded."""
    low, high = method.n_models
    return {
        "name": method.name,
        "base": method.base,
        "n_models": [low, _finite(high)],
        "parameters": [
            {
                "name": name,
                "kind": parameter.kind,
                "default": parameter.default,
                "required": parameter.required,
                "range": [_finite(parameter.low), _finite(parameter.high)],
                "per_model": name in method.per_model,
            }
            for name, parameter in {**method.shared, **method.per_model}.items()
        ],
        "random": method.is_random,
        "paper": method.source or None,
    }


def _finite(bound: float) -> float | None:
    return bound if math.isfinite(bound) else None


_BASES = {"required": " + base", "optional": " (+ base)"}


def _count(method: Method) -> str:
    """Spell how many models a method takes; a base that it needs is not among them."""
    low, high = method.n_models
    count = f"{low:g}" if low == high else f">= {low:g}" if math.isinf(high) else f"{low:g}-{high:g}"
    return count + _BASES.get(method.base, "")


def _parameters(method: Method) -> list[str]:
    own = [f"{name}* {_values(parameter)}" for name, parameter in method.per_model.items()]
    return own + [f"{name} {_values(parameter)}" for name, parameter in method.shared.items()]


def _values(parameter: Parameter) -> str:
    """Spell default and range: `1, in [0, 1]`."""
    if parameter.required:
        text = "required"
    elif parameter.default is None:
        text = "unset"
    elif parameter.kind == "boolean":
        text = str(parameter.default).lower()
    else:
        text = f"{parameter.default:g}"
    low, high = parameter.low, parameter.high
    if math.isinf(low) and math.isinf(high):
        return text
    if math.isinf(high):
        return f"{text}, >= {low:g}"
    return f"{text}, <= {high:g}" if math.isinf(low) else f"{text}, in [{low:g}, {high:g}]"
