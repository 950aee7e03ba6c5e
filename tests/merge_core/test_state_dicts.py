"""Files of weights alone: merged by name, tensor by tensor, as mergekit-pytorch does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from merge_core.errors import CheckpointError
from merge_core.merge import merged_tensors, save_merged
from merge_core.recipe import Recipe


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files base, x and y; `fewer` and `other` differ from y in what they have."""
    folder = tmp_path_factory.mktemp("files")
    generator = torch.Generator().manual_seed(0)

    def tensors() -> dict[str, Tensor]:
        shapes = {"encoder.0.weight": (5, 4), "encoder.1.weight": (5, 4), "bias": (3,), "half": (3,)}
        made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        return {**made, "half": made["half"].half(), "steps": torch.arange(3)}

    for name in ("base", "x", "y"):
        save_file(tensors(), folder / f"{name}.safetensors")
    y = load_file(folder / "y.safetensors")
    torch.save(load_file(folder / "x.safetensors"), folder / "x.pt")
    save_file(
        {**{k: v for k, v in y.items() if k != "bias"}, "extra": torch.ones(2)},
        folder / "fewer.safetensors",
    )
    save_file({**y, "bias": torch.ones(4)}, folder / "other.safetensors")
    return folder


def recipe(files: Path, method: str, models: dict[str, Any], base: str | None = None, **top: Any) -> Any:
    entries = [{"model": str(files / name), "parameters": own} for name, own in models.items()]
    named = {"base_model": str(files / base)} if base else {}
    return {"merge_method": method, **named, "models": entries, **top}


X, Y = "x.safetensors", "y.safetensors"
FILTERED = [{"filter": "encoder", "value": 0.5}, {"value": 0.25}]
CASES: dict[str, tuple[Any, ...]] = {
    "linear": ("linear", {X: {"weight": 1}, Y: {"weight": 0.5}}),
    "one of them pickled": ("linear", {"x.pt": {"weight": 1}, Y: {"weight": 0.5}}),
    "a gradient, which is at its beginning": ("linear", {X: {"weight": [0.2, 1]}, Y: {"weight": 1}}),
    "filters": ("task_arithmetic", {X: {"weight": 1}, Y: {"weight": FILTERED}}, "base.safetensors"),
    "ties": (
        "ties",
        {X: {"weight": 1, "density": 0.4}, Y: {"weight": 0.5, "density": 0.6}},
        "base.safetensors",
    ),
    "in the common ones": ("linear", {X: {"weight": 1}, "fewer.safetensors": {"weight": 1}}),
    "in those of any": ("linear", {X: {"weight": 1}, "fewer.safetensors": {"weight": 1}}),
}
OPTIONS = {
    "in the common ones": ("--tensor-intersection", {"tensors": "intersection"}),
    "in those of any": ("--tensor-union", {"tensors": "union"}),
}


@pytest.mark.parametrize("name", CASES)
def test_files_of_weights_merge_as_mergekit_pytorch_does(files: Path, tmp_path: Path, name: str) -> None:
    pytest.importorskip("mergekit", reason="mergekit is the oracle")
    from click.testing import CliRunner
    from mergekit.scripts.merge_raw_pytorch import main

    config = {**recipe(files, *CASES[name]), "dtype": "float32"}
    flag, options = OPTIONS.get(name, ("--quiet", {}))
    (tmp_path / "r.yml").write_text(yaml.safe_dump(config))
    CliRunner().invoke(main, [str(tmp_path / "r.yml"), str(tmp_path / "theirs"), flag])
    expected = load_file(tmp_path / "theirs/model.safetensors")
    found = dict(merged_tensors(Recipe.parse(config), **options))
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        torch.testing.assert_close(found[key], tensor, rtol=1e-6, atol=1e-6)


def test_weight_one_of_one_file_is_that_file(files: Path, tmp_path: Path) -> None:
    save_merged(Recipe.parse(recipe(files, "linear", {X: {"weight": 1}})), tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"model.safetensors", "mergekit_config.yml"}
    found, expected = load_file(tmp_path / "out/model.safetensors"), load_file(files / X)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert all(found[key].dtype == expected[key].dtype for key in expected)


def test_a_result_of_files_is_a_file_to_others(files: Path) -> None:
    inner = recipe(files, "linear", {X: {"weight": 1}, Y: {"weight": 1}})
    config = {
        "merge_method": "passthrough",
        "models": [{"model": "half"}],
        "intermediate": {"half": inner},
    }
    found, expected = (dict(merged_tensors(Recipe.parse(c))) for c in (config, inner))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("models", "options", "said"),
    [
        ({X: {}, "fewer.safetensors": {}}, {}, "bias is missing .* or choose --tensor-intersection"),
        ({X: {}, "other.safetensors": {}}, {}, r"bias is \[4\] against \[3\]"),
        ({X: {}, "llama": {}}, {}, "is a file of weights and .* a whole model"),
        ({"llama": {}}, {"tensors": "union"}, "--tensor-union is for files of weights"),
        ({"bad.pt": {}}, {}, "nothing in a .bin file is ever run"),
        ({"notes.txt": {}}, {}, "is a file; name the folder .* or a file of weights"),
    ],
)
def test_what_does_not_fit_is_refused(
    files: Path, llamas: Any, models: dict[str, Any], options: dict[str, str], said: str
) -> None:
    (files / "notes.txt").write_text("no weights")
    torch.save({"a": pytest.approx}, files / "bad.pt")
    config = recipe(files, "linear", models)
    for entry in config["models"]:
        entry["model"] = entry["model"].replace(str(files / "llama"), llamas.x)
    with pytest.raises(CheckpointError, match=said):
        merged_tensors(Recipe.parse(config), **options)
