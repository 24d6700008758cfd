"""The operators on a CPU: an own C kernel for few rows, PyTorch's kernels where it is missing, blocks for many rows."""

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .. import reference
from ..table import Operators, reference_operators

# Up to here a kernel of few rows is as fast as unpacking the weight and PyTorch's product of matrices.
_MOST_INTEGER_ROWS = 16
_MOST_FLOAT_ROWS = 8
_MOST_LIBRARY_ROWS = 8
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_KINDS_OF_TENSOR = (torch.Tensor, nn.Parameter)


def choose(dtype: torch.dtype) -> Operators:
    """Return the table for models on a CPU in ``dtype``, with the reason for each choice."""
    # Not at the top: OneFlow's torch, under which nothing chooses them, lacks what they need.
    from . import native

    table = reference_operators("PyTorch's own kernels serve the CPU")
    kernel = native.load()
    if isinstance(kernel, native.Kernel):
        reason = f"{kernel.instructions}, compiled by {kernel.compiler}"
        quantized = (
            "C kernel",
            f"{reason}; more than {_MOST_INTEGER_ROWS} rows and odd sizes are unpacked in blocks",
        )
        floats = ("C kernel", f"{reason}; PyTorch's product for more than {_MOST_FLOAT_ROWS} rows")
        if dtype not in _DTYPES:
            return table
    else:
        fast = dtype == torch.bfloat16 and hasattr(torch, "_weight_int8pack_mm")
        what = "torch int4 and int8" if fast else "unpacked in blocks"
        quantized = (what, kernel if fast else f"{kernel}; PyTorch's kernels are fast in bfloat16 alone")
        floats, kernel = table.choices["fused_matmul_bias"], None
    functions = {
        "fused_linear_with_groupwise_quantized_weight": functools.partial(
            fused_linear_with_groupwise_quantized_weight, kernel
        )
    }
    choices = table.choices | {"fused_linear_with_groupwise_quantized_weight": quantized, "fused_matmul_bias": floats}
    if kernel is not None:
        functions["fused_matmul_bias"] = functools.partial(fused_matmul_bias, kernel)
    return replace(table, **functions, choices=choices)


def fused_linear_with_groupwise_quantized_weight(
    kernel: Any,
    x: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    *,
    b: torch.Tensor | None = None,
    num_bits: int = 8,
    group_size: int = -1,
    _add_to_output: torch.Tensor | None = None,
    beta: float = 1.0,
) -> torch.Tensor:
    """Compute the operator as ``ops.reference`` defines it, with a kernel of ``native`` or None."""
    from . import blocks, library, native

    if not (_is_ordinary(x, w, w_scale) and w.dtype == torch.int8 and w_scale.dtype in _DTYPES):
        return reference.fused_linear_with_groupwise_quantized_weight(
            x, w, w_scale, b=b, num_bits=num_bits, group_size=group_size, _add_to_output=_add_to_output, beta=beta
        )
    columns = x.shape[-1]
    group = columns if group_size < 0 else group_size
    flat, scale = x.reshape(-1, columns).contiguous(), w_scale.view(w.shape[0], columns // group)
    rows = flat.shape[0]
    if kernel is not None and rows <= _MOST_INTEGER_ROWS and native.block_of(group, num_bits) is not None:
        out = native.integer_product(kernel, flat, w, scale, num_bits, group)
    elif kernel is None and rows <= _MOST_LIBRARY_ROWS and library.serves(flat, w, num_bits, group):
        out = library.product(flat, w, scale, num_bits, group)
    else:
        out = blocks.integer_product(kernel, flat, w, scale, num_bits, group)
    return _finish(out, x, b, _add_to_output, beta)


def fused_matmul_bias(
    kernel: Any,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    _add_to_output: torch.Tensor | None = None,
    beta: float = 1.0,
) -> torch.Tensor:
    """Compute the operator as ``ops.reference`` defines it, with a kernel of ``native``."""
    from . import blocks, native

    if not _is_ordinary(x, weight) or weight.dtype != x.dtype:
        return reference.fused_matmul_bias(x, weight, bias, _add_to_output, beta)
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    if flat.shape[0] <= _MOST_FLOAT_ROWS:
        out = native.float_product(kernel, flat, weight)
    else:
        out = blocks.float_product(flat, weight)
    return _finish(out, x, bias, _add_to_output, beta)


def _is_ordinary(x: torch.Tensor, *others: torch.Tensor) -> bool:
    """Tell whether code that reads addresses may take these tensors: real ones, of this device, with content."""
    if x.dtype not in _DTYPES or x.numel() == 0 or torch.compiler.is_compiling():
        return False
    return (
        type(x) in _KINDS_OF_TENSOR
        and x.device.type == "cpu"
        and all(
            type(other) in _KINDS_OF_TENSOR and other.device.type == "cpu" and other.is_contiguous() for other in others
        )
    )


def _finish(
    out: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None, beta: float
) -> torch.Tensor:
    """Return the product [rows, out] in the shape and dtype of x, with bias and beta * residual added before it."""
    out = out.view(*x.shape[:-1], out.shape[-1])
    if bias is not None:
        out += bias
    if residual is not None:
        out.add_(residual, alpha=beta)
    return out.to(x.dtype)
