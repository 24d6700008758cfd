"""Kernels on pages on a real GPU: odd shapes, all dtypes, poisoned pages."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed, so there are no kernels to run")

import page_checks as pages  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@DTYPES
@pytest.mark.parametrize(
    "batch, heads, size, page, count, splits",
    [
        (1, 32, 128, 64, 32, None),
        (6, 32, 128, 64, 5, None),
        (33, 4, 64, 128, 3, 2),
        (256, 4, 128, 64, 2, None),
        (5, 3, 24, 16, 9, 4),
    ],
)
def test_decode_attention(dtype, batch, heads, size, page, count, splits):
    for padded in (True, False):
        pages.check_paged_decode_attention("cuda", dtype, batch, heads, size, page, count, splits, padded)


@DTYPES
@pytest.mark.parametrize(
    "lengths, heads, size, page, prefix, pad",
    [
        ([1], 32, 128, 64, 0, 0),
        ([20, 1, 64, 33], 32, 128, 64, 0, 0),
        ([2047], 4, 128, 64, 0, 0),
        ([130, 300, 5, 128, 129], 8, 128, 64, 128, 28),
        ([77, 12], 3, 24, 16, 16, 3),
        ([40] * 40, 4, 64, 128, 0, 0),
    ],
)
def test_packed_prompts(dtype, lengths, heads, size, page, prefix, pad):
    for two in (True, False):
        pages.check_packed_rotary_concat("cuda", dtype, lengths, heads, size, two, page, prefix)
    pages.check_packed_prompt_attention("cuda", dtype, lengths, heads, size, page, prefix, pad)
