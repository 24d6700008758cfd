"""Turn a weight's integers into pairs of halves in registers and multiply them on the tensor cores, in inline PTX.

Triton's own ``dot`` would take the unpacked weight through shared memory. Here each thread multiplies the words it has
loaded. In ``mma.m16n8k16`` lane 4 g + t holds the rows g and g + 8 of the weight and row g of x, at the columns of t.
Any columns will do, as long as weight and x agree. So every lane loads 16 contiguous bytes of each of its two weight
rows, and the x that belongs to them.

The functions take one-dimensional int32 blocks of 128 values per warp, of which lane 4 g + t holds 16 g + 4 t + (0..3).
Triton lays a block out like this if it is loaded in vectors of four; ``trial`` makes sure of it.
"""

import triton
import triton.language as tl


def join_lines(*lines: str) -> tl.constexpr:
    """Return the PTX of these lines in a scope of their own."""
    return tl.constexpr("{\n" + "\n".join(lines) + "\n}")


# Four bits, stored with the even column in the high nibble: a word holds the columns 1 0 3 2 5 4 7 6 from its lowest
# nibble up. Each LOP3 takes two nibbles and flips their sign bit, so that they count from 0 to 15 in the mantissas of a
# pair of numbers; (a & b) ^ c is table 0x6A. Pairs: (1, 5), (0, 4), (3, 7), (2, 6).
# Half precision holds (integer + 8) 2^-24 as a subnormal number, and 16 times that from the upper nibbles: the product
# with x is exact, and ``_multiply`` subtracts the 8 again.
_INT4_HALF = join_lines(
    ".reg .b32 s;",
    "lop3.b32 $0, $4, 0x000F000F, 0x00080008, 0x6A;",
    "lop3.b32 $1, $4, 0x00F000F0, 0x00800080, 0x6A;",
    "shr.u32 s, $4, 8;",
    "lop3.b32 $2, s, 0x000F000F, 0x00080008, 0x6A;",
    "lop3.b32 $3, s, 0x00F000F0, 0x00800080, 0x6A;",
)
_INT4_BFLOAT = join_lines(
    ".reg .b32 s, p, q, r, t, k, m;",
    "lop3.b32 p, $4, 0x000F000F, 0x43084308, 0x6A;",  # 136 + integer
    "shr.u32 s, $4, 4;",
    "lop3.b32 q, s, 0x000F000F, 0x43084308, 0x6A;",
    "shr.u32 s, $4, 8;",
    "lop3.b32 r, s, 0x000F000F, 0x43084308, 0x6A;",
    "shr.u32 s, $4, 12;",
    "lop3.b32 t, s, 0x000F000F, 0x43084308, 0x6A;",
    "mov.b32 k, 0x3F803F80;",  # 1
    "mov.b32 m, 0xC308C308;",  # -136
    "fma.rn.bf16x2 $0, p, k, m;",
    "fma.rn.bf16x2 $1, q, k, m;",
    "fma.rn.bf16x2 $2, r, k, m;",
    "fma.rn.bf16x2 $3, t, k, m;",
)
# Eight bits: pairs (0, 1), (2, 3).
_INT8_HALF = join_lines(
    ".reg .b32 u, p, q, k;",
    "xor.b32 u, $2, 0x80808080;",
    "prmt.b32 p, u, 0x64646464, 0x4140;",  # 1152 + integer
    "prmt.b32 q, u, 0x64646464, 0x4342;",
    "mov.b32 k, 0x64806480;",
    "sub.rn.f16x2 $0, p, k;",
    "sub.rn.f16x2 $1, q, k;",
)
# The mantissa of bfloat16 has room for seven bits: (128 + those) + (-128 or, with the sign bit, -256).
_INT8_BFLOAT = join_lines(
    ".reg .b32 p, q, a, b, c, d, k;",
    "prmt.b32 p, $2, 0, 0x4140;",
    "prmt.b32 q, $2, 0, 0x4342;",
    "lop3.b32 a, p, 0x007F007F, 0x43004300, 0xEA;",
    "lop3.b32 b, p, 0x00800080, 0xC300C300, 0xEA;",
    "lop3.b32 c, q, 0x007F007F, 0x43004300, 0xEA;",
    "lop3.b32 d, q, 0x00800080, 0xC300C300, 0xEA;",
    "mov.b32 k, 0x3F803F80;",
    "fma.rn.bf16x2 $0, a, k, b;",
    "fma.rn.bf16x2 $1, c, k, d;",
)


def mma(dtype: str, chain: str, a: list, b: tuple[str, str]) -> str:
    """Return the PTX of chain += a b; ``a`` may name its operands by number."""
    sums = "{" + ", ".join(f"{chain}{i}" for i in range(4)) + "}"
    fragment = ", ".join(f"${i}" if isinstance(i, int) else i for i in a)
    return (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32 {sums}, {{{fragment}}}, {{{b[0]}, {b[1]}}}, {sums};"
    )


def _multiply(bits: int, dtype: str) -> tl.constexpr:
    """Return the PTX of acc + W x^T for the four words of a lane's two rows.

    Operands: 4 results; the pairs of row g, then of row g + 8 (4 words each); the pieces of x (4 words each); 4 sums.
    """
    pairs, pieces = (4, 4) if bits == 4 else (2, 2)
    first, x = 4, 4 + 8 * pairs
    lines = [".reg .f32 c0, c1, c2, c3, d0, d1, d2, d3;", ".reg .b32 p, q, r, t;"]
    lines += [f"mov.f32 c{i}, ${x + 4 * pieces + i};" for i in range(4)] + [
        f"mov.f32 d{i}, 0f00000000;" for i in range(4)
    ]
    # Two chains of sums, c and d, so that one product need not wait for the one before. The chains of subnormals
    # differ by a factor of 16, and e subtracts 8 of their units from each.
    subnormal = bits == 4 and dtype == "f16"
    if subnormal:
        lines += [".reg .f32 e0, e1, e2, e3;", ".reg .b32 less;", "mov.b32 less, 0x80088008;"]
        lines += [f"mov.f32 e{i}, 0f00000000;" for i in range(4)]
    for word in range(4):
        row = [first + 4 * pair + word for pair in range(pairs)]
        below = [operand + 4 * pairs for operand in row]
        if bits == 4:
            piece = [f"${x + 4 * word + i}" for i in range(4)]
            lines += [
                f"prmt.b32 p, {piece[0]}, {piece[2]}, 0x7632;",  # x1, x5
                f"prmt.b32 q, {piece[1]}, {piece[3]}, 0x7632;",  # x3, x7
                f"prmt.b32 r, {piece[0]}, {piece[2]}, 0x5410;",  # x0, x4
                f"prmt.b32 t, {piece[1]}, {piece[3]}, 0x5410;",  # x2, x6
                mma(dtype, "c", [row[0], below[0], row[2], below[2]], ("p", "q")),
                mma(dtype, "d", [row[1], below[1], row[3], below[3]], ("r", "t")),
            ]
            if subnormal:
                lines += [mma(dtype, "e", ["less"] * 4, pair) for pair in (("p", "q"), ("r", "t"))]
        else:
            low = x + 4 * (word // 2) + 2 * (word % 2)
            fragment = [row[0], below[0], row[1], below[1]]
            lines.append(mma(dtype, "cd"[word % 2], fragment, (f"${low}", f"${low + 1}")))
    if subnormal:
        lines += [f"fma.rn.f32 c{i}, d{i}, 0f3D800000, c{i};" for i in range(4)]  # 1 / 16
        return join_lines(*lines, *(f"add.f32 ${i}, c{i}, e{i};" for i in range(4)))
    return join_lines(*lines, *(f"add.f32 ${i}, c{i}, d{i};" for i in range(4)))


_INT4_MULTIPLY_HALF, _INT4_MULTIPLY_BFLOAT = _multiply(4, "f16"), _multiply(4, "bf16")
_INT8_MULTIPLY_HALF, _INT8_MULTIPLY_BFLOAT = _multiply(8, "f16"), _multiply(8, "bf16")
_INT4_UNPACKED = tl.constexpr("=r,=r,=r,=r,r")
_INT8_UNPACKED = tl.constexpr("=r,=r,r")
_INT4_SUMS = tl.constexpr(",".join(["=f"] * 4 + ["r"] * 48 + ["f"] * 4))
_INT8_SUMS = tl.constexpr(",".join(["=f"] * 4 + ["r"] * 24 + ["f"] * 4))


@triton.jit
def unit(BITS: tl.constexpr, BFLOAT: tl.constexpr, INTERPRETED: tl.constexpr):
    """Return the factor from the sums that ``multiply`` makes to the products."""
    return 16777216.0 if BITS == 4 and not BFLOAT and not INTERPRETED else 1.0


@triton.jit
def unpack(words, BITS: tl.constexpr, BFLOAT: tl.constexpr, INTERPRETED: tl.constexpr):
    """Unpack the integers in ``words`` to pairs of halves, a tuple of int32 blocks; the interpreter keeps the words."""
    if INTERPRETED:
        pairs = (words,)
    elif BITS == 4:
        pairs = tl.inline_asm_elementwise(
            _INT4_BFLOAT if BFLOAT else _INT4_HALF,
            _INT4_UNPACKED,
            [words],
            (tl.int32, tl.int32, tl.int32, tl.int32),
            True,
            1,
        )
    else:
        pairs = tl.inline_asm_elementwise(
            _INT8_BFLOAT if BFLOAT else _INT8_HALF, _INT8_UNPACKED, [words], (tl.int32, tl.int32), True, 1
        )
    return pairs


@triton.jit
def multiply(a, b, x, sums, BITS: tl.constexpr, BFLOAT: tl.constexpr, INTERPRETED: tl.constexpr):
    """Return sums + W x^T / ``unit`` for 16 weight rows per warp, 8 rows of x.

    Args:
        a, b: the unpacked words of rows g and g + 8. x: tuple of int32 blocks (pairs of halves), four for four bits
            and two for eight; piece q holds bytes 16 q to 16 q + 15 of the x for the lane's weights.
        sums: float32 block; lane 4 g + t holds, at 0..3, (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1).
    """
    if INTERPRETED:
        sums += interpreted_product(a[0], b[0], x, BITS, BFLOAT)
    elif BITS == 4:
        sums = tl.inline_asm_elementwise(
            _INT4_MULTIPLY_BFLOAT if BFLOAT else _INT4_MULTIPLY_HALF,
            _INT4_SUMS,
            [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], x[0], x[1], x[2], x[3], sums],
            tl.float32,
            False,
            4,
        )
    else:
        sums = tl.inline_asm_elementwise(
            _INT8_MULTIPLY_BFLOAT if BFLOAT else _INT8_MULTIPLY_HALF,
            _INT8_SUMS,
            [a[0], a[1], b[0], b[1], x[0], x[1], sums],
            tl.float32,
            False,
            4,
        )
    return sums


@triton.jit
def low_half(word, BFLOAT: tl.constexpr):
    """Return the 16-bit number in the low half of each word as float32."""
    return (word & 0xFFFF).to(tl.int16).to(tl.bfloat16 if BFLOAT else tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def interpreted_product(a, b, x, BITS: tl.constexpr, BFLOAT: tl.constexpr):
    """Compute what ``multiply`` adds without PTX, so that the interpreter checks the arithmetic of rows and columns."""
    WARPS: tl.constexpr = a.shape[0] // 128
    PER_WORD: tl.constexpr = 32 // BITS
    word = tl.arange(0, 4)[None, None, None, :]
    a = tl.reshape(a, [WARPS, 8, 4, 4])
    b = tl.reshape(b, [WARPS, 8, 4, 4])
    above = tl.zeros([WARPS, 8, 8], tl.float32)
    below = tl.zeros([WARPS, 8, 8], tl.float32)
    for v in tl.static_range(4):
        for j in tl.static_range(PER_WORD):
            # The even column is in the high nibble.
            SHIFT: tl.constexpr = 32 - BITS - BITS * (j ^ 1 if BITS == 4 else j)
            COLUMN: tl.constexpr = v * PER_WORD + j
            half = tl.reshape(x[COLUMN // 8], [WARPS, 8, 4, 4]) >> (16 * (j % 2))
            half = tl.sum(tl.where(word == COLUMN % 8 // 2, half, 0), 3)
            half = low_half(half, BFLOAT)[:, None, :, :]
            q_a = tl.sum(tl.where(word == v, (a << SHIFT) >> (32 - BITS), 0), 3).to(tl.float32)
            q_b = tl.sum(tl.where(word == v, (b << SHIFT) >> (32 - BITS), 0), 3).to(tl.float32)
            above += tl.sum(q_a[:, :, None, :] * half, 3)
            below += tl.sum(q_b[:, :, None, :] * half, 3)
    both = tl.join(tl.reshape(above, [WARPS, 8, 4, 2]), tl.reshape(below, [WARPS, 8, 4, 2]))
    return tl.reshape(tl.permute(both, [0, 1, 2, 4, 3]), [WARPS * 128])
