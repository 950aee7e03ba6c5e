"""From a recipe to a live model: the stream of merged tensors, consumed by what loads it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from evolve.errors import TrialEngineError, TrialMergeError, boundary
from merge_core.merge import merged_tensors
from merge_core.recipe import Recipe
from merge_core.sources import Sources

if TYPE_CHECKING:
    from torch import Tensor

Stream = Iterable[tuple[str, "Tensor"]]


def merge_and_load(
    recipe: Recipe,
    sources: Sources | None,
    device: str,
    into: Mapping[str, Tensor],
    load: Callable[[Stream], None],
) -> tuple[float, float]:
    """Merge, and load each tensor as it comes.

    Args:
        into: by name the live parameters that the merge may write into.
        load: consumes the stream.

    Returns:
        Seconds that loading waited for merged tensors, and its other seconds.

    Raises:
        TrialMergeError, TrialEngineError: by the part that failed.
    """
    waited = 0.0

    def timed(stream: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        nonlocal waited
        while True:
            asked = time.perf_counter()
            with boundary(TrialMergeError, "merging"):
                item = next(stream, None)
            waited += time.perf_counter() - asked
            if item is None:
                return
            yield item

    began = time.perf_counter()
    with boundary(TrialMergeError, "merging"):
        stream = merged_tensors(recipe, sources, device=device, into=into)
    with boundary(TrialEngineError, "loading the merged weights"):
        load(timed(stream))
    return waited, time.perf_counter() - began - waited
