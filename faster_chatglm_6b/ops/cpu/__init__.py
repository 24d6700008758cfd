"""The operators on a CPU: own C kernels, PyTorch's kernels where they are missing, and weights unpacked in blocks."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from .. import reference
from ..availability import switch_refusal
from ..table import Operators, reference_operators

# Up to here the kernel of few rows is as fast as that of many, of which those for newer CPUs take less.
_MOST_INTEGER_ROWS = {torch.float32: 8, torch.float16: 16, torch.bfloat16: 16}
_MOST_ROWS_BEFORE_BYTES = {"AVX-512 VNNI": 8, "AVX-512 VNNI and AMX": 3}
_MOST_FLOAT_ROWS = 8
_MOST_LIBRARY_ROWS = 8
_DTYPES = tuple(_MOST_INTEGER_ROWS)
_QUANTIZED = "fused_linear_with_groupwise_quantized_weight"
_FLOATS = "fused_matmul_bias"
_ATTENTION = "fused_multi_head_attention_inference_v2"
_ROTARY = "fused_apply_rotary_emb"
_GELU = "fast_gelu"


def serves_half_precision() -> bool:
    """Tell whether models in half precision are fast here, and so need not be turned to float32; it may compile."""
    from . import between, native

    return switch_refusal() is None and isinstance(between.load(), native.Kernel)


def choose(dtype: torch.dtype) -> Operators:
    """Return the table for models on a CPU in ``dtype``, with the reason for each choice."""
    # Not at the top: OneFlow's torch, under which nothing chooses them, lacks what they need.
    from . import between, blocks, native

    table = reference_operators("PyTorch's own kernels serve the CPU")
    if dtype not in _DTYPES:
        return table
    kernel = between.load()
    functions: dict[str, Callable] = {}
    choices: dict[str, tuple[str, str]] = {}
    if isinstance(kernel, native.Kernel):
        reason = str(kernel)
        most = _most_integer_rows(kernel, dtype, None)
        rest = "one of many rows; odd sizes are unpacked in blocks"
        if blocks.compute_dtype(dtype) == torch.bfloat16 and kernel.instructions == native.AVX2:
            # Such instructions multiply twice as many numbers.
            rest = "bfloat16 products of unpacked blocks"
        choices[_QUANTIZED] = ("C kernel", f"{reason}; from {most + 1} rows on {rest}")
        choices[_FLOATS] = ("C kernel", f"{reason}; PyTorch's product for more than {_MOST_FLOAT_ROWS} rows")
        choices[_ATTENTION] = ("C kernel", f"{reason}; PyTorch's attention for prompts")
        choices[_ROTARY] = choices[_GELU] = ("C kernel", reason)
        functions[_FLOATS] = functools.partial(fused_matmul_bias, kernel)
        functions[_ROTARY] = functools.partial(between.fused_apply_rotary_emb, kernel)
        functions[_GELU] = functools.partial(between.fast_gelu, kernel)
    else:
        reason, kernel = kernel, None
        if dtype == torch.bfloat16 and hasattr(torch, "_weight_int8pack_mm"):
            choices[_QUANTIZED] = ("torch int4 and int8", f"{reason}; many rows and odd sizes are unpacked in blocks")
        else:
            choices[_QUANTIZED] = ("unpacked in blocks", f"{reason}; PyTorch's kernels are fast in bfloat16 alone")
        choices[_ATTENTION] = ("PyTorch's attention", reason)
        if blocks.compute_dtype(dtype) != dtype:
            functions[_GELU] = functools.partial(between.fast_gelu, None)
            choices[_GELU] = ("in float32", f"this CPU is slow in {str(dtype).removeprefix('torch.')}")
    functions[_ATTENTION] = functools.partial(between.fused_multi_head_attention_inference_v2, kernel)
    functions[_QUANTIZED] = functools.partial(fused_linear_with_groupwise_quantized_weight, kernel)
    return replace(table, **functions, choices=table.choices | choices)


def fused_linear_with_groupwise_quantized_weight(
    kernel: Any,
    x: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    *,
    b: torch.Tensor | None = None,
    num_bits: int = 8,
    group_size: int = -1,
    _add_to_output: torch.Tensor | None = None,
    beta: float = 1.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the operator as ``ops.reference`` defines it, with a kernel of ``native`` or None.

    Args:
        out: contiguous, in the dtype of x and the result's shape, is filled and returned.
    """
    from . import between, blocks, library, native

    if not (_may_take(x, w, w_scale) and _fits(x, w, w_scale, num_bits, group_size)):
        result = reference.fused_linear_with_groupwise_quantized_weight(
            x, w, w_scale, b=b, num_bits=num_bits, group_size=group_size, _add_to_output=_add_to_output, beta=beta
        )
        return result if out is None else out.copy_(result)
    columns = x.shape[-1]
    group = columns if group_size < 0 else group_size
    flat, scale = x.reshape(-1, columns).contiguous(), w_scale.view(w.shape[0], columns // group)
    rows = flat.shape[0]
    floats = _floats(out, rows)
    few = kernel is not None and rows <= _most_integer_rows(kernel, x.dtype, group)
    if few and native.block_of(group, num_bits) is not None:
        product = native.integer_product(kernel, flat, w, scale, num_bits, group, floats)
    elif kernel is not None and _is_for_many_rows(kernel, x.dtype, group):
        product = native.many_rows_product(kernel, flat, w, scale, num_bits, group, floats)
    elif kernel is None and rows <= _MOST_LIBRARY_ROWS and library.serves(flat, w, num_bits, group):
        product = library.product(flat, w, scale, num_bits, group)
    else:
        product = blocks.integer_product(kernel, flat, w, scale, num_bits, group)
    return between.finish(kernel, product, x, b, _add_to_output, beta, out)


def _most_integer_rows(kernel: Any, dtype: torch.dtype, group: int | None) -> int:
    """Return up to how many rows the kernel of few rows serves, for groups of columns or for most models' (None)."""
    from . import native

    if group is None or native.multiplies_bytes(kernel, group):
        return _MOST_ROWS_BEFORE_BYTES.get(kernel.instructions, _MOST_INTEGER_ROWS[dtype])
    return _MOST_INTEGER_ROWS[dtype]


def _is_for_many_rows(kernel: Any, dtype: torch.dtype, group: int) -> bool:
    """Tell whether the C kernel is faster than products of unpacked blocks, for x in ``dtype`` and its groups."""
    from . import blocks, native

    if native.multiplies_bytes(kernel, group):
        return True
    return blocks.compute_dtype(dtype) == torch.float32 and native.block_of_many_rows(group) is not None


def fused_matmul_bias(
    kernel: Any,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    _add_to_output: torch.Tensor | None = None,
    beta: float = 1.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the operator as ``ops.reference`` defines it, with a kernel of ``native``.

    Args:
        out: contiguous, in the dtype of x and the result's shape, is filled and returned.
    """
    from . import between, blocks, native

    fits = weight.dtype == x.dtype and weight.dim() == 2 and weight.shape[1] == x.shape[-1]
    if not fits or not _may_take(x, weight):
        result = reference.fused_matmul_bias(x, weight, bias, _add_to_output, beta)
        return result if out is None else out.copy_(result)
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    floats = _floats(out, flat.shape[0])
    if flat.shape[0] <= _MOST_FLOAT_ROWS:
        product = native.float_product(kernel, flat, weight, floats)
    else:
        product = blocks.float_product(flat, weight, floats)
    return between.finish(kernel, product, x, bias, _add_to_output, beta, out)


def _floats(out: torch.Tensor | None, rows: int) -> torch.Tensor | None:
    """Return the memory for a product in float32 if it may stand in ``out`` itself."""
    return None if out is None or out.dtype != torch.float32 else out.view(rows, -1)


def _may_take(x: torch.Tensor, *weights: torch.Tensor) -> bool:
    """Tell whether a kernel may read these; x need not be contiguous."""
    from . import native

    is_real = type(x) in native.KINDS_OF_TENSOR and x.is_cpu and x.dtype in _DTYPES and x.numel() > 0
    return is_real and native.may_read(*weights) and not native.is_traced()


def _fits(x: torch.Tensor, w: torch.Tensor, w_scale: torch.Tensor, bits: int, group_size: int) -> bool:
    """Tell whether dtypes and sizes are those of a product; the definition says what is wrong with others."""
    columns = x.shape[-1]
    group = columns if group_size < 0 else group_size
    return (
        w.dtype == torch.int8
        and w_scale.dtype in _DTYPES
        and bits in (4, 8)
        and w.dim() == 2
        and w.shape[1] * 8 == columns * bits
        and group > 0
        and columns % group == 0
        and (bits == 8 or group % 2 == 0)
        and w_scale.numel() == w.shape[0] * (columns // group)
    )
