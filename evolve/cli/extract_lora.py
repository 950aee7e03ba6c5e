"""`evolve extract-lora`: a fine-tune's or a merge's change of its base, as a LoRA adapter."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from merge_core.errors import RecipeError

Flag = typer.Option


def extract_lora(
    model: Annotated[
        str, typer.Argument(help="fine-tune, or recipe of a merge", metavar="MODEL|RECIPE.yml")
    ],
    base: Annotated[str, typer.Argument(help="what it was made from", metavar="BASE")],
    out: Annotated[Path, typer.Argument(help="folder for the adapter", metavar="OUT")],
    max_rank: Annotated[int, Flag(min=1, help="largest rank of a module")] = 128,
    sv_epsilon: Annotated[float, Flag(min=0, help="drop singular values up to this")] = 0.0,
    distribute_scale: Annotated[
        bool, Flag(help="singular values in halves to A and B, else to A")
    ] = True,
    embed_lora: Annotated[bool, Flag(help="factors for embeddings and head, else saved whole")] = False,
    save_module: Annotated[
        list[str] | None, Flag("--save-module", help="module to save whole; repeatable")
    ] = None,
    include_regex: Annotated[
        list[str] | None, Flag("--include-regex", "-i", help="only modules that match; repeatable")
    ] = None,
    exclude_regex: Annotated[
        list[str] | None, Flag("--exclude-regex", "-e", help="no modules that match; repeatable")
    ] = None,
    skip_undecomposable: Annotated[
        bool, Flag("--skip-undecomposable", help="leave norms out, else saved whole")
    ] = False,
    overwrite: Annotated[bool, Flag("--overwrite", help="replace OUT if it exists")] = False,
    num_threads: Annotated[int | None, Flag("--num-threads", "-j", min=1, help="threads")] = None,
    quiet: Annotated[bool, Flag("--quiet", "-q", help="only errors and warnings on stderr")] = False,
) -> None:
    """Extract a LoRA adapter from a fine-tune, or from a merge, and its base.

    PEFT loads OUT, and BASE+OUT stands for the model in recipes. Options are mergekit-extract-lora's.
    """
    for option, patterns in (("--include-regex", include_regex), ("--exclude-regex", exclude_regex)):
        for pattern in patterns or ():
            _check_pattern(option, pattern)

    import torch

    from evolve.merge_progress import progress, say
    from merge_core.checkpoint.write import check_output
    from merge_core.extract import ExtractOptions, extract, save_adapter
    from merge_core.plan import model_alone, plan_merge
    from merge_core.recipe import Recipe
    from merge_core.recipe_yaml import is_recipe_file
    from merge_core.sources import Sources

    check_output(out, overwrite)
    if num_threads:
        torch.set_num_threads(num_threads)
    is_recipe = is_recipe_file(model)
    recipe = Recipe.load(model) if is_recipe else model_alone(model)
    own = model_alone(base)
    options = ExtractOptions(
        max_rank=max_rank,
        sv_epsilon=sv_epsilon,
        distribute_scale=distribute_scale,
        embed_lora=embed_lora,
        save_modules=tuple(save_module or ()),
        include=tuple(include_regex or ()),
        exclude=tuple(exclude_regex or ()),
        skip_undecomposable=skip_undecomposable,
    )
    sources = Sources()
    plan = plan_merge(recipe, sources)
    read = [*sources.folders(recipe), *sources.folders(own), *([Path(model)] if is_recipe else [])]
    check_output(out, overwrite, read)
    is_silent = quiet or not sys.stderr.isatty()
    with progress(plan, sum(planned.n_bytes for planned in plan), is_silent, 0) as on_tensor:
        found = extract(recipe, own, options, sources, on_tensor)
    if found.left_out:
        say(f"warning: {len(found.left_out)} tensors differ and are left out: {found.left_out[0]} ...")
    save_adapter(found, out, base, overwrite)
    print(
        f"wrote {out}: factors of {len(found.ranks)} modules, relative error {found.error:.4f}, "
        f"{len(found.whole) + len(found.in_place)} modules whole"
    )


def _check_pattern(option: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise RecipeError(
            f"{option} is {pattern!r}; it must be a regular expression ({error}), correct it"
        ) from None
