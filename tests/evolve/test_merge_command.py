"""`evolve merge` and `evolve methods` as commands: flags, files, refusals, uploads."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from evolve import merge_progress
from evolve.cli import main
from evolve.cli.merge import _NOTHING_TO_DO
from evolve.cli.pause import goes_on_later
from evolve.errors import PausedError
from merge_core.errors import OutputError
from merge_core.merge import save_merged
from merge_core.methods import METHODS
from merge_core.recipe import Recipe

from ..stand_in_hub import served

ROOT = Path(__file__).resolve().parents[2]

TEXT = """# made by hand
merge_method: dare_ties
base_model: {base}
models:
  - model: {x}
    parameters: {{weight: 0.8, density: 0.5}}
  - {{model: {y}, parameters: {{weight: 0.5, density: 0.5}}}}
dtype: float32
"""

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def evolve(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """Run a command in this process, which has the heavy imports already: status, stdout, stderr."""
    n_threads = torch.get_num_threads()

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["evolve", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capfd.readouterr()
        return int(left.value.code or 0), out, err

    yield call
    torch.set_num_threads(n_threads)


@pytest.fixture
def recipe(tmp_path: Path, llamas: Any) -> Path:
    path = tmp_path / "recipe.yml"
    path.write_text(TEXT.format(base=llamas.base, x=llamas.x, y=llamas.y))
    (tmp_path / "out").mkdir()
    return path


def started(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own, which knows no Hub but the one given."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    return subprocess.run(
        [sys.executable, "-m", "evolve.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**kept, "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1", **environment},
    )


# ---- files -----------------------------------------------------------------------------------------


def test_the_folder_has_weights_recipe_and_card(evolve: Command, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert evolve("merge", recipe, out) == (
        0,
        f"wrote {out}\n",
        f"warning: {Recipe.load(recipe).base_model} has no tokenizer files; the merged model will "
        f"have none\n",
    )
    assert (out / "mergekit_config.yml").read_text() == recipe.read_text()
    assert "# made by hand" in (out / "README.md").read_text()
    assert {path.name for path in out.iterdir()} >= {"model.safetensors", "config.json"}


def test_the_card_can_be_left_out(evolve: Command, recipe: Path, tmp_path: Path) -> None:
    assert evolve("merge", recipe, tmp_path / "out", "--no-write-model-card")[0] == 0
    assert not (tmp_path / "out/README.md").exists()


def test_a_seed_of_the_command_line_is_kept_with_the_model(
    evolve: Command, recipe: Path, tmp_path: Path
) -> None:
    weights = []
    for seed in ("0", "7"):
        assert evolve("merge", recipe, tmp_path / seed, "--random-seed", seed)[0] == 0
        weights.append((tmp_path / seed / "model.safetensors").read_bytes())
        kept = yaml.safe_load((tmp_path / seed / "mergekit_config.yml").read_text())
        assert kept.get("random_seed", 0) == int(seed)
    assert weights[0] != weights[1]


# ---- flags -----------------------------------------------------------------------------------------

IDLE = {
    "--trust-remote-code": (),
    "--lora-merge-cache": ("cache",),
    "--lora-merge-dtype": ("float32",),
    "--low-cpu-memory": (),
    "--read-to-gpu": (),
    "--multi-gpu": (),
    "--lazy-unpickle": (),
    "--async-write": (),
    "--write-threads": ("2",),
    "--clone-tensors": (),
    "--no-safe-serialization": (),
}
NEGATED = [
    "allow-crimes",
    "trust-remote-code",
    "unsafe-truncate-embeddings",
    "quiet",
    "cuda",
    "low-cpu-memory",
    "read-to-gpu",
    "multi-gpu",
    "lazy-unpickle",
    "async-write",
    "copy-tokenizer",
    "clone-tensors",
]


def test_a_flag_without_effect_says_so_in_one_line(evolve: Command, recipe: Path, tmp_path: Path) -> None:
    assert set(IDLE) == set(_NOTHING_TO_DO)
    evolve("merge", recipe, tmp_path / "plain")
    flags = [word for flag, values in IDLE.items() for word in (flag, *values)]
    status, _, err = evolve("merge", recipe, tmp_path / "flags", *flags)
    assert status == 0
    for flag in IDLE:
        assert err.count(f"notice: {flag} has nothing to do: ") == 1
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "flags"))
    assert a == b


def test_the_flags_negations_are_silent(evolve: Command, recipe: Path, tmp_path: Path) -> None:
    flags = [f"--no-{flag}" for flag in NEGATED]
    status, _, err = evolve("merge", recipe, tmp_path / "out", *flags, "--safe-serialization")
    assert (status, err) == (0, "")


def test_quiet_leaves_only_warnings(evolve: Command, recipe: Path, tmp_path: Path) -> None:
    status, _, err = evolve("merge", recipe, tmp_path / "out", "-q", "--async-write")
    assert status == 0
    assert [line.split(":")[0] for line in err.splitlines()] == ["warning"]


def test_verbose_names_models_and_twice_every_tensor(
    evolve: Command, recipe: Path, tmp_path: Path, llamas: Any
) -> None:
    _, _, err = evolve("merge", recipe, tmp_path / "out", "-v")
    assert f"{llamas.x}: {llamas.x}, 39 tensors, 4 layers" in err
    assert "dare_ties in float32 on cpu" in err
    assert "lm_head.weight: " not in err
    _, _, err = evolve("merge", recipe, tmp_path / "out", "-vv", "--overwrite")
    assert err.count(": dare_ties\n") == 39


@pytest.mark.parametrize("place", ["models", "recipes"])
def test_what_is_merged_is_not_overwritten(
    evolve: Command, tmp_path: Path, llamas: Any, place: str
) -> None:
    for name in ("x", "y"):
        shutil.copytree(getattr(llamas, name), tmp_path / "models" / name)
    (tmp_path / "recipes").mkdir()
    recipe = tmp_path / "recipes/r.yml"
    recipe.write_text(TEXT.format(base=llamas.base, x=tmp_path / "models/x", y=tmp_path / "models/y"))
    before = sorted(tmp_path.rglob("*"))
    status, _, err = evolve("merge", recipe, tmp_path / place, "--overwrite")
    assert status == 2
    assert "--overwrite would delete" in err
    assert sorted(tmp_path.rglob("*")) == before
    if place == "models":
        with pytest.raises(OutputError, match="--overwrite would delete"):
            save_merged(Recipe.load(recipe), tmp_path / "models", overwrite=True)
        status, _, err = evolve("merge", recipe, tmp_path / "models/x", "--overwrite")
        assert status == 0
        assert "models/x is one of the models; it is replaced" in err


def test_a_merge_that_is_stopped_claims_no_record(
    evolve: Command, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*arguments: Any, **options: Any) -> None:
        raise PausedError

    goes_on_later()  # as a command before this one may have said of itself
    monkeypatch.setattr("merge_core.merge.save_merged", stopped)
    status, _, err = evolve("merge", recipe, tmp_path / "out")
    assert status == 130
    assert err.splitlines()[-1].startswith("stopped; nothing is left half-written")


def test_a_filter_that_matches_nothing_is_a_warning(evolve: Command, tmp_path: Path, llamas: Any) -> None:
    """Or one that comes too late: the first entry that matches a tensor has it."""
    setting = (
        "[{filter: mpl, value: 0.4}, {filter: mlp, value: 0.2}, {filter: up_, value: 1}, {value: 0.5}]"
    )
    recipe = tmp_path / "r.yml"
    recipe.write_text(
        f"merge_method: linear\nmodels:\n  - {{model: {llamas.x}, parameters: {{weight: {setting}}}}}\n"
    )
    status, _, err = evolve("merge", recipe, tmp_path / "out")
    assert status == 0
    assert "warning: filter 'mpl' of weight matches no tensor" in err
    assert "warning: filter 'up_' of weight is never reached" in err
    assert "filter 'mlp'" not in err


def test_threads_and_device(evolve: Command, recipe: Path, tmp_path: Path) -> None:
    status, _, err = evolve("merge", recipe, tmp_path / "out", "-j", "2", "-v", "--device", "auto")
    assert status == 0
    assert "2 threads" in err
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--device", "banana"], "--device is 'banana'"),
        (["--out-shard-size", "many"], "--out-shard-size is 'many'"),
        (["--out-shard-size", "-5"], "--out-shard-size is '-5'; it must be a number of bytes"),
        (["--out-shard-size", "-0.1K"], "--out-shard-size is '-0.1K'; it must be a number of bytes"),
        (["--private"], "--push-to-hub"),
        (["-j", "0"], "--num-threads"),
        (["--no-such-flag"], "--no-such-flag"),
    ],
)
def test_a_wrong_flag_is_one_error_and_writes_nothing(
    evolve: Command, recipe: Path, tmp_path: Path, flags: list[str], expected: str
) -> None:
    status, out, err = evolve("merge", recipe, tmp_path / "out", *flags)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert expected in err
    assert len(err.splitlines()) == 1
    assert list((tmp_path / "out").iterdir()) == []


# ---- --check and progress --------------------------------------------------------------------------


def test_check_foretells_and_writes_nothing(evolve: Command, recipe: Path, tmp_path: Path) -> None:
    status, out, _ = evolve("merge", recipe, tmp_path / "out", "--check")
    assert status == 0
    lines = dict(line.split(":", 1) for line in out.splitlines() if ":" in line)
    assert lines["architecture"].split() == ["LlamaForCausalLM,", "4", "layers,", "39", "tensors"]
    assert list(lines) == ["architecture", "models", "read", "disk", "memory", "time"]
    assert out.endswith("the merge can begin\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "recipe.yml"]
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("flags", [["--check"], []], ids=["check", "merge"])
def test_a_full_disk_is_said_before_work_begins(
    evolve: Command, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=1000))
    status, _, err = evolve("merge", recipe, tmp_path / "out", "-q", *flags)
    assert status == 2
    assert f"error: OUT is {tmp_path / 'out'}, whose disk has 1 kB free; the merge writes 385 kB" in err
    assert list((tmp_path / "out").iterdir()) == []


def test_a_long_merge_says_now_and_then_how_far_it_is(
    evolve: Command, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge_progress, "LINE_EVERY_S", 0.0)
    _, _, err = evolve("merge", recipe, tmp_path / "out")
    lines = [line for line in err.splitlines() if " left" in line]
    assert lines[0].startswith("1/39 tensors, ")
    assert len(lines) == 38
    _, _, err = evolve("merge", recipe, tmp_path / "out", "--overwrite", "--quiet")
    assert " left" not in err


def test_a_terminal_gets_a_bar(recipe: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    seen: list[bytes] = []

    def read() -> None:
        try:
            while data := os.read(ours, 1 << 16):
                seen.append(data)
        except OSError:  # the terminal's other end is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    command = [sys.executable, "-m", "evolve.cli", "merge", str(recipe), str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100"}
    done = subprocess.run(command, stderr=theirs, stdout=subprocess.PIPE, timeout=120, env=environment)
    os.close(theirs)
    reader.join(10)
    assert done.returncode == 0
    assert b"/39 tensors" in b"".join(seen)


def test_a_merge_imports_no_more_than_it_needs(recipe: Path, tmp_path: Path) -> None:
    heavy = ("transformers", "huggingface_hub", "optuna", "ray", "lm_eval", "scipy", "pyarrow", "rich")
    code = (
        "import sys; from evolve.cli import main\n"
        f"sys.argv = ['evolve', 'merge', {str(recipe)!r}, {str(tmp_path / 'out')!r}]\n"
        "try: main()\n"
        "except SystemExit as left: assert not left.code\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True, timeout=120
    )
    assert done.stdout.splitlines()[-1] == "[]"


# ---- evolve methods --------------------------------------------------------------------------------


def test_the_table_of_methods_fits_and_names_all(evolve: Command) -> None:
    status, out, err = evolve("methods")
    assert (status, err) == (0, "")
    assert all(name in out for name in METHODS)
    assert max(map(len, out.splitlines())) <= 100
    paper = METHODS["ties"].source.removeprefix("https://")
    assert paper in out


def test_one_method_as_json(evolve: Command) -> None:
    status, out, _ = evolve("methods", "ties", "--json")
    assert status == 0
    (method,) = json.loads(out)
    assert method["base"] == "required"
    assert method["n_models"] == [1, None]
    density = {parameter["name"]: parameter for parameter in method["parameters"]}["density"]
    assert density["range"] == [0.0, 1.0]
    assert density["per_model"] is True


def test_an_unknown_method_is_told_the_nearest(evolve: Command) -> None:
    status, _, err = evolve("methods", "tie")
    assert status == 2
    assert "did you mean 'ties'?" in err


# ---- the Hub ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, llamas: Any) -> Iterator[tuple[str, Path]]:
    """The stand-in Hub's address and the folder of its models: org/base, org/x, someone/locked."""
    root = tmp_path_factory.mktemp("hub")
    models = root / "models"
    for name, license_ in (("base", "apache-2.0"), ("x", "mit")):
        shutil.copytree(getattr(llamas, name), models / "org" / name)
        (models / "org" / name / "README.md").write_text(f"---\nlicense: {license_}\n---\n# {name}\n")
    (models / "someone/locked").mkdir(parents=True)
    (models / "someone/locked/.private").touch()
    with served(root) as address:
        yield address, models


def settings(address: str, home: Path, token: str | None = "secret") -> dict[str, str]:
    return {
        "HF_ENDPOINT": address,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **({"HF_TOKEN": token} if token else {}),
    }


def test_models_of_the_hub_are_merged_and_the_merge_is_uploaded(
    hub: tuple[str, Path], tmp_path: Path
) -> None:
    recipe, out, cache = tmp_path / "recipe.yml", tmp_path / "out", tmp_path / "cache"
    recipe.write_text(
        "merge_method: task_arithmetic\nbase_model: org/base\n"
        "models: [{model: org/x@main, parameters: {weight: 0.5}}]\n"
    )
    flags = ["--push-to-hub", "someone/merged", "--private", "--transformers-cache", cache]
    done = started("merge", recipe, out, *flags, **settings(hub[0], tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"wrote {out}", f"pushed to {hub[0]}/someone/merged"]
    card = ModelCard((out / "README.md").read_text())
    assert card.data.base_model == ["org/base", "org/x"]
    assert card.data.license == "other"
    assert "apache-2.0" in card.text
    assert "mit" in card.text
    assert {path.name for path in cache.iterdir()} >= {"models--org--base", "models--org--x"}
    uploaded = hub[1] / "someone/merged"
    for path in out.iterdir():
        assert (uploaded / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_failed_upload_keeps_the_folder(hub: tuple[str, Path], recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    environment = settings(hub[0], tmp_path / "home", token="wrong")
    done = started("merge", recipe, out, "-q", "--push-to-hub", "locked", **environment)
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: --push-to-hub is 'someone/locked', and the upload failed (")
    assert f"the merged model is in {out}" in error
    assert (out / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("repo", "token", "expected"),
    [
        ("someone/new", None, "there is no login"),
        ("org/new", "secret", "use someone/new"),
        ("a b/c", "secret", "not a Hub id"),
    ],
    ids=["no token", "another's name", "no id"],
)
def test_an_upload_that_cannot_work_is_refused_before_the_merge(
    hub: tuple[str, Path], recipe: Path, tmp_path: Path, repo: str, token: str | None, expected: str
) -> None:
    environment = settings(hub[0], tmp_path / "home", token)
    done = started("merge", recipe, tmp_path / "out", "--push-to-hub", repo, **environment)
    assert done.returncode == 2
    (error,) = done.stderr.splitlines()
    assert error.startswith(f"error: --push-to-hub is {repo!r}")
    assert expected in error
    assert list((tmp_path / "out").iterdir()) == []


def test_a_hub_that_does_not_answer_is_said_before_the_merge(recipe: Path, tmp_path: Path) -> None:
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as free:
        address = f"http://127.0.0.1:{free.server_port}"
    environment = settings(address, tmp_path / "home")
    done = started("merge", recipe, tmp_path / "out", "--push-to-hub", "someone/new", **environment)
    assert done.returncode == 1
    (error,) = done.stderr.splitlines()
    assert "the Hub could not be asked" in error
    assert list((tmp_path / "out").iterdir()) == []


class LoginOnly(BaseHTTPRequestHandler):
    """Knows who asks, and refuses to make a repository."""

    role = "write"
    asked: ClassVar[list[dict[str, Any]]] = []

    def do_GET(self) -> None:
        if self.path == "/api/whoami-v2":
            self._answer(200, {"name": "someone", "auth": {"accessToken": {"role": self.role}}})
        else:
            self._answer(404, {"error": "no such repository"})

    def do_POST(self) -> None:
        self.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self._answer(403, {"error": "you may not make repositories"})

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.mark.parametrize(("role", "status"), [("write", 1), ("read", 2)])
def test_a_login_without_permission(recipe: Path, tmp_path: Path, role: str, status: int) -> None:
    asked: list[dict[str, Any]] = []
    handler = type("Handler", (LoginOnly,), {"role": role, "asked": asked})
    flags = ["-q", "--push-to-hub", "new", "--private"]
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = settings(f"http://127.0.0.1:{server.server_port}", tmp_path / "home")
        done = started("merge", recipe, tmp_path / "out", *flags, **environment)
        server.shutdown()
    assert done.returncode == status, done.stderr
    error = done.stderr.splitlines()[-1]
    if role == "read":
        assert "the login may only read" in error
        assert list((tmp_path / "out").iterdir()) == []
    else:
        assert "you may not make repositories" in error or "403" in error
        (ask,) = asked
        assert ask["name"] == "new"
        assert ask.get("visibility") == "private" or ask.get("private") is True
        assert (tmp_path / "out/model.safetensors").is_file()
