"""What this machine has: private and free memory, and how fast the disk below a folder is."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from merge_core.errors import OutputError

_PROBE_BYTES = 1 << 25
_PROBE_S = 0.35
# M_MMAP_THRESHOLD of malloc.h.
_MMAP_THRESHOLD = -3


def nearest_folder(folder: Path) -> Path:
    """Return the nearest folder above that exists; OUT is made there."""
    place = folder.absolute().parent
    return next((at for at in (place, *place.parents) if at.is_dir()), Path("/"))


def disk_seconds(place: Path, n_bytes: int) -> float:
    """Seconds that the disk needs for what the page cache will not hold back.

    Linux lets a program write into memory until half of `dirty_ratio` and `dirty_background_ratio`
    together is full, then at the disk's own pace (Documentation/admin-guide/sysctl/vm.rst).
    """
    held = 0
    try:
        ratios = [
            int(Path(f"/proc/sys/vm/dirty_{kind}").read_text()) for kind in ("ratio", "background_ratio")
        ]
        held = int((memory_left() or 0) * sum(ratios) / 200)
    except (OSError, ValueError):
        pass
    if n_bytes <= held:
        return 0.0
    data = os.urandom(_PROBE_BYTES)
    with nameless_file(place) as file:
        began, written = time.perf_counter(), 0
        while time.perf_counter() - began < _PROBE_S:
            written += file.write(data)
            os.fsync(file.fileno())
        return (n_bytes - held) / written * (time.perf_counter() - began)


def nameless_file(place: Path) -> IO[bytes]:
    """Open a file that no listing shows and that is gone when it is closed.

    Raises:
        OutputError: nothing can be written there.
    """
    try:
        return tempfile.TemporaryFile(dir=place, buffering=0)
    except OSError as error:
        raise OutputError(
            f"OUT: nothing can be written in {place} ({error.strerror}); name another folder"
        ) from None


def _field(path: Path, key: str, scale: int = 1) -> int | None:
    """Read `key: number` from a file of the kernel; None where there is none."""
    try:
        found = re.search(rf"^{key}:?\s+(\d+)", path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * scale if found else None


def private_bytes() -> int:
    """Memory of this process that is its own: mapped files do not count; 0 where nobody says."""
    return _field(Path("/proc/self/status"), "RssAnon", 1024) or 0


def memory_left() -> int | None:
    """Memory that may still be had: the system's, or what a control group leaves of it."""
    available = _field(Path("/proc/meminfo"), "MemAvailable", 1024)
    for group in _control_groups():
        try:
            limit = int((group / "memory.max").read_text())
        except (OSError, ValueError):  # no such file, or "max"
            continue
        left = limit - (_field(group / "memory.stat", "anon") or 0)
        available = left if available is None else min(available, left)
    return available


def _control_groups() -> Iterator[Path]:
    """The control groups (version 2) that this process is in, its own first."""
    root = Path("/sys/fs/cgroup")
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        if line.startswith("0::/"):
            group = root / line[4:]
            yield from (at for at in (group, *group.parents) if at.is_relative_to(root))


# How many processes of this machine keep tensors, this one included.
_n_processes = 1


def divide_memory(n_processes: int) -> None:
    """Have this process keep no more than its part, being one of so many that keep tensors here."""
    global _n_processes
    _n_processes = n_processes


def n_processes() -> int:
    """Return how many processes of this machine keep tensors, as far as this one was told."""
    return _n_processes


def give_back_freed_memory() -> None:
    """Have the C library return every large block to the system as soon as it is freed.

    Else it keeps blocks of up to 32 MiB for later, whatever size is asked for next, and the private
    memory of a merge grows far beyond the tensors that it holds. Only glibc needs it.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 4 << 20)


def give_back_gaps() -> None:
    """Return to the system, now, what the C library keeps of freed blocks between blocks in use.

    Each thread of a merge has memory of its own, which a search would see grow by the same gaps
    again. Only glibc keeps such gaps.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def in_units(n_bytes: float) -> str:
    """Spell a number of bytes in decimal units: 2.17 GB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= size:
            return (
                f"{n_bytes / size:.3g} {unit}" if n_bytes < 1e3 * size else f"{n_bytes / size:.0f} {unit}"
            )
    return f"{n_bytes:.0f} B"


def process_seconds() -> float:
    """Return the seconds since this process began; 0 where the system does not say."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        up = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0.0
    return up - ticks / os.sysconf("SC_CLK_TCK")
