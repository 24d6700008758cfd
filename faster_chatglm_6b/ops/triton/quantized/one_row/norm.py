"""LayerNorm of one row of x in the registers of the product that follows, in inline PTX.

Each warp of a program of ``row`` holds its part of the row, so that the program holds it once: lane 4 g + t
has the words of step g that lie at the columns of t. One tensor-core product of such a pair of words with itself gives
sums and squares. The pair serves as rows 0 to 7 of one operand, above ones as rows 8 to 15, and as the columns of the
other.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..mma import join_lines, low_half, mma


class NormArguments(NamedTuple):
    """LayerNorm of a row of x and its target; gamma, beta [K], out [1, K], contiguous and of x' dtype."""

    gamma: torch.Tensor
    beta: torch.Tensor
    epsilon: float
    out: torch.Tensor


@functools.cache
def ptx_statistics(words: int, warps: int, bfloat: bool) -> str:
    """Return the PTX of sum and sum of squares of a program's ``words`` words per thread. Operands: both; the words."""
    dtype, ones = ("bf16", "0x3F803F80") if bfloat else ("f16", "0x3C003C00")
    sums = [f"{chain}{i}" for chain in "cd" for i in range(4)]
    lines = [f".reg .f32 {', '.join(sums)}, s, q, a, b, e, f;", ".reg .b32 ones, thread, group, lane, place, i, j;"]
    lines += [".reg .pred p;", f"mov.b32 ones, {ones};"]
    lines += [f"mov.f32 {name}, 0f00000000;" for name in sums]
    for pair in range(words // 2):
        here, there = f"${2 + 2 * pair}", f"${3 + 2 * pair}"
        lines.append(mma(dtype, "cd"[pair % 2], [here, "ones", there, "ones"], (here, there)))
    lines += [f"add.f32 c{i}, c{i}, d{i};" for i in range(4)]
    # Of the squares only the diagonal counts: row g, whose columns 2 t and 2 t + 1 this lane has.
    lines += [
        "mov.u32 thread, %tid.x;",
        "and.b32 lane, thread, 31;",
        "shr.u32 group, lane, 2;",
        "and.b32 i, lane, 3;",
        "shl.b32 i, i, 1;",
        "or.b32 j, i, 1;",
        "mov.f32 q, 0f00000000;",
        "setp.eq.u32 p, group, i;",
        "@p mov.f32 q, c0;",
        "setp.eq.u32 p, group, j;",
        "@p mov.f32 q, c1;",
        "add.f32 s, c2, c3;",
    ]
    for distance in (16, 8, 4, 2, 1):
        lines += [f"shfl.sync.bfly.b32 a, q, {distance}, 0x1f, 0xffffffff;", "add.f32 q, q, a;"]
        # All groups of lanes have the same sums.
        if distance < 4:
            lines += [f"shfl.sync.bfly.b32 b, s, {distance}, 0x1f, 0xffffffff;", "add.f32 s, s, b;"]
    if warps > 1:
        lines += [
            f".shared .align 16 .b8 parts[{warps * 8}];",
            "mov.u32 place, parts;",
            "shr.u32 i, thread, 5;",
            "shl.b32 i, i, 3;",
            "add.u32 i, i, place;",
            "setp.eq.u32 p, lane, 0;",
            "@p st.shared.v2.f32 [i], {s, q};",
            "bar.sync 0;",
            "mov.f32 s, 0f00000000;",
            "mov.f32 q, 0f00000000;",
        ]
        for first in range(0, warps, 2):
            lines += [
                f"ld.shared.v4.f32 {{a, b, e, f}}, [place + {8 * first}];",
                "add.f32 s, s, a;",
                "add.f32 q, q, b;",
                "add.f32 s, s, e;",
                "add.f32 q, q, f;",
            ]
    return join_lines(*lines, "mov.f32 $0, s;", "mov.f32 $1, q;").value


def _normalise(bfloat: bool) -> tl.constexpr:
    """Return the PTX of (x * factor + shift) * gamma + beta, rounded before and after gamma.

    Operands: the result; these in order.
    """
    dtype = "bf16" if bfloat else "f16"
    halves = ["mov.b32 {l, h}, $1;", "cvt.f32.f16 a, l;", "cvt.f32.f16 b, h;"]
    if bfloat:
        halves = ["shl.b32 u, $1, 16;", "mov.b32 a, u;", "and.b32 u, $1, 0xFFFF0000;", "mov.b32 b, u;"]
    return join_lines(
        ".reg .f32 a, b;",
        ".reg .b16 l, h;",
        ".reg .b32 u;",
        *halves,
        "fma.rn.f32 a, a, $2, $3;",
        "fma.rn.f32 b, b, $2, $3;",
        f"cvt.rn.{dtype}x2.f32 u, b, a;",
        f"fma.rn.{dtype}x2 $0, u, $4, $5;",
    )


_NORMALISE, _NORMALISE_BFLOAT = _normalise(False), _normalise(True)
_STATISTICS16 = tl.constexpr(",".join(["=&f"] * 2 + ["r"] * 16))
_STATISTICS8 = tl.constexpr(",".join(["=&f"] * 2 + ["r"] * 8))


@triton.jit
def halves_of(word, BFLOAT: tl.constexpr):
    """Return the two 16-bit numbers of a word as float32."""
    return low_half(word, BFLOAT), low_half(word >> 16, BFLOAT)


@triton.jit
def word_of(low, high, BFLOAT: tl.constexpr):
    """Round two float32 numbers and pack them into a word."""
    dtype: tl.constexpr = tl.bfloat16 if BFLOAT else tl.float16
    low = low.to(dtype).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return low | (high.to(dtype).to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def sums_of_row(blocks, STATISTICS: tl.constexpr, BFLOAT: tl.constexpr, INTERPRETED: tl.constexpr):
    """Return sum and sum of squares of the row that the words of all threads hold."""
    words = ()
    for block in tl.static_range(len(blocks)):
        for i in tl.static_range(len(blocks[block])):
            words = words + (blocks[block][i],)
    if INTERPRETED:
        total = tl.zeros(words[0].shape, tl.float32)
        squares = total
        for i in tl.static_range(len(words)):
            low, high = halves_of(words[i], BFLOAT)
            total += low + high
            squares += low * low + high * high
        total = tl.sum(total, 0) + tl.zeros(words[0].shape, tl.float32)
        squares = tl.sum(squares, 0) + tl.zeros(words[0].shape, tl.float32)
    elif len(words) == 16:
        total, squares = tl.inline_asm_elementwise(STATISTICS, _STATISTICS16, words, (tl.float32, tl.float32), False, 1)
    else:
        tl.static_assert(len(words) == 8)
        total, squares = tl.inline_asm_elementwise(STATISTICS, _STATISTICS8, words, (tl.float32, tl.float32), False, 1)
    return total, squares


@triton.jit
def normalise_word(word, factor, shift, gamma, beta, BFLOAT: tl.constexpr, INTERPRETED: tl.constexpr):
    """Return (word * factor + shift) * gamma + beta; words of two numbers each."""
    if INTERPRETED:
        low, high = halves_of(word, BFLOAT)
        gamma_low, gamma_high = halves_of(gamma, BFLOAT)
        beta_low, beta_high = halves_of(beta, BFLOAT)
        low, high = halves_of(word_of(low * factor + shift, high * factor + shift, BFLOAT), BFLOAT)
        return word_of(low * gamma_low + beta_low, high * gamma_high + beta_high, BFLOAT)
    PTX: tl.constexpr = _NORMALISE_BFLOAT if BFLOAT else _NORMALISE
    return tl.inline_asm_elementwise(PTX, "=r,r,f,f,r,r", [word, factor, shift, gamma, beta], tl.int32, True, 1)


@triton.jit
def normalise(
    blocks, gamma, beta, K, epsilon, STATISTICS: tl.constexpr, BFLOAT: tl.constexpr, INTERPRETED: tl.constexpr
):
    """Return LayerNorm of the row of K numbers in ``blocks``, tuples of words like gamma and beta."""
    total, squares = sums_of_row(blocks, STATISTICS, BFLOAT, INTERPRETED)
    mean = total / K
    factor = tl.rsqrt(tl.maximum(squares / K - mean * mean, 0.0) + epsilon)
    shift = -mean * factor
    normed = ()
    for block in tl.static_range(len(blocks)):
        words = ()
        for i in tl.static_range(len(blocks[block])):
            words = words + (
                normalise_word(blocks[block][i], factor, shift, gamma[block][i], beta[block][i], BFLOAT, INTERPRETED),
            )
        normed = normed + (words,)
    return normed


@triton.jit
def store_words(pointers, words, wanted):
    """Store the words of a block side by side from ``pointers`` on if ``wanted``."""
    for i in tl.static_range(len(words)):
        tl.store(pointers + i, words[i], mask=wanted)
