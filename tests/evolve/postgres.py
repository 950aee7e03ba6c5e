"""A PostgreSQL server of the tests' own, on a free port of this machine."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PASSWORD = "not-to-be-written"


def programs() -> Path | None:
    """Return the folder of PostgreSQL's server programs, the newest; None where there is none."""
    known = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=_version)
    if known:
        return known[-1].parent
    found = shutil.which("postgres")
    return Path(found).parent if found else None


def _version(program: Path) -> int:
    return int(program.parts[-3])


@contextmanager
def server() -> Iterator[PostgreSQL]:
    """Run a server with an empty database `postgres`, whose user needs a password."""
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    running = PostgreSQL(folder)
    try:
        running.make()
        running.start()
        yield running
    finally:
        running.stop()
        shutil.rmtree(folder, ignore_errors=True)


class PostgreSQL:
    """A server; it cannot run as root, and then runs as the user postgres."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._server: subprocess.Popen[bytes] | None = None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        bin_folder = programs()
        assert bin_folder is not None
        self._bin = bin_folder
        self._as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []

    @property
    def url(self) -> str:
        """The database's URL, password included."""
        return f"postgresql://postgres:{PASSWORD}@127.0.0.1:{self.port}/postgres"

    def make(self) -> None:
        """Make the database."""
        word = self._folder / "word"
        word.write_text(PASSWORD)
        if self._as_user:
            shutil.chown(self._folder, "postgres")
            shutil.chown(word, "postgres")
        options = ["-D", self._folder / "data", "-U", "postgres", "-A", "scram-sha-256", "--no-sync"]
        command = [*self._as_user, self._bin / "initdb", *options, f"--pwfile={word}"]
        subprocess.run(command, check=True, capture_output=True, cwd=self._folder)

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        options = ["-D", self._folder / "data", "-k", self._folder, "-h", "127.0.0.1"]
        options += ["-p", str(self.port), "-c", "fsync=off"]
        with (self._folder / "log").open("ab") as log:
            self._server = subprocess.Popen(
                [*self._as_user, self._bin / "postgres", *options],
                stderr=log,
                stdout=log,
                cwd=self._folder,
            )
        for _ in range(300):
            asked = [self._bin / "pg_isready", "-h", "127.0.0.1", "-p", str(self.port), "-q"]
            if subprocess.run(asked, check=False).returncode == 0:
                return
            time.sleep(0.1)
        raise RuntimeError((self._folder / "log").read_text())

    def stop(self) -> None:
        """Stop the server at once; what was committed is kept."""
        if self._server is not None:
            stop = ["stop", "-m", "immediate", "-D", self._folder / "data"]
            command = [*self._as_user, self._bin / "pg_ctl", *stop]
            subprocess.run(command, check=False, capture_output=True, cwd=self._folder)
            self._server.wait()
            self._server = None
