"""What a merge needs, foretold and then measured."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from merge_core.errors import OutputError, ResourceError
from merge_core.estimate import Estimate, estimate
from merge_core.machine import (
    disk_seconds,
    in_units,
    memory_left,
    nameless_file,
    nearest_folder,
    private_bytes,
)
from merge_core.merge import save_merged
from merge_core.plan import Sources
from merge_core.recipe import Recipe


def recipe_of(family: Any, method: str = "ties", **changes: Any) -> Recipe:
    own = {"weight": 1.0, "density": 0.5} if method == "ties" else {"weight": 1.0}
    models = [{"model": model, "parameters": own} for model in (family.x, family.y)]
    base = {"base_model": family.base} if method == "ties" else {}
    return Recipe.parse({"merge_method": method, **base, "models": models, **changes})


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def stored(folder: str) -> list[torch.Tensor]:
    return list(load_file(Path(folder) / "model.safetensors").values())


@pytest.mark.parametrize("shard_bytes", [0, 50_000], ids=["one file", "shards"])
@pytest.mark.parametrize("out_dtype", [None, "bfloat16"])
def test_the_bytes_written_are_foretold(
    llamas: Any, tmp_path: Path, shard_bytes: int, out_dtype: str | None
) -> None:
    recipe, out = recipe_of(llamas, out_dtype=out_dtype), tmp_path / "out"
    needs = estimate(recipe, Sources(), out, shard_bytes=shard_bytes, timed=False)
    save_merged(recipe, out, shard_bytes=shard_bytes, with_card=False)
    texts = (out / "mergekit_config.yml").stat().st_size
    assert needs.write_bytes == pytest.approx(bytes_in(out) - texts, rel=0.01)


def test_the_bytes_read_are_those_of_the_tensors(llamas: Any, tmp_path: Path) -> None:
    needs = estimate(recipe_of(llamas), Sources(), tmp_path / "out", timed=False)
    sizes = [t.numel() * 4 for t in stored(llamas.base)]
    assert needs.read_bytes == 3 * sum(sizes)
    assert (needs.architecture, needs.n_layers) == ("LlamaForCausalLM", 4)
    assert needs.n_tensors == len(sizes)
    assert needs.models == (llamas.base, llamas.x, llamas.y)
    assert needs.seconds is None


@pytest.mark.parametrize("method", ["ties", "linear"])
def test_the_time_is_measured_and_nothing_is_left(llamas: Any, tmp_path: Path, method: str) -> None:
    needs = estimate(recipe_of(llamas, method), Sources(), tmp_path / "a/b/out", start_up_s=2.0)
    assert needs.seconds is not None
    assert 2.0 < needs.seconds < 10.0
    assert list(tmp_path.iterdir()) == []


def test_memory_counts_the_process_and_the_tensors_in_flight(llamas: Any, tmp_path: Path) -> None:
    needs = estimate(recipe_of(llamas), Sources(), tmp_path / "out", timed=False)
    # So few bytes that all tensors wait at once.
    total = sum(t.numel() * 4 for t in stored(llamas.base))
    assert needs.memory_bytes - private_bytes() == pytest.approx(total, abs=20e6)
    assert needs.available_bytes is None or needs.available_bytes > needs.memory_bytes


def huge(folder: Path) -> Path:
    """A model of 4 terabytes: a header, and a file that is one hole."""
    folder.mkdir()
    side, header, end = 1_000_000, {}, 0
    for i in range(2):
        header[f"model.layers.{i}.mlp.weight"] = {
            "dtype": "BF16",
            "shape": [side, side],
            "data_offsets": [end, end := end + 2 * side**2],
        }
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text('{"num_hidden_layers": 2}')
    return folder


def test_too_little_disk_and_memory_are_one_line_each(tmp_path: Path) -> None:
    model = huge(tmp_path / "huge")
    recipe = Recipe.parse({"merge_method": "passthrough", "models": [{"model": str(model)}]})
    needs = estimate(recipe, Sources(), tmp_path / "out")
    assert needs.seconds is None
    assert needs.architecture == "unknown"
    with pytest.raises(ResourceError) as caught:
        needs.check(tmp_path / "out")
    disk, memory = caught.value.faults
    assert f"OUT is {tmp_path / 'out'}" in disk
    assert "writes 4 TB" in disk
    assert memory.startswith("memory: ")


def test_what_suffices_passes() -> None:
    Estimate("x", 1, 1, ("m",), 1, 10, 10, 5, None).check(Path("out"))
    Estimate("x", 1, 1, ("m",), 1, 10, 10, 5, 5).check(Path("out"))


def test_a_sample_leaves_the_merge_as_it_is(llamas: Any, tmp_path: Path) -> None:
    recipe, sources = recipe_of(llamas), Sources()
    estimate(recipe, sources, tmp_path / "a")
    save_merged(recipe, tmp_path / "a", sources=sources)
    save_merged(recipe, tmp_path / "b")
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert same[0] == same[1]


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 B"), (999, "999 B"), (1_500, "1.5 kB"), (273e6, "273 MB"), (4.04e9, "4.04 GB")],
)
def test_bytes_are_spelled_in_decimal_units(n: float, text: str) -> None:
    assert in_units(n) == text


def test_the_machine_answers(tmp_path: Path) -> None:
    assert nearest_folder(tmp_path / "a/b/c") == tmp_path
    assert disk_seconds(tmp_path, 1) == 0.0
    assert disk_seconds(tmp_path, 10**15) > 1000
    left = memory_left()
    assert left is None or left > 0
    assert list(tmp_path.iterdir()) == []


def test_a_place_where_nothing_can_be_written_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="name another folder"):
        nameless_file(tmp_path / "gone")
