"""Linear and LayerNorm modules that compute through an ``Operators`` table."""

import torch
from torch import nn

from .ops import Operators


class Linear(nn.Linear):
    """``nn.Linear`` whose product, bias and residual are one operator."""

    def forward(
        self,
        x: torch.Tensor,
        ops: Operators | None = None,
        residual: torch.Tensor | None = None,
        alpha: float = 1.0,
    ) -> torch.Tensor:
        """x weight^T + bias + alpha * residual; plain ``nn.Linear`` where an adapter calls it with x alone.

        Args:
            x: [..., in]. residual: [..., out] or None.
        """
        if ops is None:
            return super().forward(x)
        return ops.fused_matmul_bias(x, self.weight, self.bias, residual, alpha)


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` computed by the ``skip_layer_norm`` operator."""

    def forward(self, x: torch.Tensor, ops: Operators) -> torch.Tensor:
        """Normalise x [..., hidden] over its last axis."""
        return ops.skip_layer_norm(x, gamma=self.weight, beta=self.bias, epsilon=self.eps)


def project(
    linear: nn.Module, x: torch.Tensor, ops: Operators, residual: torch.Tensor | None = None, alpha: float = 1.0
) -> torch.Tensor:
    """Apply a projection and add alpha * residual.

    Our own layers fold the residual in; a layer that something else put in their place (an adapter, a quantised linear
    of another library) is called with x alone.
    """
    if isinstance(linear, Linear):
        return linear(x, ops, residual, alpha)
    out = linear(x)
    return out if residual is None else out + alpha * residual
