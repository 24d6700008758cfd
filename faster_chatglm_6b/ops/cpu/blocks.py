"""Multiply many rows of x with a weight that is turned into floats block by block, while the block is in the cache."""

import torch
from torch.nn import functional

from .. import reference
from . import native

# Bytes of a block as float32: fewer leave too little to each product, more fall out of the cache.
_BLOCK_BYTES = 4 << 20


def has_bfloat16_products() -> bool:
    """Tell whether this CPU multiplies bfloat16 matrices faster than float32 ones."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which products of x in ``dtype`` are fast; half precision is slow on many CPUs."""
    return dtype if dtype == torch.bfloat16 and has_bfloat16_products() else torch.float32


def integer_product(
    kernel: native.Kernel | None, x: torch.Tensor, w: torch.Tensor, w_scale: torch.Tensor, bits: int, group: int
) -> torch.Tensor:
    """Return [rows, out], float32 or bfloat16, of x [rows, in] and an integer weight of any size.

    Args:
        kernel: what unpacks; None for torch.
        w: int8 [out, in * bits / 8]. w_scale: [out, in / group]. group: columns that share a scale.
    """
    dtype, columns = compute_dtype(x.dtype), x.shape[-1]
    x = x.to(dtype)
    out = x.new_empty(x.shape[0], w.shape[0])
    step = _rows_of_block(columns)
    scales_sums = kernel is not None and dtype == torch.bfloat16 and group == columns
    for start in range(0, w.shape[0], step):
        part, scale = w[start : start + step], w_scale[start : start + step]
        if kernel is None:
            weight = _unpacked(part, scale, bits, dtype)
        elif scales_sums:
            # Integers up to 128 are exact in bfloat16, and scaling the sums afterwards rounds once less.
            weight = native.unpack(kernel, part, None, bits, group, x.new_empty(part.shape[0], columns))
        else:
            weight = x.new_empty(part.shape[0], columns, dtype=torch.float32)
            weight = native.unpack(kernel, part, scale, bits, group, weight).to(dtype)
        torch.mm(x, weight.T, out=out[:, start : start + step])
    return out * w_scale.view(-1).float() if scales_sums else out


def float_product(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return [rows, out] of x [rows, in] and w [out, in] of one dtype, in the dtype that ``compute_dtype`` names.

    Args:
        out: of that dtype, is filled and returned.
    """
    dtype = compute_dtype(x.dtype)
    if dtype == w.dtype:
        return functional.linear(x, w) if out is None else torch.mm(x, w.T, out=out)
    x = x.to(dtype)
    out = x.new_empty(x.shape[0], w.shape[0]) if out is None else out
    step = _rows_of_block(x.shape[-1])
    for start in range(0, w.shape[0], step):
        torch.mm(x, w[start : start + step].to(dtype).T, out=out[:, start : start + step])
    return out


def _rows_of_block(columns: int) -> int:
    return max(1, _BLOCK_BYTES // (4 * max(1, columns)))


def _unpacked(w: torch.Tensor, w_scale: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the weights [rows, in] in ``dtype``, in torch calls."""
    w = reference.unpack_int4(w) if bits == 4 else w
    return (w.to(dtype).view(*w_scale.shape, -1) * w_scale.to(dtype)[..., None]).view(w.shape)
