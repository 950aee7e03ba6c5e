"""What is the same search, and what is another one: folders that move, models and data that change."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from evolve.errors import ResumeRefusedError, StorageError
from evolve.loop import run
from evolve.search_file import SearchFile
from evolve.session import Place, check, settled_plan
from evolve.study import Study
from merge_core.checkpoint.write import write_text

ROOT = Path(__file__).resolve().parents[2]
FILE = """
merge_method: linear
base_model: models/base
models:
  - {model: models/reverse, parameters: {weight: {low: 0, high: 1.5}}}
  - {model: models/sort, parameters: {weight: 0.5}}
dtype: float32
tasks: [qs_reverse, qs_sort]
search: {n_iterations: 2, sampler: random}
scoring: {limit: 4, holdout: 4}
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with copies of the quickstart's models and tasks, and a search file."""
    shutil.copytree(ROOT / "configs/quickstart/models", tmp_path / "models")
    shutil.copytree(ROOT / "tasks", tmp_path / "tasks", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "mine.yml").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def searched(n: int = 2) -> SearchFile:
    return SearchFile.load("mine.yml").changed(search={"n_iterations": n})


def test_a_search_goes_on_in_a_folder_that_was_renamed() -> None:
    first = run(searched(), folder="before")
    Path("before").rename("after")
    longer = run(searched(3), folder="after").study
    assert longer.name == first.study.name == "before"
    assert [t.params for t in longer.trials()[:2]] == [t.params for t in first.study.trials()]
    assert len(longer.trials()) == 3
    with pytest.raises(ResumeRefusedError, match="seed: the search in after has 0, this one has 1"):
        run(searched().changed(search={"seed": 1}), folder="after")


def test_a_record_whose_name_is_lost_is_not_begun_anew() -> None:
    run(searched(), folder="s")
    before = (Path("s") / "study.db").read_bytes()
    (Path("s") / "study.json").unlink()
    Path("s").rename("other")
    with pytest.raises(ResumeRefusedError, match=r"other holds the search 's' and no study\.json"):
        run(searched(), folder="other")
    assert (Path("other") / "study.db").read_bytes() == before


@pytest.mark.parametrize("name", ["search.yml", "study.json"])
def test_a_search_that_was_killed_while_it_was_made_goes_on(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path, text: str) -> None:
        if path.name == name:
            raise KeyboardInterrupt
        write_text(path, text)

    with monkeypatch.context() as patched:
        patched.setattr("evolve.study.study.write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            run(searched(), folder="s")
    assert not run(searched(), folder="s").was_complete
    assert len(Study.open(Path("s")).trials()) == 2


def test_a_record_without_its_search_file_is_read() -> None:
    result = run(searched(), folder="s")
    (Path("s") / "search.yml").unlink()
    assert Study.open(Path("s")).search_file().as_dict() == result.study.search_file().as_dict()
    assert run(searched(), folder="s").was_complete


def edit(file: str, old: str, new: str) -> None:
    text = Path(file).read_text()
    assert old in text
    Path(file).write_text(text.replace(old, new, 1))


CHANGES: dict[str, tuple[Callable[[], None], str]] = {
    "config": (
        lambda: edit("models/base/config.json", '"rms_norm_eps": ', '"rms_norm_eps": 1'),
        "configs.models/base",
    ),
    "tokenizer": (
        lambda: edit("models/sort/tokenizer_config.json", "{", '{"x": 1,'),
        "tokenizers.models/sort",
    ),
    "documents": (lambda: edit("tasks/qs_sort.jsonl", "sort ", "sort x"), "files.qs_sort"),
    "function": (lambda: edit("tasks/quickstart_data.py", "return {", "return {} or {"), "files.qs_sort"),
    "arguments": (
        lambda: edit("tasks/qs_sort.yaml", "documents: ", "x: 1\n  documents: "),
        "files.qs_sort",
    ),
    "a number": (
        lambda: edit("mine.yml", "high: 1.5", "high: 1.6"),
        "recipe.models[0].parameters.weight.high: the search in s has 1.5, this one has 1.6",
    ),
    "an option": (
        lambda: edit("mine.yml", "holdout: 4", "holdout: 4, engine: {batch_size: 4}"),
        "scoring.engine.batch_size: the search in s has null, this one has 4",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_the_scores_is_refused_by_name(change: str) -> None:
    """Before it begins, too: --check says what the run itself would say."""
    run(searched(), folder="s")
    before = Path("s/study.db").read_bytes()
    do, said = CHANGES[change]
    do()
    with pytest.raises(ResumeRefusedError) as refused:
        run(searched(3), folder="s")
    assert said in str(refused.value)
    plan = settled_plan(searched(3), Place(Path("s")))
    with pytest.raises(ResumeRefusedError) as told_before:
        check(plan, Place(Path("s")))
    assert told_before.value.faults == refused.value.faults
    assert Path("s/study.db").read_bytes() == before


def test_a_point_outside_the_space_is_told_before_it_begins() -> None:
    """A record changed by hand; --check says what the run itself would say."""
    run(searched(), folder="s")
    with closing(sqlite3.connect("s/study.db")) as database, database:
        changed = database.execute(
            "update trial_params set distribution_json = replace(distribution_json, '1.5', '1.25')"
        )
        assert changed.rowcount
    with pytest.raises(StorageError, match="trial 0 is damaged") as refused:
        run(searched(3), folder="s")
    place = Place(Path("s"))
    with pytest.raises(StorageError) as told_before:
        check(settled_plan(searched(3), place), place)
    assert told_before.value.faults == refused.value.faults


def test_what_a_config_spells_otherwise_is_the_same_search() -> None:
    run(searched(), folder="s")
    config = Path("models/base/config.json")
    config.write_text(json.dumps(json.loads(config.read_text()), indent=7, sort_keys=True))
    assert len(run(searched(3), folder="s").study.trials()) == 3
