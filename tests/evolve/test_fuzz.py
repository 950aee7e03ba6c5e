"""Whatever is in its input files, a command ends in time, with a status and one line a fault.

`python -m tests.benchmarks.fuzz` tries as many inputs as it is told.
"""

import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import yaml

from .fuzzing import KINDS, World, faults_of

N_FAST = {"search": 20, "recipe": 60, "model": 40, "storage": 2}
N_SLOW = {"search": 80, "recipe": 150, "model": 150, "storage": 40}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("fuzz"))


def tried(world: World, kind: str, seeds: range) -> None:
    found = [f for seed in seeds if (f := world.try_one(kind, seed)) is not None]
    assert not found, [(f.seed, f.faults, f.watched.raised[-800:]) for f in found]


@pytest.mark.parametrize("kind", KINDS)
def test_no_input_surprises(world: World, kind: str) -> None:
    tried(world, kind, range(N_FAST[kind]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_input_of_many_surprises(world: World, kind: str) -> None:
    tried(world, kind, range(1000, 1000 + N_SLOW[kind]))


# ---- the watch itself --------------------------------------------------------------------------------


def test_the_watch_sees_what_it_is_for(world: World, tmp_path: Path) -> None:
    """A merge into a folder that it may not write, and one of a recipe that ends in an error."""
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(yaml.safe_dump(world.recipes[0]))
    watched = world.run(["merge", str(recipe), str(tmp_path / "out")], tmp_path / "other" / "place")
    assert watched.status == 0
    assert any(str(tmp_path / "out") in event for event in watched.touched)
    assert faults_of(watched)
    watched = world.run(["merge", str(tmp_path / "none.yml"), str(tmp_path / "out2")], tmp_path)
    assert watched.status == 2
    assert faults_of(watched) == []


# ---- kinds of fault that it found --------------------------------------------------------------------


def _write(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def _change(name: str, **changes: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def _link(name: str, target: str) -> Callable[[Path], object]:
    def link(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return link


DAMAGED = {
    "a tokenizer of another form": (_write("tokenizer.json", '{"model": {}}'), "no tokenizer can be"),
    "generation defaults that are no JSON": (_write("generation_config.json", "{"), "generation_config"),
    "generation defaults that are a list": (_write("generation_config.json", "[]"), "not a JSON object"),
    "a size that is no number": (
        _change("config.json", intermediate_size="x"),
        "cannot build this model",
    ),
    "heads that do not divide": (
        _change("config.json", num_attention_heads=7),
        "cannot build this model",
    ),
    "a billion layers": (_change("config.json", num_hidden_layers=10**9), "the tensors have 2"),
    "weights elsewhere": (_link("model.safetensors", "/etc/hostname"), "outside of its folder"),
    "a tokenizer elsewhere": (_link("tokenizer.json", "/etc/passwd"), "outside of its folder"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_model_is_told_in_one_line(world: World, tmp_path: Path, case: str) -> None:
    damage, expected = DAMAGED[case]
    model = tmp_path / "model"
    shutil.copytree(world.root / "models/x", model)
    damage(model)
    command = ["eval", str(model), "--task", "qs_sort", "--limit", "2"]
    watched = world.run([*command, "--task-path", str(Path(__file__).parents[2] / "tasks")], tmp_path)
    assert faults_of(watched) == []
    assert watched.status in (1, 2)
    (line,) = [line for line in watched.err.splitlines() if line.startswith("error: ")]
    assert expected in line


def test_a_pickle_is_not_run_wherever_it_lies(world: World, tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> object:
            return os.mkdir, (str(tmp_path / "ran"),)

    import torch

    model = tmp_path / "model"
    shutil.copytree(world.root / "models/bins", model)
    torch.save({"model.norm.weight": Runs()}, model / "pytorch_model-1.bin")
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(yaml.safe_dump({"merge_method": "passthrough", "models": [{"model": str(model)}]}))
    watched = world.run(["merge", str(recipe), str(tmp_path / "out")], tmp_path / "out")
    assert faults_of(watched) == []
    assert watched.status == 2
    assert "nothing in a .bin file is ever run" in watched.err
    assert not (tmp_path / "ran").exists()


def test_links_into_the_hubs_cache_are_followed(world: World, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted((world.root / "models/x").iterdir())):
        shutil.copyfile(file, blobs / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        yaml.safe_dump({"merge_method": "passthrough", "models": [{"model": str(snapshot)}]})
    )
    watched = world.run(["merge", str(recipe), str(tmp_path / "out")], tmp_path / "out")
    assert (watched.status, watched.err) == (0, "")


def test_a_task_of_one_document_is_judged(world: World, tmp_path: Path) -> None:
    """Its bootstrap has one row, and no room for made-up documents."""
    search = {**world.searches[3], "search": {"sampler": "random", "n_iterations": 2}}
    file = tmp_path / "search.yml"
    file.write_text(yaml.safe_dump(search))
    watched = world.run(["run", str(file), "--storage-path", str(tmp_path / "out")], tmp_path / "out")
    assert faults_of(watched) == []
    assert watched.status == 0, watched.err


def _sql(*statements: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        with closing(sqlite3.connect(folder / "study.db")) as database:
            for statement in statements:
                assert database.execute(statement).rowcount
            database.commit()

    return change


def _about(**about: object) -> Callable[[Path], object]:
    return lambda folder: (folder / "study.json").write_text(json.dumps(about))


def _truncated(file: str, n_bytes: int) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:n_bytes])


CHANGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "study.json is a list": (_write("study.json", "[1]"), "it must be {study: a name"),
    "study.json is no JSON": (_write("study.json", "{"), "holds no search"),
    "a URL that is none": (_about(study="study0", storage="no url"), "no database URL"),
    "a database elsewhere": (
        _about(study="study0", storage="sqlite:////nowhere/at/all.db"),
        "cannot be opened",
    ),
    "a file that is no database": (_write("study.db", "x" * 5000), "file is not a database"),
    "half a database": (_truncated("study.db", 9000), "study.db"),
    "an empty database": (_truncated("study.db", 0), "no database of a search"),
    "search.yml is empty": (_write("search.yml", ""), "is empty"),
    "search.yml is a list": (_write("search.yml", "- 1"), "must be a mapping"),
    "search.yml has other ranges": (
        _write("search.yml", "merge_method: {choices: [ties, linear]}\nmodels: [{model: models/x}]\n"),
        "error: ",
    ),
    "scores that are none": (
        _sql("update trial_user_attributes set value_json = '[]' where key = 'scores'"),
        "trial 0 is damaged (scores is [])",
    ),
    "no scores": (
        _sql("delete from trial_user_attributes where key = 'scores'"),
        "trial 0 is damaged (it has no scores)",
    ),
    "a value that is text": (_sql("update trial_values set value = 'x'"), "damaged"),
    "a value that is infinite": (_sql("update trial_values set value_type = 'INF_POS'"), "damaged"),
    "a state that is none": (_sql("update trials set state = 'DONE'"), "damaged"),
    "a trial that is gone": (_sql("delete from trials where number = 1"), "damaged"),
    "parameters of another kind": (
        _sql("update trial_params set distribution_json = '{}'"),
        "damaged",
    ),
    "a verdict on nobody": (
        _sql(
            "update study_user_attributes set value_json = "
            "replace(value_json, '\\\"trial\\\": ', '\\\"trial\\\": 77') where key = 'verdict'"
        ),
        "what is noted as 'verdict' is damaged (there is no trial 77",
    ),
    "a verdict that is none": (
        _sql("update study_user_attributes set value_json = '\"{}\"' where key = 'verdict'"),
        "what is noted as 'verdict' is damaged",
    ),
}


@pytest.mark.parametrize("case", CHANGED)
def test_a_storage_changed_by_hand_is_told_in_one_line(world: World, tmp_path: Path, case: str) -> None:
    change, expected = CHANGED[case]
    folder = tmp_path / "study"
    shutil.copytree(world.studies[0], folder)
    change(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    watched = world.run(["export", str(folder)], folder)
    assert faults_of(watched) == []
    assert watched.status in (1, 2), watched.out
    assert expected in watched.err
    assert before.items() <= {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}.items()


def test_outcomes_that_are_damaged_are_named(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "study"
    shutil.copytree(world.studies[0], folder)
    (path,) = folder.glob("outcomes/baseline-0.parquet")
    for damage in (path.read_bytes()[:50], b""):
        path.write_bytes(damage)
        more = ["run", "study0.yml", "--storage-path", str(folder), "--n-iterations", "4"]
        watched = world.run(more, folder)
        assert faults_of(watched) == []
        assert watched.status == 1
        assert f"{path} is damaged" in watched.err
