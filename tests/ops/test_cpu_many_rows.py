"""The C kernel of many rows against the definitions in float64: any rows and columns, and integers at their limits."""

import pytest
import torch

from faster_chatglm_6b.ops import reference
from faster_chatglm_6b.ops.cpu import native


@pytest.fixture
def kernel():
    found = native.load()
    if isinstance(found, str):
        pytest.skip(found)
    return found


def operands(rows, n, k, group, bits):
    torch.manual_seed(rows * k)
    return (
        torch.randn(rows, k) * 3 + 1,
        torch.randint(-128, 128, (n, k * bits // 8), dtype=torch.int8),
        (torch.rand(n, k // group) * 0.01 + 0.001).half(),
    )


def many_rows(kernel, x, w, scale, bits, group, precise, threads=1):
    """Call the C function between rows of NaN, of which it must fill its own alone."""
    rows, n = x.shape[0], w.shape[0]
    out = torch.full((rows + 2, n), float("nan"))
    failed = kernel.library.many_rows_product(
        w.data_ptr(),
        scale.data_ptr(),
        native.KINDS[scale.dtype],
        x.data_ptr(),
        out[1].data_ptr(),
        rows,
        n,
        x.shape[1],
        group,
        native.block_of_many_rows(group),
        bits,
        precise,
        threads,
    )
    assert not failed and out[[0, -1]].isnan().all()
    return out[1:-1]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("precise", [0, 1], ids=["one digit", "two digits"])
def test_any_number_of_rows_and_columns(kernel, bits, precise):
    most = (1e-4, 4e-7)[precise]
    sizes = [(rows, 21, 64, 64) for rows in range(1, 301)]
    sizes += [(5, n, 40, 8) for n in range(1, 70)] + [(9, 17, k, k) for k in range(8, 520, 8)]
    for rows, n, k, group in [*sizes, (260, 70, 768, 256), (6, 130, 384, 128)]:
        x, w, scale = operands(rows, n, k, group, bits)
        exact = reference.fused_linear_with_groupwise_quantized_weight(
            x.double(), w, scale.double(), num_bits=bits, group_size=group
        )
        out = many_rows(kernel, x, w, scale, bits, group, precise, 1 + (n > 69))
        error = float((out.double() - exact).norm() / exact.norm())
        assert error < most, (rows, n, k, group, error)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_largest_sums_fit(kernel, bits):
    """Every number at its limit, in both signs: sums of a block then come closest to the ends of 32 bits."""
    for sign in (1.0, -1.0):
        x = torch.full((5, 512), sign)
        for byte in (-128, 127, -120, 119):
            w, scale = torch.full((18, 512 * bits // 8), byte, dtype=torch.int8), torch.ones(18)
            exact = reference.fused_linear_with_groupwise_quantized_weight(x, w, scale, num_bits=bits)
            for precise in (0, 1):
                out = many_rows(kernel, x, w, scale, bits, 512, precise)
                torch.testing.assert_close(out, exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_spoils_itself_alone(kernel, bad):
    x, w, scale = operands(30, 40, 512, 512, 4)
    x[7, 300] = bad
    out = many_rows(kernel, x, w, scale, 4, 512, 1)
    assert out[7].isnan().all() and out[[*range(7), *range(8, 30)]].isfinite().all()
