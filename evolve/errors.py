"""Errors of the search, named after the boundary that was crossed.

Input errors (`SearchFileError`, `ResumeRefusedError`) end the program before work begins, with one
line a fault. A `TrialError` is data: the candidate becomes a FAILED trial with its kind and text.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from merge_core.errors import MergeError


class SearchFileError(MergeError):
    """The search file, the options or a task is at fault."""


class ResumeRefusedError(MergeError):
    """The storage holds another search than the one asked for."""


class StorageError(MergeError):
    """The storage cannot be reached or holds something else than a study."""


class SearchStoppedError(MergeError):
    """Too many candidates failed, so the search was stopped."""


class PushError(MergeError):
    """A merged model could not be uploaded; it is kept where it was written."""


class PausedError(BaseException):
    """SIGINT or SIGTERM asked for a pause; no failure of a candidate, so nothing may catch it."""


class TrialError(Exception):
    """A candidate could not be evaluated; `kind` says at which boundary."""

    kind = "unknown"


class TrialMergeError(TrialError):
    """The merge of this candidate failed."""

    kind = "merge"


class TrialEngineError(TrialError):
    """Loading into the engine or running the model failed."""

    kind = "engine"


class TrialTaskError(TrialError):
    """A task's own metric or filter failed, or gave no finite score."""

    kind = "task"


class TrialWorkerError(TrialError):
    """The worker process died, and died again when the candidate was tried again."""

    kind = "worker"


@contextmanager
def boundary(error: type[TrialError], doing: str) -> Iterator[None]:
    """Attribute any foreign exception to the boundary it crossed; typed ones pass through."""
    try:
        yield
    except TrialError:
        raise
    except Exception as foreign:
        raise error(f"{doing}: {type(foreign).__name__}: {str(foreign) or _line(foreign)}") from foreign


def _line(foreign: Exception) -> str:
    """Quote the line that raised, for an assertion that says nothing else."""
    *_, last = traceback.extract_tb(foreign.__traceback__)
    return f"{last.line} ({last.filename}:{last.lineno})"
