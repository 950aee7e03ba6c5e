"""Errors of the search, named after the boundary that was crossed.

Input errors (`SearchFileError`, `ResumeRefusedError`) end the program before work begins, with one
line a fault. A `TrialError` is data: the candidate becomes a FAILED trial with its kind and text.
"""

from __future__ import annotations

import errno
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evolve.redaction import redacted
from merge_core.errors import MergeError


class SearchFileError(MergeError):
    """The search file, the options or a task is at fault."""


class ResumeRefusedError(MergeError):
    """The storage holds another search than the one asked for."""


class StorageError(MergeError):
    """The storage cannot be reached or holds something else than a study."""


class SearchStoppedError(MergeError):
    """Too many candidates failed, so the search was stopped."""


class WorkersLostError(MergeError):
    """No worker is left, and none can be started in its place; what is finished is recorded."""


class PushError(MergeError):
    """A merged model could not be uploaded; it is kept where it was written."""


class PausedError(BaseException):
    """SIGINT or SIGTERM asked for a pause; no failure of a candidate, so nothing may catch it."""


class TrialError(Exception):
    """A candidate could not be evaluated; `kind` says at which boundary.

    Attributes:
        is_unforeseen: whether it is a foreign exception that `boundary` met, and no refusal of ours.
    """

    kind = "unknown"
    is_unforeseen = False

    def __str__(self) -> str:
        return redacted(super().__str__())  # it is kept with the trial


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


class TrialTimeoutError(TrialError):
    """The candidate took longer than it may, and did so again."""

    kind = "timeout"


@contextmanager
def boundary(error: type[TrialError], doing: str) -> Iterator[None]:
    """Attribute any foreign exception to the boundary it crossed; typed ones pass through."""
    try:
        yield
    except TrialError:
        raise
    except Exception as foreign:
        raised = error(f"{doing}: {type(foreign).__name__}: {str(foreign) or _line(foreign)}")
        raised.is_unforeseen = True
        raise raised from foreign


# After these a device, or the engine's own processes, may answer nothing any more, or wrongly.
_BREAKING_TYPES = ("AcceleratorError", "OutOfMemoryError", "EngineDeadError", "MemoryError")
_BREAKING_TEXTS = re.compile(
    "CUDA error|HIP error|device-side assert|(CUBLAS|CUDNN|CUSOLVER|NCCL)[ _](STATUS|error)"
)


def breaks_worker(error: TrialError) -> bool:
    """Tell whether a worker cannot be trusted after an error: the candidate may not be at fault.

    So after any unforeseen exception of an engine, and after one of a device or its memory wherever
    it surfaced: a CUDA error leaves its whole process unusable.
    """
    if error.is_unforeseen and isinstance(error, TrialEngineError | TrialWorkerError):
        return True
    cause: BaseException | None = error
    while cause is not None:
        if type(cause).__name__ in _BREAKING_TYPES or _BREAKING_TEXTS.search(str(cause)):
            return True
        cause = cause.__cause__
    return False


def _line(foreign: Exception) -> str:
    """Quote the line that raised, for an assertion that says nothing else."""
    *_, last = traceback.extract_tb(foreign.__traceback__)
    return f"{last.line} ({last.filename}:{last.lineno})"


@contextmanager
def disk_faults_told(folder: Path) -> Iterator[None]:
    """Say what to do where a folder's disk is full, or a place in it is not as it should be.

    Raises:
        StorageError: in place of the system's error; errors elsewhere pass through.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(
                f"the disk of {folder} is full; everything finished is recorded, make room and run the "
                f"same command again, it goes on where it was"
            ) from error
        place = Path(error.filename) if isinstance(error.filename, str) else None
        if place is None or not place.absolute().is_relative_to(folder.absolute()):
            raise
        raise StorageError(
            f"{place} cannot be used ({error.strerror}); everything finished is recorded, put that right "
            f"and run the same command again, it goes on where it was"
        ) from error
