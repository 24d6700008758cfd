"""Apply the network's linear layers and norms through an ``Operators`` table if nobody stands between.

The layers are plain ``nn.Linear`` and ``nn.LayerNorm``, which libraries look for by type: bitsandbytes, PEFT, torchao.
If such a library, a user's hook or a wrapper replaces one, the replacement is called as a module.
"""

import torch
from torch import nn
from torch.nn.modules import module as hooks_for_all

from ..ops import Operators

# The last one is what OneFlow makes of a parameter.
_PLAIN_TENSORS = {torch.Tensor, nn.Parameter, type(nn.Parameter(torch.empty(0)))}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Hooks on all modules: dicts that are filled in place. A framework that lacks a kind of hook lacks the attribute.
_GLOBAL_HOOKS = tuple(getattr(hooks_for_all, f"_global{name}", {}) for name in _HOOKS)
_FORWARDS = {kind: kind.forward for kind in (nn.Linear, nn.LayerNorm)}


class OperatorLinear(nn.Linear):
    """A linear layer whose forward takes the operators, and a residual to add to its product."""


def is_hooked(module: nn.Module) -> bool:
    """Tell whether hooks, on the module or on all modules, or a replaced forward add to what its class does.

    accelerate's ``device_map`` replaces the forward to move weights and inputs.
    """
    state = module.__dict__
    return "forward" in state or any(map(state.get, _HOOKS)) or any(_GLOBAL_HOOKS)


def is_plain_tensor(tensor: torch.Tensor) -> bool:
    """Tell whether a weight is an ordinary tensor and no subclass that computes its own products, as torchao's."""
    return type(tensor) in _PLAIN_TENSORS


def is_plain(module: nn.Module, kind: type) -> bool:
    """Tell whether a module does what its class does and no more: an operator may then compute it from the parameters.

    Args:
        kind: ``nn.Linear`` or ``nn.LayerNorm``.
    """
    return (
        type(module) is kind
        and is_plain_tensor(module.weight)
        and not is_hooked(module)
        and kind.forward is _FORWARDS[kind]
    )


def project(
    linear: nn.Module, x: torch.Tensor, ops: Operators, residual: torch.Tensor | None = None, alpha: float = 1.0
) -> torch.Tensor:
    """Apply a projection and add alpha * residual.

    Args:
        linear: maps [..., in] to [..., out]. Unless it is a plain layer or one of our own, it gets x alone.
        x: [..., in].
        residual: [..., out] or None.
    """
    if is_plain(linear, nn.Linear):
        return ops.fused_matmul_bias(x, linear.weight, linear.bias, residual, alpha)
    # accelerate's replaced forward passes all arguments on; a user's hook expects the layer's own output.
    if isinstance(linear, OperatorLinear) and ("_hf_hook" in linear.__dict__ or not is_hooked(linear)):
        return linear(x, ops, residual, alpha)
    return with_residual(linear(x), residual, alpha)


def with_residual(out: torch.Tensor, residual: torch.Tensor | None, alpha: float) -> torch.Tensor:
    """Return out + alpha * residual, on the device of ``out``."""
    return out if residual is None else out + alpha * residual.to(out.device)


def normalise(norm: nn.Module, x: torch.Tensor, ops: Operators) -> torch.Tensor:
    """Apply a norm to x [..., hidden], over its last axis."""
    if is_plain(norm, nn.LayerNorm) and norm.bias is not None and norm.weight.shape == x.shape[-1:]:
        return ops.skip_layer_norm(x, gamma=norm.weight, beta=norm.bias, epsilon=norm.eps)
    return norm(x)
