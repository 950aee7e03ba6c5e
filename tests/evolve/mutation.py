"""Seeded mutations of valid inputs: trees of plain data, text, bytes."""

from __future__ import annotations

import copy
import datetime
import random
from collections.abc import Iterator
from typing import Any

# Values that programs stumble over: extremes, near misses of types, names that lead elsewhere.
VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    0.5,
    1e308,
    -1e-320,
    float("inf"),
    float("nan"),
    10**9,
    2**31,
    2**63,
    10**400,
    "",
    " ",
    "null",
    "0",
    "1e5",
    "0x10",
    "auto",
    "a",
    "..",
    "../../../outside",
    "/nowhere/at/all",
    "~nobody/x",
    "a/b/c",
    "a\0b",
    "line\nerror: two",
    "\x1b[31mred",
    "é" * 40,
    "x" * 5000,
    "{{ 7 * 7 }}",
    "%s%n{0}",
    "a@b+c",
    "sqlite:////nowhere/at/all.db",
    [],
    {},
    [[]],
    [1, 2],
    [None],
    ["a"],
    {"low": 0, "high": 1},
    {"low": 1, "high": 0},
    {"low": 0, "high": float("inf")},
    {"low": 0.0, "high": 1.0, "log": True},
    {"low": 0, "high": 1, "step": 0},
    {"low": 0, "high": 1, "step": 1e-300},
    {"low": 0, "high": 1, "points": 10**9},
    {"low": 0, "high": 1, "points": -1},
    {"low": 0, "high": 1, "start": 7},
    {"low": "a", "high": "b"},
    {"choices": []},
    {"choices": [1, 1]},
    {"choices": [None, {}]},
    {"choices": {"a": 1}},
    {"choices": list(range(2000))},
    [{"filter": "mlp", "value": 1}, {"value": 2}],
    [{"filter": "(", "value": None}],
    [{"value": {"value": {"value": 1}}}],
    datetime.date(2020, 2, 29),
    b"\xff\xfe",
    {1: 2},
    {None: None},
]
KEYS: list[Any] = ["", "low", "choices", "value", "filter", "model", "genome", "__proto__", 1, None, True]
# Parts of YAML's own language; the last would run a command, were it obeyed.
TOKENS = [
    "&a ",
    "*a",
    "<<: *a\n",
    "{",
    "}",
    "[",
    "]",
    ": ",
    "- ",
    "? ",
    "|\n",
    ">-\n",
    "\t",
    "---\n",
    "...\n",
    "%YAML 9.9\n",
    "#",
    '"',
    "'",
    "\\",
    "!!int ",
    "!!binary ",
    "!!set ",
    "!!python/name:os.system ",
    '!!python/object/apply:os.mkdir ["ran"]\n',
]


def nested(depth: int, kind: str) -> Any:
    """Return a list or mapping that holds one that holds one ..."""
    value: Any = 1
    for _ in range(depth):
        value = [value] if kind == "list" else {"value": value}
    return value


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Walk every (container, key or index) of a tree."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(pairs):
        yield tree, key
        yield from places(value)


def mutated_tree(rng: random.Random, tree: Any, n_changes: int | None = None) -> Any:
    """Return a copy of plain data with a few of its values, keys or branches changed."""
    tree = copy.deepcopy(tree)
    for _ in range(n_changes or rng.choice([1, 1, 1, 2, 3])):
        found = list(places(tree))
        if not found:
            return rng.choice(VALUES)
        holder, key = rng.choice(found)
        change = rng.randrange(10)
        if change == 0:
            del holder[key]
        elif change == 1 and isinstance(holder, list):
            holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(holder[key]))
        elif change == 1:
            other = rng.choice([*KEYS, rng.choice(found)[1], f"{key}x"])
            holder[other] = holder.pop(key)
        elif change == 2:  # a branch from elsewhere
            donor, at = rng.choice(found)
            holder[key] = copy.deepcopy(donor[at])
        elif change == 3:
            holder[key] = rng.choice([[holder[key]], {"value": holder[key]}, {key: holder[key]}])
        elif change == 4 and isinstance(holder[key], int | float):
            holder[key] *= rng.choice([-1, 0, 2, 0.5, 1e9])
        elif change == 4 and isinstance(holder[key], str):
            holder[key] = mutated_text(rng, holder[key])
        elif change == 5:
            depth = rng.choice([5, 30, 100])
            holder[key] = nested(depth, rng.choice(["list", "mapping"]))
        else:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
    return tree


def mutated_text(rng: random.Random, text: str) -> str:
    """Return a text with a part removed, doubled, replaced or thrown in."""
    for _ in range(rng.choice([1, 1, 2, 4])):
        i = rng.randrange(len(text) + 1)
        j = min(len(text), i + rng.choice([1, 1, 3, 20, 200]))
        part = rng.choice(["", text[i:j] * 2, rng.choice(TOKENS), chr(rng.randrange(1, 0xD800)), "\n"])
        text = text[:i] + part + text[j:]
    return text


def mutated_bytes(rng: random.Random, data: bytes, reach: int = 1 << 62) -> bytes:
    """Return bytes with a few flipped, removed or thrown in, within the first `reach`; or cut short."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        if not changed:
            break
        i = rng.randrange(min(len(changed), reach))
        change = rng.randrange(6)
        if change == 0:
            del changed[i:]
        elif change == 1:
            del changed[i : i + rng.choice([1, 8, 100])]
        elif change == 2:
            changed[i:i] = rng.randbytes(rng.choice([1, 8, 100]))
        elif change == 3:
            changed[i] ^= 1 << rng.randrange(8)
        else:
            changed[i] = rng.choice([0, 255, rng.randrange(256)])
    return bytes(changed)
