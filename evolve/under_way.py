"""What happens before a search begins, for a user who waits: downloads and data sets, counted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

UnderWay = Callable[[str], None]


def nobody_waits(text: str) -> None:
    """Show nothing."""


@contextmanager
def data_sets_counted(under_way: UnderWay, doing: str) -> Iterator[None]:
    """Say what is done, and how many data sets have been opened so far.

    A group such as mmlu loads its data sets in one call, a minute for its 57. `datasets` logs each
    one as it opens it; nothing else tells from outside.
    """
    under_way(doing)
    logger = logging.getLogger("datasets.builder")
    level, propagates = logger.level, logger.propagate
    counter = _Counter(under_way, doing)
    logger.addHandler(counter)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # else the library's own handler would print each line
    try:
        yield
    finally:
        logger.removeHandler(counter)
        logger.setLevel(level)
        logger.propagate = propagates


class _Counter(logging.Handler):
    def __init__(self, under_way: UnderWay, doing: str) -> None:
        super().__init__(logging.INFO)
        self._under_way = under_way
        self._doing = doing
        self._n = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Count a data set that was found on disk, or is being prepared."""
        if record.getMessage().startswith(("Found cached dataset", "Generating dataset")):
            self._n += 1
            self._under_way(f"{self._doing}: {self._n} data set{'s' if self._n > 1 else ''} so far")
