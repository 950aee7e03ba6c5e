"""Mutated inputs for the real command, run in this process and watched.

Four kinds: search files, recipes, a model's files, and the folder of a finished search. Whatever is
in them, a command ends in time with one of its exit statuses, with `error:` lines where it is not 0,
and does not write where it has no business, start programs, connect, or load a pickle.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from .mutation import VALUES, mutated_bytes, mutated_text, mutated_tree

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "configs/quickstart/models/base"
KINDS = ("search", "recipe", "model", "storage")
TIME_LIMIT_S = 30
MEMORY_LIMIT_MB = 600
# Real searches and evaluations take most of the time: how many of the inputs get one.
REAL_SHARE = 0.1
_STATUSES = (0, 1, 2)
_MAX_LINE = 1020


class HangError(BaseException):
    """The time limit is over; a BaseException, so that nothing takes it for a failed candidate."""


@dataclass
class Watched:
    """What one command did.

    Attributes:
        touched: events outside the folders that it may write, one line each.
    """

    status: object = None
    out: str = ""
    err: str = ""
    seconds: float = 0.0
    peak_mb: float = 0.0
    raised: str = ""
    touched: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Found:
    """An input that did what no input may do."""

    kind: str
    seed: int
    faults: list[str]
    command: list[str]
    watched: Watched


_WRITES = {
    "os.mkdir": 0,
    "os.rename": 1,
    "os.remove": 0,
    "os.rmdir": 0,
    "os.symlink": 1,
    "os.link": 1,
    "os.truncate": 0,
    "os.chmod": 0,
    "sqlite3.connect": 0,
}
_NEVER = ("os.system", "os.exec", "os.posix_spawn", "socket.connect", "pickle.find_class", "pty.spawn")
_COMPILERS = {"cc", "gcc", "clang"}
_now: tuple[Watched, tuple[str, ...]] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    """Record what Python itself says of writes, programs, connections and pickles."""
    if _now is None:
        return
    watched, allowed = _now
    starts_other = event == "subprocess.Popen" and Path(str(arguments[0])).name not in _COMPILERS
    if event in _NEVER or starts_other:
        watched.touched.append(f"{event} {arguments!r:.200}")
    elif event == "open" and isinstance(arguments[0], str | bytes):
        if (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            _check_place(watched, allowed, event, arguments[0])
    elif event in ("os.remove", "os.rmdir") and arguments[1] >= 0:  # within an open folder
        folder = os.readlink(f"/proc/self/fd/{arguments[1]}")
        _check_place(watched, allowed, event, os.path.join(folder, os.fsdecode(arguments[0])))
    elif event in _WRITES:
        _check_place(watched, allowed, event, arguments[_WRITES[event]])


def _check_place(watched: Watched, allowed: tuple[str, ...], event: str, place: Any) -> None:
    place = os.fsdecode(place) if isinstance(place, bytes | os.PathLike) else place
    if isinstance(place, str):
        path = os.path.abspath(place.removeprefix("file:").partition("?")[0])
        # The folder above OUT may be made, or hold a file without a name for a moment.
        if not path.startswith((*allowed, "/dev/")) and path != os.path.dirname(allowed[0]):
            watched.touched.append(f"{event} {path}")


@contextmanager
def _time_limit() -> Iterator[None]:
    def stop(signum: int, frame: Any) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT_S, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _memory_mb(key: str) -> float:
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) / 1024


def watch(command: list[str], allowed: tuple[Path, ...]) -> Watched:
    """Run `evolve` in this process and say what it did."""
    global _now
    from evolve import cli

    watched = Watched()
    out, err = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    argv, sys.argv = sys.argv, ["evolve", *command]
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    os.environ[cli.DEBUG] = "1"  # what nobody thought of is raised
    before, began = _memory_mb("VmRSS"), time.perf_counter()
    _now = watched, tuple(str(path) for path in allowed)
    try:
        with _time_limit(), redirect_stdout(out), redirect_stderr(err):
            cli.main()
    except SystemExit as left:
        watched.status = left.code
    except BaseException:
        watched.raised = traceback.format_exc()
    finally:
        _now = None
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)
    watched.seconds = time.perf_counter() - began
    watched.peak_mb = _memory_mb("VmHWM") - before
    watched.out, watched.err = out.getvalue(), err.getvalue()
    return watched


def faults_of(watched: Watched) -> list[str]:
    """Say what of it no input may cause."""
    faults = []
    if watched.raised:
        faults.append("raised " + watched.raised.strip().splitlines()[-1][:300])
    elif watched.status not in _STATUSES:
        faults.append(f"exit status {watched.status!r}")
    errors = [line for line in watched.err.splitlines() if line.startswith("error: ")]
    if watched.status and not errors:
        faults.append(f"status {watched.status} without an error line")
    if "this is a fault of evolve" in watched.err:
        faults.append("an error that nobody thought of")
    if "Traceback (most" in watched.out + watched.err:
        faults.append("a traceback reached the user")
    if any(len(line) > _MAX_LINE for line in errors):
        faults.append("an error line of more than a screen")
    if re.search(r"[\x00-\x08\x0b-\x1f\x7f]", watched.err):
        faults.append("control characters on stderr")
    if watched.peak_mb > MEMORY_LIMIT_MB:
        faults.append(f"took {watched.peak_mb:.0f} MB")
    return faults + watched.touched[:5]


class World:
    """Valid inputs under one folder, which is also the working directory of the commands.

    Args:
        root: an empty folder.

    Attributes:
        last: what the last input's command did.
    """

    def __init__(self, root: Path) -> None:
        self.last = Watched()
        self.root = root.resolve()
        self.case = self.root / "case"
        self.out = self.case / "out"
        (self.root / "tmp").mkdir(parents=True)
        self._save_models()
        (self.root / "text.txt").write_text("sort kdmsa:\n\nreverse kdmsa:\n")
        start = {**self.recipes[1], "parameters": {"normalize": True}}
        weight = [{"filter": "mlp", "value": [0.5, 0.5]}, {"value": 0.5}]
        start["models"] = [
            {"model": "models/x", "parameters": {"weight": weight, "density": 0.5}},
            {"model": "models/y", "parameters": {"weight": 0.5, "density": 0.5}},
        ]
        (self.root / "start.yml").write_text(yaml.safe_dump({**start, "dtype": "float32"}))

    def _save_models(self) -> None:
        import torch
        from safetensors.torch import load_file
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

        tokenizer = AutoTokenizer.from_pretrained(QUICKSTART)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        for seed, name in enumerate(("base", "x", "y")):
            torch.manual_seed(seed)
            folder = self.root / "models" / name
            LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        plain = self.root / "models/base"
        tensors = load_file(plain / "model.safetensors")
        sharded, bins = self.root / "models/sharded", self.root / "models/bins"
        LlamaForCausalLM.from_pretrained(plain).save_pretrained(sharded, max_shard_size="8KB")
        tokenizer.save_pretrained(sharded)
        shutil.copytree(plain, bins, ignore=shutil.ignore_patterns("*.safetensors"))
        half = len(tensors) // 2
        files = {name: f"pytorch_model-{i >= half:d}.bin" for i, name in enumerate(tensors)}
        for file in sorted(set(files.values())):
            torch.save({name: tensors[name] for name in tensors if files[name] == file}, bins / file)
        (bins / "pytorch_model.bin.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": files})
        )

    # ---- valid inputs -------------------------------------------------------------------------

    @cached_property
    def searches(self) -> list[dict[str, Any]]:
        """Search files, one for each part of the language."""
        weight = {"low": 0.0, "high": 1.5, "start": 0.5}
        common = {
            "dtype": "float32",
            "tasks": ["qs_sort", {"name": "qs_reverse", "metric": "exact_match", "weight": 0.5}],
            "search": {"sampler": "random", "n_iterations": 2, "seed": 1},
            "scoring": {"task_paths": [str(ROOT / "tasks")], "limit": 4, "holdout": 4, "engine": {}},
        }

        def model(name: str, **parameters: Any) -> dict[str, Any]:
            return {"model": f"models/{name}", "parameters": parameters}

        plain = {"merge_method": "linear", "models": [model("base", weight=0.5), model("x", weight=1)]}
        pieces = [{"filter": "mlp", "value": {**weight, "points": 2}}, {"value": weight}]
        return [
            {
                "merge_method": "task_arithmetic",
                "base_model": "models/base",
                "models": [model("x", weight=weight), model("y", weight=weight)],
                **common,
            },
            {
                "merge_method": {"choices": ["ties", "dare_ties", "linear"]},
                "base_model": "models/base",
                "models": [
                    model("x", weight=pieces, density={"low": 0.1, "high": 1.0, "log": True}),
                    {
                        "model": {"choices": ["models/y", None]},
                        "parameters": {"weight": 0.5, "density": 0.5},
                    },
                ],
                "parameters": {"normalize": {"choices": [True, False]}},
                **common,
                "search": {
                    "objective": "pareto",
                    "n_iterations": 2,
                    "signal": "both",
                    "constraints": [{"task": "qs_sort", "not_below": "base", "by": 0.1}],
                    "seed_recipes": ["start.yml"],
                },
            },
            {
                "slices": [
                    {
                        "sources": [
                            {"model": "models/x", "layer_range": [0, {"low": 1, "high": 2, "step": 1}]}
                        ],
                    },
                    {"sources": [{"model": "models/y", "layer_range": [1, 2]}]},
                ],
                "merge_method": "passthrough",
                **common,
                "report_only": ["qs_largest"],
            },
            {
                **plain,
                "models": [model("base", weight=weight), model("x", weight=[weight, 1.0])],
                **common,
                "tasks": [
                    "qs_sort",
                    {"name": "output_tokens", "weight": 0.1},
                    {"name": "perplexity", "text": "text.txt"},
                    {
                        "name": "kl_divergence",
                        "text": "text.txt",
                        "reference": "models/base",
                        "positions": 2,
                    },
                ],
            },
            {
                "genome": {
                    "models": ["models/x", "models/y"],
                    "merge_method": "ties",
                    "base_model": "models/base",
                    "layer_granularity": 1,
                    "normalize": False,
                    "filters": ["self_attn", "mlp"],
                },
                "tasks": [{"name": "qs_sort", "metric": "exact_match,none", "weight": 1.0}],
                "limit": 4,
                "apply_chat_template": False,
                "scoring": {"task_paths": [str(ROOT / "tasks")]},
                "search": {"n_iterations": 2},
            },
        ]

    @cached_property
    def recipes(self) -> list[dict[str, Any]]:
        """Plain recipes, one for each part of the language."""
        x = {"model": "models/x", "parameters": {"weight": [0.2, 0.8], "density": 0.5}}
        y = {"model": "models/y", "parameters": {"weight": 0.3, "density": 1.0}}
        sources = [{"model": f"models/{name}", "layer_range": [0, 2]} for name in ("x", "y")]
        return [
            {"merge_method": "linear", "models": [x, y], "dtype": "float32", "random_seed": 3},
            {"merge_method": "ties", "base_model": "models/base", "models": [x, y]},
            {
                "merge_method": "dare_linear",
                "base_model": "models/base",
                "models": [{**x, "parameters": {"weight": 1.0, "density": 0.3}}, y],
                "parameters": {"normalize": True, "rescale": True},
                "tokenizer_source": "base",
                "out_dtype": "bfloat16",
            },
            {
                "merge_method": "slerp",
                "base_model": "models/x",
                "slices": [{"sources": sources}],
                "parameters": {"t": [{"filter": "self_attn", "value": [0, 1]}, {"value": 0.5}]},
            },
            {
                "merge_method": "passthrough",
                "slices": [
                    {"sources": [{**sources[0], "layer_range": [0, 1]}]},
                    {"sources": [{**sources[1], "parameters": {"scale": 0.5}}]},
                ],
            },
            {
                "modules": {
                    "default": {
                        "models": [{"model": {"model": {"path": "models/x"}}}, {"model": "models/y"}]
                    }
                },
                "merge_method": "karcher",
                "parameters": {"max_iter": 3, "tol": 1e-5},
            },
        ]

    @cached_property
    def studies(self) -> list[Path]:
        """Folders of finished searches: one value a trial, and a front."""
        made = []
        for i, search in enumerate(self.searches[:2]):
            file, folder = self.root / f"study{i}.yml", self.root / f"study{i}"
            search = {**search, "search": {**search["search"], "n_iterations": 3}}
            file.write_text(yaml.safe_dump(search, sort_keys=False))
            done = self.run(["run", str(file), "--storage-path", str(folder)], folder)
            assert done.status == 0, done.err + done.raised
            made.append(folder)
        return made

    # ---- commands -----------------------------------------------------------------------------

    def run(self, command: list[str], *allowed: Path) -> Watched:
        """Run a command in this folder, with temporary files in its tmp."""
        before, was = Path.cwd(), tempfile.tempdir
        os.chdir(self.root)
        tempfile.tempdir = str(self.root / "tmp")
        try:
            return watch(command, (*allowed, self.root / "tmp"))
        finally:
            tempfile.tempdir = was
            os.chdir(before)

    def listing(self) -> dict[str, tuple[int, int]]:
        """Everything outside the case, by path: size and time of change."""
        found = {}
        for folder, _, files in os.walk(self.root):
            if Path(folder).is_relative_to(self.case):
                continue
            for file in files:
                path = os.path.join(folder, file)
                stat = os.lstat(path)
                found[path] = stat.st_size, stat.st_mtime_ns
        return found

    def try_one(self, kind: str, seed: int) -> Found | None:
        """Make an input of a kind from a seed, run a command on it; return what it did wrong."""
        rng = random.Random(f"{kind} {seed}")
        if kind == "storage":
            assert self.studies  # made outside the watch
        before = self.listing()
        shutil.rmtree(self.case, ignore_errors=True)
        self.case.mkdir()
        command: list[str] = getattr(self, f"_{kind}")(rng)
        watched = self.last = self.run(command, self.out)
        faults = faults_of(watched)
        after = self.listing()
        changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
        faults += [f"changed {path}" for path in sorted(changed)]
        if watched.status == 2 and kind != "storage" and self.out.exists():
            faults.append("refused, and wrote")
        return Found(kind, seed, faults, command, watched) if faults else None

    def _written(self, rng: random.Random, name: str, seeds: list[dict[str, Any]]) -> str:
        """Write a mutated YAML file into the case."""
        tree = rng.choice(seeds)
        path = self.case / name
        if rng.random() < 0.7:
            tree = mutated_tree(rng, tree)
        text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=rng.random() < 0.5)
        if rng.random() < 0.3:
            text = mutated_text(rng, text)
        data = text.encode("utf-8", "surrogatepass")
        path.write_bytes(mutated_bytes(rng, data) if rng.random() < 0.1 else data)
        return str(path)

    def _search(self, rng: random.Random) -> list[str]:
        file = self._written(rng, "search.yml", self.searches)
        command = ["run", file, "--storage-path", str(self.out)]
        if rng.random() < REAL_SHARE:
            return [*command, "--n-iterations", "2", "--limit", "3"]
        # A budget that does not parse as one ends the command where all of the file was checked.
        return [*command, "--seed-recipe", str(self.case / "none.yml"), "--limit", "3"]

    def _recipe(self, rng: random.Random) -> list[str]:
        file = self._written(rng, "recipe.yml", self.recipes)
        if rng.random() < REAL_SHARE:
            return ["eval", file, "--task", "qs_sort", *self._few(rng)]
        return ["merge", file, str(self.out), *rng.choice([[], [], ["--check"], ["--strict"]])]

    def _few(self, rng: random.Random) -> list[str]:
        return ["--limit", "2", "--task-path", str(ROOT / "tasks"), *rng.choice([[], ["--json"]])]

    def _model(self, rng: random.Random) -> list[str]:
        folder = self.case / "model"
        shutil.copytree(self.root / "models" / rng.choice(["x", "sharded", "bins"]), folder)
        for _ in range(rng.choice([1, 1, 2])):
            self._damage_model(rng, folder)
        entry = {"model": str(folder), "parameters": {"weight": 0.5, "t": 0.5}}
        base = {"model": "models/base", "parameters": {"weight": 0.5}}
        recipe = rng.choice(
            [
                {"merge_method": "linear", "models": [entry, base]},
                {"merge_method": "linear", "models": [base, entry]},
                {
                    "merge_method": "slerp",
                    "base_model": str(folder),
                    "models": [base],
                    "parameters": {"t": 0.5},
                },
                {"merge_method": "ties", "base_model": "models/base", "models": [entry]},
                {"merge_method": "passthrough", "models": [{"model": str(folder)}]},
            ]
        )
        file = self.case / "recipe.yml"
        file.write_text(yaml.safe_dump(recipe))
        if rng.random() < 2 * REAL_SHARE:
            what = rng.choice([str(folder), str(file)])
            return ["eval", what, "--task", "qs_sort", *self._few(rng)]
        return ["merge", str(file), str(self.out)]

    def _damage_model(self, rng: random.Random, folder: Path) -> None:
        files = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.is_symlink()]
        if not files:
            return
        path = rng.choice(files)
        change = rng.randrange(12)
        if change == 0:
            path.unlink()
        elif change == 1:
            other = rng.choice(["adapter_config.json", "README.md", "model.safetensors", "x.py"])
            (folder / other).write_bytes(
                rng.choice([path.read_bytes(), b"{}", b"", b"---\na: *a\n---\n"])
            )
        elif change == 2:
            leads = rng.choice(["/etc/passwd", "/nowhere", str(path), "..", str(self.root / "text.txt")])
            path.unlink()
            path.symlink_to(leads)
        elif path.suffix == ".safetensors":
            _damage_safetensors(rng, path)
        elif path.suffix == ".json" and change < 11:
            path.write_bytes(_other_json(rng, path.read_bytes()))
        else:
            path.write_bytes(mutated_bytes(rng, path.read_bytes()))

    def _storage(self, rng: random.Random) -> list[str]:
        i = rng.randrange(len(self.studies))
        shutil.copytree(self.studies[i], self.out)
        for _ in range(rng.choice([1, 1, 1, 2])):
            self._damage_storage(rng)
        resume = ["run", f"study{i}.yml", "--storage-path", str(self.out)]
        commands = [
            ["status", str(self.out)],
            ["status", str(self.out), "--json"],
            ["export", str(self.out)],
            ["export", str(self.out), "--pareto"],
            ["export", str(self.out), "--trial", "1"],
            resume,
        ]
        if rng.random() < REAL_SHARE:
            commands = [
                [*resume, "--n-iterations", "5"],
                ["eval", "models/x", "--like", str(self.out)],
            ]
        return rng.choice(commands)

    def _damage_storage(self, rng: random.Random) -> None:
        folder = self.out
        path = rng.choice([path for path in sorted(folder.rglob("*")) if path.is_file()] or [folder])
        change = rng.randrange(10)
        if change < 5 and (folder / "study.db").is_file():
            _damage_database(rng, folder / "study.db")
        elif not path.is_file():
            return
        elif change == 5:
            path.unlink()
        elif change == 6:
            path.unlink()
            rng.choice([path.mkdir, path.touch, lambda: path.symlink_to("/nowhere/at/all")])()
        elif path.suffix == ".json":
            path.write_bytes(_other_json(rng, path.read_bytes()))
        elif path.suffix == ".yml" and change < 9:
            path.write_bytes(_other_yaml(rng, path.read_bytes()))
        else:
            reach = rng.choice([200, 1 << 62])
            path.write_bytes(mutated_bytes(rng, path.read_bytes(), reach))


def _other_json(rng: random.Random, data: bytes) -> bytes:
    try:
        return json.dumps(mutated_tree(rng, json.loads(data)), default=str).encode()
    except ValueError:  # an earlier change broke it
        return mutated_bytes(rng, data)


def _other_yaml(rng: random.Random, data: bytes) -> bytes:
    try:
        tree = mutated_tree(rng, yaml.safe_load(data))
        return yaml.safe_dump(tree, sort_keys=False).encode("utf-8", "surrogatepass")
    except (yaml.YAMLError, UnicodeDecodeError, ValueError):
        return mutated_bytes(rng, data)


def _damage_safetensors(rng: random.Random, path: Path) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    change = rng.randrange(10)
    if change < 6:  # a header that parses and says something else
        try:
            header = mutated_tree(rng, json.loads(data[8 : 8 + length]))
        except (ValueError, RecursionError):  # an earlier change broke it
            return
        text = json.dumps(header, default=str).encode()
        data = len(text).to_bytes(8, "little") + text + data[8 + length :]
    elif change == 6:
        claimed = rng.choice([0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1, len(data)])
        data = claimed.to_bytes(8, "little") + data[8:]
    elif change == 7:
        text = b"[" * 100_000
        data = len(text).to_bytes(8, "little") + text + data[8 + length :]
    else:
        data = mutated_bytes(rng, data, rng.choice([8, 8 + length, len(data)]))
    path.write_bytes(data)


def _damage_database(rng: random.Random, path: Path) -> None:
    """Change a value, remove rows, or drop a table: what a hand with an SQL client can do."""
    database = sqlite3.connect(path)
    try:
        tables = [
            name for (name,) in database.execute("select name from sqlite_master where type = 'table'")
        ]
        table = rng.choice(tables)
        if rng.random() < 0.05:
            database.execute(f"drop table {table}")
            return
        rows = list(database.execute(f"select rowid, * from {table}"))
        columns = [name for _, name, *_ in database.execute(f"pragma table_info({table})")]
        if not rows:
            return
        row = rng.choice(rows)
        if rng.random() < 0.15:
            database.execute(f"delete from {table} where rowid = ?", row[:1])
            return
        i = rng.randrange(len(columns))
        value = _other_value(rng, row[i + 1])
        database.execute(f"update {table} set {columns[i]} = ? where rowid = ?", (value, row[0]))
    except (sqlite3.Error, OverflowError):
        return  # a constraint of the table forbids it, or an earlier change
    finally:
        database.commit()
        database.close()


def _other_value(rng: random.Random, value: Any) -> Any:
    """Mutate JSON as a tree, JSON within JSON too; else take another scalar."""
    if isinstance(value, str) and rng.random() < 0.9:
        try:
            tree = json.loads(value)
        except ValueError:
            return mutated_text(rng, value)
        if isinstance(tree, str) and tree[:1] in ("{", "["):
            return json.dumps(_other_value(rng, tree))
        return json.dumps(mutated_tree(rng, tree), default=str)
    return rng.choice([v for v in VALUES if isinstance(v, int | float | str | bytes | None)])


sys.addaudithook(_audit)
