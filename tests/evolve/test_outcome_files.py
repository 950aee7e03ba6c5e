"""Outcomes are whole or not there, here and in the folder that other hosts see."""

from __future__ import annotations

from pathlib import Path

import pytest

from evolve.errors import ResumeRefusedError, StorageError
from evolve.search_file import SearchFile
from evolve.study import Study, load_outcomes
from evolve.study.outcomes import OutcomeFiles
from evolve.tasks import Outcome, Outcomes

OUTCOMES: Outcomes = {"t": [Outcome("leaf", i, i / 3, {"other,none": [1, i]}) for i in range(4)]}
FILE = SearchFile(
    {
        "merge_method": "linear",
        "models": [{"model": m, "parameters": {"weight": {"low": 0, "high": 1}}} for m in "ab"],
        "tasks": ["t"],
    }
)


def host(folder: Path, shared: Path | None, prefix: str = "s-") -> OutcomeFiles:
    folder.mkdir(parents=True, exist_ok=True)
    return OutcomeFiles(folder, shared, prefix)


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    folder = tmp_path / "shared"
    folder.mkdir()
    return folder


def test_another_host_finds_what_this_one_wrote(tmp_path: Path, shared: Path) -> None:
    here, there = host(tmp_path / "here", shared), host(tmp_path / "there", shared)
    here.save("trial-0", {"search": OUTCOMES})
    assert there.has("trial-0")
    assert there.load("trial-0") == here.load("trial-0") == {"search": OUTCOMES, "holdout": {}}
    assert there.path("trial-0").read_bytes() == here.path("trial-0").read_bytes()
    assert not there.has("trial-1")
    assert not host(tmp_path / "other", shared, "other-search-").has("trial-0")


def test_what_a_killed_host_left_half_written_is_not_there(tmp_path: Path, shared: Path) -> None:
    here, there = host(tmp_path / "here", shared), host(tmp_path / "there", shared)
    here.save("trial-0", {"search": OUTCOMES})
    (copy,) = shared.iterdir()
    whole = copy.read_bytes()
    for n in (0, 4, len(whole) // 2, len(whole) - 1):
        copy.write_bytes(whole[:n])
        assert not there.has("trial-0")
    assert list((tmp_path / "there").iterdir()) == []
    here.save("trial-0", {"search": OUTCOMES})
    assert there.has("trial-0")


def test_missing_outcomes_and_a_disk_that_takes_none_are_said(tmp_path: Path) -> None:
    alone = host(tmp_path / "s", None)
    with pytest.raises(StorageError, match=r"trial-3.parquet is not there.*--artifacts"):
        alone.load("trial-3")
    (tmp_path / "s/trial-0.parquet").mkdir()  # a file cannot take a folder's place
    with pytest.raises(StorageError, match="cannot be used"):
        alone.save("trial-0", {"search": OUTCOMES})


def test_a_study_knows_where_its_outcomes_are(tmp_path: Path, shared: Path) -> None:
    url = f"sqlite:///{tmp_path}/one.db"
    with Study.create_or_resume(tmp_path / "here/s", url, FILE, {}, 1, shared) as study:
        study.outcomes.save("baseline-0", {"search": OUTCOMES})
    with Study.create_or_resume(tmp_path / "there/s", url, FILE, {}) as study:
        assert study.outcomes.load("baseline-0")["search"] == OUTCOMES
    earlier = Study.earlier_file(tmp_path / "elsewhere/s", url)
    assert earlier is not None
    assert earlier.as_dict() == FILE.as_dict()
    assert Study.earlier_file(tmp_path / "elsewhere/other", url) is None


def test_a_search_stays_where_it_is_kept(tmp_path: Path, shared: Path) -> None:
    folder = tmp_path / "s"
    url = f"sqlite:///{tmp_path}/one.db"
    with Study.create_or_resume(folder, url, FILE, {}, 1, shared):
        pass
    with Study.create_or_resume(folder, None, FILE, {}) as study:
        assert study.outcomes.path("x").parent == folder / "outcomes"
    assert not (folder / "study.db").exists()
    for other in (f"sqlite:///{tmp_path}/two.db", "postgresql://host/db"):
        with (
            pytest.raises(ResumeRefusedError, match="--storage is another"),
            Study.create_or_resume(folder, other, FILE, {}),
        ):
            pass
    with (
        pytest.raises(ResumeRefusedError, match="--artifacts is"),
        Study.create_or_resume(folder, None, FILE, {}, 1, tmp_path),
    ):
        pass


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path: Path) -> None:
    files = host(tmp_path / "s", None)
    files.save("trial-0", {"search": OUTCOMES})
    with pytest.raises(AttributeError):
        files.save("trial-0", {"search": {"t": [OUTCOMES["t"][0], None]}})  # type: ignore[list-item]
    assert load_outcomes(files.path("trial-0"))["search"] == OUTCOMES
