"""Nothing that a search starts listens to other machines, unless it was told to."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


def listening(process: psutil.Process) -> set[tuple[str, int]]:
    """List where a process and its descendants accept connections."""
    found = set()
    for each in (process, *process.children(recursive=True)):
        try:
            connections = each.net_connections("inet")
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        found |= {tuple(c.laddr) for c in connections if c.status == psutil.CONN_LISTEN}
    return found


@pytest.mark.slow
def test_workers_listen_on_loopback_alone(tmp_path: Path) -> None:
    data = yaml.safe_load((ROOT / "configs/quickstart.yml").read_text())
    data["search"]["n_iterations"] = 4
    data["scoring"] |= {"limit": 10, "holdout": 0}
    search = tmp_path / "search.yml"
    search.write_text(yaml.safe_dump(data))
    command = ["run", str(search), "--storage-path", str(tmp_path / "out"), "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "evolve.cli", *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
    )
    seen: set[tuple[str, int]] = set()
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        seen |= listening(psutil.Process(process.pid))
        time.sleep(0.2)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert seen  # Ray's own servers
    assert {host for host, _ in seen} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
