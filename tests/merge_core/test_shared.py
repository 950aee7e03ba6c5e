"""Tensors that several processes make once and map together."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from merge_core.machine import divide_memory
from merge_core.residence import available_host_bytes, host_share_bytes
from merge_core.shared import SharedTensors, remove_shared
from merge_core.sources import Sources

from ..conftest import Family


def never() -> Tensor:
    raise AssertionError("it is there already")


def test_what_one_has_made_the_other_maps(tmp_path: Path) -> None:
    one, other = SharedTensors("run", tmp_path), SharedTensors("run", tmp_path)
    made = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    first = one.get("a", (7, 3), torch.bfloat16, lambda: made)
    second = other.get("a", (7, 3), torch.bfloat16, never)
    assert torch.equal(first, made)
    assert torch.equal(second, made)
    first[0, 0] = 5  # nobody may; but it shows that there is one
    assert second[0, 0] == 5
    assert torch.equal(one.get("b", (0, 4), torch.float32, lambda: torch.empty(0, 4)), torch.empty(0, 4))


def test_the_folder_goes_with_the_last(tmp_path: Path) -> None:
    one, other = SharedTensors("run", tmp_path), SharedTensors("run", tmp_path)
    tensor = one.get("a", (2,), torch.float32, lambda: torch.ones(2))
    one.close()
    assert list(tmp_path.iterdir())
    other.close()
    assert not list(tmp_path.iterdir())
    assert torch.equal(tensor, torch.ones(2))


def test_what_killed_processes_left_can_be_removed_but_not_what_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    left = tmp_path / "evolve-shared-run"
    left.mkdir()
    (left / "cast").touch()
    remove_shared("run")
    assert not left.exists()
    used = SharedTensors("run")
    remove_shared("run", patience_s=0.2)
    assert left.exists()
    used.close()


def test_what_a_killed_process_left_goes_with_the_next(tmp_path: Path) -> None:
    code = (
        "import os, sys, torch; from pathlib import Path; from merge_core.shared import SharedTensors\n"
        "shared = SharedTensors('dead', Path(sys.argv[1]))\n"
        "shared.get('a', (2,), torch.float32, lambda: torch.ones(2)); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    (left,) = tmp_path.iterdir()
    assert list(left.iterdir())
    SharedTensors("next", tmp_path).close()
    assert not list(tmp_path.iterdir())


def test_without_room_a_tensor_is_the_process_own(tmp_path: Path) -> None:
    shared = SharedTensors("run", tmp_path)
    shared.close()  # the folder is gone
    assert torch.equal(shared.get("a", (2,), torch.float32, lambda: torch.ones(2)), torch.ones(2))


def test_shared_casts_are_the_casts(
    llamas: Family, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    alone, one, other = Sources(keep=True), *(Sources(keep=True, shared_as="x") for _ in range(2))
    cpu = torch.device("cpu")
    for name in alone.architecture(llamas.x).checkpoint.tensors:
        fetched = [
            sources.residence.fetch(sources.architecture(llamas.x).checkpoint, name, torch.bfloat16, cpu)
            for sources in (alone, one, other)
        ]
        assert torch.equal(fetched[0], fetched[1])
        assert torch.equal(fetched[0], fetched[2])
    assert len(list(tmp_path.glob("*/*"))) == len(alone.architecture(llamas.x).checkpoint.tensors)
    one.close()
    other.close()
    assert not list(tmp_path.iterdir())


def test_what_processes_keep_alone_they_divide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("merge_core.machine._n_processes", 1)
    assert host_share_bytes() == pytest.approx(available_host_bytes(), rel=0.1)
    divide_memory(4)
    assert host_share_bytes() == pytest.approx(available_host_bytes() / 4, rel=0.1)
