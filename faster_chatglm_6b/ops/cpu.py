"""The operators on a CPU: PyTorch's int8 kernel for the few rows of a decode step, the definitions for all else."""

from dataclasses import replace

import torch

from . import reference
from .table import Operators, reference_operators

# With more rows the kernel is slower than dequantising once and calling the float product (EPYC, two cores).
_MOST_ROWS = 4
# The kernel reads past the end of weights that are no multiple of its blocks.
_BLOCK = 32
_OPERATOR = "fused_linear_with_groupwise_quantized_weight"


def choose() -> Operators:
    """Return the table for models on a CPU."""
    table = reference_operators("PyTorch's own kernels serve the CPU")
    if not hasattr(torch, "_weight_int8pack_mm"):
        return table
    choices = table.choices | {
        _OPERATOR: (
            "torch int8",
            f"PyTorch's int8 kernel for up to {_MOST_ROWS} rows; more, groups, 4 bits and odd sizes are dequantised",
        )
    }
    return replace(table, **{_OPERATOR: fused_linear_with_groupwise_quantized_weight}, choices=choices)


def fused_linear_with_groupwise_quantized_weight(
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
    """Compute the operator as ``ops.reference`` defines it."""
    rows = x.numel() // x.shape[-1]
    if num_bits != 8 or group_size >= 0 or rows > _MOST_ROWS or w.shape[0] % _BLOCK or w.shape[1] % _BLOCK:
        return reference.fused_linear_with_groupwise_quantized_weight(
            x, w, w_scale, b=b, num_bits=num_bits, group_size=group_size, _add_to_output=_add_to_output, beta=beta
        )
    out = torch._weight_int8pack_mm(x.reshape(rows, -1), w, w_scale.to(x.dtype)).view(*x.shape[:-1], w.shape[0])
    if b is not None:
        out = out + b
    return out if _add_to_output is None else out + beta * _add_to_output
