"""The commands: run, status, report, dashboard, export, merge, extract-lora, methods and eval.

Only the command line lives here, one file a command; what a command does is imported when it runs, so
that `evolve --help` answers at once.
"""

from __future__ import annotations

import os
import sys
from errno import ENOSPC, EPIPE

import typer

from evolve.cli.dashboard import dashboard
from evolve.cli.evaluate import evaluate
from evolve.cli.export import export
from evolve.cli.extract_lora import extract_lora
from evolve.cli.merge import merge
from evolve.cli.methods import methods
from evolve.cli.pause import pause_on_signals, pause_text, was_asked_to_pause
from evolve.cli.report import report
from evolve.cli.run import run
from evolve.cli.status import status
from evolve.cli.stderr import (
    DEBUG,
    EXIT_INPUT,
    EXIT_OTHER,
    EXIT_PAUSED,
    end,
    open_closed_streams,
    unforeseen,
)
from evolve.errors import (
    PausedError,
    PushError,
    SearchStoppedError,
    StorageError,
    TrialError,
    WorkersLostError,
)
from evolve.merge_progress import say
from merge_core.errors import HubUnreachableError, MergeError

_NOT_THE_INPUT = (HubUnreachableError, StorageError, SearchStoppedError, WorkersLostError, PushError)

app = typer.Typer(
    name="evolve",
    help="Find the numbers in a merge recipe by search, and tell the truth about the gain.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.command()(run)
app.command()(status)
app.command()(report)
app.command()(dashboard)
app.command()(export)
app.command()(merge)
app.command("extract-lora")(extract_lora)
app.command()(methods)
app.command("eval")(evaluate)


def main() -> None:
    """Run a command; errors become `error: ...` lines and an exit status."""
    open_closed_streams()
    pause_on_signals()
    try:
        result = app(standalone_mode=False)
    except PausedError:
        say(pause_text())
        raise SystemExit(EXIT_PAUSED) from None
    except Exception as error:
        # The signal's exception may have cut something short, a transaction say, which then failed.
        if was_asked_to_pause():
            say(pause_text())
            raise SystemExit(EXIT_PAUSED) from None
        if isinstance(error, MergeError):
            end(error.faults, EXIT_OTHER if isinstance(error, _NOT_THE_INPUT) else EXIT_INPUT)
        if isinstance(error, TrialError):
            end([str(error)], EXIT_OTHER)
        # Typer's usage errors; it carries its own copy of click, so they are known by their method.
        if hasattr(error, "format_message"):
            end([error.format_message()], EXIT_INPUT)
        if isinstance(error, OSError) and error.filename is None and error.errno in (EPIPE, ENOSPC):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in its buffer
            who_reads = [] if error.errno == EPIPE else [f"stdout cannot be written ({error.strerror})"]
            end(who_reads, EXIT_OTHER)
        if os.environ.get(DEBUG):
            raise
        end([unforeseen(error)], EXIT_OTHER)
    raise SystemExit(result if isinstance(result, int) else 0)
