"""The operators between the products, by between.c: GELU, rotary positions, attention of few rows, the ends."""

import ctypes
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from .. import reference
from . import blocks, native

# Longer prompts multiply matrices of queries and keys, which PyTorch does in blocks, with float32 sums in any dtype.
_MOST_ATTENDING_ROWS = 8


def fast_gelu(kernel: native.Kernel | None, x: torch.Tensor) -> torch.Tensor:
    """Compute the operator as ``ops.reference`` defines it, without a kernel in the dtype in which PyTorch is fast."""
    if kernel is not None and native.may_read(x) and not native.is_traced() and x.dtype in native.KINDS:
        out = torch.empty(x.shape, dtype=x.dtype, device="cpu")
        kernel.library.gelu(x.data_ptr(), native.KINDS[x.dtype], out.data_ptr(), x.numel(), torch.get_num_threads())
        return out
    fast = blocks.compute_dtype(x.dtype) if x.dtype in native.KINDS else x.dtype
    return reference.fast_gelu(x.to(fast)).to(x.dtype)


def fused_apply_rotary_emb(
    kernel: native.Kernel,
    x: torch.Tensor,
    *,
    position_ids: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    tensor_index: int,
    k_size: int,
) -> torch.Tensor:
    """Compute the operator as ``ops.reference`` defines it."""
    parts, places = position_ids.dim() - 1, (x.shape[0], x.shape[1])
    if (
        native.may_read(x, position_ids, cos, sin)
        and not native.is_traced()
        and x.numel() > 0
        and cos.dtype == sin.dtype == x.dtype in native.KINDS
        and position_ids.dtype == torch.int64
        and x.dim() == 3
        and position_ids.shape in (places, (places[0], 2, places[1]))
        and cos.shape == sin.shape == (len(cos), k_size // parts // 2)
        and k_size % (2 * parts) == 0
        and x.shape[2] % (3 * k_size) == 0
    ):
        batch, rows, heads = *x.shape[:2], x.shape[2] // (3 * k_size)
        out = torch.empty(batch, heads, rows, k_size, dtype=x.dtype, device="cpu")
        pointers = (tensor.data_ptr() for tensor in (position_ids, cos, sin, out))
        sizes = (batch, rows, heads, k_size, parts, len(cos), tensor_index)
        failed = kernel.library.rotary(x.data_ptr(), native.KINDS[x.dtype], *pointers, *sizes, torch.get_num_threads())
        if not failed:
            return out
    return reference.fused_apply_rotary_emb(
        x, position_ids=position_ids, cos=cos, sin=sin, tensor_index=tensor_index, k_size=k_size
    )


def fused_multi_head_attention_inference_v2(
    kernel: native.Kernel | None,
    *,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_bias: torch.Tensor | None = None,
    scale: float | None = None,
    **rest: Any,
) -> torch.Tensor:
    """Compute the operator as ``ops.reference`` defines it, for many rows or without a kernel by PyTorch's own."""
    tensors = (query, key, value)
    if not (
        query.dtype == key.dtype == value.dtype in native.KINDS
        and all(tensor.dim() == 4 for tensor in tensors)
        and query.numel() > 0
        and key.shape == value.shape == (*query.shape[:2], key.shape[2], query.shape[3])
        and key.shape[2] > 0
    ):
        return reference.fused_multi_head_attention_inference_v2(
            query=query, key=key, value=value, attn_bias=attn_bias, scale=scale
        )
    if (
        kernel is not None
        and all(type(one) in native.KINDS_OF_TENSOR and one.is_cpu and one.stride(-1) == 1 for one in tensors)
        and not native.is_traced()
        and query.shape[2] <= _MOST_ATTENDING_ROWS
        and query.shape[3] % 8 == 0
        and (attn_bias is None or _is_bias(attn_bias, query, key))
    ):
        (batch, heads, rows, width), keys = query.shape, key.shape[2]
        out = torch.empty(batch, rows, heads * width, dtype=query.dtype, device="cpu")
        bias = None if attn_bias is None else attn_bias.expand(batch, 1, rows, keys)
        strides = [size for tensor in tensors for size in tensor.stride()[:3]]
        strides += [0, 0, 0] if bias is None else [bias.stride(0), *bias.stride()[2:]]
        failed = kernel.library.attention(
            *(tensor.data_ptr() for tensor in tensors),
            native.KINDS[query.dtype],
            None if bias is None else bias.data_ptr(),
            0 if bias is None else native.KINDS[bias.dtype],
            out.data_ptr(),
            (ctypes.c_long * 12)(*strides),
            *(batch, heads, rows, keys, width),
            1.0 / math.sqrt(width) if scale is None else scale,
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(f"There is no memory for the scores of {keys} keys.")
        return out
    bias = None if attn_bias is None else attn_bias.to(query.dtype)
    context = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
    return context.transpose(1, 2).flatten(2)


def _is_bias(bias: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> bool:
    return (
        type(bias) in native.KINDS_OF_TENSOR
        and bias.is_cpu
        and bias.dtype in native.KINDS
        and bias.dim() == 4
        and bias.shape[0] in (1, query.shape[0])
        and bias.shape[1:] == (1, query.shape[2], key.shape[2])
    )


def finish(
    kernel: native.Kernel | None,
    out: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    beta: float,
    done: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the product [rows, out] in the shape and dtype of x, with bias and beta * residual added before it.

    Args:
        done: of that shape and dtype, contiguous, is filled and returned; it may be ``out``.
    """
    (rows, columns), shape = out.shape, (*x.shape[:-1], out.shape[-1])
    if (
        kernel is not None
        and out.dtype == torch.float32
        and (bias is None or (native.may_read(bias) and bias.dtype in native.KINDS and bias.shape == (columns,)))
        and (
            residual is None
            or (native.may_read(residual) and residual.dtype in native.KINDS and residual.shape == shape)
        )
    ):
        if done is None:
            done = out if x.dtype == torch.float32 else torch.empty(rows, columns, dtype=x.dtype, device="cpu")
        if done.data_ptr() == out.data_ptr() and bias is None and residual is None:
            return out.view(shape)
        kernel.library.finish(
            out.data_ptr(),
            *((None, 0) if bias is None else (bias.data_ptr(), native.KINDS[bias.dtype])),
            *((None, 0) if residual is None else (residual.data_ptr(), native.KINDS[residual.dtype])),
            beta,
            done.data_ptr(),
            native.KINDS[x.dtype],
            *(rows, columns, torch.get_num_threads()),
        )
        return done.view(shape)
    out = out.view(shape)
    if bias is not None:
        out += bias
    if residual is not None:
        out.add_(residual, alpha=beta)
    return out.to(x.dtype) if done is None else done.view(shape).copy_(out)


@functools.cache
def load() -> native.Kernel | str:
    """Return the kernel of ``native.load`` if the functions here are right too, or one clause that says why not."""
    kernel = native.load()
    if isinstance(kernel, str):
        return kernel
    wrong = native.what_differs(_trials(kernel))
    return kernel if wrong is None else f"the C kernel is wrong on this machine: {wrong}"


def _trials(kernel: native.Kernel) -> dict[str, tuple[Callable[[], torch.Tensor], torch.Tensor]]:
    """Return small calls of every function here by name, with what the definition gives in float64."""
    generator = torch.Generator("cpu").manual_seed(0)

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    query, key, value = make(2, 3, 2, 72), make(2, 3, 9, 72), make(2, 3, 9, 72)
    bias, packed = make(2, 1, 2, 9), make(2, 5, 3 * 3 * 16)
    positions, cos, sin = torch.arange(20, device="cpu").view(2, 2, 5) % 7, make(7, 4), make(7, 4)
    y, extra, residual = make(3, 11), make(11), make(3, 11)
    rotary = {"tensor_index": 1, "k_size": 16}
    attention = functools.partial(
        fused_multi_head_attention_inference_v2, kernel, query=query, key=key, value=value, attn_bias=bias
    )
    exact = reference.fused_multi_head_attention_inference_v2(
        query=query.double(), key=key.double(), value=value.double(), attn_bias=bias.double()
    )
    rotate = functools.partial(
        fused_apply_rotary_emb, kernel, packed, position_ids=positions, cos=cos, sin=sin, **rotary
    )
    rotated = reference.fused_apply_rotary_emb(
        packed.double(), position_ids=positions, cos=cos.double(), sin=sin.double(), **rotary
    )
    numbers = make(777) * 4
    ended = y.double() + extra.double() + 0.5 * residual.double()
    return {
        "GELU": (functools.partial(fast_gelu, kernel, numbers), reference.fast_gelu(numbers.double())),
        "attention": (attention, exact),
        "rotary": (rotate, rotated),
        "finish": (functools.partial(finish, kernel, y.clone(), y, extra, residual, 0.5), ended),
    }
