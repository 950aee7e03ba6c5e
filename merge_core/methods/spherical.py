"""Interpolation along great circles: slerp."""

from __future__ import annotations

import math

from torch import Tensor

from merge_core.methods.job import TensorJob, by_chunks, chunks, row_sums

# Above this cosine the arc is nearly a line, and sin(theta) would amplify rounding.
_PARALLEL = 0.9995


def slerp(job: TensorJob) -> Tensor:
    """Interpolate from the base (t = 0) to the other model (t = 1) along the arc between them.

    Shoemake 1985, https://doi.org/10.1145/325165.325242. Whole tensors are the vectors:
    result = sin((1-t) theta)/sin(theta) a + sin(t theta)/sin(theta) b, with theta the angle
    between a and b; nearly parallel tensors (|cos theta| > 0.9995) are interpolated linearly.
    Norms of at most 1e-8 count as 1.

    Returns:
        Tensor of the sources' shape (*s), in the job's output dtype.
    """
    assert job.base is not None
    a, b = job.base.tensor.reshape(-1), job.sources[0].tensor.reshape(-1)
    t = job.parameters["t"]
    sums: tuple[list[float], ...] = ([], [], [])
    for start, stop in chunks(a.numel()):
        x, y = a[start:stop].to(job.work_dtype), b[start:stop].to(job.work_dtype)
        for rows, product in zip(sums, (x * x, y * y, x * y), strict=True):
            rows += row_sums(product)
    aa, bb, ab = map(math.fsum, sums)
    norm_a, norm_b = (math.sqrt(s) if math.sqrt(s) > 1e-8 else 1.0 for s in (aa, bb))
    cosine = max(-1.0, min(1.0, ab / (norm_a * norm_b)))
    if abs(cosine) > _PARALLEL:
        share_a, share_b = 1 - t, t
    else:
        theta = math.acos(cosine)
        share_a = math.sin((1 - t) * theta) / math.sin(theta)
        share_b = math.sin(t * theta) / math.sin(theta)

    def compute(start: int, stop: int) -> Tensor:
        mixed: Tensor = a[start:stop].to(job.work_dtype) * share_a
        mixed += b[start:stop].to(job.work_dtype) * share_b
        return mixed

    return by_chunks(job, compute)
