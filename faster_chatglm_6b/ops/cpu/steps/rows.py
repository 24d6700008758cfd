"""Rows of the embedding table, and their norms."""

from typing import Any

import torch
from torch.nn import functional


class Workspace:
    """Stand for the scratch memory of Triton's kernels, of which these need none."""

    def __init__(self, device: torch.device | str, batch: int, *sizes: Any):
        self.batch = batch


def embedding(tokens: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Look up ``weight[tokens]``.

    Args:
        tokens: int64 or int32 [B], each below V; negative ones count as 0.
        weight: [V, D].
        out: [B, D].
    """
    return torch.index_select(weight, 0, tokens.clamp(min=0), out=out)


def skip_layer_norm(
    x: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    skip: torch.Tensor | None = None,
    epsilon: float = 1e-5,
    alpha: float = 1.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return LayerNorm(x + alpha * skip) over the last axis, sum and statistics in float32.

    Args:
        x, skip: [..., size]. gamma, beta: [size]. out: as x; may be x or skip.
    """
    if skip is not None:
        x = torch.add(x.float(), skip, alpha=alpha)
        gamma, beta = gamma.float(), beta.float()
    normed = functional.layer_norm(x, x.shape[-1:], gamma, beta, epsilon)
    return normed if out is None else out.copy_(normed)
