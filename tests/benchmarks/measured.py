"""Whole commands, measured: seconds, and the most memory that the process and its children held."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_SAMPLE_SECONDS = 0.02
_COPY_BYTES = 8 << 20
# Folders of the testbed: a base and what was fine-tuned from it.
BASE, TUNED = "base", ("addition", "roman")


@dataclass(frozen=True)
class Usage:
    """What a command took.

    Attributes:
        seconds: wall time from its start to its end.
        rss_mb: peak resident memory of the process tree, mapped files included; sampled.
        private_mb: peak private memory of the process tree (RssAnon); sampled.
        max_rss_mb: the system's own record for the process and its ended children, the largest one.
        error: last line of its stderr where it failed, else None.
    """

    seconds: float
    rss_mb: float
    private_mb: float
    max_rss_mb: float
    error: str | None = None


class _Sampler(threading.Thread):
    """Reads a process tree's memory until told to stop."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid, self._stop_asked = pid, threading.Event()
        self.rss_kb = self.private_kb = 0

    def run(self) -> None:
        while not self._stop_asked.wait(_SAMPLE_SECONDS):
            held = [_memory_kb(pid) for pid in _tree(self._pid)]
            self.rss_kb = max(self.rss_kb, sum(rss for rss, _ in held))
            self.private_kb = max(self.private_kb, sum(private for _, private in held))

    def stop(self) -> None:
        self._stop_asked.set()
        self.join()


def _tree(pid: int) -> list[int]:
    """List a process and all its descendants."""
    found = [pid]
    for parent in found:
        # Any of them may end meanwhile.
        with contextlib.suppress(OSError):
            for path in Path(f"/proc/{parent}/task").glob("*/children"):
                found += map(int, path.read_text().split())
    return found


def _memory_kb(pid: int) -> tuple[int, int]:
    """Return VmRSS and RssAnon; nothing of a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    fields = dict(line.split(":", 1) for line in lines)
    rss, private = (int(fields.get(name, "0 kB").split()[0]) for name in ("VmRSS", "RssAnon"))
    return rss, private


def measure(command: Sequence[str]) -> Usage:
    """Run a command to its end; what other commands wrote is on the disk before it starts."""
    os.sync()
    with tempfile.TemporaryFile("w+") as stderr:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr)
        sampler = _Sampler(process.pid)
        sampler.start()
        # waited for without reaping, so that the sampler never reads another process of that number
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        seconds = time.perf_counter() - began
        sampler.stop()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        stderr.seek(0)
        said = stderr.read().strip().splitlines()
    error = None if process.returncode == 0 else said[-1] if said else f"exit {process.returncode}"
    return Usage(seconds, sampler.rss_kb / 1024, sampler.private_kb / 1024, used.ru_maxrss / 1024, error)


def best(usages: Sequence[Usage]) -> Usage:
    """Take the shortest time and the smallest peaks of several runs; the first failure, if any."""
    failed = next((usage for usage in usages if usage.error), None)
    return failed or Usage(
        min(usage.seconds for usage in usages),
        min(usage.rss_mb for usage in usages),
        min(usage.private_mb for usage in usages),
        min(usage.max_rss_mb for usage in usages),
    )


def our_command(recipe: Path, out: Path) -> list[str]:
    """The command that merges with this project."""
    return [sys.executable, "-m", "evolve.cli", "merge", str(recipe), str(out)]


def peers_command(recipe: Path, out: Path) -> list[str]:
    """The command that merges with mergekit, installed beside this Python."""
    tool = Path(sys.executable).parent / "mergekit-yaml"
    return [str(tool), str(recipe), str(out), "--lazy-unpickle"]


def write_recipe(config: dict[str, Any], path: Path) -> Path:
    """Write a recipe as YAML."""
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def weights_of(folder: Path) -> list[Path]:
    """List a model's safetensors files."""
    return sorted(folder.glob("*.safetensors"))


def copy_seconds(read: Sequence[Path], written: Sequence[Path], out: Path) -> float:
    """Time plain reading of all of `read`, and writing as many bytes as `written` has to a new file.

    Bytes go through one small buffer; page cache to page cache, as in a merge of warm files.
    """
    os.sync()
    buffer = memoryview(bytearray(_COPY_BYTES))
    left = sum(path.stat().st_size for path in written)
    began = time.perf_counter()
    with out.open("wb", buffering=0) as target:
        for path in read:
            with path.open("rb", buffering=0) as source:
                while n := source.readinto(buffer):
                    part = buffer[: min(n, left)]
                    if part:
                        left -= target.write(part)
    seconds = time.perf_counter() - began
    out.unlink()
    if left:
        raise ValueError(f"{left} bytes more were to be written than read")
    return seconds
