"""How a cluster's cores are divided among workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Ray counts resources in ten-thousandths.
_PARTS = 10_000


@dataclass(frozen=True)
class Host:
    """What a host of the cluster has."""

    cpus: float
    gpus: float = 0


def cpus_each(hosts: Sequence[Host], size: int, gpus_each: float = 0) -> float | None:
    """Return the most CPUs that every one of `size` workers can have, each on one host.

    Whole CPUs; where there are too few for that, a share of one, which workers then share.

    Returns:
        None where the GPUs do not suffice.
    """

    def fit(cpus: float) -> bool:
        return sum(places(host, cpus, gpus_each, size) for host in hosts) >= size

    for whole in range(int(max((host.cpus for host in hosts), default=0)), 0, -1):
        if fit(whole):
            return whole
    for sharing in range(2, size + 1):
        share = (_PARTS // sharing) / _PARTS
        if fit(share):
            return share
    return None


def places(host: Host, cpus_each: float, gpus_each: float, size: int) -> int:
    """Count the workers, of `size`, that a host has room for."""
    by_cpus = int(host.cpus / cpus_each + 1e-9)
    return min(size, by_cpus, int(host.gpus / gpus_each + 1e-9) if gpus_each else size)
