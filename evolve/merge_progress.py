"""Progress of a merge on stderr: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from evolve.redaction import printable

if TYPE_CHECKING:
    from merge_core.plan import Planned

# Without a terminal a line is printed at most so often, and none for a short merge.
LINE_EVERY_S = 5.0


def duration(seconds: float) -> str:
    """Spell seconds: 8.4 s, 2 min 5 s, 3 h 20 min."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


@contextmanager
def progress(
    plan: Sequence[Planned], total_bytes: int, quiet: bool, verbose: int
) -> Iterator[Callable[[str, int], None] | None]:
    """Show tensors done, bytes written and time left on stderr.

    Args:
        plan: the merge's output tensors.
        total_bytes: what they have together.
        quiet: show nothing.
        verbose: 2 and more name each tensor.

    Yields:
        To be called with name and bytes of each tensor; None where nothing is shown.
    """
    methods = {planned.name: planned.method for planned in plan}

    def name_it(name: str) -> None:
        if verbose > 1:
            say(f"{name}: {methods[name]}")

    if quiet:
        yield None
    elif sys.stderr.isatty():
        with _bar() as bar:
            task = bar.add_task("merging", total=total_bytes, tensors=f"0/{len(plan)}")
            n_done = 0

            def show(name: str, n_bytes: int) -> None:
                nonlocal n_done
                n_done += 1
                bar.update(task, advance=n_bytes, tensors=f"{n_done}/{len(plan)}")
                name_it(name)

            yield show
    else:
        lines = _Lines(len(plan), total_bytes)

        def tell(name: str, n_bytes: int) -> None:
            lines(n_bytes)
            name_it(name)

        yield tell


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[tensors]} tensors"),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )


class _Lines:
    """A line every few seconds, where there is no terminal."""

    def __init__(self, n_tensors: int, total_bytes: int) -> None:
        self._n, self._total = n_tensors, total_bytes
        self._began = self._last = time.monotonic()
        self._done = self._bytes = 0

    def __call__(self, n_bytes: int) -> None:
        from merge_core.machine import in_units

        self._done += 1
        self._bytes += n_bytes
        now = time.monotonic()
        if now - self._last > LINE_EVERY_S and self._done < self._n:
            self._last = now
            left = (now - self._began) * (self._total / self._bytes - 1)
            say(
                f"{self._done}/{self._n} tensors, {in_units(self._bytes)} of {in_units(self._total)}, "
                f"{duration(max(0.0, left))} left"
            )


def say(text: str) -> None:
    """Print a line on stderr."""
    print(printable(text), file=sys.stderr, flush=True)
