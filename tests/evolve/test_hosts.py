"""A search kept on a server goes on from another host: here, from another folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from evolve.errors import ResumeRefusedError, SearchFileError, StorageError
from evolve.loop import run
from evolve.search_file import SearchFile
from evolve.study import Study

from .postgres import PASSWORD, PostgreSQL

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def raced(n: int = 12) -> SearchFile:
    """A raced search: whoever goes on with it learns from the outcomes of those before."""
    file = SearchFile.load(ROOT / "configs/quickstart.yml")
    return file.changed(
        search={"n_iterations": n, "racing": "always"}, scoring={"limit": 20, "holdout": 10}
    )


def told(study: Study) -> list[Any]:
    return [(t.number, t.params, t.values, t.user_attrs["scores"]) for t in study.trials()]


class Killed(BaseException):
    pass


def killed_after(n: int) -> Any:
    def watch(event: str, study: Study | None, plan: Any) -> None:
        if event == "answered" and study and study.n_finished == n:
            raise Killed

    return watch


@pytest.mark.slow
def test_a_search_goes_on_from_another_host_as_if_it_had_not_moved(
    postgresql: PostgreSQL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = run(raced(), folder=tmp_path / "undisturbed/hosts")
    shared = tmp_path / "shared"
    shared.mkdir()
    here, there = tmp_path / "here/hosts", tmp_path / "there/hosts"
    with pytest.raises(Killed):
        run(raced(), folder=here, storage=postgresql.url, artifacts=shared, progress=killed_after(5))
    result = run(raced(), folder=there, storage=postgresql.url)
    assert told(result.study) == told(undisturbed.study)
    assert result.verdict == undisturbed.verdict
    best = (there / "best.yml").read_text()
    assert best == (undisturbed.study.folder / "best.yml").read_text()
    files = [
        path for path in tmp_path.rglob("*") if path.is_file() and PASSWORD.encode() in path.read_bytes()
    ]
    assert files == []

    # The first host has what was found elsewhere, without the URL or its password.
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    command = [sys.executable, "-m", "evolve.cli", "status", str(here), "--json"]
    status = subprocess.run(command, check=True, capture_output=True, text=True)
    assert json.loads(status.stdout)["n_trials"] == 12
    assert run(raced(), folder=here).was_complete
    with pytest.raises(ResumeRefusedError, match="--storage is another"):
        run(raced(), folder=here, storage=f"sqlite:///{tmp_path}/other.db")
    with pytest.raises(ResumeRefusedError, match="--artifacts"):
        run(raced(), folder=here, artifacts=tmp_path)


@pytest.mark.slow
def test_without_a_shared_folder_what_is_missing_is_said(postgresql: PostgreSQL, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(raced(), folder=tmp_path / "here/apart", storage=postgresql.url, progress=killed_after(3))
    with pytest.raises(StorageError, match=r"trial-\d+.parquet is not there.*copy its outcomes"):
        run(raced(3), folder=tmp_path / "there/apart", storage=postgresql.url)
    (tmp_path / "there/apart/outcomes").rmdir()
    (tmp_path / "here/apart/outcomes").rename(tmp_path / "there/apart/outcomes")
    assert run(raced(3), folder=tmp_path / "there/apart", storage=postgresql.url).verdict


def test_a_shared_folder_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(SearchFileError, match="--artifacts"):
        run(raced(2), folder=tmp_path / "s", artifacts=tmp_path / "none")
