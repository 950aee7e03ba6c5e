"""Models of the Hub under conditions that are not fair: gated, cut off, killed; and a merge that is
pushed with its scores, pulled back and scored again.

The Hub is the stand-in's own code, in a thread of this process; the clients are real ones.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from ..stand_in_hub import SERVER, need

ROOT = Path(__file__).resolve().parents[2]

LOCATE = """
import sys
from merge_core.checkpoint.read import Checkpoint
from merge_core.errors import MergeError
for reference in sys.argv[1:]:
    try:
        checkpoint = Checkpoint(reference)
        sums = [float(checkpoint.read(name).double().sum()) for name in checkpoint.tensors]
        print(checkpoint.folder, sum(sums))
    except MergeError as error:
        print(error)
"""


@dataclass
class Hub:
    """A stand-in, and what it was asked.

    Attributes:
        models: folder of its models, ORG/NAME.
        settings: the stand-in's options.
        asked: (status, path) of every answer.
        ranges: (path, Range header) of every request that wants the rest of a file.
        slow: end of the name of files that take their time.
        pause_s: how long each part of these makes the client wait.
        breaks_after: bytes of a file after which a connection breaks, once; None = none does.
    """

    address: str
    models: Path
    settings: Namespace
    asked: list[tuple[int, str]] = field(default_factory=list)
    ranges: list[tuple[str, str]] = field(default_factory=list)
    slow: str = ".safetensors"
    pause_s: float = 0.0
    breaks_after: int | None = None

    def environment(self, home: Path, token: str | None, offline: bool = False) -> dict[str, str]:
        foreign = ("HF_", "HUGGING", "TRANSFORMERS_")
        return {
            **{k: v for k, v in os.environ.items() if not k.startswith(foreign)},
            "HF_ENDPOINT": self.address,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": str(int(offline)),
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": str(ROOT),
            **({"HF_TOKEN": token} if token else {}),
        }

    def run(self, home: Path, *arguments: object, token: str | None = None, offline: bool = False) -> str:
        """Run Python to a good end; return what it prints."""
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            env=self.environment(home, token, offline),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def sent(self, name: str) -> int:
        """Count how often a file's beginning or rest was sent or begun to be sent."""
        return sum(status in (200, 206) and path.endswith(name) for status, path in self.asked)


@pytest.fixture
def hub(tmp_path: Path, llamas: Any) -> Iterator[Hub]:
    """Models org/open, org/gated and org/big, which has two shards of 3 MB."""
    need()
    models = tmp_path / "hub/models"
    for name in ("open", "gated", "big"):
        shutil.copytree(llamas.x, models / "org" / name)
    (models / "org/gated/.private.gated").touch()
    big = models / "org/big"
    (big / "model.safetensors").unlink()
    shards = {f"model-0000{i}-of-00002.safetensors": f"model.layers.{i - 1}.w" for i in (1, 2)}
    for file, name in shards.items():
        save_file({name: torch.full((3 << 18,), 0.5)}, big / file)
    index = {"weight_map": {name: file for file, name in shards.items()}}
    (big / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((big / "config.json").read_text())
    (big / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))

    spec = importlib.util.spec_from_file_location("stand_in_hub", SERVER)
    assert spec
    assert spec.loader
    stand_in: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stand_in)
    stand_in.ARGS = Namespace(root=str(tmp_path / "hub"), token="secret", fault="none", verbose=False)

    class Handler(stand_in.Hub):
        def send_file(self, repo: Path, path: Path) -> None:
            is_let_in = self.headers.get("Authorization") == "Bearer secret"
            if (repo / ".private.gated").exists() and not is_let_in:
                said = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model is restricted."}
                return self.answer(403, {"error": "gated"}, said)
            if self.command == "GET" and "Range" in self.headers:
                found.ranges.append((path.name, self.headers["Range"]))
            whole = self.wfile
            self.wfile = _Slow(whole, found, found.pause_s if path.name.endswith(found.slow) else 0.0)
            try:
                return super().send_file(repo, path)
            finally:
                self.wfile = whole

        def log_request(self, code: Any = "-", size: Any = "-") -> None:
            if self.command == "GET":
                found.asked.append((int(code), self.path))

        def finish(self) -> None:
            with contextlib.suppress(OSError):  # of clients that were killed
                super().finish()

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            """Say nothing: clients are cut off and killed here on purpose."""

    server = Server(("127.0.0.1", 0), Handler)
    found = Hub(f"http://127.0.0.1:{server.server_port}", models, stand_in.ARGS)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield found
    finally:
        server.shutdown()


class _Slow:
    """A connection that waits before each mebibyte, and may break."""

    def __init__(self, file: Any, hub: Hub, pause_s: float) -> None:
        self._file, self._hub, self._pause_s = file, hub, pause_s
        self._n_sent = 0

    def write(self, data: bytes) -> int:
        if len(data) >= 1 << 20:
            time.sleep(self._pause_s)
        n: int = self._file.write(data)
        self._n_sent += n
        if self._hub.breaks_after is not None and self._n_sent > self._hub.breaks_after:
            self._hub.breaks_after = None
            raise ConnectionAbortedError
        return n

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def test_a_gated_model_is_told_from_one_that_is_let_in_and_a_cut_download_goes_on(
    hub: Hub, tmp_path: Path
) -> None:
    hub.settings.fault = "cut"
    gated, big = hub.run(tmp_path / "home", "-c", LOCATE, "org/gated", "org/big").splitlines()
    for said in ("'org/gated'", "it is gated; accept its terms", "hf auth login"):
        assert said in gated
    assert float(big.split()[1]) == 2 * (3 << 18) * 0.5
    assert hub.sent("00001-of-00002.safetensors") == 2


@pytest.mark.slow
def test_of_a_large_file_whose_connection_breaks_the_rest_alone_is_asked_for(
    hub: Hub, tmp_path: Path
) -> None:
    """The client keeps what came in pieces of 10 MiB."""
    large = hub.models / "org/open/model.safetensors"
    save_file({"w": torch.arange(6 << 20, dtype=torch.float32)}, large)
    hub.breaks_after = 15 << 20
    (found,) = hub.run(tmp_path / "home", "-c", LOCATE, "org/open").splitlines()
    assert float(found.split()[1]) == sum(range(6 << 20))
    assert hub.ranges == [("model.safetensors", f"bytes={10 << 20}-")]


@pytest.mark.slow
def test_a_killed_download_keeps_whole_files_and_later_needs_no_hub(hub: Hub, tmp_path: Path) -> None:
    """Of the file that was under way huggingface_hub keeps a part for connections that break only."""
    home, hub.slow, hub.pause_s = tmp_path / "home", "00002-of-00002.safetensors", 5.0
    line = [sys.executable, "-c", LOCATE, "org/big"]
    process = subprocess.Popen(
        line, env=hub.environment(home, None), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    whole = ("model-00001-of-00002.safetensors", "config.json")
    deadline = time.monotonic() + 60
    while not (hub.sent(hub.slow) and all(list(home.glob(f"hub/*/snapshots/*/{n}")) for n in whole)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not list(home.glob(f"hub/*/snapshots/*/*{hub.slow}"))
    hub.pause_s = 0.0
    n_configs = hub.sent("/config.json")
    expected = 2 * (3 << 18) * 0.5
    assert float(hub.run(home, "-c", LOCATE, "org/big").split()[1]) == expected
    assert hub.sent("/config.json") == n_configs == 1
    assert hub.sent("00001-of-00002.safetensors") == 1
    assert hub.sent("00002-of-00002.safetensors") == 2
    n_sent = hub.sent(".safetensors")
    assert float(hub.run(home, "-c", LOCATE, "org/big").split()[1]) == expected
    assert float(hub.run(home, "-c", LOCATE, "org/big", offline=True).split()[1]) == expected
    assert hub.sent(".safetensors") == n_sent
    said = hub.run(home, "-c", LOCATE, "org/gated", offline=True)
    assert "not in the Hub's local cache" in said
    assert hub.run(home, "-c", LOCATE, "org/gated", token="secret").split()[0].startswith(str(home))


@pytest.mark.slow
def test_a_search_is_pushed_with_its_scores_pulled_back_and_scores_the_same(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    from evolve.loop import run
    from evolve.search_file import SearchFile

    file = SearchFile.load("configs/quickstart.yml").changed(
        search={"n_iterations": 4}, scoring={"limit": 20, "holdout": 20}
    )
    study = tmp_path / "study"
    result = run(file, folder=study)
    assert result.best is not None
    assert result.verdict is not None
    evolve, home = ("-m", "evolve.cli"), tmp_path / "home"
    pushing = ["merge", study / "best.yml", tmp_path / "out", "--push-to-hub", "winner", "--private"]
    hub.run(home, *evolve, *pushing, token="secret")

    pushed = hub.models / "someone/winner"
    card = ModelCard((pushed / "README.md").read_text())
    assert card.data.eval_results is not None
    for found in card.data.eval_results:
        assert found.metric_value == round(result.verdict.holdout[found.dataset_type].value, 4)
    interval = result.verdict.holdout["qs_sort"]
    assert f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]" in card.text
    assert result.verdict.text[1:] in card.text
    assert {baseline.name for baseline in result.verdict.baselines} <= {
        line.split(" | ")[0].removeprefix("| ") for line in card.text.splitlines()
    }

    scoring = ["eval", "someone/winner", "--like", study, "--json"]
    (model,) = json.loads(hub.run(home, *evolve, *scoring, token="secret"))["models"]
    assert model["scores"] == result.best.user_attrs["scores"]
    pulled = next((home / "hub").glob("models--someone--winner/snapshots/*/model.safetensors"))
    assert {n: t.tolist() for n, t in load_file(pulled).items()} == {
        n: t.tolist() for n, t in load_file(tmp_path / "out/model.safetensors").items()
    }
