"""The fused operators: which implementation serves each of them, decided once when a model is loaded or moved.

The model calls operators only through an ``Operators`` table. Their contracts are the docstrings of ``ops.reference``.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .. import backend, report
from . import reference

OPERATOR_NAMES = (
    "fast_gelu",
    "fused_apply_rotary_emb",
    "fused_attention_concat_past_key_value",
    "fused_multi_head_attention_inference_v2",
    "fused_fast_gelu_mul",
    "fused_matmul_bias",
    "skip_layer_norm",
    "fused_linear_with_groupwise_quantized_weight",
)


@dataclass(frozen=True)
class Operators:
    """One callable per operator, and why it was chosen.

    ``choices`` maps an operator's name to (implementation, reason), for ``faster_chatglm_6b.status()``.
    """

    fast_gelu: Callable
    fused_apply_rotary_emb: Callable
    fused_attention_concat_past_key_value: Callable
    fused_multi_head_attention_inference_v2: Callable
    fused_fast_gelu_mul: Callable
    fused_matmul_bias: Callable
    skip_layer_norm: Callable
    fused_linear_with_groupwise_quantized_weight: Callable
    choices: dict[str, tuple[str, str]] = field(default_factory=dict, compare=False)


def reference_operators(reason: str) -> Operators:
    """The table that serves every operator by its definition; ``reason`` says why nothing faster does."""
    return Operators(
        **{name: getattr(reference, name) for name in OPERATOR_NAMES},
        choices={name: ("reference", reason) for name in OPERATOR_NAMES},
    )


_DIFFERENTIABLE = reference_operators("autograd is on, and the fused kernels have no backward")
_chosen: dict[tuple[torch.device, torch.dtype, int], Operators] = {}


def operators_for(device: torch.device, dtype: torch.dtype, head_size: int, differentiable: bool) -> Operators:
    """The table for models on ``device`` in ``dtype``; chosen once per combination and reported by ``status()``.

    Args:
        head_size: width of one attention head.
        differentiable: whether autograd must be able to pass, which the fused kernels cannot.
    """
    if differentiable:
        return _DIFFERENTIABLE
    key = (device, dtype, head_size)
    table = _chosen.get(key)
    if table is None:
        table = _chosen[key] = _choose(device, dtype, head_size)
        name = device.type if device.index is None else f"{device.type}:{device.index}"
        report.record_operators(f"{name} {str(dtype).split('.')[-1]}", table.choices)
    return table


def _choose(device: torch.device, dtype: torch.dtype, head_size: int) -> Operators:
    if backend.is_oneflow():
        from . import oneflow

        return oneflow.choose(device, dtype, head_size)
    if device.type not in ("cpu", "cuda"):
        return reference_operators(f"PyTorch's own kernels serve {device.type}")
    # Imported here: they need this module's names.
    from . import cpu, cuda

    if device.type == "cpu":
        refusal = cuda.switch_refusal()
        return cpu.choose() if refusal is None else reference_operators(refusal)
    return cuda.choose(device, dtype)
