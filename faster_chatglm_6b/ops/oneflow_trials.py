"""One small call of each of OneFlow's kernels against the definition, made before a model is trusted to it."""

from collections.abc import Callable
from typing import Any

import torch

from . import reference
from .caches import ListCache

_BATCH, _ROWS, _HEADS = 2, 3, 2


def failure_of(name: str, fused: Callable, device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    """Say why operator ``name`` of the installed OneFlow cannot be trusted on this device; None if it agrees.

    Args:
        fused: the operator, with the arguments of ``ops.reference``.
    """
    arguments, keywords = _EXAMPLES[name](_Random(device, dtype), head_size)
    try:
        with torch.no_grad():
            found = _as_tuple(fused(*_fresh(arguments), **keywords))
            expected = _as_tuple(getattr(reference, name)(*_fresh(arguments), **keywords))
            errors = [float((f.float() - e.float()).abs().max()) for f, e in zip(found, expected, strict=True)]
            scale = max(float(e.float().abs().max()) for e in expected)
    except Exception as problem:
        lines = str(problem).strip().splitlines() or [type(problem).__name__]
        return f"OneFlow's kernel failed its trial: {lines[-1][:160]}"
    allowed = (1e-3 if dtype in (torch.float32, torch.float64) else 3e-2) * max(scale, 1.0)
    # Written so that NaN fails.
    if all(error <= allowed for error in errors):
        return None
    return f"OneFlow's kernel gave other values than its definition (off by {', '.join(f'{e:.2g}' for e in errors)})"


class _Random:
    """Maker of tensors of small mixed values that leaves the caller's random numbers alone."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype, self._next = device, dtype, 0

    def __call__(self, *shape: int) -> torch.Tensor:
        count = 1
        for size in shape:
            count *= size
        values = torch.arange(self._next, self._next + count, dtype=torch.float32) * 0.7
        self._next += count
        return values.sin().reshape(shape).to(self.device).to(self.dtype)


def _as_tuple(result: Any) -> tuple:
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


def _fresh(arguments: tuple) -> tuple:
    """Return the arguments with a cache of their own, which the operator changes."""
    return tuple(_copy(argument) if isinstance(argument, ListCache) else argument for argument in arguments)


def _copy(cache: ListCache) -> ListCache:
    copied = ListCache()
    copied.layers = list(cache.layers)
    return copied


def _gelu(random: _Random, head_size: int) -> tuple:
    return (random(_BATCH, _ROWS, head_size),), {}


def _gelu_mul(random: _Random, head_size: int) -> tuple:
    return (random(_BATCH, _ROWS, head_size), random(_BATCH, _ROWS, head_size)), {}


def _rotary(random: _Random, head_size: int) -> tuple:
    positions = torch.arange(_BATCH * 2 * _ROWS).reshape(_BATCH, 2, _ROWS).to(random.device)
    table = random(_BATCH * 2 * _ROWS, head_size // 4)
    return (random(_BATCH, _ROWS, _HEADS * 3 * head_size),), {
        "position_ids": positions,
        "cos": table,
        "sin": random(*table.shape),
        "tensor_index": 1,
        "k_size": head_size,
    }


def _concat(random: _Random, head_size: int) -> tuple:
    cache = ListCache()
    cache.put(0, random(_BATCH, _HEADS, 2, head_size), random(_BATCH, _HEADS, 2, head_size))
    value = random(_BATCH, _ROWS, _HEADS, head_size).transpose(1, 2)
    return (cache, random(_BATCH, _HEADS, _ROWS, head_size), value, 0), {}


def _attention(random: _Random, head_size: int) -> tuple:
    query, key, value = (random(_BATCH, _HEADS, rows, head_size) for rows in (_ROWS, 5, 5))
    return (), {"query": query, "key": key, "value": value, "attn_bias": random(_BATCH, 1, _ROWS, 5)}


def _matmul_bias(random: _Random, head_size: int) -> tuple:
    x, weight, residual = random(_BATCH, _ROWS, head_size), random(16, head_size), random(_BATCH, _ROWS, 16)
    return (x, weight, random(16), residual, 2.5), {}


def _layer_norm(random: _Random, head_size: int) -> tuple:
    x, skip = random(_BATCH, _ROWS, head_size), random(_BATCH, _ROWS, head_size)
    return (x,), {"gamma": random(head_size), "beta": random(head_size), "skip": skip, "alpha": 2.5}


def _quantized(random: _Random, head_size: int) -> tuple:
    integers = (torch.arange(16 * head_size) * 7 % 255 - 127).reshape(16, head_size).to(torch.int8).to(random.device)
    return (random(_BATCH, _ROWS, 2 * head_size), integers, random(16) * 0.05), {"b": random(16), "num_bits": 4}


_EXAMPLES = {
    "fast_gelu": _gelu,
    "fused_fast_gelu_mul": _gelu_mul,
    "fused_apply_rotary_emb": _rotary,
    "fused_attention_concat_past_key_value": _concat,
    "fused_multi_head_attention_inference_v2": _attention,
    "fused_matmul_bias": _matmul_bias,
    "skip_layer_norm": _layer_norm,
    "fused_linear_with_groupwise_quantized_weight": _quantized,
}
