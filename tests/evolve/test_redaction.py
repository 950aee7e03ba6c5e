"""Secrets reach no log, report, error line or exported file."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from evolve.errors import SearchFileError, TrialEngineError
from evolve.redaction import printable, redacted
from evolve.search_file import SearchFile

from ..stand_in_hub import served

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "configs/quickstart/models"
TOKEN = "hf_aB3dE5fG7hJ9kL1mN3pQ5rS7tU9vW1xY3z"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("postgresql://me:pass word@host/db", "postgresql://me:pass word@host/db"),  # no URL
        ("at postgresql://me:s3cret@host:5432/db?x=1", "at postgresql://me:***@host:5432/db?x=1"),
        ("postgresql+psycopg://:s3cret@/db", "postgresql+psycopg://:***@/db"),
        ("postgresql://me@host/db", "postgresql://me@host/db"),
        ("https://user:tok@host/org/model", "https://user:***@host/org/model"),
        ("https://tok@host/org/model", "https://***@host/org/model"),
        ("http://host:8080/a@b", "http://host:8080/a@b"),
        (f"login with {TOKEN}, or not", "login with hf_***, or not"),
        ("org/hf_llama_model@main", "org/hf_llama_model@main"),
        ("Authorization: Bearer abcdefgh.ijk", "Authorization: Bearer ***"),
        ("postgresql://h/db?user=me&password=s3cret&x=1", "postgresql://h/db?user=me&password=***&x=1"),
        ("max_tokens: 7, token ids", "max_tokens: 7, token ids"),
    ],
)
def test_secrets_are_taken_out_and_nothing_else(text: str, expected: str) -> None:
    assert redacted(text) == expected
    assert redacted(redacted(text)) == expected


def test_what_the_environment_keeps_is_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPASSWORD", "correct horse")
    assert redacted("password 'correct horse' is wrong") == "password '***' is wrong"


def test_what_steers_a_terminal_is_taken_out() -> None:
    assert printable("a\x1b[31mb\x07\nc é 字") == "a [31mb \nc é 字"


def test_a_failures_text_is_kept_without_secrets() -> None:
    assert str(TrialEngineError(f"GET with {TOKEN}")) == "GET with hf_***"


def test_a_search_file_with_a_secret_is_refused_by_place_and_not_by_value() -> None:
    data = yaml.safe_load((ROOT / "configs/quickstart.yml").read_text())
    data["scoring"]["engine"] = {"hf_token": TOKEN}
    data["models"][1]["model"] = "https://user:tok123@host/model"
    with pytest.raises(SearchFileError) as refused:
        SearchFile(data)
    text = str(refused.value)
    assert "scoring.engine.hf_token holds a token" in text
    assert "models[1].model holds a token or password" in text
    assert TOKEN not in text
    assert "tok123" not in text


# ---- whole commands over a Hub that asks for a token -------------------------------------------------


@pytest.fixture(scope="module")
def private_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A stand-in Hub with the private models me/base and me/sort; the environment to reach it."""
    root = tmp_path_factory.mktemp("hub")
    for name in ("base", "sort"):
        shutil.copytree(QUICKSTART / name, root / "models/me" / name)
        (root / "models/me" / name / ".private").touch()
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    with served(root, TOKEN) as address:
        yield {
            **kept,
            "HF_ENDPOINT": address,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path_factory.mktemp("home")),
            "PYTHONPATH": str(ROOT),
        }


def evolve(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "evolve.cli", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
    )


def holders(secret: str, *folders: Path) -> list[Path]:
    """List the files that hold a secret."""
    return [
        path
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and secret.encode() in path.read_bytes()
    ]


RECIPE: dict[str, Any] = {
    "merge_method": "linear",
    "models": [
        {"model": "me/base", "parameters": {"weight": 0.5}},
        {"model": "me/sort", "parameters": {"weight": 1.0}},
    ],
}


@pytest.mark.slow
def test_a_search_over_private_models_keeps_the_token_to_itself(
    private_hub: dict[str, str], tmp_path: Path
) -> None:
    search = tmp_path / "search.yml"
    models = [RECIPE["models"][0], {"model": "me/sort", "parameters": {"weight": {"low": 0, "high": 1}}}]
    scoring = {"task_paths": ["tasks"], "limit": 5, "holdout": 5}
    data = {**RECIPE, "models": models, "tasks": ["qs_sort"], "scoring": scoring}
    search.write_text(yaml.safe_dump(data))
    out, model = tmp_path / "out", tmp_path / "model"
    run = ["run", search, "--storage-path", out, "--n-iterations", 3, "--trust-remote-code"]

    refused = evolve(*run, **private_hub, HF_TOKEN="hf_" + "wrong" * 7)
    assert refused.returncode == 2
    assert "me/base" in refused.stderr
    assert "wrong" not in refused.stderr.replace("wrong name", "")
    assert not out.exists()

    done = evolve(*run, **private_hub, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    # Code that was allowed to run is named wherever the result is.
    assert "--trust-remote-code" in done.stdout
    assert "--trust-remote-code" in (out / "best.yml").read_text()
    state = evolve("status", out, "--json", **private_hub)
    assert any("--trust-remote-code" in n for n in json.loads(state.stdout)["verdict_notes"]["notices"])
    merged = evolve("merge", out / "best.yml", model, **private_hub, HF_TOKEN=TOKEN)
    assert merged.returncode == 0, merged.stderr
    for each in (done, state, merged):
        assert TOKEN not in each.stdout + each.stderr
    assert holders(TOKEN, out, model) == []
    assert holders("me/sort", out) != []  # what is looked through is there
