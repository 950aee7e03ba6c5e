"""A search that is killed, again and again, beside one that is not.

    python tests/benchmarks/kill.py [--kills 30] [--racing] [--seed 0]

`kill -9` goes to the whole process group. Most kills come at a random moment after the candidates
began, every tenth at a random moment of the start, and every third in one of the short phases that a
random moment seldom meets, at a random candidate: outcomes being written, a trial being told, a
recipe being exported, the next candidate being proposed and merged. What the process was doing is
read from its stack, dumped just before.

After each kill the record is opened: no finished trial may be missing, doubled or changed. The
search is then resumed; where it ends before the next kill, its trials and its best.yml have to be
those of the undisturbed one, byte for byte, and another search begins.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evolve.search_file import SearchFile
from evolve.study import Study

ROOT = Path(__file__).resolve().parents[2]
# Also says where it is when asked, and makes no other difference.
COMMAND = """
import faulthandler, signal, sys
faulthandler.register(signal.SIGUSR1, file=open(sys.argv.pop(1), "w"))
from evolve.cli import main
main()
"""
# By the innermost function of ours that is one of these.
PHASES = {
    "propose": "proposing",
    "sampler_of": "proposing",
    "begin": "proposing",
    "merge_and_load": "merging and loading",
    "fill": "merging and loading",
    "answer": "scoring",
    "save_outcomes": "writing outcomes",
    "_tell": "telling",
    "complete": "telling",
    "keep_current": "exporting",
    "judge": "at the end",
    "finals": "at the end",
    "search": "between",
}
SHORT = ("writing outcomes", "telling", "exporting", "next")
# How long after a trial's outcomes the next one is proposed and merged, at most.
NEXT_S = 0.15
_IN_MOVED_TO, _IN_CREATE = 0x80, 0x100
HANGS_AFTER_S = 600.0


def search(racing: bool, n: int) -> SearchFile:
    """The quickstart's search with `n` candidates."""
    file = SearchFile.load(ROOT / "configs/quickstart.yml")
    return file.changed(
        search={"n_iterations": n, "racing": "always" if racing else "none"},
        scoring={"limit": 200, "holdout": 100},
    )


def record(folder: Path) -> dict[int, str]:
    """Return what is told of each finished trial, but for when and how long, with its outcomes.

    Raises:
        AssertionError: numbers are not 0, 1, ... or a trial has no whole outcomes.
    """
    study = Study.open(folder)
    trials = study.trials()
    assert [trial.number for trial in trials] == list(range(len(trials)))
    told = {}
    for trial in study.finished():
        attributes = {k: v for k, v in trial.user_attrs.items() if k not in ("seconds", "attempts")}
        data: list[Any] = [trial.number, trial.state.name, trial.params, trial.values, attributes]
        if trial.values is not None:
            outcomes = study.outcomes.load(f"trial-{trial.number}")["search"]
            data.append({k: [(o.leaf, o.document, o.value) for o in v] for k, v in outcomes.items()})
        told[trial.number] = json.dumps(data, sort_keys=True)
    return told


class _Watch:
    """New and renamed files of folders, as the system tells them (inotify)."""

    def __init__(self, *folders: Path) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = self._libc.inotify_init()
        for folder in folders:
            self._libc.inotify_add_watch(self._descriptor, os.fsencode(folder), _IN_MOVED_TO | _IN_CREATE)

    def names(self, timeout_s: float) -> list[tuple[str, bool]]:
        """Wait for files; return their names, and whether they were renamed into place."""
        if not select.select([self._descriptor], [], [], timeout_s)[0]:
            return []
        data, found = os.read(self._descriptor, 1 << 16), []
        while data:
            _, mask, _, length = struct.unpack_from("iIII", data)
            found.append((data[16 : 16 + length].rstrip(b"\0").decode(), bool(mask & _IN_MOVED_TO)))
            data = data[16 + length :]
        return found

    def close(self) -> None:
        os.close(self._descriptor)


class Run:
    """One `evolve run`, in a process group of its own."""

    def __init__(self, search_file: Path, folder: Path) -> None:
        self.folder = folder
        self._dump = folder.parent / "stack"
        self._dump.unlink(missing_ok=True)
        command = [sys.executable, "-c", COMMAND, str(self._dump), "run", str(search_file)]
        self._log = (folder.parent / "log").open("ab")
        self._process = subprocess.Popen(
            [*command, "--storage-path", str(folder)],
            cwd=ROOT,
            start_new_session=True,
            stdout=self._log,
            stderr=self._log,
        )

    def has_ended(self) -> bool:
        status = self._process.poll()
        assert status in (None, 0), (self.folder.parent / "log").read_text()[-3000:]
        return status == 0

    def under_way(self) -> None:
        """Wait until the candidates of this run begin, or it ends."""
        log = self.folder / "run.log"
        before = log.stat().st_size if log.exists() else 0
        self._until(lambda: log.exists() and log.stat().st_size > before)

    def finished(self) -> None:
        """Wait for the end."""
        self._until(lambda: False)

    def _until(self, condition: Any) -> None:
        deadline = time.monotonic() + HANGS_AFTER_S
        while not self.has_ended() and not condition():
            assert time.monotonic() < deadline, "the search hangs"
            time.sleep(0.005)

    def reaches(self, phase: str, n: int) -> None:
        """Wait for the `n`-th time that a short phase begins, or the end."""
        (self.folder / "outcomes").mkdir(exist_ok=True)
        watch = _Watch(self.folder, self.folder / "outcomes")
        deadline = time.monotonic() + HANGS_AFTER_S
        try:
            while not self.has_ended():
                assert time.monotonic() < deadline, "the search hangs"
                for name, is_renamed in watch.names(0.05):
                    is_outcomes = name.startswith("trial-") and ".parquet" in name
                    n -= {
                        "writing outcomes": is_outcomes and not is_renamed,
                        "telling": is_outcomes and is_renamed,
                        "next": is_outcomes and is_renamed,
                        "exporting": name.startswith("best.yml"),
                    }[phase]
                if n <= 0:
                    return
        finally:
            watch.close()

    def kill(self) -> str:
        """Kill the group; return what it was doing."""
        self._process.send_signal(signal.SIGUSR1)
        for _ in range(200):
            if self._dump.exists() and self._dump.stat().st_size > 200:
                break
            time.sleep(0.0001)
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        stack = self._dump.read_text() if self._dump.exists() else ""
        return next((PHASES[name] for name in _functions(stack) if name in PHASES), "starting")


def _functions(stack: str) -> list[str]:
    """Return the functions of the main thread, the innermost first."""
    *_, main = stack.split("Thread 0x")
    return [line.rsplit(" in ", 1)[1] for line in main.splitlines() if " in " in line]


@dataclass
class Disturbed:
    """What came of the kills.

    Attributes:
        n_kills: how many.
        n_searches: how many searches they were spread over, each compared at its end.
        phases: how often the process was doing what.
        seconds: how long the undisturbed search took.
    """

    n_kills: int = 0
    n_searches: int = 0
    seconds: float = 0.0
    phases: Counter[str] = field(default_factory=Counter)


def disturb(place: Path, n_kills: int, racing: bool, n_candidates: int, seed: int = 0) -> Disturbed:
    """Kill searches `n_kills` times, and compare.

    Raises:
        AssertionError: something finished was lost, doubled or changed, or a search ended otherwise.
    """
    file = place / "search.yml"
    file.write_text(search(racing, n_candidates).to_yaml())
    whole = place / "whole" / "s"
    whole.parent.mkdir()
    began = time.monotonic()
    Run(file, whole).finished()
    found = Disturbed(seconds=time.monotonic() - began)
    expected, best = record(whole), (whole / "best.yml").read_bytes()
    assert len(expected) == n_candidates
    rng = random.Random(seed)
    while found.n_kills < n_kills:
        folder = place / f"disturbed-{found.n_searches}" / "s"
        folder.parent.mkdir()
        known: dict[int, str] = {}
        while True:
            run = Run(file, folder)
            if found.n_kills == n_kills:
                run.finished()
            else:
                _wait(run, rng, found)
            if run.has_ended():
                break
            found.phases[run.kill()] += 1
            found.n_kills += 1
            after = record(folder) if Study.is_in(folder) else {}
            assert known.items() <= after.items() <= expected.items()
            known = after
        assert record(folder) == expected
        assert (folder / "best.yml").read_bytes() == best
        found.n_searches += 1
    return found


def _wait(run: Run, rng: random.Random, found: Disturbed) -> None:
    """Wait until a moment to kill at, or the end."""
    if found.n_kills % 10 == 9:
        time.sleep(rng.uniform(0, found.seconds / 4))
        return
    run.under_way()
    if run.has_ended():
        return
    if found.n_kills % 3 == 1:
        phase = SHORT[found.n_kills // 3 % len(SHORT)]
        run.reaches(phase, rng.randint(1, 6))
        if phase == "next":
            time.sleep(rng.uniform(0, NEXT_S))
        return
    until = time.monotonic() + rng.uniform(0, found.seconds / 3)
    while time.monotonic() < until and not run.has_ended():
        time.sleep(0.001)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--candidates", type=int, default=24)
    parser.add_argument("--racing", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="evolve-kill-") as place:
        found = disturb(
            Path(place), arguments.kills, arguments.racing, arguments.candidates, arguments.seed
        )
    print(f"undisturbed: {arguments.candidates} candidates in {found.seconds:.1f} s")
    print(f"{found.n_kills} kills over {found.n_searches} searches, each ended as the undisturbed one")
    for phase, n in found.phases.most_common():
        print(f"  {phase}: {n}")


if __name__ == "__main__":
    main()
