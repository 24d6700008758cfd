"""Inline PTX of the products with a few rows of x, one value per thread and operand, as in ``one_row.ptx``.

Lane 4 g + t has row g of x at the columns of t, and the sums of the weight rows g and g + 8 with the rows 2 t and
2 t + 1 of x.
"""

import triton
import triton.language as tl

from ..mma import join_lines
from ..one_row.ptx import PRODUCT_REGISTERS, interpreted_products, product_lines


def _accumulate(bits: int, bfloat: bool) -> tl.constexpr:
    """Return the PTX that adds a step's products to two chains of sums.

    Operands: the chains, 4 words each; the words of row g, then of row g + 8; x; the chains as they were.
    """
    before = 16 + 64 // bits
    sums = [f"{chain}{i}" for chain in "cd" for i in range(4)]
    lines = [PRODUCT_REGISTERS, f".reg .f32 {', '.join(sums)};"]
    lines += [f"mov.f32 {name}, ${before + i};" for i, name in enumerate(sums)]
    lines += product_lines(bits, bfloat, 8, 16)
    return join_lines(*lines, *(f"mov.f32 ${i}, {name};" for i, name in enumerate(sums)))


_ACCUMULATE4, _ACCUMULATE8 = _accumulate(4, False), _accumulate(8, False)
_ACCUMULATE4_BFLOAT, _ACCUMULATE8_BFLOAT = _accumulate(4, True), _accumulate(8, True)
_OPERANDS4 = tl.constexpr(",".join(["=f"] * 8 + ["r"] * 24 + ["f"] * 8))
_OPERANDS8 = tl.constexpr(",".join(["=f"] * 8 + ["r"] * 16 + ["f"] * 8))
_F8 = tl.constexpr((tl.float32,) * 8)


@triton.jit
def accumulate(words, x, sums, BITS: tl.constexpr, BFLOAT: tl.constexpr, INTERPRETED: tl.constexpr):
    """Return the eight ``sums`` with a step's products added; those of float16 are in units of 2^-24.

    Args:
        words: four of row g, four of row g + 8. x: of a step, arranged.
        sums: of each chain (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1): the weight's row, and x'.
    """
    if INTERPRETED:
        above, below = interpreted_products(words, x, BITS, BFLOAT)
        first = (
            sums[0] + every_other(above, 0),
            sums[1] + every_other(above, 1),
            sums[2] + every_other(below, 0),
            sums[3] + every_other(below, 1),
        )
        return first + (sums[4], sums[5], sums[6], sums[7])
    if BITS == 4:
        PTX: tl.constexpr = _ACCUMULATE4_BFLOAT if BFLOAT else _ACCUMULATE4
        return tl.inline_asm_elementwise(PTX, _OPERANDS4, words + x + sums, _F8, True, 1)
    else:
        PTX8: tl.constexpr = _ACCUMULATE8_BFLOAT if BFLOAT else _ACCUMULATE8
        return tl.inline_asm_elementwise(PTX8, _OPERANDS8, words + x + sums, _F8, True, 1)


@triton.jit
def every_other(products, first: tl.constexpr):
    """Return the columns 2 t + ``first`` of [warps, 8 g, 8 columns], one for each lane 4 g + t."""
    WARPS: tl.constexpr = products.shape[0]
    here = tl.arange(0, 2)[None, None, None, :] == first
    return tl.reshape(tl.sum(tl.where(here, tl.reshape(products, [WARPS, 8, 4, 2]), 0.0), 3), [WARPS * 32])


@triton.jit
def totals(sums, BITS: tl.constexpr, BFLOAT: tl.constexpr, INTERPRETED: tl.constexpr):
    """Return the four sums of both chains."""
    HIGH: tl.constexpr = 0.0625 if BITS == 4 and not BFLOAT and not INTERPRETED else 1.0
    return (
        sums[0] + sums[4] * HIGH,
        sums[1] + sums[5] * HIGH,
        sums[2] + sums[6] * HIGH,
        sums[3] + sums[7] * HIGH,
    )
