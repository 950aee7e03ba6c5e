"""Where source tensors live: the decision as a function of bytes, and what fetching returns."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from merge_core.checkpoint.read import Checkpoint
from merge_core.errors import CheckpointError
from merge_core.residence import Residence, available_host_bytes, plan_residence

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
# Stands in for an accelerator: its tensors have no bytes, but everything else of a device.
META = torch.device("meta")
# Bytes in float32: 400, 800, ..., 3200.
TENSORS = {f"t{i}": torch.randn(i * 100, generator=torch.Generator().manual_seed(i)) for i in range(1, 9)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("model")
    save_file(TENSORS, folder / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint(str(folder))


# ---- the decision -------------------------------------------------------------------------------


def test_the_largest_go_to_the_device_then_to_the_host_and_the_rest_stays_mapped():
    sizes = {"a": 1, "b": 5, "c": 3, "d": 4, "e": 2}
    assert plan_residence(sizes, 9, 3) == {
        "a": "mapped",
        "b": "device",
        "c": "pinned",
        "d": "device",
        "e": "mapped",
    }


def test_what_is_too_large_for_a_budget_leaves_it_to_smaller_ones():
    assert plan_residence({"a": 10, "b": 4, "c": 3}, 5, 4) == {
        "a": "mapped",
        "b": "device",
        "c": "pinned",
    }


def test_equal_sizes_go_in_the_order_given():
    sizes = dict.fromkeys("zyx", 2)
    assert plan_residence(sizes, 2, 2) == {"z": "device", "y": "pinned", "x": "mapped"}


@pytest.mark.parametrize(
    ("budgets", "expected"), [((99, 0), "device"), ((0, 99), "pinned"), ((0, 0), "mapped")], ids=str
)
def test_one_budget_that_holds_all(budgets, expected):
    assert set(plan_residence({"a": 40, "b": 59}, *budgets).values()) == {expected}


@given(
    sizes=st.dictionaries(st.text(max_size=3), st.integers(0, 50), max_size=12),
    device=st.integers(0, 200),
    host=st.integers(0, 200),
)
def test_no_budget_is_exceeded_and_none_is_left_that_would_hold_more(sizes, device, host):
    places = plan_residence(sizes, device, host)
    assert list(places) == list(sizes)
    held = {
        at: sum(sizes[name] for name in sizes if places[name] == at)
        for at in ("device", "pinned", "mapped")
    }
    assert held["device"] <= device
    assert held["pinned"] <= host
    for name, place in places.items():
        if place != "device":
            assert sizes[name] > device - held["device"]
        if place == "mapped":
            assert sizes[name] > host - held["pinned"]


# ---- on the CPU ---------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [False, True])
def test_without_a_cast_it_is_the_mapped_view(checkpoint, keep):
    residence = Residence(keep=keep)
    fetched = residence.fetch(checkpoint, "t3", torch.float32, CPU)
    assert fetched.data_ptr() == checkpoint.read("t3").data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("keep", [False, True])
def test_a_cast_is_torchs_own(checkpoint, dtype, keep):
    residence = Residence(keep=keep)
    for _ in range(2):
        for name, tensor in TENSORS.items():
            fetched = residence.fetch(checkpoint, name, dtype, CPU)
            assert fetched.dtype == dtype
            assert torch.equal(fetched, tensor.to(dtype))


def kept(residence: Residence, checkpoint: Checkpoint, dtype: torch.dtype = torch.bfloat16) -> set[str]:
    """Names whose second fetch is the first one's very tensor."""
    first = {name: residence.fetch(checkpoint, name, dtype, CPU) for name in TENSORS}
    return {n for n in TENSORS if residence.fetch(checkpoint, n, dtype, CPU) is first[n]}


def test_casts_are_kept_within_the_budget_and_only_on_demand(checkpoint):
    assert kept(Residence(), checkpoint) == set()
    assert kept(Residence(keep=True), checkpoint) == set(TENSORS)
    assert kept(Residence(keep=True, host_budget=0), checkpoint) == set()
    # 200 + 400 + 600 bytes in bfloat16, as they come.
    assert kept(Residence(keep=True, host_budget=1300), checkpoint) == {"t1", "t2", "t3"}


def test_announced_casts_are_chosen_by_size(checkpoint):
    residence = Residence(keep=True, host_budget=3300)
    wanted = [(checkpoint, name, torch.bfloat16) for name in TENSORS]
    residence.announce(wanted, CPU)
    residence.announce(wanted, CPU)  # a place once given stays
    assert kept(residence, checkpoint) == {"t8", "t7", "t1"}  # 1600 + 1400 + 200


def test_tensors_that_need_no_cast_take_nothing_from_the_budget(checkpoint):
    residence = Residence(keep=True, host_budget=1600)
    residence.announce([(checkpoint, name, torch.float32) for name in TENSORS], CPU)
    first = residence.fetch(checkpoint, "t8", torch.bfloat16, CPU)
    assert residence.fetch(checkpoint, "t8", torch.bfloat16, CPU) is first


def test_each_dtype_and_each_checkpoint_has_its_own(checkpoint, tmp_path):
    save_file({"t3": TENSORS["t3"] + 1}, tmp_path / "model.safetensors")
    other = Checkpoint(str(tmp_path))
    residence = Residence(keep=True)
    for _ in range(2):
        for dtype in (torch.bfloat16, torch.float64):
            assert torch.equal(residence.fetch(checkpoint, "t3", dtype, CPU), TENSORS["t3"].to(dtype))
            moved = (TENSORS["t3"] + 1).to(dtype)
            assert torch.equal(residence.fetch(other, "t3", dtype, CPU), moved)


def test_prefetch_changes_nothing_but_time(checkpoint):
    for residence in (Residence(), Residence(keep=True)):
        for _ in range(2):
            for name in TENSORS:
                residence.prefetch(checkpoint, name, torch.bfloat16, CPU)
                fetched = residence.fetch(checkpoint, name, torch.bfloat16, CPU)
                assert torch.equal(fetched, TENSORS[name].bfloat16())


def test_a_checkpoint_that_cannot_be_read_is_its_own_error(checkpoint, tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    damaged = Checkpoint(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Residence(keep=True).fetch(damaged, "t1", torch.bfloat16, CPU)


@pytest.mark.parametrize("budget", [0, 3000, 10**6])
@pytest.mark.parametrize("device", [CPU, META], ids=str)
def test_several_threads_fetch_at_once(checkpoint, budget, device):
    for _ in range(5):
        residence = Residence(keep=True, host_budget=budget, device_budget=budget // 2)
        gate = threading.Barrier(8)

        def fetch_all(k: int, residence=residence, gate=gate) -> dict[str, torch.Tensor]:
            gate.wait()
            names = list(TENSORS)[k:] + list(TENSORS)[:k]
            return {n: residence.fetch(checkpoint, n, torch.bfloat16, device) for n in names}

        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(fetch_all, range(8)))
        for name, tensor in TENSORS.items():
            for result in results:
                assert result[name].device == device
                assert result[name].dtype == torch.bfloat16
                assert device == META or torch.equal(result[name], tensor.bfloat16())
            if budget == 10**6:
                assert all(result[name] is results[0][name] for result in results)
        assert residence._host_left >= 0
        assert residence._device_left[device] >= 0


# ---- on a device, as far as one can see without ------------------------------------------------


def test_what_fits_stays_on_the_device_and_what_does_not_is_kept_on_the_host(checkpoint):
    residence = Residence(keep=True, device_budget=3200 + 2800, host_budget=2400 + 2000)
    residence.announce([(checkpoint, name, torch.float32) for name in TENSORS], META)
    first = {name: residence.fetch(checkpoint, name, torch.float32, META) for name in TENSORS}
    again = {name: residence.fetch(checkpoint, name, torch.float32, META) for name in TENSORS}
    assert {name for name in TENSORS if again[name] is first[name]} == {"t8", "t7"}
    assert {t.device for t in again.values()} == {META}
    assert {key[1] for key in residence._kept} == {"t8", "t7", "t6", "t5"}
    on_host = {key[1]: tensor for key, tensor in residence._kept.items() if tensor.device == CPU}
    assert set(on_host) == {"t6", "t5"}
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in on_host.items())


def test_without_keep_nothing_stays_on_a_device(checkpoint):
    residence = Residence(device_budget=10**9, host_budget=10**9)
    first = residence.fetch(checkpoint, "t1", torch.bfloat16, META)
    assert first.device == META
    assert first.dtype == torch.bfloat16
    assert residence.fetch(checkpoint, "t1", torch.bfloat16, META) is not first
    assert not residence._kept


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("place", ["device", "pinned", "mapped"])
def test_on_a_gpu_every_place_gives_the_same_tensor(checkpoint, place):
    device = torch.device("cuda", 0)
    budgets = {"device": (10**6, 0), "pinned": (0, 10**6), "mapped": (0, 0)}[place]
    residence = Residence(keep=True, device_budget=budgets[0], host_budget=budgets[1])
    for _ in range(3):
        for name, tensor in TENSORS.items():
            residence.prefetch(checkpoint, name, torch.bfloat16, device)
            fetched = residence.fetch(checkpoint, name, torch.bfloat16, device)
            assert torch.equal(fetched.cpu(), tensor.bfloat16())


# ---- memory -------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_default_budget_is_half_of_what_is_available():
    available = available_host_bytes()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < available <= total
    assert Residence(keep=True)._host_left == pytest.approx(available / 2, rel=0.2)
    assert Residence()._host_left == 0


def test_a_control_groups_limit_counts(tmp_path, monkeypatch):
    import merge_core.residence

    groups = [(tmp_path, "memory.max", "memory.current")]
    monkeypatch.setattr(merge_core.residence, "_CONTROL_GROUPS", groups)
    machine = available_host_bytes()
    (tmp_path / "memory.current").write_text("70000000\n")
    (tmp_path / "memory.stat").write_text("anon 40000000\ninactive_file 30000000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert available_host_bytes() == pytest.approx(machine, rel=0.1)
    (tmp_path / "memory.max").write_text("100000000\n")
    assert available_host_bytes() == 60_000_000
    (tmp_path / "memory.max").write_text("10000\n")
    assert available_host_bytes() == 0


MEMORY = """
import sys, torch
from pathlib import Path
from merge_core.checkpoint.read import Checkpoint
from merge_core.residence import Residence

def private_mb():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024

checkpoint = Checkpoint(sys.argv[1])
checkpoint.read("t0")[:1].bfloat16()
for residence in (Residence(keep=True), Residence(keep=True, host_budget=25_000_000)):
    for dtype in (torch.float32, torch.bfloat16):
        before = private_mb()
        for _ in range(2):
            for name in checkpoint.tensors:
                residence.fetch(checkpoint, name, dtype, torch.device("cpu"))[:1].sum()
        print(private_mb() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_only_casts_take_memory_and_no_more_than_the_budget(tmp_path):
    tensors = {f"t{i}": torch.ones(5_000_000) for i in range(6)}  # 10 MB each in bfloat16
    save_file(tensors, tmp_path / "model.safetensors")
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=True,
    )
    views, casts, views_again, few_casts = map(float, done.stdout.split())
    assert views < 4
    assert 52 < casts < 68
    assert views_again < 4
    assert 15 < few_casts < 30
