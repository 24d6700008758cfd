"""Compute a step's products with float or integer weights; the kernel is chosen at capture."""

from types import ModuleType
from typing import Any

import torch

from ...layers.quantized import QuantizedLinear


def product(
    kernels: ModuleType,
    linear: Any,
    x: torch.Tensor,
    out: torch.Tensor,
    workspace: Any,
    residual: torch.Tensor | None = None,
    beta: float = 1.0,
    gelu: bool = False,
) -> None:
    """Compute out = linear(x), then ``fast_gelu`` or + beta * residual; x is [M, K], residual and out are [M, N].

    Args:
        kernels: from ``step_kernels``.
    """
    rest = {"residual": residual, "beta": beta, "gelu": gelu, "out": out, "workspace": workspace}
    if isinstance(linear, QuantizedLinear):
        kernels.fused_linear_with_groupwise_quantized_weight(
            x, linear.weight, linear.weight_scale, linear.bias, linear.bits, linear.group_size, **rest
        )
    else:
        kernels.fused_matmul_bias(x, linear.weight, linear.bias, **rest)


def normed_product(
    kernels: ModuleType,
    norm: Any,
    linear: Any,
    x: torch.Tensor,
    gelu: bool,
    normed_out: torch.Tensor,
    out: torch.Tensor,
    workspace: Any,
) -> None:
    """Compute normed_out = norm(x) and out = linear(normed_out), then ``fast_gelu`` if asked; x is [M, K]."""
    parameters = (x, norm.weight, norm.bias, norm.eps, linear.weight)
    rest = {"gelu": gelu, "normed_out": normed_out, "out": out, "workspace": workspace}
    if isinstance(linear, QuantizedLinear):
        kernels.layer_norm_quantized_linear(
            *parameters, linear.weight_scale, linear.bias, linear.bits, linear.group_size, **rest
        )
    else:
        kernels.layer_norm_matmul_bias(*parameters, linear.bias, **rest)
