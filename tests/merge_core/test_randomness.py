"""The mask hash, version 1: what it gives now it must give for ever."""

from __future__ import annotations

import hashlib
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_core.randomness import HASH_VERSION, MaskKey

from .masks import hash31, keep_below, keep_mask

KEY = MaskKey(0, "org/model", 0, "model.layers.0.mlp.up_proj.weight")
CPU = torch.device("cpu")

# Written down once, from the plain integers below. A change here changes every exported recipe.
GOLDEN = {
    MaskKey(0, "org/model", 0, "model.layers.0.mlp.up_proj.weight"): [
        1992489511,
        731381136,
        238104510,
        1534415013,
        179013171,
        113843339,
        809279993,
        1598062647,
        1748114452,
        223517514,
    ],
    MaskKey(0, "org/model", 1, "model.layers.0.mlp.up_proj.weight"): [
        1767111406,
        718669029,
        453528214,
        76994051,
        1427709157,
        2076257792,
        486116458,
        1890708108,
        1404246645,
        1240249696,
    ],
    MaskKey(1, "org/model", 0, "model.layers.0.mlp.up_proj.weight"): [
        1640465948,
        877009004,
        879411538,
        1530098218,
        361517669,
        1572242210,
        2095334744,
        143473513,
        504852808,
        342455134,
    ],
    MaskKey(-7, "models/été@main", 0, "lm_head.weight"): [
        1074589622,
        1296441414,
        1923850588,
        1162864251,
        1324265278,
        1775421656,
        979662698,
        1387378925,
        1994821063,
        180508083,
    ],
}
INDICES = [0, 1, 2, 12345, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 5 * 2**32 + 3]
keys = pytest.mark.parametrize(
    "key", GOLDEN, ids=lambda key: f"{key.model}:{key.random_seed}:{key.occurrence}"
)


def plain_words(key):
    """The key's two words, from its definition: blake2b over NUL-separated text."""
    text = f"v1\0{key.random_seed}\0{key.model}\0{key.occurrence}\0{key.tensor}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def plain_hash31(key, i):
    """The hash in plain unsigned integers modulo 2**32."""
    k0, k1 = plain_words(key)
    x = (i % 2**32) ^ k0
    x ^= x >> 17
    x = x * 0xED5AD4BB % 2**32
    x ^= x >> 11
    x = (x + k1 + (i >> 32) * 0x9E3779B9) % 2**32
    x = x * 0xAC4C1B51 % 2**32
    x ^= x >> 15
    x = x * 0x31848BAB % 2**32
    x ^= x >> 14
    return x % 2**31


def hashes(key, indices):
    return hash31(key, torch.tensor(indices, dtype=torch.int64)).tolist()


def test_the_hash_is_version_1():
    assert HASH_VERSION == 1


@keys
def test_golden_values_never_change(key):
    assert hashes(key, INDICES) == GOLDEN[key]
    assert [plain_hash31(key, i) for i in INDICES] == GOLDEN[key]


def test_a_golden_mask_never_changes():
    kept = keep_mask(KEY, 0, 40, 0.3, CPU).nonzero().view(-1).tolist()
    assert kept == [2, 4, 5, 8, 13, 18, 24, 28, 31, 34]


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(-(2**63), 2**63),
    model=st.text(max_size=20),
    start=st.integers(0, 2**34),
    n=st.integers(1, 20),
)
def test_the_hash_is_the_plain_one_for_any_key_and_index(seed, model, start, n):
    key = MaskKey(seed, model, 3, "t")
    indices = list(range(start, start + n))
    assert hashes(key, indices) == [plain_hash31(key, i) for i in indices]


def test_hashes_lie_in_31_bits_and_fill_them_evenly():
    values = hash31(KEY, torch.arange(1 << 16))
    assert int(values.min()) >= 0
    # 64 cells of 1024 expected: chi-square with 63 degrees of freedom, mean 63, sd 11.2
    counts = torch.bincount((values >> 25).long(), minlength=64).double()
    assert ((counts - 1024) ** 2 / 1024).sum() < 63 + 4 * 11.3
    for bit in range(31):
        share = ((values >> bit) & 1).double().mean()
        assert abs(float(share) - 0.5) < 4 * 0.5 / 256, bit


@pytest.mark.parametrize("p", [1e-9, 0.001, 0.1, 1 / 3, 0.5, 0.9, 0.999, 1 - 1e-9, 1.0])
def test_an_entry_is_kept_where_its_u_is_below_the_probability(p):
    index = torch.arange(20_000)
    expected = [h / 2**31 < p for h in hash31(KEY, index).tolist()]
    assert keep_mask(KEY, 0, 20_000, p, CPU).bool().tolist() == expected


@pytest.mark.parametrize(
    ("numerator", "denominator"), [(0, 1), (1, 3), (2, 3), (51_402, 110_592), (7, 7)]
)
def test_fractions_are_compared_exactly(numerator, denominator):
    index = torch.arange(5000)
    expected = [h * denominator < numerator * 2**31 for h in hash31(KEY, index).tolist()]
    assert keep_below(KEY, index, numerator, denominator).bool().tolist() == expected


def test_masks_hold_only_0_and_1():
    assert set(keep_mask(KEY, 0, 1000, 0.5, CPU).tolist()) == {0.0, 1.0}


def test_masks_nest_as_the_probability_grows():
    masks = [keep_mask(KEY, 0, 10_000, p, CPU).bool() for p in (0.0, 0.01, 0.3, 0.3001, 0.7, 1.0)]
    for small, large in itertools.pairwise(masks):
        assert not (small & ~large).any()


@pytest.mark.parametrize("start", [0, 2**32 - 500], ids=["0", "across 2**32"])
def test_a_mask_is_the_same_in_pieces(start):
    whole = keep_mask(KEY, start, start + 1003, 0.4, CPU)
    edges = [0, 1, 64, 499, 500, 501, 1003]
    pieces = [keep_mask(KEY, start + a, start + b, 0.4, CPU) for a, b in itertools.pairwise(edges)]
    assert torch.equal(torch.cat(pieces), whole)


@keys
@pytest.mark.parametrize("p", [0.01, 0.3, 0.5, 0.9])
def test_the_share_kept_is_the_probability_within_3_standard_errors(key, p):
    n = 100_000
    mean = float(keep_mask(key, 0, n, p, CPU).mean())
    assert abs(mean - p) <= 3 * math.sqrt(p * (1 - p) / n)


STREAMS = {
    "seed": MaskKey(1, KEY.model, 0, KEY.tensor),
    "model": MaskKey(0, "org/other", 0, KEY.tensor),
    "occurrence": MaskKey(0, KEY.model, 1, KEY.tensor),
    "tensor": MaskKey(0, KEY.model, 0, "model.layers.1.mlp.up_proj.weight"),
}


@pytest.mark.parametrize("other", STREAMS.values(), ids=STREAMS.keys())
@pytest.mark.parametrize("shift", [0, 1, 4096])
def test_streams_of_different_keys_are_uncorrelated(other, shift):
    n = 100_000
    index = torch.arange(n)
    pair = torch.stack((hash31(KEY, index).double(), hash31(other, index + shift).double()))
    # The correlation of n independent pairs has standard deviation 1 / sqrt(n).
    assert abs(float(torch.corrcoef(pair)[0, 1])) < 4 / math.sqrt(n)


@pytest.mark.parametrize("shift", [1, 2, 48, 4096])
def test_neighbours_in_one_stream_are_uncorrelated(shift):
    n = 100_000
    index = torch.arange(n)
    pair = torch.stack((hash31(KEY, index).double(), hash31(KEY, index + shift).double()))
    assert abs(float(torch.corrcoef(pair)[0, 1])) < 4 / math.sqrt(n)


def test_no_stream_is_a_shift_of_another():
    def triples(key):
        values = hashes(key, range(2002))
        return set(zip(values, values[1:], values[2:], strict=False))

    own = triples(KEY)
    for other in STREAMS.values():
        assert not own & triples(other)


def test_every_part_of_a_key_matters_and_parts_do_not_run_together():
    variants = [
        KEY,
        *STREAMS.values(),
        MaskKey(0, "a", 1, "1b"),
        MaskKey(0, "a1", 1, "b"),
        MaskKey(0, "a", 11, "b"),
        MaskKey(10, "a", 1, "b"),
    ]
    assert len({key.words() for key in variants}) == len(variants)


def test_draws_do_not_touch_torchs_own_generator():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    keep_mask(KEY, 0, 1000, 0.5, CPU)
    assert torch.equal(torch.rand(3), expected)
