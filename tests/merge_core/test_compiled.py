"""A compiled loop gives the bits of the torch operations that it stands for."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from merge_core.methods import METHODS, compiled
from merge_core.methods.entrywise import Values, entries, total
from merge_core.methods.job import CHUNK

pytestmark = pytest.mark.skipif(
    not compiled.is_compilable(torch.zeros(1)), reason="no C compiler here: torch does it all"
)

OWN = {"weight": [0.7, -0.4, 1.1], "density": [0.3, 0.6, 1.0], "gamma": [0.05] * 3, "epsilon": [0.1] * 3,
       "scale": [0.9] * 3}  # fmt: skip
SHARED = {"t": 0.02, "lambda": 1.3, "select_topk": 0.4, "normalize": True}


def awkward(shape, dtype, seed):
    """Random entries, with zeros of both signs, denormals, ties and large ones among them."""
    generator = torch.Generator().manual_seed(seed)
    x = 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64)
    flat = x.view(-1)
    for i, value in enumerate((0.0, -0.0, 1e-40, -1e-40, 300.0, 0.015625, -0.015625)):
        flat[i :: 29 + i] = value
    return x.to(dtype)


def bits(tensor):
    size = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_the_same_bits(job_of, method, dtype):
    table = METHODS[method]
    base = awkward((61, 67), dtype, 0)
    names = [name for name in OWN if name in table.per_model]
    n = int(min(3, table.n_models[1]))
    models = [(awkward((61, 67), dtype, i + 1), {name: OWN[name][i] for name in names}) for i in range(n)]
    shared = {name: value for name, value in SHARED.items() if name in table.shared}
    job = job_of(method, None if table.base in ("ignored", "input") else base, models, **shared)
    plain = table.function()(job)
    fast = table.function()(replace(job, compiles=True))
    assert torch.equal(bits(plain), bits(fast))


@pytest.mark.parametrize(
    "dtypes",
    [*itertools.permutations((torch.float16, torch.bfloat16, torch.float32), 2),
     (torch.float64, torch.float32), (torch.float64, torch.bfloat16), (torch.float16, torch.float64)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("method", ["ties", "dare_linear"])
def test_every_pair_of_dtypes_gives_the_same_bits(job_of, method, dtypes):
    base = awkward((2311,), dtypes[0], 0)
    models = [(awkward((2311,), d, i), {"weight": 0.6, "density": 0.37}) for i, d in enumerate(dtypes)]
    for out in dtypes:
        job = job_of(method, base, models, out_dtype=out, rescale=True)
        plain = METHODS[method].function()(job)
        assert torch.equal(bits(plain), bits(METHODS[method].function()(replace(job, compiles=True))))


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 31, 33, CHUNK - 1, CHUNK + 1])
def test_every_length_gives_the_same_bits(job_of, n):
    base = awkward((n,), torch.bfloat16, 0) if n > 100 else torch.linspace(-1, 1, n).bfloat16()
    models = [
        (base * 1.5, {"weight": 0.6, "density": 0.37}),
        (base * 0.7, {"weight": 0.2, "density": 0.5}),
    ]
    job = job_of("dare_ties", base, models)
    plain = METHODS["dare_ties"].function()(job)
    assert torch.equal(bits(plain), bits(METHODS["dare_ties"].function()(replace(job, compiles=True))))


def test_sums_are_exact_integers(job_of):
    x = awkward((5003,), torch.float32, 1)
    job = job_of("linear", None, [(x, {"weight": 1.0})])

    def scaled(structure, o):
        return o.xs[0].abs() * o.number()

    expected = int((x.abs() * 1024.0).to(torch.int64).sum())
    for compiles in (False, True):
        found = total(replace(job, compiles=compiles), scaled, None, [x], Values((1024.0,)))
        assert found == expected


def test_a_loop_is_compiled_once_for_all_values(job_of):
    x = awkward((100,), torch.float32, 1)
    job = replace(job_of("linear", None, [(x, {"weight": 1.0})]), compiles=True)

    def times(structure, o):
        return o.xs[0] * o.number()

    before = len(compiled._loops)
    for weight in (0.1, 0.5, 2.0):
        assert torch.equal(entries(job, times, None, [x], Values((weight,))), x * weight)
    assert len(compiled._loops) == before + 1


def test_without_a_compiler_torch_does_it(job_of, monkeypatch):
    monkeypatch.setenv("CC", "/no/such/compiler")
    compiled._compiler.cache_clear()
    try:
        x = awkward((100,), torch.float32, 1)
        job = replace(job_of("linear", None, [(x, {"weight": 2.0})], normalize=False), compiles=True)
        assert torch.equal(METHODS["linear"].function()(job), x * 2.0)
    finally:
        compiled._compiler.cache_clear()
