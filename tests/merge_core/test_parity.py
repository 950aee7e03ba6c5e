"""Parity of every method with its definition, and with mergekit 0.1.5 run in process.

In float32 the two programs round at the same places up to the order of a few operations: they
agree within 1e-6 of each tensor's largest magnitude. In bfloat16 mergekit rounds weights, deltas
and sums to bfloat16 on the way and we round once; there the judge is the definition in float64
(`reference.py`). Entries that tie at a threshold are left out and counted: mergekit leaves their
choice open. Families that mergekit 0.1.5 refuses are compared with the definition alone.

`pytest -s` prints tables of the largest differences, by method and family.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from merge_core.merge import merged_tensors
from merge_core.methods import METHODS
from merge_core.parameters import look_up
from merge_core.plan import Planned, plan_merge
from merge_core.randomness import MaskKey
from merge_core.recipe import Recipe

from .families import CASES, FAMILIES, RANDOM_CASES, Stored, resolved
from .reference import Exact, Model, defined, fusion


class Deviation(NamedTuple):
    """Largest difference; in float32 relative to the tensor's largest magnitude, in bfloat16 in
    units in the last place of the exact value."""

    largest: float
    n_left_out: int
    n: int

    def __add__(self, other: Deviation) -> Deviation:  # type: ignore[override]
        return Deviation(max(self[0], other[0]), self[1] + other[1], self[2] + other[2])


NONE = Deviation(0.0, 0, 0)


F32_EXACT = "float32 against the definition in float64: difference over the tensor's largest magnitude"
F32_THEIRS = "float32 against mergekit 0.1.5: difference over the tensor's largest magnitude"
BF16_EXACT = "bfloat16 against the definition in float64: error in units of the last place"


# The table is whole with the slow tests; these families differ most from each other.
FAST = ("Llama", "Gemma, tied", "GPT-2", "Qwen3-MoE, fused")


def some_are_slow(names: Iterable[str]) -> list[Any]:
    return [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[dict[tuple[str, str, str], Deviation]]:
    """Largest deviation by title, method and family; printed at the end under -s."""
    found: defaultdict[tuple[str, str, str], Deviation] = defaultdict(lambda: NONE)
    yield found
    if request.config.getoption("capture") != "no":
        return
    for title in dict.fromkeys(title for title, _, _ in found):
        methods = dict.fromkeys(method for t, method, _ in found if t == title)
        families = dict.fromkeys(family for t, _, family in found if t == title)
        print(f"\n\n{title}\n\n| method |", *(f"{family} |" for family in families), "left out |")
        print("|---" * (len(families) + 2) + "|")
        for method in methods:
            row = [found[title, method, family] for family in families]
            n_left_out, n = (sum(cell[i] for cell in row) for i in (1, 2))
            print(f"| {method} |", *(f"{cell.largest:.1g} |" for cell in row), f"{n_left_out} of {n} |")


def exact(recipe: Recipe, planned: Planned, family: Stored) -> Exact:
    """What an output tensor must be, from the sources as cast to the recipe's dtype."""
    method = METHODS[recipe.merge_method]
    dtype = getattr(torch, str(recipe.dtype))

    def model(entry: Any, is_base: bool = False) -> Model:
        parameters = {
            name: look_up(name, parameter, (*entry.levels, *planned.levels), entry.filter_name, planned.t)
            for name, parameter in method.per_model.items()
            if not is_base
        }
        key = MaskKey(recipe.random_seed, entry.model, entry.occurrence, planned.name)
        return Model(family.tensors[entry.model][entry.name].to(dtype), parameters, key)

    shared = {
        name: look_up(name, parameter, planned.levels, planned.name, planned.t)
        for name, parameter in method.shared.items()
    }
    base = model(planned.base, is_base=True) if planned.base else None
    return defined(recipe.merge_method, base, [model(entry) for entry in planned.inputs], shared)


def relative(found: Tensor, expected: Tensor, is_open: Tensor) -> Deviation:
    """Compare with what is meant to be the same in float32."""
    assert found.shape == expected.shape
    difference = (found.double() - expected.double()).abs()[~is_open]
    largest = float(expected.abs().max()) or 1.0
    return Deviation(float(difference.max()) / largest, int(is_open.sum()), is_open.numel())


def unit_in_the_last_place(value: Tensor) -> Tensor:
    """Return the spacing of bfloat16 numbers (8 significant bits) at the magnitude of a value."""
    exponent = torch.frexp(value).exponent.double()
    return torch.where(value == 0, 2.0**-140, 2.0 ** (exponent - 8))


def in_units(found: Tensor, exact: Exact) -> Deviation:
    """Compare with the exact value, in bfloat16 units beyond what float32 rounds of the terms."""
    error = (found.double() - exact.value).abs() - 2.0**-20 * exact.size
    units = (error.clamp(min=0) / unit_in_the_last_place(exact.value))[~exact.is_open]
    return Deviation(float(units.max()), int(exact.is_open.sum()), exact.is_open.numel())


# Share of the entries that may be left out: few lie at a threshold, more of bfloat16's tie there.
FEW, MORE = 1e-3, 0.02
# Across joined experts nuslerp's vectors have an entry an expert; of those that are nearly parallel
# mergekit divides by the sine of their angle in float32.
FEW_EXPERTS = 2e-5
CAST = "Llama, from float32"


@pytest.mark.parametrize("name", [*CASES, *RANDOM_CASES])
@pytest.mark.parametrize("family_name", some_are_slow(FAMILIES))
def test_float32(request, stored, table, family_name, name):
    family = stored(family_name, "float32")
    config = {**resolved((CASES | RANDOM_CASES)[name], family.folders), "dtype": "float32"}
    recipe = Recipe.parse(config)
    found = dict(merged_tensors(recipe, family.sources))
    has_oracle = FAMILIES[family_name][2] and name in CASES
    expected = request.getfixturevalue("theirs")(config) if has_oracle else found
    assert set(found) == set(expected) == set(family.tensors[family.folders["base"]])
    to_exact = to_theirs = NONE
    faults = []
    for planned in plan_merge(recipe, family.sources):
        tensor = found[planned.name]
        assert tensor.dtype == torch.float32
        value = exact(recipe, planned, family)
        deviations = [relative(tensor, value.value, value.is_open)]
        to_exact += deviations[0]
        if has_oracle:
            deviations.append(relative(tensor, expected[planned.name], value.is_open))
            to_theirs += deviations[1]
        limits = [1e-6, FEW_EXPERTS if recipe.merge_method == "nuslerp" and tensor.dim() == 3 else 1e-6]
        faults += [
            (planned.name, deviation)
            for deviation, limit in zip(deviations, limits, strict=False)
            if not deviation.largest <= limit
        ]
    table[F32_EXACT, recipe.merge_method, family_name] += to_exact
    if has_oracle:
        table[F32_THEIRS, recipe.merge_method, family_name] += to_theirs
    assert not faults
    assert to_exact.n_left_out <= FEW * to_exact.n


# The random methods' cases of density 1 would repeat task_arithmetic's and ties' here.
@pytest.mark.parametrize("name", [name for name in [*CASES, *RANDOM_CASES] if "whole" not in name])
@pytest.mark.parametrize("family_name", some_are_slow([*FAMILIES, CAST]))
def test_bfloat16(stored, table, family_name, name):
    family = stored("Llama", "float32") if family_name == CAST else stored(family_name, "bfloat16")
    config = {**resolved((CASES | RANDOM_CASES)[name], family.folders), "dtype": "bfloat16"}
    recipe = Recipe.parse(config)
    found = dict(merged_tensors(recipe, family.sources))
    assert set(found) == set(family.tensors[family.folders["base"]])
    deviation = NONE
    faults = []
    for planned in plan_merge(recipe, family.sources):
        tensor = found[planned.name]
        assert tensor.dtype == torch.bfloat16
        units = in_units(tensor, exact(recipe, planned, family))
        deviation += units
        faults += [(planned.name, units)] if not units.largest <= 0.5 else []
    table[BF16_EXACT, recipe.merge_method, family_name] += deviation
    assert not faults
    assert deviation.n_left_out <= MORE * deviation.n


@pytest.mark.parametrize("shape", [(64, 576), (3, 5, 301), (4096,)], ids=str)
@pytest.mark.parametrize("move", [1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fusion_of_near_models_takes_what_the_definition_says(merge_one, dtype, move, shape):
    # In float32 the divergence of such models is rounding alone; mergekit's choice is, too.
    generator = torch.Generator().manual_seed(0)
    base = (0.05 * torch.randn(shape, generator=generator)).to(dtype)
    x = (base.float() + move * torch.randn(shape, generator=generator)).to(dtype)
    value, is_open = fusion(base.double(), x.double(), noise=1e-6)
    assert torch.equal(merge_one("arcee_fusion", base, [(x, {})])[~is_open], value.to(dtype)[~is_open])
    assert is_open.double().mean() <= (FEW if dtype == torch.float32 else MORE)
