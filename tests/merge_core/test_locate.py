"""Models by Hub id, through a stand-in Hub on loopback and the real client in its own process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ..stand_in_hub import free_port, served

ROOT = Path(__file__).parents[2]

# Locates each reference in turn, and with MERGE set also merges it; one JSON object a line.
CLIENT = """
import json, os, sys
from merge_core.errors import MergeError
from merge_core.checkpoint.locate import locate, split_adapter
for reference in sys.argv[1:]:
    found = {}
    try:
        model, adapter = split_adapter(reference)
        folder = locate(adapter, is_adapter=True) if adapter else locate(model)
        files = [path for path in folder.rglob("*") if path.is_file()]
        found["files"] = sorted(path.relative_to(folder).as_posix() for path in files)
        if os.environ.get("MERGE"):
            from merge_core.merge import merged_tensors
            from merge_core.plan import model_alone
            merged = merged_tensors(model_alone(reference))
            found["sums"] = {name: float(tensor.double().sum()) for name, tensor in merged}
    except MergeError as error:
        found["error"], found["faults"] = type(error).__name__, error.faults
    print(json.dumps(found), flush=True)
"""

NEEDED = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
NEEDED += ["chat_template.jinja", "generation_config.json"]
UNNEEDED = ["README.md", "pytorch_model.bin", "tf_model.h5", "training_args.bin", "plot.png"]


ADAPTED = "model.layers.1.self_attn.q_proj"


def save_adapter(folder: Path, file: str) -> None:
    """Save an adapter that adds 2 * 4 * 1 to each entry of one weight, beside a model."""
    folder.mkdir()
    names = [f"base_model.model.{ADAPTED}.lora_{part}.weight" for part in "AB"]
    tensors = {names[0]: torch.ones(4, 48), names[1]: torch.ones(48, 4)}
    save = torch.save if file.endswith(".bin") else save_file
    save(tensors, folder / file)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": [ADAPTED]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({"x": torch.zeros(3)}, folder / "model.safetensors")
    (folder / "training_args.bin").write_text("{}")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, llamas) -> Iterator[tuple[str, Path]]:
    """The stand-in Hub's address and the folder of its models."""
    root = tmp_path_factory.mktemp("hub")
    models = root / "models/org"
    for name in ("tiny", "secret", "extra", "pickled", "weightless"):
        shutil.copytree(llamas.x, models / name)
        for file in (*NEEDED, *UNNEEDED):
            if not (models / name / file).exists():
                (models / name / file).write_text("{}")
    (models / "secret/.private").touch()
    save_adapter(models / "lora", "adapter_model.safetensors")
    save_adapter(models / "pickled-lora", "adapter_model.bin")
    (models / "extra/original").mkdir()
    shutil.copy(models / "extra/model.safetensors", models / "extra/original/consolidated.safetensors")
    shutil.copy(models / "extra/model.safetensors", models / "extra/consolidated.safetensors")
    torch.save(load_file(models / "tiny/model.safetensors"), models / "pickled/pytorch_model.bin")
    (models / "pickled/original").mkdir()
    shutil.copy(models / "pickled/pytorch_model.bin", models / "pickled/original")
    (models / "pickled/model.safetensors").unlink()
    for file in ("model.safetensors", "pytorch_model.bin"):
        (models / "weightless" / file).unlink()
    with served(root) as address:
        yield address, models


def run_client(address: str, home: Path, *references: str, cwd: Path, **environment: str) -> list[dict]:
    """Locate and merge references in a fresh process; what it found, one entry each."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    environment = {
        **kept,
        "HF_ENDPOINT": address,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(home),
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(ROOT),
        **environment,
    }
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, *references],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


REFERENCES = ["org/tiny", "org/tiny@main", "org/gone", "org/secret", "org/extra", "org/pickled"]
REFERENCES += ["org/weightless"]
WITH_ADAPTERS = ["org/tiny@main+org/lora@main", "org/tiny+org/pickled-lora"]
REFERENCES += [*WITH_ADAPTERS, "org/tiny+org/gone", "org/lora"]

# Nothing here may be looked up on the Hub: each is a path that does not exist.
PATHS = [
    "/nowhere/gone",
    "./gone",
    "../gone",
    "models/gone",  # relative, below a folder that exists
    "models/gone@main",
    "a/b/gone",
    "gone/",
    "~/gone",
]
LOCAL = "org/tiny@v1+a"


@pytest.fixture(scope="module")
def home(tmp_path_factory, llamas) -> Path:
    """HF_HOME and working directory of the clients."""
    home = tmp_path_factory.mktemp("home")
    (home / "models").mkdir()
    shutil.copytree(llamas.x, home / LOCAL)
    return home


@pytest.fixture(scope="module")
def found(hub, tmp_path_factory, home) -> dict[str, dict]:
    """What a client without token finds."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")  # no folder org/ there
    results = run_client(hub[0], home, *REFERENCES, cwd=elsewhere, MERGE="1")
    return dict(zip(REFERENCES, results, strict=True))


@pytest.fixture(scope="module")
def unreachable(home) -> dict[str, dict]:
    """What a client finds at an address where nobody answers."""
    references = ["other/tiny", *PATHS, LOCAL]
    results = run_client(f"http://127.0.0.1:{free_port()}", home, *references, cwd=home)
    return dict(zip(references, results, strict=True))


def sums(model: str) -> dict[str, float]:
    tensors = load_file(Path(model) / "model.safetensors")
    return {name: float(tensor.double().sum()) for name, tensor in tensors.items()}


def test_an_id_downloads_the_needed_files_and_merges(found, llamas):
    assert found["org/tiny"].get("faults") is None
    assert set(NEEDED) <= set(found["org/tiny"]["files"])
    assert found["org/tiny"]["sums"] == pytest.approx(sums(llamas.x))


@pytest.mark.parametrize("file", UNNEEDED)
def test_files_that_a_merge_does_not_need_are_not_downloaded(found, file):
    assert file not in found["org/tiny"]["files"]


@pytest.mark.parametrize("file", ["consolidated.safetensors", "original/consolidated.safetensors"])
def test_second_copies_of_the_weights_are_not_downloaded(found, file):
    assert "model.safetensors" in found["org/extra"]["files"]
    assert file not in found["org/extra"]["files"]


def test_bin_weights_are_downloaded_where_there_are_no_safetensors(found, llamas):
    assert found["org/pickled"].get("faults") is None
    assert {*NEEDED, "pytorch_model.bin"} - {"model.safetensors"} <= set(found["org/pickled"]["files"])
    assert found["org/pickled"]["sums"] == pytest.approx(sums(llamas.x))
    for file in {"original/pytorch_model.bin", *UNNEEDED} - {"pytorch_model.bin"}:
        assert file not in found["org/pickled"]["files"]


@pytest.mark.parametrize("reference", WITH_ADAPTERS)
def test_an_adapter_is_downloaded_without_what_lies_beside_it(reference, found, llamas):
    assert found[reference].get("faults") is None
    file = "adapter_model.bin" if "pickled" in reference else "adapter_model.safetensors"
    assert found[reference]["files"] == ["adapter_config.json", file]
    expected = sums(llamas.x)
    expected[f"{ADAPTED}.weight"] += 8 * 48 * 48
    assert found[reference]["sums"] == pytest.approx(expected, rel=1e-5)


def test_a_revision_may_be_named(found):
    assert found["org/tiny@main"] == found["org/tiny"]


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("org/gone", ["'org/gone'", "correct the name", "HF_TOKEN"]),
        ("org/secret", ["'org/secret'", "private", "HF_TOKEN"]),
        ("org/weightless", ["'org/weightless'", "pytorch_model.bin", "model.safetensors"]),
        ("org/tiny+org/gone", ["'org/gone'", "correct the name"]),
        ("org/lora", ["'org/lora'", "is an adapter without a model", "BASE+org/lora"]),
    ],
    ids=["missing", "private", "without weights", "a missing adapter", "an adapter alone"],
)
def test_what_cannot_be_had_is_a_checkpoint_error_that_says_what_to_do(found, reference, expected):
    result = found[reference]
    assert result["error"] == "CheckpointError"
    (fault,) = result["faults"]
    for text in expected:
        assert text in fault
    assert "\n" not in fault


def test_a_private_model_is_found_with_a_token(hub, tmp_path):
    (result,) = run_client(hub[0], tmp_path, "org/secret", cwd=tmp_path, HF_TOKEN="secret")
    assert result.get("faults") is None
    assert set(NEEDED) <= set(result["files"])


class WithoutRevision(BaseHTTPRequestHandler):
    """Answers as the Hub does where a repository has no such revision; the stand-in has them all."""

    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RevisionNotFound")
        self.send_header("X-Error-Message", "Invalid rev id: gone")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


def test_a_revision_that_does_not_exist_is_a_checkpoint_error_that_says_what_to_do(tmp_path):
    with HTTPServer(("127.0.0.1", 0), WithoutRevision) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        (result,) = run_client(address, tmp_path, "org/tiny@gone", cwd=tmp_path)
        server.shutdown()
    assert result["error"] == "CheckpointError"
    (fault,) = result["faults"]
    for text in ("'org/tiny@gone'", "no revision 'gone'", "branch, tag or commit"):
        assert text in fault


@pytest.mark.parametrize("offline", [False, True], ids=["down", "offline"])
def test_a_downloaded_model_is_found_without_the_hub(found, home, tmp_path, offline):
    nobody = f"http://127.0.0.1:{free_port()}"
    environment = {"HF_HUB_OFFLINE": "1"} if offline else {}
    references = ["org/tiny", "org/pickled", "org/other"]
    first, pickled, second = run_client(nobody, home, *references, cwd=tmp_path, **environment)
    assert first["files"] == found["org/tiny"]["files"]
    assert pickled["files"] == found["org/pickled"]["files"]
    assert second["error"] == ("CheckpointError" if offline else "HubUnreachableError")


def test_a_hub_that_does_not_answer_is_not_the_users_fault(unreachable):
    result = unreachable["other/tiny"]
    assert result["error"] == "HubUnreachableError"
    (fault,) = result["faults"]
    assert "'other/tiny'" in fault
    assert "try again" in fault
    assert "\n" not in fault


@pytest.mark.parametrize("reference", PATHS)
def test_a_path_is_never_looked_up_on_the_hub(unreachable, reference):
    assert unreachable[reference]["error"] == "CheckpointError"
    (fault,) = unreachable[reference]["faults"]
    assert "no such folder" in fault
    assert repr(reference) in fault


def test_a_folder_wins_over_an_id(unreachable, llamas):
    assert unreachable[LOCAL]["files"] == sorted(path.name for path in Path(llamas.x).iterdir())
