"""A search over two hosts, one of which is cut off in the middle; PostgreSQL runs on a third.

    python tests/benchmarks/two_hosts.py [--candidates 40] [--by link|kill]      # Linux, as root

Hosts are network namespaces on a bridge, each with an address, shared memory and a disk for its
temporary files of its own; what they share is what several hosts must have alike: the installation,
and the models at the same paths. Host 1 is the head of a Ray cluster and runs `evolve run`, host 2
joins the cluster with one worker, host 3 is the PostgreSQL server. When a third of the candidates
are told and one is under way on host 2, that loses its link (or all its processes), and nobody tells
host 1.

Everything happens in namespaces of the script's own: whatever happens to it, nothing stays behind.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
NETWORK = "10.77.0"
HEAD, OTHER, DATABASE = (f"{NETWORK}.{i}" for i in (1, 2, 3))
RAY_PORT, PASSWORD = 6379, "not-a-secret"
STORAGE = f"postgresql+psycopg://postgres:{PASSWORD}@{DATABASE}/postgres"
STORE_BYTES = 100_000_000
# Namespaces of its own: network, mounts and processes, which end with the first of them.
_APART = ("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")


@dataclass(frozen=True)
class Found:
    """What the search made of it.

    Attributes:
        result: what `evolve run --json` printed.
        trials: number, state and failure kind of each trial in the storage.
        told_before: how many candidates were told when the host was cut off.
        told_after_s: seconds until the search said that it had lost a worker; None if it never did.
        seconds: of the whole command.
        said: what it said from then on.
    """

    result: dict[str, Any]
    trials: list[tuple[int, str, str | None]]
    told_before: int
    told_after_s: float | None
    seconds: float
    said: list[str]


def missing() -> str | None:
    """Say what this machine lacks for the test; None where it can run."""
    if shutil.which("unshare") is None or shutil.which("nsenter") is None or shutil.which("ip") is None:
        return "needs unshare, nsenter and ip (util-linux, iproute2)"
    if _postgres("initdb") is None:
        return "needs a PostgreSQL server"
    try:
        import psycopg  # noqa: F401
    except ImportError:
        return "needs psycopg"
    tried = subprocess.run([*_APART, "ip", "link", "add", "br0", "type", "bridge"], capture_output=True)
    return "may make no network namespaces here" if tried.returncode else None


def two_hosts(candidates: int, by: str, health_check_s: float | None = None) -> Found:
    """Run the script in namespaces of its own, and return what it found.

    Args:
        by: how host 2 is cut off: "link" or "kill".
        health_check_s: after how long without an answer Ray takes a host for dead; None = its own.
    """
    command = [sys.executable, str(Path(__file__).resolve()), "--inside", "--json"]
    command += ["--candidates", str(candidates), "--by", by]
    environment = dict(os.environ)
    if health_check_s is not None:
        environment["RAY_health_check_period_ms"] = environment["RAY_health_check_timeout_ms"] = str(
            int(1000 * health_check_s / 2)
        )
        environment["RAY_health_check_failure_threshold"] = "2"
    done = subprocess.run(
        [*_APART, *command], stdout=subprocess.PIPE, text=True, check=False, env=environment
    )
    if done.returncode:
        raise RuntimeError(f"the search over two hosts ended with {done.returncode}")
    found = json.loads(done.stdout.splitlines()[-1])
    return Found(**{**found, "trials": [tuple(trial) for trial in found["trials"]]})


# ---- inside ---------------------------------------------------------------------------------------


class Host:
    """A network namespace on the bridge, with mounts of its own."""

    def __init__(self, name: str, address: str) -> None:
        self.name, self.address = name, address
        self._holder = subprocess.Popen(["unshare", "--net", "--mount", "sleep", "infinity"])
        own = os.readlink("/proc/self/ns/mnt")
        _until(lambda: self._namespace("mnt") != own, 10, "a namespace")
        pid = str(self._holder.pid)
        _run("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", pid)
        _run("ip", "link", "set", name, "master", "br0", "up")
        _run(*self.inside("ip", "link", "set", "lo", "up"))
        _run(*self.inside("ip", "address", "add", f"{address}/24", "dev", "eth0"))
        _run(*self.inside("ip", "link", "set", "eth0", "up"))
        # It leads nowhere; Ray asks which address it would leave from.
        _run(*self.inside("ip", "route", "add", "default", "via", f"{NETWORK}.254"))
        # /tmp/ray is where Ray notes the cluster that a machine belongs to.
        for folder in ("/dev/shm", "/tmp/ray"):
            _run(*self.inside("mount", "-t", "tmpfs", "tmpfs", folder))

    def _namespace(self, kind: str, pid: int | None = None) -> str:
        return os.readlink(f"/proc/{pid or self._holder.pid}/ns/{kind}")

    def inside(self, *command: str, folder: Path | None = None) -> list[str]:
        """Return a command line that runs a command on this host."""
        where = [f"--wd={folder}"] if folder else []
        enter = ["nsenter", "--target", str(self._holder.pid), "--net", "--mount", *where]
        return [*enter, "--", *command]

    def cut_off(self, by: str) -> None:
        """Take away the link, or all processes."""
        if by == "link":
            _run("ip", "link", "set", self.name, "down")
            return
        for process in self._processes():
            with suppress(OSError):  # it ended by itself
                os.kill(process, signal.SIGKILL)

    def is_at_work(self) -> bool:
        """Tell whether a worker evaluates a candidate here; Ray names processes by what they run."""
        for process in self._processes():
            with suppress(OSError):
                if Path(f"/proc/{process}/cmdline").read_bytes().startswith(b"ray::_Actor.evaluate"):
                    return True
        return False

    def _processes(self) -> Iterator[int]:
        """Yield the processes of this host, beside the one that holds its namespaces."""
        own = self._namespace("net")
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal() and int(entry.name) != self._holder.pid:
                with suppress(OSError):
                    if self._namespace("net", int(entry.name)) == own:
                        yield int(entry.name)


def _run(*command: str, **options: Any) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, **options)


def _until(is_so: Callable[[], bool], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > end:
            raise TimeoutError(f"no {what} within {seconds:g} s")
        time.sleep(0.05)


def _postgres(program: str) -> str | None:
    installed = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{program}"))
    return shutil.which(program) or (str(installed[-1]) if installed else None)


def start_database(host: Host, folder: Path) -> None:
    """Start a PostgreSQL server that asks the other hosts for a password."""
    folder.mkdir()
    shutil.chown(folder, "postgres", "postgres")
    word = folder / "word"
    word.write_text(PASSWORD)
    shutil.chown(word, "postgres", "postgres")
    data = str(folder / "data")
    initdb, postgres, is_ready = (str(_postgres(name)) for name in ("initdb", "postgres", "pg_isready"))
    options = ["-U", "postgres", "-A", "scram-sha-256", f"--pwfile={word}", "--no-sync"]
    _run("runuser", "-u", "postgres", "--", initdb, "-D", data, *options)
    with Path(data, "pg_hba.conf").open("a") as access:
        access.write(f"host all all {NETWORK}.0/24 scram-sha-256\n")
    server = [postgres, "-D", data, "-k", str(folder), "-h", host.address]
    subprocess.Popen(
        host.inside("runuser", "-u", "postgres", "--", *server),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    answers = host.inside(is_ready, "-q", "-h", host.address)
    _until(lambda: not subprocess.run(answers).returncode, 30, "answer of the database")


def start_ray(host: Host, temporary: Path, head: Host | None = None) -> None:
    """Start a host's part of the cluster: with one CPU, for one worker."""
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--num-cpus=1", "--block"]
    ray += [f"--object-store-memory={STORE_BYTES}", f"--node-ip-address={host.address}"]
    if head is None:
        ray += ["--head", f"--port={RAY_PORT}", f"--temp-dir={temporary}", "--include-dashboard=false"]
    else:
        ray += [f"--address={head.address}:{RAY_PORT}"]
    subprocess.Popen(host.inside(*ray), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if head is None:
        _until(lambda: _answers(host), 60, "answer of the cluster's head")
        return
    both = (
        f"import ray, time; ray.init(address='{HEAD}:{RAY_PORT}', log_to_driver=False, "
        "logging_level='ERROR')\n"
        "while sum(node['Alive'] for node in ray.nodes()) < 2: time.sleep(0.1)\n"
    )
    _run(*head.inside(sys.executable, "-c", both), timeout=120)


def _answers(host: Host) -> bool:
    knock = f"import socket; socket.create_connection(('{host.address}', {RAY_PORT}), 1)"
    tried = subprocess.run(host.inside(sys.executable, "-S", "-c", knock), stderr=subprocess.DEVNULL)
    return not tried.returncode


def write_search(path: Path, candidates: int) -> None:
    """Write the quickstart's search with absolute paths."""
    search = yaml.safe_load((ROOT / "configs/quickstart.yml").read_text())
    search["base_model"] = str(ROOT / search["base_model"])
    for entry in search["models"]:
        entry["model"] = str(ROOT / entry["model"])
    search["search"]["n_iterations"] = candidates
    search["scoring"]["task_paths"] = [str(ROOT / "tasks")]
    path.write_text(yaml.safe_dump(search))


class _Lines(threading.Thread):
    """What a command says, line by line, and when."""

    def __init__(self, stream: IO[str]) -> None:
        super().__init__(daemon=True)
        self._stream = stream
        self.lines: list[tuple[float, str]] = []

    def run(self) -> None:
        for line in self._stream:
            self.lines.append((time.monotonic(), line.strip()))


def search(head: Host, other: Host, folder: Path, candidates: int, by: str) -> Found:
    """Run the search on the head, and cut the other host off when a third is told and it is at work."""
    write_search(folder / "search.yml", candidates)
    command = ["run", "search.yml", "--storage-path", "s", "--storage", STORAGE, "--workers", "2"]
    command += ["--ray-address", f"{HEAD}:{RAY_PORT}", "--device", "cpu", "--json"]
    began = time.monotonic()
    process = subprocess.Popen(
        head.inside(sys.executable, "-m", "evolve.cli", *command, folder=folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stderr
    said = _Lines(process.stderr)
    said.start()

    def n_told() -> int:
        return len(list((folder / "s/outcomes").glob("trial-*.parquet")))

    def is_a_third_told() -> bool:
        if process.poll() is not None:
            raise RuntimeError("\n".join(line for _, line in said.lines))
        return n_told() >= candidates // 3

    _until(lambda: is_a_third_told() and other.is_at_work(), 300, "third of the candidates")
    told_before = n_told()
    other.cut_off(by)
    cut = time.monotonic()
    printed = process.stdout.read()  # `communicate` would take lines of stderr from who reads them
    process.wait()
    seconds = time.monotonic() - began
    said.join()
    after = [(at, line) for at, line in said.lines if at >= cut]
    if process.returncode:
        raise RuntimeError("\n".join(line for _, line in said.lines))
    told = subprocess.run(
        head.inside(sys.executable, "-c", _TRIALS, folder=folder),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return Found(
        result=json.loads(printed),
        trials=json.loads(told.stdout),
        told_before=told_before,
        told_after_s=next((at - cut for at, line in after if "worker" in line), None),
        seconds=seconds,
        said=[f"{at - cut:.1f} s: {line}" for at, line in after],
    )


_TRIALS = f"""
import json, optuna
optuna.logging.set_verbosity(optuna.logging.ERROR)
(name,) = optuna.get_all_study_names("{STORAGE}")
trials = optuna.load_study(study_name=name, storage="{STORAGE}").trials
kind = lambda trial: trial.user_attrs.get("failure", {{}}).get("kind")
print(json.dumps([(trial.number, trial.state.name, kind(trial)) for trial in trials]))
"""


def inside(candidates: int, by: str) -> Found:
    """Build the network in these namespaces, start everything, and search."""
    # Ray's own protection, which every host must agree on; and workers no lower than other processes.
    token = secrets.token_hex(32)
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_worker_niceness": "0"}
    Path("/tmp/ray").mkdir(exist_ok=True)
    _run("ip", "link", "set", "lo", "up")
    _run("ip", "link", "add", "br0", "type", "bridge")
    _run("ip", "address", "add", f"{NETWORK}.254/24", "dev", "br0")
    _run("ip", "link", "set", "br0", "up")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        folder.chmod(0o755)
        (folder / "disk").mkdir()
        head, other, database = Host("one", HEAD), Host("two", OTHER), Host("three", DATABASE)
        # Its own empty disk: neither the head's working folder nor its Ray's files are there.
        _run(*other.inside("mount", "-t", "tmpfs", "tmpfs", str(folder)))
        start_database(database, folder / "pg")
        start_ray(head, folder / "ray")
        start_ray(other, folder / "ray", head)
        return search(head, other, folder / "disk", candidates, by)


def main() -> None:
    """Print what the search made of it."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--candidates", type=int, default=40)
    parser.add_argument("--by", choices=("link", "kill"), default="link")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        found = inside(arguments.candidates, arguments.by)
    elif (lacking := missing()) is not None:
        parser.error(lacking)
    else:
        found = two_hosts(arguments.candidates, arguments.by)
    if arguments.json:
        print(json.dumps(asdict(found)))
        return
    states = [state for _, state, _ in found.trials]
    print(
        f"{len(states)} candidates: {states.count('COMPLETE')} COMPLETE, {states.count('FAIL')} FAILED "
        f"({', '.join(str(kind) for _, state, kind in found.trials if state == 'FAIL')})"
    )
    print(f"host 2 was cut off after {found.told_before}, by {arguments.by}; then was said:")
    for line in found.said:
        print(f"  {line}")
    print(f"{found.seconds:.0f} s in all; {found.result['verdict']}")


if __name__ == "__main__":
    main()
