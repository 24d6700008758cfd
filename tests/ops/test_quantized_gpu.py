"""The products with integer weights on a real GPU: odd shapes, batch 1 to 257, all dtypes, groups and epilogues."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed, so there are no kernels to run")

import quantized_checks as checks  # noqa: E402

from faster_chatglm_6b.ops import triton as kernels  # noqa: E402
from faster_chatglm_6b.ops.triton.quantized import trial  # noqa: E402
from faster_chatglm_6b.ops.triton.quantized.configs import FewRows, Quantized, Row, Tiles  # noqa: E402
from faster_chatglm_6b.ops.triton.quantized.pipelined.launch import serves_pipelined  # noqa: E402
from faster_chatglm_6b.ops.triton.quantized.pipelined.tables import Pipelined  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
DEVICE = "cuda"
HALF, BFLOAT, SINGLE = torch.float16, torch.bfloat16, torch.float32
BITS = pytest.mark.parametrize("bits", [8, 4])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@BITS
@pytest.mark.parametrize("dtype", [HALF, BFLOAT], ids=["fp16", "bf16"])
@pytest.mark.parametrize("n, k", [(12288, 4096), (4096, 4096), (16384, 4096), (4096, 16384)])
def test_every_kernel_passes_its_trial(bits, dtype, n, k):
    weight = torch.randint(-128, 128, (n, k * bits // 8), dtype=torch.int8, device=DEVICE)
    scale = torch.full((n,), 1e-3, dtype=HALF, device=DEVICE)
    trial._holds.clear()
    for rows in (1, 2, 8, 16, 32, 64, 128, 256):
        x = torch.randn(rows, k, device=DEVICE).to(dtype)
        kernels.fused_linear_with_groupwise_quantized_weight(x, weight, scale, None, bits)
    # Numbers of rows may share a kernel and its shape.
    assert len(trial._holds) >= 6 and all(trial._holds.values()), trial._holds


@BITS
@pytest.mark.parametrize("dtype", [HALF, BFLOAT, SINGLE], ids=["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("rows", [1, 2, 5, 8, 9, 17, 33, 64, 65, 128, 129, 256, 257])
def test_product(bits, dtype, rows):
    for n, k, group_size in ((37, 128, -1), (700, 1152, 128), (384, 512, 64)):
        for epilogue in ("plain", "gelu", "residual"):
            checks.check_fused_linear_with_groupwise_quantized_weight(
                DEVICE, dtype, bits, rows, n, k, group_size, epilogue
            )


@BITS
@pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=["fp16", "fp32"])
def test_odd_shapes(bits, dtype):
    for rows, n, k, group_size in ((1, 1, 2, -1), (3, 701, 1002, 6), (8, 33, 90, 18), (20, 33, 90, 18)):
        checks.check_fused_linear_with_groupwise_quantized_weight(
            DEVICE, dtype, bits, rows, n, k, group_size, "residual"
        )
    checks.check_quantized_gemv(DEVICE, dtype, bits, 2, 70, 4098, -1)
    checks.check_dequantize(DEVICE, HALF, bits, 701, 1002, 6)
    checks.check_dequantize(DEVICE, BFLOAT, bits, 701, 1024, -1)


@BITS
@pytest.mark.parametrize("rows", [1, 4, 8, 16, 33, 128, 200])
@pytest.mark.parametrize("n, k", [(12288, 4096), (16384, 4096), (4096, 16384), (130528, 4096)])
def test_weights_of_the_model(bits, rows, n, k):
    group_size, epilogue = (128, "gelu") if n == 16384 else (-1, "residual")
    checks.check_fused_linear_with_groupwise_quantized_weight(DEVICE, HALF, bits, rows, n, k, group_size, epilogue)


@BITS
@pytest.mark.parametrize("dtype", [HALF, BFLOAT], ids=["fp16", "bf16"])
def test_configurations(bits, dtype):
    for config in (Quantized(1, 8, 4), Quantized(2, 4, 2), Quantized(4, 1, 1), Quantized(1, 16, 1), Quantized(1, 2, 8)):
        for rows, group_size in ((9, 128), (40, -1)):
            checks.check_quantized_config(DEVICE, dtype, bits, rows, 300, 1152, group_size, config)


@BITS
@pytest.mark.parametrize("dtype", [HALF, BFLOAT], ids=["fp16", "bf16"])
@pytest.mark.parametrize("rows", [2, 7, 8])
def test_few_rows_configurations(bits, dtype, rows):
    # One part and several, few warps and many, one tile of a program and more, uneven rows and columns, groups.
    for config, n, k, group_size, epilogue in (
        (FewRows(8, 4, 1, 2), 300, 1152, -1, "gelu"),
        (FewRows(4, 4, 2, 4), 5000, 2048, 128, "residual"),
        (FewRows(16, 2, 1, 1, True), 5000, 2048, -1, "residual"),
        (FewRows(1, 1, 1, 4), 70, 384, 128, "gelu"),
    ):
        checks.check_quantized_parts(DEVICE, dtype, bits, rows, n, k, group_size, config, epilogue)


@BITS
@pytest.mark.parametrize("dtype", [HALF, BFLOAT], ids=["fp16", "bf16"])
@pytest.mark.parametrize("rows", [9, 40, 130, 300])
def test_tile_configurations(bits, dtype, rows):
    # Uneven rows of both and uneven columns, blocks of x rows, splits, groups of a block and of several.
    for config in (
        Tiles(16, 64, 128, 4, 5, 3),
        Tiles(64, 64, 256, 4, 3),
        Tiles(64, 128, 64, 8, 4, 2),
        Tiles(128, 128, 32, 4, 3, 5),
        Tiles(256, 64, 64, 8, 3),
    ):
        for n, k, group_size, epilogue in (
            (300, 1152, -1, "residual"),
            (700, 2048, 128, "gelu"),
            (70, 768, 96, "gelu"),
        ):
            checks.check_quantized_parts(DEVICE, dtype, bits, rows, n, k, group_size, config, epilogue)


@BITS
@pytest.mark.parametrize("dtype", [HALF, BFLOAT], ids=["fp16", "bf16"])
@pytest.mark.parametrize("rows", [9, 40, 130, 256])
def test_pipelined_configurations(bits, dtype, rows):
    probe = torch.empty(16, 64, dtype=dtype, device=DEVICE)
    if not serves_pipelined(probe, probe.view(torch.int8), -1):
        pytest.skip("this kernel is for compute capability 9.0 and the releases of Triton that it was run on")
    # Uneven rows of both and uneven columns, blocks of x rows, turns, splits, fewer blocks than stages.
    for config in (
        Pipelined(32, 4, 2, 128, 8),
        Pipelined(32, 4, 4, 64, 8, 2),
        Pipelined(64, 2, 2, 128, 4, 3),
        Pipelined(128, 4, 1, 64, 3),
        Pipelined(256, 2, 1, 64, 4, 2),
    ):
        for n, k, epilogue in ((300, 1152, "residual"), (1000, 2048, "gelu"), (70, 384, "residual")):
            checks.check_quantized_parts(DEVICE, dtype, bits, rows, n, k, -1, config, epilogue)


@BITS
@pytest.mark.parametrize("dtype", [HALF, BFLOAT], ids=["fp16", "bf16"])
def test_integers_of_tiles(bits, dtype):
    checks.check_integers_of_tiles(DEVICE, dtype, bits)


@BITS
@pytest.mark.parametrize("dtype", [HALF, BFLOAT], ids=["fp16", "bf16"])
def test_row_configurations(bits, dtype):
    # One round and several, one block of x and several, one tile of rows and more per program, uneven rows and columns.
    for config in (Row(4, 4, 2, 3), Row(16, 4, 2, 1), Row(2, 4, 3, 2), Row(1, 2, 5, 1), Row(8, 2, 1, 2)):
        for n, k, group_size in ((300, 1152, -1), (5000, 2048, 128), (70, 4096, -1)):
            checks.check_quantized_config(DEVICE, dtype, bits, 1, n, k, group_size, config)


@BITS
@pytest.mark.parametrize("dtype", [HALF, BFLOAT], ids=["fp16", "bf16"])
def test_rows_that_are_normalised(bits, dtype):
    # Few warps and many, one block of x and two, uneven rows and columns; a mean as large as ten deviations.
    for config, n, k, group_size, mean in (
        (Row(4, 2, 3, 6), 300, 1152, -1, 0.0),
        (Row(2, 2, 3, 2), 5000, 1024, 128, 30.0),
        (Row(8, 4, 1, 4), 70, 4096, -1, 3.0),
        (Row(4, 4, 2, 3), 12288, 4096, -1, 3.0),
    ):
        checks.check_normalised_row(DEVICE, dtype, bits, n, k, group_size, config, mean)


@BITS
def test_large_values_and_layer_norm(bits):
    checks.check_large_values(DEVICE, bits, 4096)
    for rows, n, k in ((1, 12288, 4096), (1, 16384, 4096), (2, 12288, 4096), (1, 300, 16384)):
        checks.check_layer_norm_quantized(DEVICE, HALF, bits, rows, n, k)
