"""One compiled loop for a formula: every entry is read once and written once.

A formula is called once with stand-ins that write down, as C, what is done to them; the system's C
compiler makes a library of it in half a second, which runs without the GIL. Only operations with
one right answer are translated, and the compiler may not contract or reorder them, so the loop
gives the bits of the torch operations that it stands for. Without a compiler nothing is lost but
speed.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge_core.randomness import high_word

# Nothing here lets the compiler change a value: no contraction to fused multiply-add, no
# reassociation. Traps and errno are given up, which no result depends on, to allow vectors.
_FLAGS = ("-O3", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno", "-shared", "-fPIC")
_NATIVE = (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ("-mcpu=native",), ())

_PREAMBLE = """
#include <stdint.h>
#include <string.h>
static inline float of_bits(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
static inline uint32_t bits_of(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
static inline double of_wide_bits(int64_t u) { double f; memcpy(&f, &u, 8); return f; }
static inline int64_t wide_bits_of(double f) { int64_t u; memcpy(&u, &f, 8); return u; }
static inline float from_bf16(uint16_t v) { return of_bits((uint32_t)v << 16); }
static inline uint16_t to_bf16(float f) { /* round to nearest, ties to even */
    uint32_t u = bits_of(f);
    uint32_t r = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return f != f ? 0x7fc0u : (uint16_t)r;
}
"""
# torch dtype -> C type, reading it, writing it.
_STORED = {
    torch.bfloat16: ("uint16_t", "from_bf16({})", "to_bf16((float)({}))"),
    torch.float16: ("_Float16", "({})", "(_Float16)({})"),
    torch.float32: ("float", "({})", "(float)({})"),
    torch.float64: ("double", "({})", "(double)({})"),
    torch.uint16: ("uint16_t", "({})", ""),
    torch.int32: ("int32_t", "({})", ""),
}
_COMPUTED = {torch.float32: "float", torch.float64: "double", torch.int32: "int32_t"}
_WIDTH = {"int32_t": 0, "int64_t": 0, "float": 1, "double": 2}
# A number of this C type, its bits as a signed integer, and back.
_BITS = {
    "float": ("int32_t", "(int32_t)bits_of({})", "of_bits((uint32_t)({}))"),
    "double": ("int64_t", "wide_bits_of({})", "of_wide_bits({})"),
}
_COMPARED = {torch.gt: ">", torch.lt: "<", torch.eq: "==", torch.ne: "!="}
# Indices beyond this would not fit the 32-bit counter of one call.
_CALL = 1 << 30


class Value:
    """A number that is known only when the loop runs; it takes the type of what it meets."""

    def __init__(self, name: str) -> None:
        self.name = name


class Traced:
    """Stand-in for a tensor of entries: a local variable of the C loop."""

    def __init__(self, lines: list[str], c_type: str, expression: str) -> None:
        self._lines, self.c_type = lines, c_type
        self.name = f"v{len(lines)}"
        lines.append(f"{c_type} {self.name} = {expression};")

    def _operand(self, other: Any, c_type: str) -> str:
        if isinstance(other, Traced):
            return other.name if other.c_type == c_type else f"({c_type}){other.name}"
        if isinstance(other, Value):
            return f"({c_type}){other.name}"
        if _WIDTH[c_type] == 0:
            return f"(({c_type}){int(other)})"
        return f"(({c_type}){float(other).hex()})"

    def _binary(self, symbol: str, other: Any, swapped: bool = False) -> Traced:
        c_type = self.c_type
        if isinstance(other, Traced) and _WIDTH[other.c_type] > _WIDTH[c_type]:
            c_type = other.c_type
        a, b = self._operand(self, c_type), self._operand(other, c_type)
        a, b = (b, a) if swapped else (a, b)
        if c_type == "int32_t" and symbol in "+-*":  # wraps, as torch's integers do
            return Traced(self._lines, c_type, f"(int32_t)((uint32_t){a} {symbol} (uint32_t){b})")
        return Traced(self._lines, c_type, f"{a} {symbol} {b}")

    def _into(self, result: Traced) -> Traced:
        self._lines.append(f"{self.name} = {result.name};")
        return self

    def __add__(self, other: Any) -> Traced:
        return self._binary("+", other)

    def __sub__(self, other: Any) -> Traced:
        return self._binary("-", other)

    def __mul__(self, other: Any) -> Traced:
        return self._binary("*", other)

    def __truediv__(self, other: Any) -> Traced:
        return self._binary("/", other)

    def __xor__(self, other: Any) -> Traced:
        return self._binary("^", other)

    def __and__(self, other: Any) -> Traced:
        return self._binary("&", other)

    def __rshift__(self, other: Any) -> Traced:
        return self._binary(">>", other)

    def __invert__(self) -> Traced:
        return Traced(self._lines, self.c_type, f"~{self.name}")

    def __iadd__(self, other: Any) -> Traced:
        return self._into(self + other)

    def __isub__(self, other: Any) -> Traced:
        return self._into(self - other)

    def __imul__(self, other: Any) -> Traced:
        return self._into(self * other)

    def __itruediv__(self, other: Any) -> Traced:
        return self._into(self / other)

    def __iand__(self, other: Any) -> Traced:
        return self._into(self & other)

    def __ixor__(self, other: Any) -> Traced:
        return self._into(self ^ other)

    add_, mul_, div_, bitwise_and_ = __iadd__, __imul__, __itruediv__, __iand__

    def abs(self) -> Traced:
        """As torch's."""
        function = "__builtin_fabsf" if self.c_type == "float" else "__builtin_fabs"
        return Traced(self._lines, self.c_type, f"{function}({self.name})")

    def reciprocal(self) -> Traced:
        """As torch's."""
        return self._binary("/", 1.0, swapped=True)

    def clamp(self, low: float | None = None, high: float | None = None) -> Traced:
        """As torch's: NaN stays."""
        text = self.name
        if high is not None:
            bound = self._operand(high, self.c_type)
            text = f"({self.name} > {bound} ? {bound} : {text})"
        if low is not None:
            bound = self._operand(low, self.c_type)
            text = f"({self.name} < {bound} ? {bound} : {text})"
        return Traced(self._lines, self.c_type, text)

    def to(self, dtype: torch.dtype) -> Traced:
        """As torch's, for the dtypes that are computed in."""
        c_type = _COMPUTED[dtype]
        return Traced(self._lines, c_type, f"({c_type}){self.name}")

    @property
    def width(self) -> int:
        """How many bits the variable has."""
        return 64 if self.c_type in ("int64_t", "double") else 32

    def bits(self) -> Traced:
        """The bits of a number, as a signed integer of its width."""
        c_type, forth, _ = _BITS[self.c_type]
        return Traced(self._lines, c_type, forth.format(self.name))

    def kept(self, mask: Traced) -> Traced:
        """The number where the mask is -1, +0 where it is 0."""
        c_type, forth, back = _BITS[self.c_type]
        masked = f"{forth.format(self.name)} & ({c_type}){mask.name}"
        return Traced(self._lines, self.c_type, back.format(masked))

    def indicator(self, compare: Callable[..., Tensor], other: Any) -> Traced:
        """1 where the comparison holds, else 0, in this variable's type."""
        other_name = self._operand(other, self.c_type)
        return Traced(
            self._lines,
            self.c_type,
            f"({self.c_type})({self.name} {_COMPARED[compare]} {other_name} ? 1 : 0)",
        )


class Loop:
    """A compiled formula."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._library = _compile(source)
        self._run = self._library.run
        self._run.restype = ctypes.c_int64

    def run(
        self,
        base: Tensor | None,
        xs: Sequence[Tensor],
        numbers: Sequence[float],
        integers: Sequence[int],
        arrays: Sequence[Tensor],
        out: Tensor | None,
        start: int = 0,
    ) -> int:
        """Run over all entries: how many results are NaN, or the sum where there is no `out`.

        Args:
            start: flat index of the first entry, where the tensors are chunks.
        """
        held = [t.contiguous() for t in (*([] if base is None else [base]), *xs, *arrays)]
        tensors = held if out is None else [*held, out]
        reals = (ctypes.c_double * max(1, len(numbers)))(*numbers)
        whole = (ctypes.c_int32 * max(1, len(integers)))(*integers)
        n = tensors[0].numel()
        found = 0
        for at in range(0, n, _CALL):
            pointers = (ctypes.c_void_p * len(tensors))(
                *(t.data_ptr() + at * t.element_size() for t in tensors)
            )
            count = ctypes.c_int64(min(_CALL, n - at))
            low, high = (start + at) & 0xFFFFFFFF, high_word(start + at)
            found += self._run(count, ctypes.c_uint32(low), ctypes.c_int32(high), pointers, reals, whole)
        return found


_loops: dict[Hashable, Loop] = {}
_lock = threading.Lock()


def loop_for(
    key: Hashable,
    trace: Callable[..., Traced],
    base: torch.dtype | None,
    xs: tuple[torch.dtype, ...],
    out: torch.dtype | None,
    work: torch.dtype,
    arrays: tuple[torch.dtype, ...],
    counts: tuple[int, int],
) -> Loop:
    """Compile a formula for these dtypes, or recall it.

    Args:
        key: names the formula and its structure.
        trace: the formula: (base, xs, index, index_high, numbers, integers, arrays) to a result.
        base, xs, out, work, arrays: dtypes; without `out` the loop sums the results as integers.
        counts: how many numbers and integers the formula asks for.
    """
    full_key = (key, base, xs, out, work, arrays, counts)
    with _lock:
        if full_key not in _loops:
            _loops[full_key] = Loop(_c_source(trace, base, xs, out, work, arrays, counts))
        return _loops[full_key]


def _c_source(
    trace: Callable[..., Traced],
    base: torch.dtype | None,
    xs: tuple[torch.dtype, ...],
    out: torch.dtype | None,
    work: torch.dtype,
    arrays: tuple[torch.dtype, ...],
    counts: tuple[int, int],
) -> str:
    stored = [*([base] if base is not None else []), *xs, *arrays]
    lines: list[str] = []
    read = [
        Traced(lines, _COMPUTED[work], f"({_COMPUTED[work]}){_STORED[d][1].format(f'in{i}[i]')}")
        for i, d in enumerate(stored)
    ]
    first = 0 if base is None else 1
    result = trace(
        read[0] if first else None,
        read[first : first + len(xs)],
        lambda: Traced(lines, "int32_t", "(int32_t)(low + (uint32_t)i)"),
        Value("high"),
        [Value(f"n{i}") for i in range(counts[0])],
        [Value(f"k{i}") for i in range(counts[1])],
        read[first + len(xs) :],
    )
    declared = [f"const {_STORED[d][0]} *restrict in{i} = in[{i}];" for i, d in enumerate(stored)]
    declared += [f"const double n{i} = numbers[{i}];" for i in range(counts[0])]
    declared += [f"const int32_t k{i} = integers[{i}];" for i in range(counts[1])]
    if out is None:
        lines.append(f"found += (int64_t){result.name};")
        counter = "int64_t found = 0;"
    else:
        declared.append(f"{_STORED[out][0]} *restrict out = in[{len(stored)}];")
        lines.append(f"found += {result.name} != {result.name};")
        lines.append(f"out[i] = {_STORED[out][2].format(result.name)};")
        counter = "int32_t found = 0;"
    return (
        _PREAMBLE
        + "int64_t run(int64_t n, uint32_t low, int32_t high, void **in, const double *numbers,\n"
        + "            const int32_t *integers) {\n"
        + "\n".join(declared)
        + f"\n{counter}\nfor (int32_t i = 0; i < (int32_t)n; i++) {{\n"
        + "\n".join(lines)
        + "\n}\nreturn found;\n}\n"
    )


def is_compilable(tensor: Tensor) -> bool:
    """Whether loops can run here: on the CPU, where there is a C compiler."""
    return tensor.device.type == "cpu" and _compiler() is not None


@cache
def _compiler() -> tuple[str, ...] | None:
    """Find a C compiler and the flags it takes; None where there is none that works."""
    given = shlex.split(os.environ.get("CC", ""))
    compiler = given or list(filter(shutil.which, ("cc", "gcc", "clang")))[:1]
    for native in _NATIVE if compiler else ():
        command = (*compiler, *_FLAGS, *native)
        try:
            _build(command, _PREAMBLE + "float f(_Float16 x) { return (float)x; }\n")
        except (OSError, subprocess.SubprocessError):
            continue
        return command
    return None


def _compile(source: str) -> ctypes.CDLL:
    command = _compiler()
    assert command is not None
    return _build(command, source)


def _build(command: tuple[str, ...], source: str) -> ctypes.CDLL:
    # A private folder, gone as soon as the library is loaded: nobody else can put code there.
    with tempfile.TemporaryDirectory(prefix="evolve-loop-") as folder:
        path = Path(folder, "loop.c")
        path.write_text(source)
        library = path.with_suffix(".so")
        subprocess.run(
            [*command, str(path), "-o", str(library)], check=True, capture_output=True, timeout=120
        )
        return ctypes.CDLL(str(library))
