"""Writing a model folder: the format, the memory it takes, and what is left when it fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from merge_core.checkpoint.read import Checkpoint
from merge_core.checkpoint.safetensors_file import ITEM_BYTES
from merge_core.checkpoint.write import DEFAULT_SHARD_BYTES, complete_folder, write_shards
from merge_core.errors import OutputError

ROOT = Path(__file__).parents[2]
Tensors = dict[str, torch.Tensor]


def announced(tensors: Tensors) -> list[tuple[str, str, tuple[int, ...]]]:
    return [
        (name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for name, tensor in tensors.items()
    ]


def write(tensors: Tensors, folder: Path, shard_bytes: int = DEFAULT_SHARD_BYTES) -> int:
    folder.mkdir(exist_ok=True)
    return write_shards(announced(tensors), tensors.items(), folder, shard_bytes)


def tensor_of(dtype: str, *shape: int) -> torch.Tensor:
    """Any bits at all, but only 0 and 1 for booleans."""
    n_bytes = ITEM_BYTES[dtype] * int(torch.tensor(shape).prod())
    generator = torch.Generator().manual_seed(n_bytes)
    high = 2 if dtype == "bool" else 256
    bits = torch.randint(0, high, (n_bytes,), dtype=torch.uint8, generator=generator)
    return bits.view(getattr(torch, dtype)).reshape(shape)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(found: Tensors, expected: Tensors) -> bool:
    return set(found) == set(expected) and all(
        found[name].dtype == tensor.dtype
        and found[name].shape == tensor.shape
        and bits(found[name]) == bits(tensor)
        for name, tensor in expected.items()
    )


def loaded(folder: Path) -> Tensors:
    found: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as f:
            assert f.metadata() == {"format": "pt"}
            found.update({name: f.get_tensor(name) for name in f.keys()})  # noqa: SIM118
    return found


# ---- the format ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ITEM_BYTES)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (4, 0, 2)], ids=str)
def test_every_dtype_and_shape_is_read_back_bit_for_bit(tmp_path, dtype, shape):
    tensors = {"t": tensor_of(dtype, *shape), "u": tensor_of(dtype, 2)}
    assert write(tensors, tmp_path) == sum(tensor.nbytes for tensor in tensors.values())
    assert same(loaded(tmp_path), tensors)
    checkpoint = Checkpoint(str(tmp_path))
    assert same({name: checkpoint.read(name) for name in checkpoint.tensors}, tensors)


@settings(max_examples=60, deadline=None)
@given(
    kinds=st.lists(
        st.tuples(st.sampled_from(list(ITEM_BYTES)), st.lists(st.integers(0, 5), max_size=3)), max_size=9
    ),
    shard_bytes=st.sampled_from([-1, 0, 1, 40, 10**9]),
)
def test_any_mix_of_dtypes_is_read_back_in_shards_of_any_size(tmp_path_factory, kinds, shard_bytes):
    folder = tmp_path_factory.mktemp("mix")
    tensors = {f"t{i}": tensor_of(dtype, *shape) for i, (dtype, shape) in enumerate(kinds)}
    total = write(tensors, folder, shard_bytes)
    assert total == sum(tensor.nbytes for tensor in tensors.values())
    assert same(loaded(folder), tensors)
    assert list(Checkpoint(str(folder)).tensors) == list(tensors)
    for file in folder.glob("*.safetensors"):
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        assert length % 8 == 0
        header = json.loads(content[8 : 8 + length])
        assert header.pop("__metadata__") == {"format": "pt"}
        for entry in header.values():  # readers that map the file need aligned tensors
            size = ITEM_BYTES[str(tensor_dtype(entry["dtype"]))]
            assert entry["data_offsets"][0] % size == 0
        held = sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in header.values())
        assert shard_bytes <= 0 or len(header) == 1 or held <= shard_bytes


def tensor_dtype(stored: str) -> str:
    from merge_core.checkpoint.safetensors_file import _DTYPES

    return _DTYPES[stored][0]


def test_a_file_holds_what_safetensors_own_writer_would_put_there(tmp_path):
    tensors = {name: torch.randn(7, 3) for name in ("a", "b", "c")}
    write(tensors, tmp_path / "ours")
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    ours, theirs = (
        (tmp_path / "ours/model.safetensors").read_bytes(),
        (tmp_path / "theirs.safetensors").read_bytes(),
    )
    assert len(ours) == len(theirs)
    assert ours[-7 * 3 * 4 * 3 :] == theirs[-7 * 3 * 4 * 3 :]


def test_strided_and_shared_tensors_and_parameters_are_written_as_they_look(tmp_path):
    whole = torch.arange(24.0).reshape(4, 6)
    tensors = {"t": whole.t(), "s": whole[::2, 1:3], "e": whole[0, :1].expand(5), "w": whole}
    tensors["p"] = torch.nn.Parameter(whole.clone())
    write(tensors, tmp_path)
    assert same(loaded(tmp_path), {name: tensor.detach() for name, tensor in tensors.items()})


def test_the_index_names_every_tensors_shard_and_the_size_of_all(tmp_path):
    tensors = {f"t{i}": torch.full((10,), float(i)) for i in range(7)}
    assert write(tensors, tmp_path, shard_bytes=100) == 280
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 280}
    files = [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert sorted(p.name for p in tmp_path.iterdir()) == [*files, "model.safetensors.index.json"]
    assert index["weight_map"] == {f"t{i}": files[i // 2] for i in range(7)}
    for i in range(7):
        assert f"t{i}" in load_file(tmp_path / files[i // 2])


def test_transformers_loads_shards_of_mixed_dtypes(llamas, tmp_path):
    from transformers import AutoModelForCausalLM

    from merge_core.merge import save_merged
    from merge_core.plan import model_alone

    save_merged(model_alone(llamas.x), tmp_path / "out", shard_bytes=50_000)
    found, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    expected = load_file(Path(llamas.x) / "model.safetensors")
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("shard_bytes", [0, 60_000])
def test_the_files_are_the_same_bytes_whatever_the_number_of_threads(
    llamas, tmp_path, n_threads, shard_bytes
):
    from merge_core.merge import save_merged
    from merge_core.recipe import Recipe

    entry = {"model": llamas.x, "parameters": {"weight": 0.3, "density": 0.4}}
    recipe = Recipe.parse({"merge_method": "ties", "base_model": llamas.base, "models": [entry]})
    contents = []
    for n in (1, 2, 3):
        n_threads(n)
        out = tmp_path / str(n) / "out"
        save_merged(recipe, out, shard_bytes=shard_bytes)
        contents.append({p.name: p.read_bytes() for p in out.iterdir()})
    assert contents[0] == contents[1] == contents[2]


# ---- a stream that is not what was announced ----------------------------------------------------

ONE = torch.zeros(2, 3)
STREAMS: dict[str, tuple[list[tuple[str, torch.Tensor]], str]] = {
    "another name": ([("a", ONE), ("c", ONE)], r"\('c', .* came where \('b', .* was announced"),
    "another order": ([("b", ONE), ("a", ONE)], r"\('b', .* came where \('a', "),
    "another dtype": ([("a", ONE.half()), ("b", ONE)], r"'float16', .* came where \('a', 'float32'"),
    "another shape": ([("a", ONE), ("b", ONE[:1])], r"\(1, 3\)\) came where \('b'"),
    "too few": ([("a", ONE)], r"nothing came where \('b'"),
    "too many": ([("a", ONE), ("b", ONE), ("c", ONE)], r"tensor c came after the last"),
}


@pytest.mark.parametrize(("stream", "expected"), STREAMS.values(), ids=STREAMS)
def test_a_stream_that_is_not_the_one_announced_is_an_error_of_ours(tmp_path, stream, expected):
    layout = announced({"a": ONE, "b": ONE})
    with (
        pytest.raises(RuntimeError, match=expected),
        complete_folder(tmp_path / "out", overwrite=False) as part,
    ):
        write_shards(layout, stream, part)
    assert list(tmp_path.iterdir()) == []


# ---- memory -------------------------------------------------------------------------------------

MEMORY = """
import sys, torch
from pathlib import Path
from merge_core.checkpoint.write import write_shards

def private_mb():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024

n, rows = 30, 2_500_000  # 10 MB each
layout = [(f"t{i}", "float32", (rows,)) for i in range(n)]
write_shards([("t", "float32", (9,))], [("t", torch.ones(9))], Path(sys.argv[1]))
before, peak = private_mb(), 0.0

def stream():
    global peak
    for name, _, shape in layout:
        tensor = torch.ones(shape)
        peak = max(peak, private_mb())
        yield name, tensor
        peak = max(peak, private_mb())
        del tensor

assert write_shards(layout, stream(), Path(sys.argv[1]), int(sys.argv[2])) == n * rows * 4
print(max(peak, private_mb()) - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("shard_bytes", [0, 100_000_000])
def test_no_more_than_a_tensor_is_held(tmp_path, shard_bytes):
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path), str(shard_bytes)],
        capture_output=True,
        text=True,
        # What is let go goes back to the system at once, so that what is held can be seen.
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "MALLOC_MMAP_THRESHOLD_": "1000000",
        },
        check=True,
    )
    assert float(done.stdout) < 15, "MB, of a stream of 300 in tensors of 10"


# ---- what is left when it fails -----------------------------------------------------------------

SLOW = """
import sys, time, torch
from pathlib import Path
from merge_core.checkpoint.write import complete_folder, write_shards

def stream():
    for i in range(100):
        yield f"t{i}", torch.ones(1000)
        print(i, flush=True)
        time.sleep(0.05)

with complete_folder(Path(sys.argv[1]), overwrite=True) as part:
    write_shards([(f"t{i}", "float32", (1000,)) for i in range(100)], stream(), part, 20_000)
"""


def killed(out: Path, script: str = SLOW) -> int:
    """Kill a process in the middle of its writing; return its number, which is then free."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(out)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == "7":
            process.send_signal(signal.SIGKILL)
            break
    assert process.wait(30) == -signal.SIGKILL
    process.stdout.close()
    return process.pid


def held(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("before", ["absent", "full"])
def test_a_killed_merge_leaves_the_output_as_it_was_and_the_next_clears_up(tmp_path, before):
    out = tmp_path / "out"
    if before == "full":
        out.mkdir()
        (out / "mine.txt").write_text("keep")
    pid = killed(out)
    assert out.exists() == (before == "full")
    assert before == "absent" or held(out) == {"mine.txt"}
    assert f"out.part-{pid}" in held(tmp_path)
    with complete_folder(out, overwrite=True) as part:
        assert held(tmp_path) == ({"out"} if before == "full" else set()) | {part.name}
        write({"t": torch.ones(3)}, part)
    assert held(tmp_path) == {"out"}
    assert held(out) == {"model.safetensors"}


def test_a_killed_command_leaves_no_output(llamas, tmp_path):
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(f"merge_method: linear\nmodels:\n  - model: {llamas.x}\n")
    script = f"""
import sys, time
import merge_core.checkpoint.write as write
from evolve.cli import main
whole = write._checked_bytes
def slowed(announced, name, tensor, count=[0]):
    print(count[0], flush=True)
    count[0] += 1
    time.sleep(0.05)
    return whole(announced, name, tensor)
write._checked_bytes = slowed
out = sys.argv[1]
sys.argv = ["evolve", "merge", {str(recipe)!r}, out]
main()
"""
    pid = killed(tmp_path / "out", script)
    assert held(tmp_path) == {"recipe.yml", f"out.part-{pid}"}
    command = [sys.executable, "-m", "evolve.cli", "merge", str(recipe), str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert held(tmp_path) == {"recipe.yml", "out"}
    assert {"model.safetensors", "config.json"} <= held(tmp_path / "out")


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def dead() -> int:
    return dead_pid()


def test_only_leftovers_of_dead_processes_and_of_this_output_are_cleared(tmp_path, dead):
    kept = {
        f"out.part-{os.getppid()}",  # at work
        "out.part-1",
        f"other.part-{dead}",
        f"out.part-{dead}.txt",
        f"my-out.part-{dead}",
        "out.part-x",
        "outs",
    }
    for name in (*kept, f"out.part-{dead}", f"out.part-{os.getpid()}", "out.part-99999999999999999999"):
        (tmp_path / name / "deep").mkdir(parents=True)
    with complete_folder(tmp_path / "out", overwrite=False):
        pass
    assert held(tmp_path) == {*kept, "out"}


def test_an_overwrite_killed_between_its_renames_is_undone(tmp_path, dead):
    (tmp_path / f"out.part-old-{dead}").mkdir()
    (tmp_path / f"out.part-old-{dead}/mine.txt").write_text("keep")
    (tmp_path / f"out.part-{dead}").mkdir()
    with (
        pytest.raises(OutputError, match="not empty; add --overwrite"),
        complete_folder(tmp_path / "out", overwrite=False),
    ):
        pass
    assert held(tmp_path) == {"out"}
    assert held(tmp_path / "out") == {"mine.txt"}


def test_what_an_overwrite_replaced_is_not_put_back_once_the_new_model_is_there(tmp_path, dead):
    (tmp_path / "out").mkdir()
    (tmp_path / f"out.part-old-{dead}").mkdir()
    with complete_folder(tmp_path / "out", overwrite=True) as part:
        (part / "new").touch()
    assert held(tmp_path) == {"out"}
    assert held(tmp_path / "out") == {"new"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one mebibyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    try:
        done = subprocess.run(mount, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no mount here")
    if done.returncode:
        pytest.skip("may not mount here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def large(n: int) -> Iterable[tuple[str, torch.Tensor]]:
    return ((f"t{i}", torch.ones(50_000)) for i in range(n))


@pytest.mark.parametrize("shard_bytes", [0, 1, 400_000])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_full_disk_is_one_clear_error_and_leaves_no_half_model(small_disk, shard_bytes, overwrite):
    layout = [(f"t{i}", "float32", (50_000,)) for i in range(9)]
    if overwrite:
        (small_disk / "out").mkdir()
        (small_disk / "out/mine.txt").write_text("keep")
    with (
        pytest.raises(OutputError, match="No space left on device") as caught,
        complete_folder(small_disk / "out", overwrite) as part,
    ):
        write_shards(layout, large(9), part, shard_bytes)
    (fault,) = caught.value.faults
    assert fault.startswith(f"OUT {small_disk / 'out'} could not be written")
    assert "\n" not in fault
    assert held(small_disk) == ({"out"} if overwrite else set())
    assert not overwrite or held(small_disk / "out") == {"mine.txt"}
    with complete_folder(small_disk / "out", overwrite) as part:  # what does fit is written
        write_shards(layout[:4], large(4), part, shard_bytes)
    assert len(Checkpoint(str(small_disk / "out")).tensors) == 4


def test_a_command_that_would_fill_the_disk_is_refused_in_one_line(llamas, small_disk, tmp_path):
    for i in range(4):
        (small_disk / f"ballast{i}").write_bytes(bytes(200_000))
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(f"merge_method: linear\nmodels:\n  - model: {llamas.x}\n")
    before = held(small_disk)
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "evolve.cli", "merge", str(recipe), str(small_disk / "out")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert time.monotonic() - begun < 60
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "free; the merge writes" in line
    assert held(small_disk) == before
