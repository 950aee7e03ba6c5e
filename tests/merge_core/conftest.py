"""Builders for tests of single tensors, models of many families, and mergekit as the oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from merge_core.methods import METHODS
from merge_core.methods.job import Source, TensorJob
from merge_core.randomness import MaskKey
from merge_core.statistics import StatisticsCache

from .families import Stored, build_family


def build_job(
    method: str,
    base: Tensor | None,
    models: Sequence[tuple[Tensor, dict[str, Any]]],
    names: Sequence[str] | None = None,
    out_dtype: torch.dtype | None = None,
    seed: int = 0,
    **shared: Any,
) -> TensorJob:
    """Build the job of one tensor, parameters completed with the method's defaults.

    Args:
        models: tensor and own parameters of each model besides the base.
        names: the models' names, which key their masks; default m0, m1, ...
        shared: the method's shared parameters; `lambda_` stands for lambda.
    """
    table = METHODS[method]
    shared = {key.rstrip("_"): value for key, value in shared.items()}
    names = names or [f"m{i}" for i in range(len(models))]
    sources = []
    for name, (tensor, own) in zip(names, models, strict=True):
        unknown = set(own) - set(table.per_model)
        assert not unknown, unknown
        parameters = {key: own.get(key, p.default) for key, p in table.per_model.items()}
        sources.append(Source(tensor, parameters, MaskKey(seed, name, 0, "t"), name, "t"))
    assert not set(shared) - set(table.shared)
    return TensorJob(
        name="t",
        base=None if base is None else Source(base, {}, MaskKey(seed, "base", 0, "t"), "base", "t"),
        sources=sources,
        parameters={key: shared.get(key, p.default) for key, p in table.shared.items()},
        out_dtype=out_dtype or models[0][0].dtype,
        statistics=StatisticsCache(),
    )


@pytest.fixture(scope="session")
def job_of() -> Callable[..., TensorJob]:
    return build_job


@pytest.fixture(scope="session")
def merge_one() -> Callable[..., Tensor]:
    """Merge one tensor; arguments as of `build_job`."""

    def merge(method: str, *args: Any, **keywords: Any) -> Tensor:
        return METHODS[method].function()(build_job(method, *args, **keywords))

    return merge


@pytest.fixture
def n_threads() -> Iterator[Callable[[int], None]]:
    """Set torch's number of threads; the old number comes back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# ---- whole models -------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Stored]:
    """Build a family in a dtype, once; arguments: its name in `families.FAMILIES`, the dtype."""

    @cache
    def build(name: str, dtype: str) -> Stored:
        return build_family(tmp_path_factory.mktemp("family"), name, getattr(torch, dtype))

    return build


@pytest.fixture(scope="session")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Tensor]]:
    """Merge a config with mergekit, in process; skips where it is not installed."""
    pytest.importorskip("mergekit", reason="mergekit is the oracle")
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions
    from safetensors.torch import load_file
    from transformers import AutoConfig

    # It reads each model's config several times a merge, which takes longer than the merge.
    read = cache(AutoConfig.from_pretrained)

    def merge(config: dict[str, Any], **options: Any) -> dict[str, Tensor]:
        out = tmp_path_factory.mktemp("mergekit")
        quiet = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True, **options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(AutoConfig, "from_pretrained", lambda *a, **k: deepcopy(read(*a, **k)))
            run_merge(MergeConfiguration.model_validate(config), str(out), quiet)
        return load_file(out / "model.safetensors")

    return merge
