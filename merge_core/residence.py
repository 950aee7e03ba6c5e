"""Where source tensors live between candidates, so that a search does not fetch them anew each time.

On the CPU a source tensor is a view of its mapped file, which is free; only a cast costs, and casts
are kept while they fit. On an accelerator tensors stay on the device while they fit, else in pinned
host memory, from which a copy can run beside the computation, else in the mapped file.

The device part was never run on a GPU; its decisions are tested, its copies only in form.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from threading import Lock
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from merge_core.checkpoint.read import Checkpoint, Update
from merge_core.machine import n_processes
from merge_core.shared import SharedTensors

Place = Literal["device", "pinned", "mapped"]
Name = TypeVar("Name")
# One kept tensor: whose, its name, as what, for where.
_Key = tuple[Checkpoint, str, torch.dtype, torch.device]
# Version 2 and version 1 of control groups, as a container sees its own.
_CONTROL_GROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
)


def plan_residence(sizes: Mapping[Name, int], device_budget: int, host_budget: int) -> dict[Name, Place]:
    """Decide where each tensor lives.

    Every byte kept saves one byte of copying a candidate, so the largest tensors come first: they
    fill a budget with the fewest copies and leave the small ones to fill the gaps. Equal sizes go
    in the order given.

    Args:
        sizes: bytes of each tensor as it would be kept.
        device_budget: bytes on the device.
        host_budget: bytes of host memory.
    """
    places: dict[Name, Place] = dict.fromkeys(sizes, "mapped")
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        if sizes[name] <= device_budget:
            places[name] = "device"
            device_budget -= sizes[name]
        elif sizes[name] <= host_budget:
            places[name] = "pinned"
            host_budget -= sizes[name]
    return places


class Residence:
    """Source tensors, cast and on their device, kept between candidates within budgets.

    Without `keep` nothing is kept, which is right for a single merge. Of a model with an adapter only
    what is stored is kept, the base's tensor in its own dtype; the sum of both is made at each fetch.
    Several threads may fetch and prefetch at the same time.
    """

    def __init__(
        self,
        keep: bool = False,
        host_budget: int | None = None,
        device_budget: int | None = None,
        shared: SharedTensors | None = None,
    ) -> None:
        """Set the budgets, all in bytes.

        Args:
            keep: keep tensors between fetches.
            host_budget: for casts on the CPU, or pinned copies; default half of what is available.
            device_budget: for tensors on the accelerator; default half of what is free on it when
                the first one is asked for, after the engine has taken its part.
            shared: where casts on the CPU are kept together with other processes; None = in this one.
        """
        if host_budget is None:
            available = host_share_bytes() if shared is None else available_host_bytes()
            host_budget = available // 2 if keep else 0
        self._keeps = keep
        self._shared = shared
        self._host_left = host_budget
        self._device_budget = device_budget
        self._device_left: dict[torch.device, int] = {}
        self._places: dict[_Key, Place] = {}
        self._kept: dict[_Key, Tensor] = {}
        self._arriving: dict[_Key, tuple[Tensor, Any]] = {}
        self._streams: dict[torch.device, Any] = {}
        self._lock = Lock()

    def announce(
        self, wanted: Iterable[tuple[Checkpoint, str, torch.dtype]], device: torch.device
    ) -> None:
        """Decide on many tensors together, the largest first; others are decided as they come."""
        if self._keeps:
            with self._lock:
                self._decide([_stored(*source, device)[0] for source in wanted], device)

    def forget(self, checkpoint: Checkpoint) -> None:
        """Drop what is kept of a checkpoint that is not wanted again, and give its memory back."""
        with self._lock:
            for key in [key for key in self._places if key[0] is checkpoint]:
                place = self._places.pop(key)
                self._kept.pop(key, None)
                self._arriving.pop(key, None)
                n_bytes = math.prod(checkpoint.tensors[key[1]].shape) * key[2].itemsize
                if place == "device":
                    self._device_left[key[3]] += n_bytes
                elif place == "pinned":
                    self._host_left += n_bytes

    def places(self) -> dict[Place, int]:
        """Count the tensors that have been decided on, by where they live."""
        return dict(Counter(self._places.values()))

    def fetch(
        self, checkpoint: Checkpoint, name: str, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Return a source tensor, cast to `dtype`, on `device`; never write into it.

        Raises:
            CheckpointError: it cannot be read.
        """
        key, update = _stored(checkpoint, name, dtype, device)
        tensor = self._fetched(key)
        return tensor if update is None else update(tensor, dtype)

    def _fetched(self, key: _Key) -> Tensor:
        checkpoint, name, dtype, device = key
        place = self._place(key)
        if place == "mapped":
            return _on_device(checkpoint.read(name), dtype, device)
        kept = self._kept.get(key)
        if kept is None:
            made = self._made(key, place)
            with self._lock:
                kept = self._kept.setdefault(key, made)
        if place == "device" or device.type == "cpu":
            return kept
        with self._lock:
            arriving = self._arriving.pop(key, None)
        if arriving is None:
            return kept.to(device, non_blocking=True)
        tensor, arrived = arriving
        # The computation waits for the copy; the copy's memory is not reused before it has ended.
        computing = torch.cuda.current_stream(device)
        computing.wait_event(arrived)
        tensor.record_stream(computing)
        return tensor

    def _made(self, key: _Key, place: Place) -> Tensor:
        checkpoint, name, dtype, device = key
        if place == "device":
            return _on_device(checkpoint.read(name), dtype, device)

        def make() -> Tensor:
            return _in_host_memory(checkpoint.read(name), dtype, device)

        # Each candidate may have another result of that name; files of all of them would pile up.
        if self._shared is None or device.type != "cpu" or not checkpoint.is_mapped:
            return make()
        text = f"{checkpoint.identity} {name} {dtype}"
        return self._shared.get(text, checkpoint.tensors[name].shape, dtype, make)

    def prefetch(
        self, checkpoint: Checkpoint, name: str, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Start to bring what the next fetch will want, from disk or over the bus; return at once."""
        key, _ = _stored(checkpoint, name, dtype, device)
        kept = self._kept.get(key)
        if kept is None:
            key[0].prefetch(key[1])
        elif device.type == "cuda" and self._places[key] == "pinned":
            with self._lock:
                if key not in self._arriving:
                    self._arriving[key] = self._sent(kept, device)

    def _sent(self, kept: Tensor, device: torch.device) -> tuple[Tensor, Any]:
        """Start a copy on the device's side stream; return it and the event of its arrival."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream = self._streams[device]
        with torch.cuda.stream(stream):
            return kept.to(device, non_blocking=True), stream.record_event()

    def _place(self, key: _Key) -> Place:
        if not self._keeps:
            return "mapped"
        with self._lock:
            if key not in self._places:
                self._decide([key], key[3])
            return self._places[key]

    def _decide(self, keys: Iterable[_Key], device: torch.device) -> None:
        """Give the tensors that have none a place, and take it from the budgets.

        A place once given stays: every candidate passes over all tensors in the same order, so what
        was thrown out for a newer tensor would be the next one wanted.
        """
        keys = [key for key in keys if key not in self._places]
        if not keys:
            return
        sizes = {}
        for key in keys:
            checkpoint, name, dtype, _ = key
            info = checkpoint.tensors[name]
            is_cast = info.dtype != str(dtype).removeprefix("torch.")
            if device.type == "cpu" and checkpoint.is_mapped and not is_cast:
                self._places[key] = "mapped"  # the view itself, which costs nothing
            else:
                sizes[key] = math.prod(info.shape) * dtype.itemsize
        if device not in self._device_left:
            self._device_left[device] = self._free_on(device)
        places = plan_residence(sizes, self._device_left[device], self._host_left)
        self._device_left[device] -= sum(sizes[key] for key, at in places.items() if at == "device")
        self._host_left -= sum(sizes[key] for key, at in places.items() if at == "pinned")
        self._places.update(places)

    def _free_on(self, device: torch.device) -> int:
        """Return how many bytes may be kept on a device."""
        if device.type == "cpu":
            return 0
        if self._device_budget is not None:
            return self._device_budget
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
        return int(free) // 2


def _stored(
    checkpoint: Checkpoint, name: str, dtype: torch.dtype, device: torch.device
) -> tuple[_Key, Update | None]:
    """Say what a source tensor is fetched as: where it is stored, and what remains to be done to it."""
    store, own_name, update = checkpoint.origin(name)
    if update is not None:
        dtype = getattr(torch, store.tensors[own_name].dtype)
    return (store, own_name, dtype, device), update


def _on_device(view: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copy and cast, in the order that takes fewer bytes over the bus; the view itself if it fits."""
    if dtype.itemsize < view.dtype.itemsize:
        return view.to(dtype).to(device)
    return view.to(device).to(dtype)


def _in_host_memory(view: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copy and cast into memory of this process, pinned where a CUDA device is to read it."""
    # torch rounds pinned memory up to a power of two; that is left to the budget's other half.
    kept = torch.empty(view.shape, dtype=dtype, pin_memory=device.type == "cuda")
    return kept.copy_(view)


def host_share_bytes() -> int:
    """Return how much memory this process may take beside others like it; see `divide_memory`."""
    return available_host_bytes() // n_processes()


def available_host_bytes() -> int:
    """Return how much memory this process may still take: the machine's, or its control group's.

    What the page cache holds counts as available, so mapped checkpoints do not lower it.
    """
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # no Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    for folder, limit_file, usage_file in _CONTROL_GROUPS:
        try:
            limit = int((folder / limit_file).read_text())
            usage = int((folder / usage_file).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # no such version, or no limit ("max")
            continue
        cache = int(stat.get("total_inactive_file") or stat.get("inactive_file") or 0)
        available = min(available, max(limit - usage + cache, 0))
    return available
