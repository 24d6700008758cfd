"""Choose the implementation of each fused operator, once, when a model is loaded or moved.

The model calls operators only through an ``Operators`` table. Their contracts are the docstrings of ``ops.reference``.
"""

import torch

from .. import backend, report
from . import cpu
from .availability import kernels_refusal, switch_refusal
from .table import OPERATOR_NAMES, Operators, reference_operators

__all__ = ["OPERATOR_NAMES", "Operators", "operators_chosen_for", "operators_for", "reference_operators"]

_DIFFERENTIABLE = reference_operators("autograd is on, and the fused kernels have no backward")
_TRACED = reference_operators("torch.compile came before the first call")
_chosen: dict[tuple[torch.device, torch.dtype, int], Operators] = {}


def operators_for(device: torch.device, dtype: torch.dtype, head_size: int, differentiable: bool) -> Operators:
    """Return the table for models on ``device`` in ``dtype``, chosen once per combination and shown by ``status()``.

    Args:
        head_size: width of one attention head.
        differentiable: whether autograd must pass; it cannot pass the fused kernels.
    """
    if differentiable:
        return _DIFFERENTIABLE
    key = (device, dtype, head_size)
    table = _chosen.get(key)
    if table is None and not backend.is_oneflow() and torch.compiler.is_compiling():
        # A choice compiles and tries kernels, which a tracer must not see. Outside of it, the next call chooses.
        return _TRACED
    if table is None:
        table = _chosen[key] = _choose(device, dtype, head_size)
        name = device.type if device.index is None else f"{device.type}:{device.index}"
        report.record_operators(f"{name} {str(dtype).split('.')[-1]}", table.choices)
    return table


def operators_chosen_for(x: torch.Tensor) -> Operators | None:
    """Return the table that a model chose before for the device and dtype of x, for a layer that is called alone.

    None if there is none, or if autograd is on.
    """
    if torch.is_grad_enabled():
        return None
    return next((table for key, table in _chosen.items() if key[:2] == (x.device, x.dtype)), None)


def _choose(device: torch.device, dtype: torch.dtype, head_size: int) -> Operators:
    if backend.is_oneflow():
        from . import oneflow

        return oneflow.choose(device, dtype, head_size)
    if device.type not in ("cpu", "cuda"):
        return reference_operators(f"PyTorch's own kernels serve {device.type}")
    if device.type == "cpu" and switch_refusal() is None:
        return cpu.choose(dtype)
    reason = switch_refusal() if device.type == "cpu" else kernels_refusal(device, dtype)
    if reason is not None:
        return reference_operators(reason)
    # Import it only after Triton was found to be installed and to work.
    from . import cuda

    return cuda.choose(device)
