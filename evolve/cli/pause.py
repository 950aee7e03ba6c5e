"""Ctrl-C and SIGTERM: a command pauses in order, or leaves as it is where that takes too long."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from evolve.cli.stderr import EXIT_PAUSED
from evolve.errors import PausedError

PAUSED = "paused; everything finished is recorded, run the same command again to go on"
STOPPED = "stopped; nothing is left half-written, run the same command again to begin anew"
# How long a pause may take before the process leaves as it is.
PATIENCE_S = 30

_signals: list[int] = []
_texts = [STOPPED]


def pause_on_signals() -> None:
    """Have either signal raise PausedError in the main thread; a command begins with this."""
    _signals.clear()
    _texts[:] = [STOPPED]
    signal.signal(signal.SIGTERM, _pause)
    signal.signal(signal.SIGINT, _pause)


def goes_on_later() -> None:
    """Say at a pause that the command goes on where it was: it keeps a record."""
    _texts.append(PAUSED)


def pause_text() -> str:
    """Return what is said at a pause."""
    return _texts[-1]


def was_asked_to_pause() -> bool:
    """Tell whether one of the signals has come."""
    return bool(_signals)


def unless_paused(progress: Callable[..., None]) -> Callable[..., None]:
    """Pause at the next event, too: Python drops what a signal raises inside a destructor."""

    def told(*event: Any) -> None:
        if _signals:
            raise PausedError
        progress(*event)

    return told


def _pause(signum: int, frame: Any) -> NoReturn:
    for each in (signal.SIGINT, signal.SIGTERM):  # a second one, whichever, stops at once
        signal.signal(each, _leave)
    _signals.append(signum)
    # An exception out of nowhere may leave a lock behind that something waits for at the end.
    signal.signal(signal.SIGALRM, _leave)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE_S)
    raise PausedError


def _leave(signum: int, frame: Any) -> NoReturn:
    """Go without tidying up: what is finished was recorded when it was finished."""
    os.write(sys.stderr.fileno(), f"{pause_text()}\n".encode())  # print may be at work below this
    os._exit(EXIT_PAUSED)
