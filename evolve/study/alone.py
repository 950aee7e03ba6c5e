"""One run at a time: a lock on the search's folder, and a lease on a study that others can reach.

The lock ends with the process. The lease is two attributes of the study: who holds it, and when the
holder was last seen by the database's clock; it is renewed while the run works, and whoever finds it
expired may take it. Every transaction of the holder touches it first, so that a run whose lease was
taken, because its host was cut off for long, writes nothing any more.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from evolve.errors import ResumeRefusedError, StorageError

if TYPE_CHECKING:
    from evolve.study.storage import Storage

HOLDER, SEEN = "lease", "lease_seen"
# A lease that was not renewed for so long may be taken.
EXPIRY_S = 60.0
_RENEWED_EVERY_S = 10.0


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder; the lock ends with the process, however that ends.

    Raises:
        ResumeRefusedError: another run is at work there.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ResumeRefusedError(
            f"--storage-path is {folder}, where another `evolve run` is at work; wait for "
            f"it, or give another one"
        ) from None
    try:
        yield
    finally:
        os.close(descriptor)


@contextmanager
def leased(storage: Storage) -> Iterator[None]:
    """Hold a study's lease, and let nothing be written to it without.

    Raises:
        ResumeRefusedError: another run holds it.
    """
    mine = json.dumps(
        {"host": socket.gethostname(), "process": _process(os.getpid()), "run": uuid.uuid4().hex}
    )
    _take(storage, mine)
    storage.hold(HOLDER, mine)
    ending = Event()

    def renew() -> None:
        while not ending.wait(_RENEWED_EVERY_S):
            try:
                storage.keep_notes({SEEN: storage.now().isoformat()}, patience_s=0)
            except StorageError:
                continue  # the next write tells, where the lease is lost

    renewing = Thread(target=renew, name="lease", daemon=True)
    renewing.start()
    try:
        yield
    finally:
        ending.set()
        renewing.join()
        with suppress(StorageError):  # it expires
            storage.swap_note(HOLDER, mine, None, patience_s=0)
        storage.hold(HOLDER, None)


def _take(storage: Storage, mine: str) -> None:
    """Take the lease where nobody holds it, its holder died, or it has expired."""
    notes, now = storage.notes(), storage.now()
    held = notes.get(HOLDER)
    idle_s = (now - datetime.fromisoformat(notes[SEEN])).total_seconds() if SEEN in notes else EXPIRY_S
    is_free = held is None or idle_s >= EXPIRY_S or _is_dead(json.loads(held))
    if is_free and storage.swap_note(HOLDER, held, mine, also={SEEN: now.isoformat()}):
        return
    holder = json.loads(held or storage.notes()[HOLDER])
    process = holder["process"].partition(" ")[0]
    raise ResumeRefusedError(
        f"--storage is {storage.url}, where another `evolve run` is at work on this search (host "
        f"{holder['host']}, process {process}, seen {idle_s:.0f} s ago); wait for it, or, where it is "
        f"gone, until it was not seen for {EXPIRY_S:.0f} s"
    )


def _is_dead(holder: dict[str, Any]) -> bool:
    """Tell whether a holder was a process of this host that runs no more."""
    if holder["host"] != socket.gethostname():
        return False
    process: str = holder["process"]
    return _process(int(process.partition(" ")[0])) != process


def _process(pid: int) -> str:
    """Name a process beyond its number, which another may have later: with its start, in clock ticks."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return str(pid)
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{pid} {stat.rpartition(')')[2].split()[19]} {boot}"
