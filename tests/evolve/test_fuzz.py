"""Whatever is in its input files, a command ends in time, with a status and one line a fault.

`python -m tests.benchmarks.fuzz` tries as many inputs as it is told.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from .fuzzing import KINDS, World, faults_of

N_FAST = {"search": 30, "recipe": 80, "model": 60, "storage": 30}
N_SLOW = {"search": 100, "recipe": 150, "model": 150, "storage": 100}


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
