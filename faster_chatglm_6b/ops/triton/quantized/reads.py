"""Reads of x and the residual after the wait for the kernel before, for the products with integer weights.

They are PTX. The compiler may move the wait after anything that does not depend on it. So every address here must
contain ``zero_after_wait``, which comes after the wait.
"""

import triton
import triton.language as tl

_NOTHING = tl.constexpr("mov.b32 $0, 0;")
_READ_HALF = tl.constexpr("ld.global.b16 $0, [$1];")


@triton.jit
def zero_after_wait():
    """Return an int32 zero that the compiler cannot foresee, so that its users stay after everything before it."""
    return tl.inline_asm_elementwise(_NOTHING, "=r", [], tl.int32, False, 1)


@triton.jit
def read_half(pointers, INTERPRETED: tl.constexpr):
    """Read the 16-bit numbers at ``pointers`` as float32, by PTX."""
    if INTERPRETED:
        values = tl.load(pointers)
    else:
        bits = tl.inline_asm_elementwise(_READ_HALF, "=h,l", [pointers.to(tl.int64)], tl.int16, False, 1)
        values = bits.to(pointers.dtype.element_ty, bitcast=True)
    return values.to(tl.float32)
