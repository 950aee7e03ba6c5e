"""Reading checkpoints: safetensors and .bin give the same tensors, and damage is one clear line."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import pickle
import shutil
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_core.checkpoint.read import Checkpoint
from merge_core.errors import CheckpointError

ROOT = Path(__file__).parents[2]
LAYER = "model.layers.0.mlp.up_proj.weight"


def named(*names: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(names))
    return {name: torch.randn(3, 5, generator=generator) for name in names}


def save_bin(tensors: Any, path: Path, zipped: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    return path.parent


def save_safetensors(tensors: dict[str, torch.Tensor], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt"})
    return path.parent


def sharded(folder: Path, kind: str, shards: dict[str, dict[str, torch.Tensor]], index: Any) -> Path:
    """Write shards, named by a stem each, and an index of stems."""
    stem, save = {
        "safetensors": ("model.safetensors", save_safetensors),
        "bin": ("pytorch_model.bin", save_bin),
    }[kind]
    for name, tensors in shards.items():
        save(tensors, folder / f"{name}.{kind}")
    weight_map = {tensor: f"{file}.{kind}" for tensor, file in index.items()}
    (folder / f"{stem}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def same(checkpoint: Checkpoint, tensors: dict[str, torch.Tensor]) -> bool:
    read = {name: checkpoint.read(name) for name in checkpoint.tensors}
    return list(read) == list(tensors) and all(
        torch.equal(read[name], tensor)
        and read[name].is_contiguous()
        and checkpoint.tensors[name].shape == tuple(tensor.shape)
        and checkpoint.tensors[name].dtype == str(read[name].dtype).removeprefix("torch.")
        for name, tensor in tensors.items()
    )


def fault_of(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(str(folder))
    (fault,) = caught.value.faults
    assert str(folder) in fault
    assert "\n" not in fault
    assert len(fault) < 1000
    return fault


# ---- what is read -------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("container", [dict, OrderedDict])
def test_a_bin_file_gives_its_tensors(tmp_path, zipped, container):
    tensors = {
        "weight": torch.randn(7, 3),
        "half": torch.randn(5).bfloat16(),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
        "scalar": torch.tensor(3.0),
        "none": torch.empty(0, 4),
        "ids": torch.arange(6),
        "mask": torch.tensor([True, False]),
    }
    folder = save_bin(container(tensors), tmp_path / "pytorch_model.bin", zipped)
    checkpoint = Checkpoint(str(folder))
    assert same(checkpoint, tensors)
    floating = {name for name, info in checkpoint.tensors.items() if info.is_floating}
    assert floating == {"weight", "half", "parameter", "scalar", "none"}
    assert not checkpoint.read("parameter").requires_grad


def test_shared_storages_and_strided_views_are_the_right_tensors(tmp_path):
    whole = torch.arange(60.0).reshape(6, 10)
    tensors = {
        "whole": whole,
        "again": whole,
        "rows": whole[2:5],
        "columns": whole[:, 3:7],
        "transposed": whole.t(),
        "every second": whole[::2, ::2],
        "expanded": whole[0, :1].expand(4),
        "one": whole[3, 4],
    }
    folder = save_bin(tensors, tmp_path / "pytorch_model.bin")
    checkpoint = Checkpoint(str(folder))
    assert same(checkpoint, tensors)
    assert checkpoint.read("whole").data_ptr() == checkpoint.read("again").data_ptr()
    for name in tensors:
        checkpoint.prefetch(name)


def test_a_compressed_bin_file_is_read_as_well(tmp_path):
    tensors = {"a": torch.zeros(2000), "b": torch.arange(500.0)}
    folder = save_bin(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "stored")
    with (
        zipfile.ZipFile(tmp_path / "stored") as stored,
        zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for record in stored.infolist():
            packed.writestr(record.filename, stored.read(record))
    assert same(Checkpoint(str(folder)), tensors)


def test_a_merge_of_bin_models_is_that_of_safetensors_models(llamas, tmp_path):
    from merge_core.merge import merged_tensors
    from merge_core.recipe import Recipe

    def merge(*models: str) -> dict[str, torch.Tensor]:
        entries = [{"model": model, "parameters": {"weight": 0.4}} for model in models]
        return dict(merged_tensors(Recipe.parse({"merge_method": "linear", "models": entries})))

    folders = []
    for name in ("x", "y"):
        shutil.copytree(getattr(llamas, name), tmp_path / name)
        tensors = load_file(tmp_path / name / "model.safetensors")
        (tmp_path / name / "model.safetensors").unlink()
        folders.append(str(tmp_path / name))
        if name == "x":
            save_bin(tensors, tmp_path / "x/pytorch_model.bin")
        else:
            names = sorted(tensors)
            cut = {"s1": names[:9], "s2": names[9:]}
            shards = {shard: {n: tensors[n] for n in part} for shard, part in cut.items()}
            index = {n: shard for shard, part in cut.items() for n in part}
            sharded(tmp_path / "y", "bin", shards, index)
    expected = merge(llamas.x, llamas.y)
    found = merge(*folders)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_safetensors_are_preferred_and_the_bin_beside_them_is_not_touched(tmp_path):
    tensors = named(LAYER)
    save_safetensors(tensors, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"no pickle")
    (tmp_path / "pytorch_model.bin.index.json").write_text("{")
    assert same(Checkpoint(str(tmp_path)), tensors)
    (tmp_path / "model.safetensors").unlink()
    sharded(tmp_path, "safetensors", {"s": tensors}, {LAYER: "s"})
    assert same(Checkpoint(str(tmp_path)), tensors)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_several_threads_read_at_once(tmp_path, kind):
    shards = {f"s{i}": named(*(f"t{i}.{j}" for j in range(i + 1))) for i in range(8)}
    index = {name: shard for shard, tensors in shards.items() for name in tensors}
    checkpoint = Checkpoint(str(sharded(tmp_path, kind, shards, index)))
    names = list(index) * 20
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(checkpoint.read, names))
    assert all(
        torch.equal(tensor, shards[index[name]][name]) for name, tensor in zip(names, read, strict=True)
    )


MEMORY = """
import sys, torch
from pathlib import Path
from merge_core.checkpoint.read import Checkpoint

def private_mb():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024

torch.ones(1).sum()
Checkpoint(sys.argv[1]).read("small")  # what opening imports is not what it holds
before = private_mb()
checkpoint = Checkpoint(sys.argv[2])
opened = private_mb() - before
total = sum(float(checkpoint.read(name)[::512].sum()) for name in checkpoint.tensors)
print(opened, private_mb() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("save", [save_safetensors, save_bin])
def test_opening_and_reading_take_no_private_memory(tmp_path, save):
    file = "model.safetensors" if save is save_safetensors else "pytorch_model.bin"
    save({"small": torch.ones(2)}, tmp_path / "small" / file)
    save({f"t{i}": torch.ones(4_000_000) for i in range(6)}, tmp_path / "large" / file)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "small"), str(tmp_path / "large")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=True,
    )
    opened, read = map(float, done.stdout.split())
    assert opened < 8, "MB, of 96"
    assert read < 8, "MB, of 96"


def resident_pages(path: Path) -> list[bool]:
    """Tell of each page of a file whether it is in memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("r+b") as f, mmap.mmap(f.fileno(), 0) as mapped:
        n_pages = -(-len(mapped) // mmap.PAGESIZE)
        pages = (ctypes.c_ubyte * n_pages)()
        address = ctypes.addressof(anchor := ctypes.c_char.from_buffer(mapped))
        assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(mapped)), pages) == 0
        del anchor
        return [bool(page & 1) for page in pages]


@pytest.mark.skipif(sys.platform != "linux", reason="asks the page cache")
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_prefetch_brings_a_tensors_bytes_and_few_others(tmp_path, kind):
    file = tmp_path / {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}[kind]
    save = save_safetensors if kind == "safetensors" else save_bin
    # The last one is wanted: what the system reads ahead of itself after the header is not it.
    save({f"t{i}": torch.ones(2_000_000) for i in range(4)}, file)
    with file.open("r+b") as f:
        os.fsync(f.fileno())
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if any(resident_pages(file)):
        pytest.skip("this file system does not let go of its cache")
    checkpoint = Checkpoint(str(tmp_path))
    before = sum(resident_pages(file))
    checkpoint.prefetch("t3")
    view = checkpoint.read("t3")
    for _ in range(2000):  # a hint, which a busy disk follows late
        brought = sum(resident_pages(file)) - before
        if brought * mmap.PAGESIZE >= view.nbytes * 0.5:
            break
        time.sleep(0.01)
    assert view.nbytes * 0.5 <= brought * mmap.PAGESIZE <= view.nbytes * 2


# ---- fingerprints -------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_bin_files_fingerprint_changes_with_its_contents_and_only_then(tmp_path, zipped):
    prints = []
    for folder, value in (("a", 1.0), ("b", 1.0), ("c", 2.0)):
        tensors = {"t": torch.full((9,), value)}
        save_bin(tensors, tmp_path / folder / "pytorch_model.bin", zipped)
        prints.append(Checkpoint(str(tmp_path / folder)).fingerprint())
    if zipped:  # the legacy format stores addresses of this process
        assert prints[0] == prints[1]
    assert prints[0] != prints[2]
    assert Checkpoint(str(tmp_path / "a")).fingerprint() == prints[0]


# ---- damage: safetensors ------------------------------------------------------------------------


def with_header(header: Any, n_bytes: int) -> Callable[[Path], None]:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text + bytes(n_bytes)
    return lambda path: path.write_bytes(content)


def spans(*offsets: tuple[int, int]) -> dict[str, Any]:
    return {
        f"t{i}": {"dtype": "F32", "shape": [(b - a) // 4], "data_offsets": [a, b]}
        for i, (a, b) in enumerate(offsets)
    }


def entry(**changes: Any) -> dict[str, Any]:
    return {"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


SAFETENSORS_DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "does not fit its 0 bytes"),
    "seven bytes": (lambda path: path.write_bytes(b"1234567"), "does not fit its 7 bytes"),
    "cut in the header": (
        lambda path: path.write_bytes((99).to_bytes(8, "little") + b'{"t": '),
        "header does not fit",
    ),
    "a header of 2^63 bytes": (lambda path: path.write_bytes(b"\xff" * 100), "header does not fit"),
    "cut in the data": (with_header(spans((0, 8)), 4), "bytes where its header says"),
    "bytes to spare": (with_header(spans((0, 8)), 12), "bytes where its header says"),
    "overlap": (with_header(spans((0, 8), (4, 12)), 12), "tensor t1 overlap those before"),
    "one within another": (with_header(spans((0, 16), (4, 8)), 16), "tensor t1 overlap"),
    "the same bytes twice": (with_header(spans((0, 8), (0, 8)), 8), "tensor t1 overlap"),
    "a hole": (with_header(spans((0, 4), (8, 12)), 12), "tensor t1 are apart"),
    "a hole before all": (with_header(spans((4, 8)), 8), "tensor t0 are apart"),
    "no JSON": (with_header(b"{", 0), "header cannot be read"),
    "no UTF-8": (with_header(b'{"\xff": 1}', 0), "header cannot be read"),
    "deep JSON": (with_header(b"[" * 100_000, 0), "header cannot be read"),
    "a number": (with_header(3, 0), "header cannot be read"),
    "no dtype": (with_header({"t": {"shape": [2], "data_offsets": [0, 8]}}, 8), "cannot be read"),
    "a dtype of numbers": (with_header(entry(dtype=[1]), 8), "header cannot be read"),
    "a negative shape": (with_header(entry(shape=[-1, -2]), 8), "header cannot be read"),
    "a shape that is a text": (with_header(entry(shape="ab"), 8), "header cannot be read"),
    "a shape that is too large": (with_header(entry(shape=[3]), 8), "header cannot be read"),
    "true for an offset": (with_header(entry(data_offsets=[False, 8]), 8), "header cannot be read"),
    "three offsets": (with_header(entry(data_offsets=[0, 4, 8]), 8), "header cannot be read"),
    "backward offsets": (with_header(entry(data_offsets=[8, 0]), 8), "header cannot be read"),
    "an unknown dtype": (with_header(entry(dtype="F4"), 8), "holds t as 'F4', which cannot be read"),
}


@pytest.mark.parametrize(("damage", "expected"), SAFETENSORS_DAMAGES.values(), ids=SAFETENSORS_DAMAGES)
def test_a_damaged_safetensors_file_is_one_clear_error(tmp_path, damage, expected):
    damage(tmp_path / "model.safetensors")
    assert expected in fault_of(tmp_path)


def test_a_file_that_is_replaced_after_it_was_opened_is_one_clear_error(tmp_path):
    save_safetensors(named("a", "b"), tmp_path / "model.safetensors")
    checkpoint = Checkpoint(str(tmp_path))
    save_safetensors(named("c"), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"is damaged: tensor b cannot be read"):
        checkpoint.read("b")


# ---- damage: .bin -------------------------------------------------------------------------------


class Harmful:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


class Evaluated(Harmful):
    def __reduce__(self) -> Any:
        return eval, (f"__import__('os').mkdir({str(self.path)!r})",)


class OfTorch(Harmful):
    """What loads code through torch itself."""

    def __reduce__(self) -> Any:
        return torch.load, (str(self.path),)


def pickled(value: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(value, protocol=2))


SAVERS: dict[str, Callable[[Any, Path], Any]] = {
    "zip": save_bin,
    "legacy": lambda value, path: save_bin(value, path, zipped=False),
    "plain pickle": pickled,
}


@pytest.mark.parametrize("harm", [Harmful, Evaluated, OfTorch])
@pytest.mark.parametrize("save", SAVERS.values(), ids=SAVERS)
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "bare"])
@pytest.mark.parametrize("forced", [True, False], ids=["forced", "plain"])
def test_a_harmful_pickle_is_refused_and_nothing_in_it_runs(
    tmp_path, monkeypatch, harm, save, nested, forced
):
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    value = harm(tmp_path / "harm")
    save({LAYER: torch.ones(2), "x": value} if nested else value, tmp_path / "pytorch_model.bin")
    fault = fault_of(tmp_path)
    assert "nothing in a .bin file is ever run" in fault or "damaged or no file of weights" in fault
    assert not (tmp_path / "harm").exists()


def test_the_refusal_names_what_the_pickle_asked_to_run(tmp_path):
    save_bin({"x": Harmful(tmp_path / "harm")}, tmp_path / "pytorch_model.bin")
    assert "asks to run posix.mkdir, and nothing" in fault_of(tmp_path)


def cut(path: Path, zipped: bool = True) -> None:
    save_bin({"t": torch.ones(5000)}, path, zipped)
    with path.open("r+b") as f:
        f.truncate(path.stat().st_size // 2)


CONTENTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "damaged or no file of weights"),
    "zeros": (lambda path: path.write_bytes(bytes(100)), "damaged or no file of weights"),
    "text": (lambda path: path.write_text("hello"), "damaged or no file of weights"),
    "a zip of nothing": (lambda path: path.write_bytes(b"PK\x03\x04" * 9), "damaged or no file"),
    "another zip": (
        lambda path: zipfile.ZipFile(path, "w").writestr("a", "b"),
        "damaged or no file of weights",
    ),
    "cut": (cut, "damaged or no file of weights"),
    "cut, legacy": (lambda path: cut(path, zipped=False), "damaged or no file of weights"),
    "git-lfs": (
        lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
        "Git LFS pointer and not the weights; run `git lfs pull`",
    ),
    "a nested state_dict": (
        lambda path: save_bin({"state_dict": named(LAYER), "epoch": 3}, path),
        "entry 'state_dict' is a dict, and a state_dict has names and tensors only; save the flat",
    ),
    "a number among tensors": (
        lambda path: save_bin({**named(LAYER), "epoch": 3}, path),
        "entry 'epoch' is a int",
    ),
    "a number for a name": (lambda path: save_bin({3: torch.ones(2)}, path), "entry 3 is a Tensor"),
    "a tensor": (lambda path: save_bin(torch.ones(2), path), "holds a Tensor and not a state_dict"),
    "a list": (lambda path: save_bin([torch.ones(2)], path), "holds a list and not a state_dict"),
    "a module": (lambda path: save_bin(torch.nn.Linear(2, 2), path), "asks to run torch.nn."),
    "sparse": (lambda path: save_bin({"t": torch.eye(3).to_sparse()}, path), "torch.sparse_coo"),
    "meta": (lambda path: save_bin({"t": torch.ones(3, device="meta")}, path), "on meta"),
    "complex": (
        lambda path: save_bin({"t": torch.ones(3, dtype=torch.complex128)}, path),
        "tensor t is torch.complex128",
    ),
}


@pytest.mark.parametrize(("write", "expected"), CONTENTS.values(), ids=CONTENTS)
def test_a_bin_file_that_is_no_flat_state_dict_is_one_clear_error(tmp_path, write, expected):
    write(tmp_path / "pytorch_model.bin")
    assert expected in fault_of(tmp_path)


# ---- damage: indexes ----------------------------------------------------------------------------

A, B = named("a"), named("b")
INDEXES: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {
    "a missing shard": ({"s": A}, {"a": "s", "b": "gone"}, "shard gone.{kind} is missing in"),
    "a tensor its shard lacks": (
        {"s": A, "r": B},
        {"a": "s", "c": "r"},
        "the index says that c is in r.{kind}, which does not hold it; restore",
    ),
    "a tensor in two shards": (
        {"s": A, "r": {**A, **B}},
        {"a": "s", "b": "r"},
        "a is in r.{kind} and in s.{kind}; restore",
    ),
    "outside": ({"s": A}, {"a": "s", "b": "../s"}, "names '../s.{kind}'; shards must lie in"),
    "absolute": ({"s": A}, {"a": "/etc/s"}, "names '/etc/s.{kind}'; shards must lie in"),
    "in a subfolder": ({"s": A}, {"a": "sub/s"}, "names 'sub/s.{kind}'; shards must lie in"),
    "nothing": ({"s": A}, {}, "index.json names no tensors"),
}


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize(("shards", "index", "expected"), INDEXES.values(), ids=INDEXES)
def test_an_index_that_does_not_fit_is_one_clear_error(tmp_path, kind, shards, index, expected):
    sharded(tmp_path, kind, shards, index)
    assert expected.format(kind=kind) in fault_of(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"weight_map": 3}', "[" * 100_000])
@pytest.mark.parametrize("stem", ["model.safetensors", "pytorch_model.bin"])
def test_an_index_that_is_none_is_one_clear_error(tmp_path, stem, text):
    (tmp_path / f"{stem}.index.json").write_text(text)
    assert "is not a valid index" in fault_of(tmp_path)


def test_a_damaged_shard_is_named(tmp_path):
    sharded(tmp_path, "bin", {"s": A, "r": B}, {"a": "s", "b": "r"})
    (tmp_path / "r.bin").write_bytes(b"")
    assert "r.bin is damaged" in fault_of(tmp_path)


def test_a_folder_without_weights_says_what_would_be_read(tmp_path):
    fault = fault_of(tmp_path)
    for file in ("model.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json"):
        assert file in fault
