"""A mergekit-evolve file in a search file's words: its defaults, and where its keys belong.

mergekit-evolve merges in bfloat16, scores with Transformers unless told otherwise, takes the first
`limit` documents as lm-eval does, and proposes with CMA-ES.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from evolve.genome import Genome
from merge_core.errors import schema_faults

# mergekit-evolve's first standard deviation; here it is a share of each range.
SIGMA0 = 1 / 6
# Names that mergekit-evolve refuses to optimise for unless a flag says otherwise.
_BENCHMARK = re.compile(
    r"(mmlu|hendrycks|agieval|gsm8k|hellaswag|winogrande|arc_|ai2_arc|truthfulqa|bigbench|piqa|openbookqa"
    r"|leaderboard).*(?<!_train)"
)


class MergekitFile(BaseModel):
    """The keys of a mergekit-evolve file beside `tasks:`, and its defaults."""

    model_config = ConfigDict(frozen=True)

    genome: Genome
    limit: int | None = Field(default=None, ge=1)
    """Documents of each lm-eval task, the first ones."""
    num_fewshot: int | None = Field(default=None, ge=0)
    shuffle: bool = False
    """Whether the documents are shuffled before the first ones are taken."""
    random_init: bool = False
    """Whether the search begins at random instead of at the average."""
    apply_chat_template: bool = True
    fewshot_as_multiturn: bool = True


# Keys that a search file has in `scoring`.
_IN_SCORING = ("limit", "num_fewshot", "apply_chat_template", "fewshot_as_multiturn")


def in_our_words(data: Mapping[str, Any], faults: list[str]) -> dict[str, Any]:
    """Return the file with its settings in `search` and `scoring`, where those given there count.

    Args:
        data: a file with `genome:`; one that was resolved before, too.
        faults: gets a line for each fault; the result then is of no use.
    """
    own = {key: value for key, value in data.items() if key in MergekitFile.model_fields}
    result = {key: value for key, value in data.items() if key not in own}
    try:
        file = MergekitFile.model_validate(own)
    except ValidationError as error:
        faults += schema_faults(error, {"genome": Genome.model_fields})
        return result
    faults += file.genome.faults()
    settings = {key: getattr(file, key) for key in _IN_SCORING}
    settings |= {"draw": "shuffled" if file.shuffle else "first", "backend": "hf"}
    for section, defaults in (("search", {"sampler": "cma", "sigma0": SIGMA0}), ("scoring", settings)):
        given = data.get(section)
        if given is None or isinstance(given, Mapping):
            result[section] = {**defaults, **(given or {})}
        twice = [key for key in own if isinstance(given, Mapping) and key in given and key in _IN_SCORING]
        faults += [f"{key} stands at the top and in {section}; give it once" for key in twice]
    if isinstance(data.get("search"), Mapping) and data["search"].get("layer_granularity"):
        faults.append("search.layer_granularity goes with ranges; genome has its own, remove it")
    result["genome"] = file.genome.model_dump(mode="json")
    result["random_init"] = file.random_init
    return result


def benchmarks(names: Iterable[str]) -> list[str]:
    """Pick the names that mergekit-evolve takes for common benchmarks."""
    return [name for name in names if _BENCHMARK.fullmatch(name)]
