"""What a winner must beat: each model alone, their plain average, the recipe at its starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evolve.known import named_apart
from evolve.workers.worker import Job, Prompting
from merge_core.checkpoint.locate import tokenizer_folder
from merge_core.checkpoint.write import TEMPLATE_FILES, TOKENIZER_FILES
from merge_core.moe.recipe import MoeRecipe
from merge_core.plan import model_alone, origin
from merge_core.recipe import Recipe


def baseline_jobs(
    start: Recipe, prompting: Prompting, references: Sequence[str] | None = None
) -> list[Job]:
    """List the baselines: each model alone, the plain average, the recipe at its starts.

    `references` are the models, where the recipe at its starts does not name them all.

    A model alone is asked as the merge will be, and also as its owner would ask it where that
    differs; as its owner would alone where the merge has a tokenizer of its own, whose ids mean
    nothing to the model.
    """
    references = references or start.references()
    jobs = []
    for reference in references:
        own = Prompting(reference, _has_chat_template(reference))
        promptings = (prompting,) if same_prompts(own, prompting) else (prompting, own)
        if prompting.tokenizer is None:
            promptings = (own,)
        jobs.append(Job(reference, "baseline", model_alone(reference, start), (), promptings))
    others = [reference for reference in references if reference != start.base_model]
    if isinstance(start, MoeRecipe):  # whose base is no common ancestor, but may be an expert too
        others = [model for model in references if model in {e.source_model for e in start.experts}]
    averaged = others if len(others) > 1 else references
    if len(averaged) > 1:
        recipe = Recipe.parse(
            {
                "merge_method": "linear",
                "base_model": origin(start),
                "models": [{"model": model, "parameters": {"weight": 1.0}} for model in averaged],
                "dtype": start.dtype,
                "out_dtype": start.out_dtype,
                **_tokenizer_keys(start),
            }
        )
        jobs.append(Job(named_apart("average", references), "baseline", recipe, (), (prompting,)))
    jobs.append(Job(named_apart("starts", references), "baseline", start, (), (prompting,)))
    return jobs


def _tokenizer_keys(recipe: Recipe) -> dict[str, Any]:
    """Return what a recipe says of its tokenizer."""
    keys = ("tokenizer_source", "tokenizer", "chat_template")
    return {key: value for key, value in recipe.as_config().items() if key in keys}


def _has_chat_template(reference: str) -> bool:
    folder = tokenizer_folder(reference)
    config = folder / "tokenizer_config.json"
    return (
        (folder / "chat_template.jinja").is_file()
        or (folder / "chat_template.json").is_file()
        or (config.is_file() and '"chat_template"' in config.read_text(encoding="utf-8"))
    )


def same_prompts(one: Prompting, other: Prompting) -> bool:
    """Tell whether two ways of prompting give the same requests."""
    if one.apply_chat_template != other.apply_chat_template:
        return False
    if one.tokenizer is None or other.tokenizer is None:
        return one.tokenizer == other.tokenizer
    a, b = tokenizer_folder(one.tokenizer), tokenizer_folder(other.tokenizer)
    return all(
        ((a / file).read_bytes() if (a / file).is_file() else b"")
        == ((b / file).read_bytes() if (b / file).is_file() else b"")
        for file in (*TOKENIZER_FILES, *TEMPLATE_FILES)
    )
