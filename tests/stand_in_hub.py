"""A stand-in for the Hub on loopback, whose scripts lie beside the project.

`EVOLVE_HUB` names another folder of them (serve.py, make_data.py). Where there are none, what needs a Hub
is skipped.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("EVOLVE_HUB", Path(__file__).resolve().parents[2] / "shared/hub"))
SERVER = FOLDER / "serve.py"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def need() -> None:
    if not SERVER.is_file():
        pytest.skip(f"no stand-in Hub at {FOLDER}")


def make_data(root: Path) -> None:
    """Write data sets in the shape of mmlu, gsm8k and others."""
    need()
    subprocess.run([sys.executable, str(FOLDER / "make_data.py"), str(root)], check=True)


@contextmanager
def served(root: Path, token: str = "secret") -> Iterator[str]:
    """Serve root/models and root/datasets; yields the address, which answers."""
    need()
    port = free_port()
    line = [sys.executable, str(SERVER), str(root), "--port", str(port), "--token", token]
    server = subprocess.Popen(line, stdout=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"{address}/api/whoami-v2", timeout=5)
                break
            except urllib.error.HTTPError:  # it answers
                break
            except OSError:
                assert server.poll() is None, "the stand-in Hub ended"
                assert time.monotonic() < deadline, "the stand-in Hub does not answer"
                time.sleep(0.05)
        yield address
    finally:
        server.terminate()
        server.wait(10)
