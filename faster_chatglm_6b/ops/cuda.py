"""The operators on NVIDIA GPUs: Triton kernels, PyTorch's attention for prompts, else the definition."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import reference
from . import triton as kernels
from .availability import DTYPES
from .table import Operators

# Prompts have more rows; for them cuBLAS is as fast on the device and cheaper to launch.
_MOST_GEMV_ROWS = 4


def choose(device: torch.device) -> Operators:
    """Return the table for models on ``device``, whose kernels ``kernels_refusal`` does not refuse.

    The table serves the plain path. There the host's time to launch counts most, and a Triton launch costs about twice
    a PyTorch call: if one kernel of PyTorch's does the whole operator, it is taken. The captured loop calls the Triton
    kernels itself.
    """
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        reason = f"compute capability {capability[0]}.{capability[1]}"
    else:
        reason = "Triton's interpreter"
    fused = (fused_apply_rotary_emb, fused_fast_gelu_mul)
    choices = {function.__name__: ("triton", reason) for function in fused}
    captured = f"{reason}; Triton in the captured loop"
    choices |= {
        "fast_gelu": ("torch gelu", captured),
        "skip_layer_norm": ("torch layer_norm", f"{captured}, and if there is a skip"),
        "fused_attention_concat_past_key_value": ("cache update", captured),
        "fused_matmul_bias": (f"cuBLAS; triton up to {_MOST_GEMV_ROWS} rows", captured),
        "fused_multi_head_attention_inference_v2": ("torch scaled_dot_product_attention", captured),
        "fused_linear_with_groupwise_quantized_weight": ("triton", f"{reason}; dequantised for cuBLAS above 256 rows"),
    }
    return Operators(
        **{function.__name__: function for function in (*fused, fused_matmul_bias, skip_layer_norm)},
        fast_gelu=reference.fast_gelu,
        fused_attention_concat_past_key_value=reference.fused_attention_concat_past_key_value,
        fused_multi_head_attention_inference_v2=fused_multi_head_attention_inference_v2,
        fused_linear_with_groupwise_quantized_weight=fused_linear_with_groupwise_quantized_weight,
        choices=choices,
        prompts_need_no_bias=True,
    )


def _on_its_device(function: Callable) -> Callable:
    """Launch on the device of the first argument: Triton launches on the current one, wherever its tensors are."""

    @functools.wraps(function)
    def launch(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
            return function(x, *args, **kwargs)
        with torch.cuda.device(x.device):
            return function(x, *args, **kwargs)

    return launch


def _share_dtype(first: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Tell whether the given tensors share the first one's device and dtype, and the kernels take that dtype."""
    device, dtype = first.device, first.dtype
    if dtype not in DTYPES:
        return False
    for tensor in others:
        if tensor is not None and (tensor.dtype != dtype or tensor.device != device):
            return False
    return True


@_on_its_device
def fused_fast_gelu_mul(x: torch.Tensor, multiplier: torch.Tensor) -> torch.Tensor:
    """See ``reference.fused_fast_gelu_mul``."""
    if _share_dtype(x, multiplier) and x.shape == multiplier.shape and x.is_contiguous() and multiplier.is_contiguous():
        return kernels.fused_fast_gelu_mul(x, multiplier)
    return reference.fused_fast_gelu_mul(x, multiplier)


@_on_its_device
def fused_apply_rotary_emb(
    x: torch.Tensor, *, position_ids: torch.Tensor, cos: torch.Tensor, **rest: Any
) -> torch.Tensor:
    """See ``reference.fused_apply_rotary_emb``."""
    if _share_dtype(x, cos) and position_ids.dtype == torch.int64 and position_ids.shape[0] == x.shape[0]:
        return kernels.fused_apply_rotary_emb(x, position_ids=position_ids, cos=cos, **rest)
    return reference.fused_apply_rotary_emb(x, position_ids=position_ids, cos=cos, **rest)


@_on_its_device
def fused_matmul_bias(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    _add_to_output: torch.Tensor | None = None,
    beta: float = 1.0,
) -> torch.Tensor:
    """See ``reference.fused_matmul_bias``."""
    if not _share_dtype(x, weight, bias, _add_to_output):
        return reference.fused_matmul_bias(x, weight, bias, _add_to_output, beta)
    if x.numel() <= _MOST_GEMV_ROWS * x.shape[-1] and weight.is_contiguous():
        return kernels.fused_matmul_bias(x, weight, bias, _add_to_output, beta)
    out = functional.linear(x, weight, bias)
    return out if _add_to_output is None else out.add_(_add_to_output, alpha=beta)


@_on_its_device
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
    """See ``reference.fused_linear_with_groupwise_quantized_weight``."""
    if _share_dtype(x, b, _add_to_output) and w.device == x.device and w.is_contiguous() and w_scale.is_contiguous():
        return kernels.fused_linear_with_groupwise_quantized_weight(
            x, w, w_scale, b, num_bits, group_size, _add_to_output, beta
        )
    return reference.fused_linear_with_groupwise_quantized_weight(
        x, w, w_scale, b=b, num_bits=num_bits, group_size=group_size, _add_to_output=_add_to_output, beta=beta
    )


@_on_its_device
def skip_layer_norm(
    x: torch.Tensor,
    *,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    skip: torch.Tensor | None = None,
    epsilon: float = 1e-5,
    alpha: float = 1.0,
) -> torch.Tensor:
    """See ``reference.skip_layer_norm``."""
    if skip is None or not _share_dtype(x, gamma, beta, skip):
        return reference.skip_layer_norm(x, gamma=gamma, beta=beta, skip=skip, epsilon=epsilon, alpha=alpha)
    return kernels.skip_layer_norm(x, gamma, beta, skip, epsilon, alpha)


def fused_multi_head_attention_inference_v2(
    *,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_bias: torch.Tensor | None = None,
    prefix_length: int | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """See ``reference.fused_multi_head_attention_inference_v2``.

    Of a generation prompt only the last row, ``<sop>``, is not context. The context's rows see one another, and a
    P-Tuning prefix, without any mask, and the last row sees all: two unmasked calls need no bias.
    """
    with attention_kernels():
        return _attend(query, key, value, attn_bias, prefix_length, scale)


def attention_kernels() -> contextlib.AbstractContextManager:
    """Return a context without cuDNN's attention, which prepares itself again for every length of a prompt."""
    if not getattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: False)():
        return contextlib.nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_bias: torch.Tensor | None,
    prefix_length: int | None,
    scale: float | None,
) -> torch.Tensor:
    batch, heads, rows, size = query.shape
    keys = key.shape[2]
    attend = functools.partial(functional.scaled_dot_product_attention, scale=scale)
    if prefix_length != keys - 1 or rows < 2:
        return attend(query, key, value, attn_mask=attn_bias).transpose(1, 2).reshape(batch, rows, heads * size)
    out = query.new_empty(batch, rows, heads, size)
    context = attend(query[:, :, :-1], key[:, :, :-1], value[:, :, :-1])
    out[:, :-1] = context.transpose(1, 2)
    out[:, -1:] = attend(query[:, :, -1:], key, value).transpose(1, 2)
    return out.view(batch, rows, heads * size)
