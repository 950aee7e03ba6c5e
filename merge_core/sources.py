"""The checkpoints that recipes refer to, opened once and kept with what was learned of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable
from typing import Any

from merge_core.architecture import Architecture
from merge_core.checkpoint.read import Checkpoint
from merge_core.errors import CheckpointError

# A search has one structure, or a few where layer ranges or models are searched too.
_MAX_STRUCTURES = 32


class Sources:
    """Open checkpoints, statistics of their deltas, and the structures planned over them.

    Args:
        keep: keep cast or copied tensors too, within half of the memory that is free: for a
            search, where they are wanted again.
    """

    def __init__(self, keep: bool = False) -> None:
        # Not before: torch takes a second to import, and who reads a search file needs none.
        from merge_core.residence import Residence, available_host_bytes
        from merge_core.statistics import StatisticsCache

        self.keeps = keep
        self.residence = Residence(keep)
        self._architectures: dict[str, Architecture] = {}
        self._structures: dict[Hashable, Any] = {}
        self.statistics = StatisticsCache(available_host_bytes() // 4 if keep else 0)

    def architecture(self, reference: str) -> Architecture:
        """Open a model, or return it where it is open already.

        Raises:
            CheckpointError, HubUnreachableError: it cannot be opened.
        """
        if reference not in self._architectures:
            self._architectures[reference] = Architecture(Checkpoint(reference))
        return self._architectures[reference]

    def open_all(self, references: Collection[str]) -> list[str]:
        """Open several models; return the faults of those that cannot be opened."""
        faults: list[str] = []
        for reference in references:
            try:
                self.architecture(reference)
            except CheckpointError as error:
                faults += error.faults
        return faults

    def remembered(self, structure: Hashable, build: Callable[[], Any]) -> Any:
        """Return what `build` made of a structure, now or before; errors are not remembered."""
        if structure not in self._structures:
            value = build()
            while len(self._structures) >= _MAX_STRUCTURES:
                del self._structures[next(iter(self._structures))]
            self._structures[structure] = value
        return self._structures[structure]
