"""Products with float or integer weights and what ends them, by the operators of ``ops.cpu``."""

from typing import Any

import torch

from ... import cpu, reference
from .. import between, native
from .rows import skip_layer_norm


def fused_matmul_bias(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    beta: float = 1.0,
    gelu: bool = False,
    out: torch.Tensor | None = None,
    workspace: Any = None,
) -> torch.Tensor:
    """Return x weight^T + bias, then ``fast_gelu`` or + beta * residual; as ``triton.fused_matmul_bias``.

    Args:
        x: [M, K]. weight: [N, K]. bias: [N] or None. residual: [M, N] or None. out: [M, N], contiguous.
    """
    compiled = _kernel()
    if compiled is not None:
        out = cpu.fused_matmul_bias(compiled, x, weight, bias, residual, beta, out)
    else:
        result = reference.fused_matmul_bias(x, weight, bias, residual, beta)
        out = result if out is None else out.copy_(result)
    return _widened(out) if gelu else out


def fused_linear_with_groupwise_quantized_weight(
    x: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    b: torch.Tensor | None = None,
    num_bits: int = 8,
    group_size: int = -1,
    *,
    residual: torch.Tensor | None = None,
    beta: float = 1.0,
    gelu: bool = False,
    out: torch.Tensor | None = None,
    workspace: Any = None,
) -> torch.Tensor:
    """Return x times an int8 or int4 weight, + b, then ``fast_gelu`` or + beta * residual; as Triton's function.

    Args:
        x: [M, K]. w, w_scale, b, num_bits, group_size: as of ``ops.reference``. residual: [M, N] or None.
        out: [M, N], contiguous.
    """
    rest = {"b": b, "num_bits": num_bits, "group_size": group_size, "_add_to_output": residual, "beta": beta}
    out = cpu.fused_linear_with_groupwise_quantized_weight(_kernel(), x, w, w_scale, **rest, out=out)
    return _widened(out) if gelu else out


def layer_norm_matmul_bias(
    x: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    epsilon: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    gelu: bool = False,
    normed_out: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    workspace: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``fused_matmul_bias(skip_layer_norm(x, gamma, beta), weight, bias, gelu=gelu)`` and the normalised x."""
    normed = skip_layer_norm(x, gamma, beta, epsilon=epsilon, out=normed_out)
    return fused_matmul_bias(normed, weight, bias, gelu=gelu, out=out), normed


def layer_norm_quantized_linear(
    x: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    epsilon: float,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    b: torch.Tensor | None = None,
    num_bits: int = 8,
    group_size: int = -1,
    gelu: bool = False,
    normed_out: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    workspace: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what ``layer_norm_matmul_bias`` does, with an integer weight."""
    normed = skip_layer_norm(x, gamma, beta, epsilon=epsilon, out=normed_out)
    product = fused_linear_with_groupwise_quantized_weight(
        normed, w, w_scale, b, num_bits, group_size, gelu=gelu, out=out
    )
    return product, normed


def _kernel() -> native.Kernel | None:
    found = between.load()
    return found if isinstance(found, native.Kernel) else None


def _widened(x: torch.Tensor) -> torch.Tensor:
    """Apply tanh GELU in place."""
    return x.copy_(between.fast_gelu(_kernel(), x))
