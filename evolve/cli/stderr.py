"""What is said on stderr, and the exit statuses that go with it."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import NoReturn

from evolve.merge_progress import say
from evolve.redaction import printable

MAX_FAULTS = 20
# Characters of an error line; longer ones lose their middle, and keep the repair at their end.
MAX_LINE = 1000
EXIT_OTHER, EXIT_INPUT, EXIT_PAUSED = 1, 2, 130
# With this variable set an error that nobody thought of ends in Python's traceback.
DEBUG = "EVOLVE_TRACEBACK"


def end(faults: list[str], status: int) -> NoReturn:
    """Print the faults as `error: ...` lines and leave."""
    for fault in faults[:MAX_FAULTS]:
        say("error: " + _one_line(fault))
    sys.stdout.flush()
    raise SystemExit(status)


def _one_line(fault: str) -> str:
    """Make a fault one line of a readable length, whatever the values that it quotes."""
    line = " ".join(printable(fault).split())
    if len(line) > MAX_LINE:
        line = f"{line[: MAX_LINE - 200]} ... {line[-200:]}"
    return line


def unforeseen(error: Exception) -> str:
    """Say of an error that nobody thought of what a report of it needs."""
    *_, last = traceback.extract_tb(error.__traceback__)
    return (
        f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno}); this is a fault of "
        f"evolve itself, run it again with {DEBUG}=1 for the whole traceback and report that"
    )


def open_closed_streams() -> None:
    """Open the null device in the place of each standard stream that the shell closed (`>&-`).

    The next file to be opened would take its number otherwise, and get what is printed.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8")  # noqa: SIM115 - open as long as the process
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8")  # noqa: SIM115


def quiet_libraries() -> None:
    """Keep the libraries' notices off stderr, which belongs to progress and errors."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")  # two lines for each data set in the cache
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.simplefilter("ignore", FutureWarning)
