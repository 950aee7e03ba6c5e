"""Tensors that processes of one host make once and map together, such as casts of source tensors.

Each is a file in a folder for temporary files. Its pages are in the page cache, once for all, and
the system may write them out where memory is short. The folder goes with the last process that
uses it; one that killed processes left behind is removed by the next that makes such a folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import math
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

_PREFIX = "evolve-shared-"


class SharedTensors:
    """The tensors of one run on this host.

    Args:
        name: the run's, the same in all its processes; nobody else can guess it.
        parent: where the folder is; default: the system's place for temporary files.
    """

    def __init__(self, name: str, parent: Path | None = None) -> None:
        parent = parent or Path(tempfile.gettempdir())
        self._folder = parent / f"{_PREFIX}{name}"
        self._folder.mkdir(mode=0o700, exist_ok=True)
        # Held while this process lives, however it ends.
        self._lock = os.open(self._folder, os.O_RDONLY)
        fcntl.flock(self._lock, fcntl.LOCK_SH)
        for folder in parent.glob(f"{_PREFIX}*"):
            if folder != self._folder:
                _remove_unused(folder)

    def get(
        self, key: str, shape: Sequence[int], dtype: torch.dtype, make: Callable[[], Tensor]
    ) -> Tensor:
        """Return the tensor of a key, made at the first need; never write into it.

        Where there is no room for its file, it is this process's own.

        Args:
            key: the same for the same tensor in every process.
            make: gives a tensor of this shape and dtype on the CPU.
        """
        n = math.prod(shape)
        path = self._folder / hashlib.sha256(key.encode()).hexdigest()
        try:
            if not n:
                return make()
            if not path.exists():
                self._write(path, make())
            return torch.from_file(str(path), shared=True, size=n, dtype=dtype).view(tuple(shape))
        except (OSError, RuntimeError):
            return make()

    @staticmethod
    def _write(path: Path, tensor: Tensor) -> None:
        part = path.with_name(f"{path.name}.part-{os.getpid()}-{threading.get_ident()}")
        try:
            with part.open("wb") as file:
                # Room for all of it: a mapped page that finds none would end the process.
                os.posix_fallocate(file.fileno(), 0, tensor.nbytes)
            n = tensor.numel()
            torch.from_file(str(part), shared=True, size=n, dtype=tensor.dtype).copy_(tensor.reshape(-1))
            with contextlib.suppress(FileExistsError):  # another process was first: its file stays
                os.link(part, path)
        finally:
            part.unlink(missing_ok=True)

    def close(self) -> None:
        """Leave the folder; the last one removes it. What is mapped stays until it is let go."""
        os.close(self._lock)
        _remove_unused(self._folder)


def remove_shared(name: str, patience_s: float = 5.0) -> None:
    """Remove a run's folder on this host, where processes that were killed have left it behind.

    Args:
        patience_s: how long those that are about to end may take.
    """
    folder = Path(tempfile.gettempdir()) / f"{_PREFIX}{name}"
    until = time.monotonic() + patience_s
    while folder.exists() and time.monotonic() < until:
        _remove_unused(folder)
        time.sleep(0.05)


def _remove_unused(folder: Path) -> None:
    """Remove a folder that no living process uses."""
    try:
        lock = os.open(folder, os.O_RDONLY)
    except OSError:  # gone, or another user's
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        pass
    finally:
        os.close(lock)
