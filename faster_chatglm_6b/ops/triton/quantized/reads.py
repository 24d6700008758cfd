"""Reads of x and the residual after the wait for the kernel before, for the products with integer weights.

They are PTX. In a pipelined loop Triton would copy what ``tl.load`` reads some rounds ahead, together with the weight:
before the predecessor has written it. The compiler may also move the wait after anything that does not depend on it. So
every address here must contain ``zero_after_wait``, which the branch with the wait produces.
"""

import triton
import triton.language as tl

from .counts import arrange, offset
from .mma import join_lines


def _read(pieces: int) -> tl.constexpr:
    """Return the PTX that reads ``pieces`` times 16 bytes if the last operand is not 0, and gives 0 otherwise."""
    lines = [".reg .pred p;", f"setp.ne.b32 p, ${4 * pieces + 4}, 0;"]
    lines += [f"mov.b32 ${i}, 0;" for i in range(4 * pieces)]
    for piece in range(pieces):
        words = ", ".join(f"${4 * piece + i}" for i in range(4))
        lines.append(f"@p ld.global.v4.b32 {{{words}}}, [${4 * pieces} + {16 * piece}];")
    return join_lines(*lines)


_READ2, _READ4 = _read(2), _read(4)
# Results are written before the address is read.
_READ2_OPERANDS = tl.constexpr(",".join(["=&r"] * 8 + ["l"] * 4 + ["r"] * 4))
_READ4_OPERANDS = tl.constexpr(",".join(["=&r"] * 16 + ["l"] * 4 + ["r"] * 4))
_NOTHING = tl.constexpr("mov.b32 $0, 0;")


@triton.jit
def zero_after_wait():
    """Return an int32 zero that the compiler cannot foresee, so that its users stay after everything before it."""
    return tl.inline_asm_elementwise(_NOTHING, "=r", [], tl.int32, False, 1)


@triton.jit
def load_x(x, chunk, index, M, KW: tl.constexpr, BITS: tl.constexpr, INTERPRETED: tl.constexpr):
    """Read the x that belongs to the words of a chunk: 16 / BITS pieces of four words per lane each.

    Lanes whose row of x does not exist hold 0.
    """
    PIECES: tl.constexpr = 16 // BITS
    row = index // 16 % 8
    wanted = (row < M) & (chunk < KW // 16)
    pointers = x + (row * (KW * PIECES) + chunk * (16 * PIECES) + index // 4 % 4 * (4 * PIECES) + index % 4)
    if INTERPRETED:
        pieces = ()
        for piece in tl.static_range(PIECES):
            pieces = pieces + (tl.load(pointers + 4 * piece, mask=wanted, other=0),)
    elif BITS == 4:
        pieces = tl.inline_asm_elementwise(
            _READ4,
            _READ4_OPERANDS,
            [pointers.to(tl.int64), wanted.to(tl.int32)],
            (tl.int32, tl.int32, tl.int32, tl.int32),
            False,
            4,
        )
    else:
        pieces = tl.inline_asm_elementwise(
            _READ2, _READ2_OPERANDS, [pointers.to(tl.int64), wanted.to(tl.int32)], (tl.int32, tl.int32), False, 4
        )
    return pieces


@triton.jit
def load_round(
    x,
    chunk,
    index,
    M,
    KW: tl.constexpr,
    BITS: tl.constexpr,
    WARPS: tl.constexpr,
    DEPTH: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Read the x of each step of a round with ``load_x``."""
    steps = ()
    for step in tl.static_range(DEPTH):
        steps = steps + (load_x(x, chunk + step * WARPS, index, M, KW, BITS, INTERPRETED),)
    return steps


@triton.jit
def arrange_round(steps, BITS: tl.constexpr, INTERPRETED: tl.constexpr):
    """Arrange every piece of a round."""
    new = ()
    for step in tl.static_range(len(steps)):
        pieces = ()
        for piece in tl.static_range(len(steps[step])):
            pieces = pieces + (arrange(steps[step][piece], BITS, INTERPRETED),)
        new = new + (pieces,)
    return new


@triton.jit
def offset_round(steps, less, BITS: tl.constexpr, INTERPRETED: tl.constexpr):
    """Subtract the surplus of every step of a round from the chains ``less``."""
    for step in tl.static_range(len(steps)):
        less = offset(steps[step], less[0], less[1], BITS, INTERPRETED)
    return less


_READ_HALF = tl.constexpr("ld.global.b16 $0, [$1];")


@triton.jit
def read_half(pointers, INTERPRETED: tl.constexpr):
    """Read the 16-bit numbers at ``pointers`` as float32, by PTX as ``load_x`` does."""
    if INTERPRETED:
        values = tl.load(pointers)
    else:
        bits = tl.inline_asm_elementwise(_READ_HALF, "=h,l", [pointers.to(tl.int64)], tl.int16, False, 1)
        values = bits.to(pointers.dtype.element_ty, bitcast=True)
    return values.to(tl.float32)


@triton.jit
def read_residual(residual, row, m, M, N, TILES: tl.constexpr, INTERPRETED: tl.constexpr):
    """Read the addends to the results of each tile; the first number stands in if there is no result."""
    added = ()
    for _ in tl.static_range(TILES):
        target = tl.where((row < N) & (m < M), m.to(tl.int64) * N + row, 0)
        added = added + (read_half(residual + target, INTERPRETED),)
        row += 16
    return added


@triton.jit
def no_residual(row, TILES: tl.constexpr):
    """Return zeros in the shape of ``read_residual``."""
    added = ()
    for _ in tl.static_range(TILES):
        added = added + (tl.zeros(row.shape, tl.float32),)
    return added
