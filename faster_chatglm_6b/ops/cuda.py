"""The operators on NVIDIA GPUs: Triton kernels, PyTorch's attention for prompts, the definition where neither fits."""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..decoding.kv_cache import KVCache
from ..versions import installed_version, is_too_old
from . import Operators, reference, reference_operators

OLDEST_CAPABILITY = (8, 0)
# Before it, the instructions by which a kernel starts the next one are missing or cannot be called.
OLDEST_TRITON = "3.5"
# Prompts have more rows; for them cuBLAS is as fast on the device and cheaper to launch.
_MOST_GEMV_ROWS = 4
SWITCH = "FASTER_CHATGLM_6B_KERNELS"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def switch_refusal() -> str | None:
    """Why the user wants the definitions alone, on any device; None where the switch is not set to off."""
    if os.environ.get(SWITCH, "").lower() in ("off", "0"):
        return f"{SWITCH}={os.environ[SWITCH]}"
    return None


@functools.cache
def kernels_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot serve this device and dtype; None where they can.

    A CPU passes in Triton's interpreter only (``TRITON_INTERPRET=1``), which is for tests. Users turn the kernels off,
    and the captured loop with them, with ``FASTER_CHATGLM_6B_KERNELS=off``.
    """
    if switch_refusal() is not None:
        return switch_refusal()
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and not interpreted):
        return f"there are no fused kernels for {device.type}; PyTorch's own serve it"
    if dtype not in DTYPES:
        return f"there are no fused kernels for {str(dtype).removeprefix('torch.')}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; install it with `pip install triton`"
    version = installed_version("triton")
    if version is not None and is_too_old(version, OLDEST_TRITON):
        return (
            f"Triton {version} is too old for the fused kernels, which need {OLDEST_TRITON} or newer; "
            "torch 2.9 and later bring one"
        )
    if device.type == "cpu":
        return None
    if interpreted:
        return "TRITON_INTERPRET=1 makes Triton interpret its kernels"
    if torch.version.hip is not None:
        return "the fused kernels are made for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {capability[0]}.{capability[1]}; 8.0 is needed"
    return _trial(device)


def _trial(device: torch.device) -> str | None:
    """Compile and run the smallest kernel: Triton needs a C compiler and a driver that it knows."""
    try:
        from . import triton as kernels

        with torch.cuda.device(device):
            kernels.fast_gelu(torch.zeros(16, dtype=torch.float16, device=device))
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"Triton does not work here: {lines[-1][:200]}"
    return None


def choose(device: torch.device, dtype: torch.dtype) -> Operators:
    """The table for models on ``device`` in ``dtype``."""
    reason = kernels_refusal(device, dtype)
    if reason is not None:
        return reference_operators(reason)
    return fused_operators(device)


def fused_operators(device: torch.device) -> Operators:
    """The table of the fused operators; needs Triton.

    It serves prompts and the plain path, where the host's time to launch counts most (a Triton launch costs about
    twice a PyTorch call): PyTorch's own kernel is taken where one does the whole operator. The captured loop calls the
    Triton kernels itself.
    """
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        reason = f"compute capability {capability[0]}.{capability[1]}"
    else:
        reason = "Triton's interpreter"
    fused = (fused_apply_rotary_emb, fused_attention_concat_past_key_value, fused_fast_gelu_mul)
    choices = {function.__name__: ("triton", reason) for function in fused}
    captured = f"{reason}; Triton in the captured decode loop"
    choices |= {
        "fast_gelu": ("torch gelu", captured),
        "skip_layer_norm": ("torch layer_norm", f"{captured}, and where there is a skip"),
        "fused_matmul_bias": (f"cuBLAS; triton up to {_MOST_GEMV_ROWS} rows", captured),
        "fused_multi_head_attention_inference_v2": ("torch scaled_dot_product_attention", captured),
        "fused_linear_with_groupwise_quantized_weight": ("triton", f"{reason}; dequantised for cuBLAS above 64 rows"),
    }
    return Operators(
        **{function.__name__: function for function in (*fused, fused_matmul_bias, skip_layer_norm)},
        fast_gelu=reference.fast_gelu,
        fused_multi_head_attention_inference_v2=fused_multi_head_attention_inference_v2,
        fused_linear_with_groupwise_quantized_weight=fused_linear_with_groupwise_quantized_weight,
        choices=choices,
    )


def _on_its_device(function: Callable) -> Callable:
    """Launch on the device of the first argument: Triton launches on the current one, whatever its tensors say."""

    @functools.wraps(function)
    def launch(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
            return function(x, *args, **kwargs)
        with torch.cuda.device(x.device):
            return function(x, *args, **kwargs)

    return launch


def _fit(first: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether the tensors that are given share the first one's device and dtype, and the kernels take that."""
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
    from . import triton as kernels

    if _fit(x, multiplier) and x.shape == multiplier.shape and x.is_contiguous() and multiplier.is_contiguous():
        return kernels.fused_fast_gelu_mul(x, multiplier)
    return reference.fused_fast_gelu_mul(x, multiplier)


@_on_its_device
def fused_apply_rotary_emb(
    x: torch.Tensor, *, position_ids: torch.Tensor, cos: torch.Tensor, **rest: Any
) -> torch.Tensor:
    """See ``reference.fused_apply_rotary_emb``."""
    from . import triton as kernels

    if _fit(x, cos) and position_ids.dtype == torch.int64 and position_ids.shape[0] == x.shape[0]:
        return kernels.fused_apply_rotary_emb(x, position_ids=position_ids, cos=cos, **rest)
    return reference.fused_apply_rotary_emb(x, position_ids=position_ids, cos=cos, **rest)


def fused_attention_concat_past_key_value(
    past_key_values: object, key: torch.Tensor, value: torch.Tensor, layer: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``reference.fused_attention_concat_past_key_value``; in place where the cache is our own."""
    if not isinstance(past_key_values, KVCache):
        return reference.fused_attention_concat_past_key_value(past_key_values, key, value, layer)
    if not _fit(past_key_values.storage, key, value) or key.stride(3) != 1 or value.stride(3) != 1:
        return past_key_values.update(key, value, layer)
    start, keys, values = past_key_values.grow(layer, key.shape[2])
    _write(key, value, *past_key_values.layer(layer), start)
    return keys, values


@_on_its_device
def _write(
    key: torch.Tensor, value: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, start: int
) -> None:
    from . import triton as kernels

    kernels.fused_attention_concat_past_key_value(key, value, key_cache, value_cache, start)


@_on_its_device
def fused_matmul_bias(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    _add_to_output: torch.Tensor | None = None,
    beta: float = 1.0,
) -> torch.Tensor:
    """See ``reference.fused_matmul_bias``."""
    from . import triton as kernels

    if not _fit(x, weight, bias, _add_to_output):
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
    from . import triton as kernels

    if _fit(x, b, _add_to_output) and w.device == x.device and w.is_contiguous() and w_scale.is_contiguous():
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
    from . import triton as kernels

    if skip is None or not _fit(x, gamma, beta, skip):
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

    A generation prompt ends in its ``<sop>``, the only row that is not context: the context's rows see one another (and
    a P-Tuning prefix) without any mask, and the last row sees all, so that two unmasked calls do without a bias.
    """
    with attention_kernels():
        return _attend(query, key, value, attn_bias, prefix_length, scale)


def attention_kernels() -> contextlib.AbstractContextManager:
    """Without cuDNN's attention, which prepares itself anew for every length of a prompt."""
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
