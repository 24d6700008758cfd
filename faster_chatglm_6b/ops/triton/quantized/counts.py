"""Integers as subnormal halves on the tensor cores, in inline PTX: the cheapest way from a stored word to a product.

With its sign bit flipped, an integer of four bits counts from 0 to 15 (its value plus 8), one of eight bits from 0 to
255 (plus 128). As the low bits of a half it is a subnormal number, the count times 2^-24, and its product with x is
exact. The surplus, 8 or 128 times the sum of x, is the same for every weight row: ``offset`` subtracts it once for all
rows that a warp has under way. Lanes and rows are the same as in ``mma``; bfloat16 has no room for this.
"""

import triton
import triton.language as tl

from .mma import interpreted_product, join_lines, mma


def _move(pairs: list[tuple[str, str]]) -> list[str]:
    return [f"mov.f32 {target}, {source};" for target, source in pairs]


def _multiply(bits: int) -> tl.constexpr:
    """Return the PTX of one step for 16 weight rows.

    Operands: four chains of sums, 4 words each; the words of row g, then of row g + 8; x as ``arrange`` leaves it, 4
    words per piece; the chains as they were. With four chains no product waits for the one before. In four bits the
    odd chains are 16 times as large as the even ones, because the high nibbles are not shifted down.
    """
    pieces = 16 // bits
    before = 24 + 4 * pieces
    sums = [f"{chain}{i}" for chain in "abcd" for i in range(4)]
    lines = [f".reg .f32 {', '.join(sums)};", ".reg .b32 p, q, r, s, t, u, v, w, y, z;"]
    lines += _move([(name, f"${before + i}") for i, name in enumerate(sums)])
    for word in range(4):
        above, below = f"${16 + word}", f"${20 + word}"
        if bits == 4:
            low, high = "0x000F000F, 0x00080008, 0x6A", "0x00F000F0, 0x00800080, 0x6A"
            x = [f"${24 + 4 * word + i}" for i in range(4)]
            even, odd = ("a", "b") if word % 2 == 0 else ("c", "d")
            lines += [
                f"shr.u32 y, {above}, 8;",
                f"shr.u32 z, {below}, 8;",
                f"lop3.b32 p, {above}, {low};",
                f"lop3.b32 q, {below}, {low};",
                f"lop3.b32 r, y, {low};",
                f"lop3.b32 s, z, {low};",
                f"lop3.b32 t, {above}, {high};",
                f"lop3.b32 u, {below}, {high};",
                f"lop3.b32 v, y, {high};",
                f"lop3.b32 w, z, {high};",
                mma("f16", even, ["p", "q", "r", "s"], (x[0], x[1])),
                mma("f16", odd, ["t", "u", "v", "w"], (x[2], x[3])),
            ]
        else:
            x = [f"${24 + 4 * (word // 2) + 2 * (word % 2) + i}" for i in range(2)]
            lines += [
                f"xor.b32 y, {above}, 0x80808080;",
                f"xor.b32 z, {below}, 0x80808080;",
                "prmt.b32 p, y, 0, 0x4140;",
                "prmt.b32 q, z, 0, 0x4140;",
                "prmt.b32 r, y, 0, 0x4342;",
                "prmt.b32 s, z, 0, 0x4342;",
                mma("f16", "abcd"[word], ["p", "q", "r", "s"], (x[0], x[1])),
            ]
    return join_lines(*lines, *_move([(f"${i}", name) for i, name in enumerate(sums)]))


def _offset(bits: int) -> tl.constexpr:
    """Return the PTX that adds -8 or -128 times the sum of x to two chains of sums.

    Operands: both chains, 4 words each; x as above; the chains as they were.
    """
    words = 4 * 16 // bits
    sums = [f"{chain}{i}" for chain in "cd" for i in range(4)]
    less = "0x80088008" if bits == 4 else "0x80808080"
    lines = [".reg .f32 c0, c1, c2, c3, d0, d1, d2, d3;", ".reg .b32 less;", f"mov.b32 less, {less};"]
    lines += _move([(name, f"${8 + words + i}") for i, name in enumerate(sums)])
    for pair in range(words // 2):
        x = (f"${8 + 2 * pair}", f"${9 + 2 * pair}")
        lines.append(mma("f16", "cd"[pair % 2], ["less"] * 4, x))
    return join_lines(*lines, *_move([(f"${i}", name) for i, name in enumerate(sums)]))


# Four bits: the eight halves of a word of x in the order of the nibbles: (1, 5), (3, 7), (0, 4), (2, 6).
_ARRANGE = join_lines(
    "prmt.b32 $0, $4, $6, 0x7632;",
    "prmt.b32 $1, $5, $7, 0x7632;",
    "prmt.b32 $2, $4, $6, 0x5410;",
    "prmt.b32 $3, $5, $7, 0x5410;",
)
# Results before inputs would share registers with inputs that are still needed.
_ARRANGED = tl.constexpr("=&r,=&r,=&r,=&r,r,r,r,r")
_MULTIPLY4, _MULTIPLY8, _OFFSET4, _OFFSET8 = _multiply(4), _multiply(8), _offset(4), _offset(8)
_MULTIPLY4_OPERANDS = tl.constexpr(",".join(["=f"] * 16 + ["r"] * 24 + ["f"] * 16))
_MULTIPLY8_OPERANDS = tl.constexpr(",".join(["=f"] * 16 + ["r"] * 16 + ["f"] * 16))
_OFFSET4_OPERANDS = tl.constexpr(",".join(["=f"] * 8 + ["r"] * 16 + ["f"] * 8))
_OFFSET8_OPERANDS = tl.constexpr(",".join(["=f"] * 8 + ["r"] * 8 + ["f"] * 8))


@triton.jit
def arrange(piece, BITS: tl.constexpr, INTERPRETED: tl.constexpr):
    """Arrange a piece of x (int32 block, pairs of halves) as ``multiply_counts`` and ``offset`` take it."""
    if BITS == 4 and not INTERPRETED:
        piece = tl.inline_asm_elementwise(_ARRANGE, _ARRANGED, [piece], tl.int32, True, 4)
    return piece


@triton.jit
def multiply_counts(a, b, x, sums, BITS: tl.constexpr, INTERPRETED: tl.constexpr):
    """Add the counts in the words ``a`` and ``b`` (rows g and g + 8) times x to the four chains ``sums``.

    Args:
        x: tuple of arranged pieces, four for four bits and two for eight. sums: float32 blocks, laid out as in
            ``mma.multiply``; ``total`` adds them up.
    """
    if INTERPRETED:
        sums = (sums[0] + interpreted_product(a, b, x, BITS, False), sums[1], sums[2], sums[3])
    elif BITS == 4:
        sums = tl.inline_asm_elementwise(
            _MULTIPLY4,
            _MULTIPLY4_OPERANDS,
            [a, b, x[0], x[1], x[2], x[3], sums[0], sums[1], sums[2], sums[3]],
            (tl.float32, tl.float32, tl.float32, tl.float32),
            True,
            4,
        )
    else:
        sums = tl.inline_asm_elementwise(
            _MULTIPLY8,
            _MULTIPLY8_OPERANDS,
            [a, b, x[0], x[1], sums[0], sums[1], sums[2], sums[3]],
            (tl.float32, tl.float32, tl.float32, tl.float32),
            True,
            4,
        )
    return sums


@triton.jit
def offset(x, c, d, BITS: tl.constexpr, INTERPRETED: tl.constexpr):
    """Return chains c and d, less the surplus of a step."""
    if not INTERPRETED:
        if BITS == 4:
            c, d = tl.inline_asm_elementwise(
                _OFFSET4, _OFFSET4_OPERANDS, [x[0], x[1], x[2], x[3], c, d], (tl.float32, tl.float32), True, 4
            )
        else:
            c, d = tl.inline_asm_elementwise(
                _OFFSET8, _OFFSET8_OPERANDS, [x[0], x[1], c, d], (tl.float32, tl.float32), True, 4
            )
    return c, d


@triton.jit
def total(sums, less, BITS: tl.constexpr, INTERPRETED: tl.constexpr):
    """Return W x^T from the counts' chains ``sums`` and the two chains ``less`` of their surplus."""
    HIGH: tl.constexpr = 0.0625 if BITS == 4 else 1.0
    UNIT: tl.constexpr = 1.0 if INTERPRETED else 16777216.0
    return (sums[0] + sums[2] + (sums[1] + sums[3]) * HIGH + (less[0] + less[1])) * UNIT
