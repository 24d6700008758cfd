"""Inline PTX of the products with one row of x, one value per thread and operand.

Every block has one element per thread, so its layout can only be the obvious one. A step is 64 bytes of 16 weight rows
per warp. Lane 4 g + t copies 16 bytes of row g and of row g + 8 to shared memory. It reads its own copies back, so that
no barrier is needed, and multiplies them on the tensor cores. Lanes and rows are the same as in ``mma``.

Halves are multiplied with counts, the cheapest way from a stored word to a product. With its sign bit flipped, an
integer of four bits counts from 0 to 15 (its value plus 8), one of eight bits from 0 to 255 (plus 128). As the low bits
of a half it is a subnormal number, the count times 2^-24, and its product with x is exact. The surplus, 8 or 128 times
the sum of x, is the same for every weight row: ``offset`` gives it once. bfloat16 has no room for this.
"""

import triton
import triton.language as tl

from ..mma import join_lines, low_half, mma

# A step takes half of a line of 128 bytes and the next step the other half: asking for both at once is worth 7 %.
_COPY = join_lines(
    "cp.async.cg.shared.global.L2::128B [$1], [$3], 16, $5;",
    "cp.async.cg.shared.global.L2::128B [$2], [$4], 16, $5;",
    "cp.async.commit_group;",
    "mov.b32 $0, 0;",
)
_READ = join_lines(
    "ld.shared.v4.b32 {$0, $1, $2, $3}, [$8];",
    "ld.shared.v4.b32 {$4, $5, $6, $7}, [$9];",
)


def ptx_wait(ahead: int) -> str:
    """Return the PTX that waits until at most ``ahead`` - 1 of this thread's copies are under way."""
    return f"cp.async.wait_group {ahead - 1};\nmov.b32 $0, 0;"


def ptx_ring(size: int) -> str:
    """Return the PTX that allocates ``size`` bytes of shared memory, at most 48 KiB, and gives their address."""
    return f"{{\n.shared .align 16 .b8 ring[{size}];\nmov.u32 $0, ring;\n}}"


def _load(words: int) -> tl.constexpr:
    """Return the PTX that reads ``words`` words if the last operand is not 0, and gives 0 otherwise."""
    lines = [".reg .pred p;", f"setp.ne.b32 p, ${words + 1}, 0;"]
    lines += [f"mov.b32 ${i}, 0;" for i in range(words)]
    for first in range(0, words, 4):
        targets = ", ".join(f"${first + i}" for i in range(4))
        lines.append(f"@p ld.global.v4.b32 {{{targets}}}, [${words} + {4 * first}];")
    return join_lines(*lines)


def _arrange() -> tl.constexpr:
    """Return the PTX that puts each 8 halves of 16 words into the nibbles' order: (1, 5), (3, 7), (0, 4), (2, 6)."""
    lines = []
    for first in range(0, 16, 4):
        x = [f"${16 + first + i}" for i in range(4)]
        lines += [
            f"prmt.b32 ${first}, {x[0]}, {x[2]}, 0x7632;",
            f"prmt.b32 ${first + 1}, {x[1]}, {x[3]}, 0x7632;",
            f"prmt.b32 ${first + 2}, {x[0]}, {x[2]}, 0x5410;",
            f"prmt.b32 ${first + 3}, {x[1]}, {x[3]}, 0x5410;",
        ]
    return join_lines(*lines)


def _unpacking_lines(bits: int, bfloat: bool, word: str, targets: list[str]) -> list[str]:
    """Return the PTX that turns a word into pairs of numbers.

    The pairs are (1, 5), (3, 7), (0, 4), (2, 6) of four bits and (0, 1), (2, 3) of eight. Halves hold counts as
    subnormal numbers, the last two pairs of four bits 16 times as large. bfloat16 holds the integers.
    """
    if bits == 4 and not bfloat:
        low, high = "0x000F000F, 0x00080008, 0x6A", "0x00F000F0, 0x00800080, 0x6A"
        return [
            f"shr.u32 y, {word}, 8;",
            f"lop3.b32 {targets[0]}, {word}, {low};",
            f"lop3.b32 {targets[1]}, y, {low};",
            f"lop3.b32 {targets[2]}, {word}, {high};",
            f"lop3.b32 {targets[3]}, y, {high};",
        ]
    if bits == 4:
        lines = [f"lop3.b32 {targets[0]}, {word}, 0x000F000F, 0x43084308, 0x6A;"]  # 136 + integer
        for target, shift in ((targets[2], 4), (targets[1], 8), (targets[3], 12)):
            lines += [f"shr.u32 y, {word}, {shift};", f"lop3.b32 {target}, y, 0x000F000F, 0x43084308, 0x6A;"]
        lines += ["mov.b32 y, 0x3F803F80;", "mov.b32 z, 0xC308C308;"]  # 1, -136
        return lines + [f"fma.rn.bf16x2 {target}, {target}, y, z;" for target in targets]
    if not bfloat:
        return [
            f"xor.b32 y, {word}, 0x80808080;",
            f"prmt.b32 {targets[0]}, y, 0, 0x4140;",
            f"prmt.b32 {targets[1]}, y, 0, 0x4342;",
        ]
    # The mantissa of bfloat16 has room for seven bits: (128 + those) + (-128 or, with the sign bit, -256).
    lines = ["mov.b32 k, 0x3F803F80;"]
    for target, selector in zip(targets, ("0x4140", "0x4342"), strict=True):
        lines += [
            f"prmt.b32 y, {word}, 0, {selector};",
            "lop3.b32 z, y, 0x00800080, 0xC300C300, 0xEA;",
            "lop3.b32 y, y, 0x007F007F, 0x43004300, 0xEA;",
            f"fma.rn.bf16x2 {target}, y, k, z;",
        ]
    return lines


PRODUCT_REGISTERS = ".reg .b32 p<4>, q<4>, y, z, k;"


def product_lines(bits: int, bfloat: bool, words: int, x: int) -> list[str]:
    """Return the PTX that adds a step's products to the chains of sums c and d; it needs ``PRODUCT_REGISTERS``.

    With four bits of halves d gets the pairs that are 16 times as large, otherwise the chains take turns.

    Args:
        words: operand of the first word of row g; those of row g + 8 follow its four. x: operand of the first of x.
    """
    pairs = 16 // bits
    lines = []
    for word in range(4):
        above, below = [f"p{i}" for i in range(pairs)], [f"q{i}" for i in range(pairs)]
        lines += _unpacking_lines(bits, bfloat, f"${words + word}", above)
        lines += _unpacking_lines(bits, bfloat, f"${words + 4 + word}", below)
        for half in range(pairs // 2):
            chain = "cd"[(word * (pairs // 2) + half) % 2]
            here = tuple(f"${x + pairs * word + 2 * half + i}" for i in range(2))
            fragment = [above[2 * half], below[2 * half], above[2 * half + 1], below[2 * half + 1]]
            lines.append(mma("bf16" if bfloat else "f16", chain, fragment, here))
    return lines


def _step(bits: int, bfloat: bool, column: int) -> tl.constexpr:
    """Return the PTX of a step's products for rows g and g + 8 in column 2 t + ``column``.

    Operands: both results; the words of row g, then of row g + 8; x. There are two chains of sums.
    """
    sums = [f"{chain}{i}" for chain in "cd" for i in range(4)]
    lines = [PRODUCT_REGISTERS, f".reg .f32 {', '.join(sums)};"]
    lines += [f"mov.f32 {name}, 0f00000000;" for name in sums]
    lines += product_lines(bits, bfloat, 2, 10)
    for result in range(2):
        c, d = (f"{chain}{2 * result + column}" for chain in "cd")
        # With four bits, d has the pairs that are 16 times as large.
        if bits == 4 and not bfloat:
            lines.append(f"fma.rn.f32 ${result}, {d}, 0f3D800000, {c};")
        else:
            lines.append(f"add.f32 ${result}, {c}, {d};")
    return join_lines(*lines)


def _offset(bits: int) -> tl.constexpr:
    """Return the PTX of -8 or -128 times the sum of x of the columns 2 t and 2 t + 1. Operands: both; x."""
    sums = [f"{chain}{i}" for chain in "cd" for i in range(4)]
    lines = [f".reg .f32 {', '.join(sums)};", ".reg .b32 less;"]
    lines += [f"mov.b32 less, {'0x80088008' if bits == 4 else '0x80808080'};"]
    lines += [f"mov.f32 {name}, 0f00000000;" for name in sums]
    for pair in range(32 // bits):
        lines.append(mma("f16", "cd"[pair % 2], ["less"] * 4, (f"${2 + 2 * pair}", f"${3 + 2 * pair}")))
    return join_lines(*lines, "add.f32 $0, c0, d0;", "add.f32 $1, c1, d1;")


_SUM4 = join_lines(
    ".reg .f32 a, b, c, d;",
    "shfl.sync.bfly.b32 a, $2, 1, 0x1f, 0xffffffff;",
    "shfl.sync.bfly.b32 b, $3, 1, 0x1f, 0xffffffff;",
    "add.f32 a, a, $2;",
    "add.f32 b, b, $3;",
    "shfl.sync.bfly.b32 c, a, 2, 0x1f, 0xffffffff;",
    "shfl.sync.bfly.b32 d, b, 2, 0x1f, 0xffffffff;",
    "add.f32 $0, a, c;",
    "add.f32 $1, b, d;",
)
_LOAD16, _LOAD8, _ARRANGE = _load(16), _load(8), _arrange()
_LOAD16_OPERANDS = tl.constexpr(",".join(["=&r"] * 16 + ["l", "r"]))
_LOAD8_OPERANDS = tl.constexpr(",".join(["=&r"] * 8 + ["l", "r"]))
# Results before inputs would share registers with inputs that are still needed.
_ARRANGE_OPERANDS = tl.constexpr(",".join(["=&r"] * 16 + ["r"] * 16))
_READ_OPERANDS = tl.constexpr(",".join(["=&r"] * 8 + ["r"] * 2))
_STEP4, _STEP4_ODD = _step(4, False, 0), _step(4, False, 1)
_STEP8, _STEP8_ODD = _step(8, False, 0), _step(8, False, 1)
_STEP4_BFLOAT, _STEP4_BFLOAT_ODD = _step(4, True, 0), _step(4, True, 1)
_STEP8_BFLOAT, _STEP8_BFLOAT_ODD = _step(8, True, 0), _step(8, True, 1)
_STEP4_OPERANDS = tl.constexpr(",".join(["=&f"] * 2 + ["r"] * 24))
_STEP8_OPERANDS = tl.constexpr(",".join(["=&f"] * 2 + ["r"] * 16))
_OFFSET4, _OFFSET8 = _offset(4), _offset(8)
_OFFSET4_OPERANDS = tl.constexpr(",".join(["=f"] * 2 + ["r"] * 16))
_OFFSET8_OPERANDS = tl.constexpr(",".join(["=f"] * 2 + ["r"] * 8))
_I8 = tl.constexpr((tl.int32,) * 8)
_I16 = tl.constexpr((tl.int32,) * 16)


@triton.jit
def allocate(RING: tl.constexpr):
    """Return the address of the shared memory that the PTX of ``ptx_ring`` allocates."""
    return tl.inline_asm_elementwise(RING, "=r", [], tl.int32, False, 1)


@triton.jit
def copy_step(target, other_target, above, below, size):
    """Start copying 16 bytes each from ``above`` and ``below``; with ``size`` 0 write zeros and read nothing."""
    tl.inline_asm_elementwise(
        _COPY,
        "=r,r,r,l,l,r",
        [target, other_target, above.to(tl.int64), below.to(tl.int64), size],
        tl.int32,
        False,
        1,
    )


@triton.jit
def wait_for_copy(WAIT: tl.constexpr):
    """Wait as the PTX of ``ptx_wait`` does."""
    tl.inline_asm_elementwise(WAIT, "=r", [], tl.int32, False, 1)


@triton.jit
def read_step(source, other_source):
    """Read what ``copy_step`` has copied: four words of each row."""
    return tl.inline_asm_elementwise(_READ, _READ_OPERANDS, [source, other_source], _I8, False, 1)


@triton.jit
def load_x(pointers, wanted, BITS: tl.constexpr, INTERPRETED: tl.constexpr):
    """Load the 64 / BITS words of x that belong to a step's weights, or 0 if not ``wanted``."""
    if INTERPRETED:
        words = ()
        for i in tl.static_range(64 // BITS):
            words = words + (tl.load(pointers + i, mask=wanted, other=0),)
    elif BITS == 4:
        words = tl.inline_asm_elementwise(
            _LOAD16, _LOAD16_OPERANDS, [pointers.to(tl.int64), wanted.to(tl.int32)], _I16, False, 1
        )
    else:
        words = tl.inline_asm_elementwise(
            _LOAD8, _LOAD8_OPERANDS, [pointers.to(tl.int64), wanted.to(tl.int32)], _I8, False, 1
        )
    return words


@triton.jit
def arrange(x, BITS: tl.constexpr, INTERPRETED: tl.constexpr):
    """Arrange ``load_x``'s words as ``multiply_step`` and ``offset`` take them."""
    if BITS == 4 and not INTERPRETED:
        x = tl.inline_asm_elementwise(_ARRANGE, _ARRANGE_OPERANDS, x, _I16, True, 1)
    return x


@triton.jit
def multiply_step(words, x, ODD: tl.constexpr, BITS: tl.constexpr, BFLOAT: tl.constexpr, INTERPRETED: tl.constexpr):
    """Return column 2 t + ODD of the products for rows g and g + 8; float16 results are in units of 2^-24."""
    if INTERPRETED:
        return interpreted_step(words, x, ODD, BITS, BFLOAT)
    if BITS == 4:
        if BFLOAT:
            PTX: tl.constexpr = _STEP4_BFLOAT_ODD if ODD else _STEP4_BFLOAT
        else:
            PTX: tl.constexpr = _STEP4_ODD if ODD else _STEP4
        return tl.inline_asm_elementwise(PTX, _STEP4_OPERANDS, words + x, (tl.float32, tl.float32), True, 1)
    else:
        if BFLOAT:
            PTX8: tl.constexpr = _STEP8_BFLOAT_ODD if ODD else _STEP8_BFLOAT
        else:
            PTX8: tl.constexpr = _STEP8_ODD if ODD else _STEP8
        return tl.inline_asm_elementwise(PTX8, _STEP8_OPERANDS, words + x, (tl.float32, tl.float32), True, 1)


@triton.jit
def offset(x, zeros, BITS: tl.constexpr, INTERPRETED: tl.constexpr):
    """Return the negated surplus that counting from zero adds to a step's products, in columns 2 t and 2 t + 1."""
    if INTERPRETED:
        return zeros, zeros
    elif BITS == 4:
        return tl.inline_asm_elementwise(_OFFSET4, _OFFSET4_OPERANDS, x, (tl.float32, tl.float32), True, 1)
    else:
        return tl.inline_asm_elementwise(_OFFSET8, _OFFSET8_OPERANDS, x, (tl.float32, tl.float32), True, 1)


@triton.jit
def row_sums(top, bottom, INTERPRETED: tl.constexpr):
    """Return [32] sums over the warps: lane 4 g + t has row g + 8 t for t < 2, and 0 for the other t."""
    WARPS: tl.constexpr = top.shape[0] // 32
    if INTERPRETED:
        top = tl.reshape(
            tl.sum(tl.reshape(top, [WARPS * 8, 4]), 1)[:, None] + tl.zeros([1, 4], tl.float32), [WARPS * 32]
        )
        bottom = tl.reshape(
            tl.sum(tl.reshape(bottom, [WARPS * 8, 4]), 1)[:, None] + tl.zeros([1, 4], tl.float32), [WARPS * 32]
        )
    else:
        top, bottom = tl.inline_asm_elementwise(_SUM4, "=&f,=&f,f,f", [top, bottom], (tl.float32, tl.float32), False, 1)
    place = tl.arange(0, 32 * WARPS) % 4
    chosen = tl.where(place == 0, top, tl.where(place == 1, bottom, 0.0))
    return tl.sum(tl.reshape(chosen, [WARPS, 32]), 0)


@triton.jit
def interpreted_products(words, x, BITS: tl.constexpr, BFLOAT: tl.constexpr):
    """Multiply without PTX, so that the interpreter checks the arithmetic of rows and columns.

    Returns:
        The products of a step for the weight rows g and for g + 8, both [warps, 8 g, 8 columns of x].
    """
    WARPS: tl.constexpr = words[0].shape[0] // 32
    PER_WORD: tl.constexpr = 32 // BITS
    above = tl.zeros([WARPS, 8, 8], tl.float32)
    below = tl.zeros([WARPS, 8, 8], tl.float32)
    for v in tl.static_range(4):
        for j in tl.static_range(PER_WORD):
            # The even column is in the high nibble.
            SHIFT: tl.constexpr = 32 - BITS - BITS * (j ^ 1 if BITS == 4 else j)
            COLUMN: tl.constexpr = v * PER_WORD + j
            half = low_half(x[COLUMN // 2] >> (16 * (COLUMN % 2)), BFLOAT)
            half = tl.reshape(half, [WARPS, 8, 4])[:, None, :, :]
            q = tl.reshape(((words[v] << SHIFT) >> (32 - BITS)).to(tl.float32), [WARPS, 8, 4])
            above += tl.sum(q[:, :, None, :] * half, 3)
            q = tl.reshape(((words[4 + v] << SHIFT) >> (32 - BITS)).to(tl.float32), [WARPS, 8, 4])
            below += tl.sum(q[:, :, None, :] * half, 3)
    return above, below


@triton.jit
def interpreted_step(words, x, ODD: tl.constexpr, BITS: tl.constexpr, BFLOAT: tl.constexpr):
    """Do ``multiply_step`` without PTX."""
    WARPS: tl.constexpr = words[0].shape[0] // 32
    above, below = interpreted_products(words, x, BITS, BFLOAT)
    here = tl.arange(0, 2)[None, None, None, :] == ODD
    above = tl.sum(tl.where(here, tl.reshape(above, [WARPS, 8, 4, 2]), 0.0), 3)
    below = tl.sum(tl.where(here, tl.reshape(below, [WARPS, 8, 4, 2]), 0.0), 3)
    return tl.reshape(above, [WARPS * 32]), tl.reshape(below, [WARPS * 32])
