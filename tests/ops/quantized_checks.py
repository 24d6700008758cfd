"""Checks of the products with integer weights against float64, shared by the interpreter's and the GPU's tests."""

import contextlib
import math
from dataclasses import replace
from unittest import mock

import torch
from operator_checks import ALPHA, assert_close, gelu64, layer_norm64, poison, random

from faster_chatglm_6b.ops import triton as kernels
from faster_chatglm_6b.ops.reference import unpack_int4
from faster_chatglm_6b.ops.triton.quantized.configs import FewRows, Quantized, Row, Tiles, fit_few_rows, fit_tiles
from faster_chatglm_6b.ops.triton.quantized.dequantize import dequantize
from faster_chatglm_6b.ops.triton.quantized.few_rows import rows as few_rows
from faster_chatglm_6b.ops.triton.quantized.few_rows.rows import launch_quantized_few_rows
from faster_chatglm_6b.ops.triton.quantized.gemv import launch_quantized_gemv
from faster_chatglm_6b.ops.triton.quantized.matmul import launch_quantized_matmul, serves
from faster_chatglm_6b.ops.triton.quantized.one_row.norm import NormArguments
from faster_chatglm_6b.ops.triton.quantized.one_row.row import launch_quantized_row, normalises
from faster_chatglm_6b.ops.triton.quantized.pipelined.launch import launch_quantized_pipelined, serves_pipelined
from faster_chatglm_6b.ops.triton.quantized.pipelined.tables import Pipelined, fit_pipelined
from faster_chatglm_6b.ops.triton.quantized.tiles import launch_quantized_tiles, serves_tiles

LAUNCHES = {Quantized: launch_quantized_matmul, Row: launch_quantized_row}


def quantized_weight(
    device: str, bits: int, n: int, k: int, group_size: int, dtype: torch.dtype = torch.float16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return stored integers of every value that the format has, their scales, and the float64 product of both."""
    packed = torch.randint(-128, 128, (n, k * bits // 8), dtype=torch.int8, device=device)
    groups = 1 if group_size < 0 else k // group_size
    # Scales that differ show a wrong row or group.
    scale = (torch.rand(n, groups, device=device) + 0.2).mul(1 / math.sqrt(k) / 2 ** (bits - 1)).to(dtype)
    integers = unpack_int4(packed) if bits == 4 else packed
    exact = (integers.double().view(n, groups, -1) * scale.double()[..., None]).view(n, k)
    return packed, scale.squeeze(1) if group_size < 0 else scale, exact


def expected_product(
    x: torch.Tensor,
    exact: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gelu: bool,
) -> torch.Tensor:
    out = x.double() @ exact.T
    out = out if bias is None else out + bias.double()
    out = gelu64(out) if gelu else out
    return out if residual is None else out + ALPHA * residual.double()


def check_fused_linear_with_groupwise_quantized_weight(
    device: str, dtype: torch.dtype, bits: int, rows: int, n: int, k: int, group_size: int = -1, epilogue: str = "plain"
) -> None:
    """Check the public function, whatever kernel it takes; the mean of x shows a lost offset."""
    w, scale, exact = quantized_weight(device, bits, n, k, group_size)
    x = random(device, dtype, rows, k) * 30 + 10
    bias = None if epilogue == "plain" else random(device, dtype, n)
    residual = random(device, dtype, rows, n) if epilogue == "residual" else None
    out = kernels.fused_linear_with_groupwise_quantized_weight(
        x, w, scale, bias, bits, group_size, residual, ALPHA, epilogue == "gelu", out=poison(device, dtype, rows, n)
    )
    assert_close(out, expected_product(x, exact, bias, residual, epilogue == "gelu"))


def check_quantized_config(
    device: str,
    dtype: torch.dtype,
    bits: int,
    rows: int,
    n: int,
    k: int,
    group_size: int,
    config: Quantized | Row,
) -> None:
    """Check a tensor-core kernel in one configuration; its sums are float32, so only the rounding of ``out`` counts."""
    w, scale, exact = quantized_weight(device, bits, n, k, group_size)
    x, bias, residual = random(device, dtype, rows, k) + 1, random(device, dtype, n), random(device, dtype, rows, n)
    assert serves(x, w, bits, group_size)
    out = poison(device, dtype, rows, n)
    launch = LAUNCHES[type(config)]
    launch(x, w, scale, bits, group_size, bias, residual, ALPHA, False, out, config)
    assert_close(out, expected_product(x, exact, bias, residual, False))
    error = (out.double() - expected_product(x, exact, bias, residual, False)).norm() / out.double().norm()
    assert error <= {torch.float16: 3e-4, torch.bfloat16: 2.4e-3}[dtype], error


def few_programs() -> contextlib.AbstractContextManager:
    """Let a small weight have more tiles than programs, so that some take several."""
    return mock.patch.object(few_rows, "multiprocessor_count", lambda device: 2)


def check_quantized_parts(
    device: str,
    dtype: torch.dtype,
    bits: int,
    rows: int,
    n: int,
    k: int,
    group_size: int,
    config: FewRows | Pipelined | Tiles,
    epilogue: str = "residual",
) -> None:
    """Check a kernel that adds up parts of a row, twice: the first run must leave the counters at zero.

    The sums are float32, so only the rounding of the results counts.
    """
    w, scale, exact = quantized_weight(device, bits, n, k, group_size)
    x, bias = random(device, dtype, rows, k) + 1, random(device, dtype, n)
    residual = random(device, dtype, rows, n) if epilogue == "residual" else None
    workspace = kernels.Workspace(device, 1, 4, 32, 1024)
    if isinstance(config, FewRows):
        assert serves(x, w, bits, group_size)
        launch, config = launch_quantized_few_rows, fit_few_rows(config, bits, n, k, workspace)
    elif isinstance(config, Pipelined):
        assert serves_pipelined(x, w, group_size)
        launch, config = launch_quantized_pipelined, fit_pipelined(config, rows, n, workspace)
    else:
        assert serves_tiles(x, w, bits, group_size)
        launch, config = launch_quantized_tiles, fit_tiles(config, rows, n, k, group_size, workspace)
    arguments = (x, w, scale, bits, group_size, bias, residual, ALPHA, epilogue == "gelu")
    expected = expected_product(x, exact, bias, residual, epilogue == "gelu")
    outs = poison(device, dtype, 2, rows, n)
    for out in outs:
        workspace.partial.fill_(math.nan)
        with few_programs() if device == "cpu" else contextlib.nullcontext():
            launch(*arguments, out, config, workspace.partial, workspace.counters)
        assert_close(out, expected)
        assert workspace.counters.count_nonzero() == 0
    assert torch.equal(*outs)
    error = (outs[0].double() - expected).norm() / expected.norm()
    assert error <= {torch.float16: 3e-4, torch.bfloat16: 2.4e-3}[dtype], error


def check_integers_of_tiles(device: str, dtype: torch.dtype, bits: int) -> None:
    """Check that every integer becomes exactly its number: each row of x picks one column."""
    k = 512 // bits
    values = torch.arange(-(1 << bits - 1), 1 << bits - 1, device=device)
    # Each row has every integer at another column.
    integers = torch.stack([values.roll(shift) for shift in range(48)]).repeat(1, -(-k // len(values)))[:, :k]
    w = integers.to(torch.int8)
    if bits == 4:
        w = w[:, ::2] << 4 | w[:, 1::2] & 15
    x, scale = torch.eye(k, dtype=dtype, device=device), torch.ones(48, dtype=dtype, device=device)
    out = kernels.fused_linear_with_groupwise_quantized_weight(
        x, w.contiguous(), scale, num_bits=bits, out=poison(device, dtype, k, 48)
    )
    assert torch.equal(out.long(), integers.T)


def check_quantized_gemv(
    device: str, dtype: torch.dtype, bits: int, rows: int, n: int, k: int, group_size: int
) -> None:
    """Check the kernel that takes every shape."""
    w, scale, exact = quantized_weight(device, bits, n, k, group_size)
    x, bias = random(device, dtype, rows, k), random(device, dtype, n)
    out = poison(device, dtype, rows, n)
    launch_quantized_gemv(x, w, scale, bits, bias, None, 1.0, True, out)
    assert_close(out, expected_product(x, exact, bias, None, True))


def check_large_values(device: str, bits: int, k: int) -> None:
    """Check sums far beyond the largest half, with scales that bring them back."""
    w, _, _ = quantized_weight(device, bits, 33, k, -1)
    integers = (unpack_int4(w) if bits == 4 else w).double()
    x = torch.full((2, k), 30000.0, dtype=torch.float16, device=device)
    scale = torch.full((33,), 2e-6, dtype=torch.float16, device=device)
    out = kernels.fused_linear_with_groupwise_quantized_weight(x, w, scale, num_bits=bits)
    assert out.isfinite().all()
    assert_close(out, x.double() @ (integers * scale.double()[:, None]).T)


def check_dequantize(device: str, dtype: torch.dtype, bits: int, n: int, k: int, group_size: int) -> None:
    w, scale, exact = quantized_weight(device, bits, n, k, group_size)
    out = dequantize(w, scale, bits, dtype, out=poison(device, dtype, n, k))
    assert torch.equal(out, exact.float().to(dtype))


def check_normalised_row(
    device: str, dtype: torch.dtype, bits: int, n: int, k: int, group_size: int, config: Row, mean: float = 0.0
) -> None:
    """Check the product that normalises its x, with numbers around ``mean``."""
    w, scale, exact = quantized_weight(device, bits, n, k, group_size)
    gamma, beta, bias = (random(device, dtype, size) for size in (k, k, n))
    x = random(device, dtype, 1, k) * 3 + mean
    assert serves(x, w, bits, group_size) and normalises(bits, k, replace(config, normalises=True))
    out, normed = poison(device, dtype, 1, n), poison(device, dtype, 1, k)
    norm = NormArguments(gamma, beta, 1e-5, normed)
    launch_quantized_row(x, w, scale, bits, group_size, bias, None, 1.0, True, out, config, norm)
    assert_close(normed, layer_norm64(x, gamma, beta, 1e-5))
    assert_close(out, expected_product(normed, exact, bias, None, True))
    # The deviation is zero, so only beta is left.
    launch_quantized_row(
        torch.full_like(x, 1000.0), w, scale, bits, group_size, bias, None, 1.0, True, out, config, norm
    )
    assert (normed - beta).abs().max() <= 0.1
    assert_close(out, expected_product(normed, exact, bias, None, True))


def check_layer_norm_quantized(device: str, dtype: torch.dtype, bits: int, rows: int, n: int, k: int) -> None:
    w, scale, exact = quantized_weight(device, bits, n, k, -1)
    x, gamma, beta, bias = (random(device, dtype, *shape) for shape in ((rows, k), (k,), (k,), (n,)))
    out, normed = poison(device, dtype, rows, n), poison(device, dtype, rows, k)
    kernels.layer_norm_quantized_linear(
        x, gamma, beta, 1e-5, w, scale, bias, bits, gelu=True, normed_out=normed, out=out
    )
    assert_close(normed, layer_norm64(x, gamma, beta, 1e-5))
    assert_close(out, expected_product(normed, exact, bias, None, True))
