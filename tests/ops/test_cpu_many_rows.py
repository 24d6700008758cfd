"""The C kernels of many rows against the definitions in float64: any rows and columns, and integers at their limits."""

import pytest
import torch

from faster_chatglm_6b.ops import reference
from faster_chatglm_6b.ops.cpu import native


@pytest.fixture(params=[native.AVX2, native.VNNI, native.AMX])
def kernel(request):
    """Return the kernel as a CPU with these instructions, and no newer ones, uses it."""
    found = native.load()
    if isinstance(found, str):
        pytest.skip(found)
    every = [native.AVX2, native.VNNI, native.AMX]
    if every.index(request.param) > every.index(found.instructions):
        pytest.skip(f"this CPU has no {request.param}")
    return found._replace(instructions=request.param)


def served(kernel, sizes):
    """Return those of the sizes (rows, n, k, group) that the kernel's own file serves."""
    return [size for size in sizes if kernel.instructions == native.AVX2 or native.multiplies_bytes(kernel, size[3])]


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
    function, block, rest = kernel.library.many_rows_product, native.block_of_many_rows(group), ()
    if kernel.instructions != native.AVX2:
        function, block = kernel.library.many_rows_512_product, native.block_of_many_rows(group, 64)
        rest = native.KINDS[x.dtype], kernel.instructions == native.AMX
    failed = function(
        w.data_ptr(),
        scale.data_ptr(),
        native.KINDS[scale.dtype],
        x.data_ptr(),
        out[1].data_ptr(),
        rows,
        n,
        x.shape[1],
        group,
        block,
        bits,
        precise,
        threads,
        *rest,
    )
    assert not failed and out[[0, -1]].isnan().all()
    return out[1:-1]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("precise", [0, 1], ids=["one digit", "two digits"])
def test_any_number_of_rows_and_columns(kernel, bits, precise):
    most = (1e-4, 4e-7)[precise]
    sizes = [(rows, 21, 64, 64) for rows in range(1, 301)]
    sizes += [(5, n, 40, 8) for n in range(1, 70)] + [(9, 17, k, k) for k in range(8, 520, 8)]
    # Tails of tasks of 64 rows of the weight, and passes of 256 rows of x.
    sizes += [(5, n, 64, 64) for n in (1, 15, 31, 32, 33, 63, 64, 65, 97)] + [(260, 70, 768, 256), (6, 130, 384, 128)]
    for rows, n, k, group in served(kernel, sizes):
        x, w, scale = operands(rows, n, k, group, bits)
        exact = reference.fused_linear_with_groupwise_quantized_weight(
            x.double(), w, scale.double(), num_bits=bits, group_size=group
        )
        out = many_rows(kernel, x, w, scale, bits, group, precise, 1 + (n > 69))
        error = float((out.double() - exact).norm() / exact.norm())
        assert error < most, (rows, n, k, group, error)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", list(native.KINDS), ids=str)
def test_x_is_read_in_its_own_dtype(kernel, bits, dtype):
    for rows, n, k, group in ((17, 40, 512, 128), (33, 130, 192, 192), (40, 7, 320, 320)):
        x, w, scale = operands(rows, n, k, group, bits)
        exact = reference.fused_linear_with_groupwise_quantized_weight(
            x.to(dtype).double(), w, scale.double(), num_bits=bits, group_size=group
        )
        out = native.many_rows_product(kernel, x.to(dtype), w, scale, bits, group)
        assert float((out.double() - exact).norm() / exact.norm()) < (4e-7 if dtype == torch.float32 else 1e-4)


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


@pytest.mark.parametrize("reason", ["the trial", "Linux"])
def test_a_variant_that_does_not_work_leaves_the_next_one(kernel, reason, monkeypatch):
    """A CPU with all instructions, whose newer variants than the kernel's are wrong or not allowed."""
    names = [name for name, _, _ in native._VARIANTS]
    wrong = names[: names.index(kernel.instructions)] if reason == "the trial" else names[:1]

    class Library:
        def request_amx(self):
            return reason == "Linux"

    monkeypatch.setattr(native.torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(native, "_cpu_flags", lambda: set().union(*(needs for _, _, needs in native._VARIANTS)))
    monkeypatch.setattr(native, "_library", lambda compiler, options: Library())
    monkeypatch.setattr(native, "_trial", lambda one: "it was changed" if one.instructions in wrong else None)
    found = native.load.__wrapped__()
    assert found.instructions == (kernel.instructions if reason == "the trial" else native.VNNI)
    assert [f"not {name}: " in str(found) for name in names] == [name in wrong for name in names]
