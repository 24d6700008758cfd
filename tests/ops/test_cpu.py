"""The CPU's products against the definitions in float64: the C kernel, PyTorch's kernels without it, and blocks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from faster_chatglm_6b.ops import cpu, reference
from faster_chatglm_6b.ops.cpu import blocks, library, native

ROOT = Path(__file__).resolve().parents[2]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ERRORS = {torch.float32: 2e-6, torch.float16: 4e-4, torch.bfloat16: 6e-3}
# Rows and columns of the weight, columns per scale: blocks of 256, of 64 and of 16, tails of tiles, and odd sizes.
SHAPES = [
    (64, 512, -1),
    (7, 1024, -1),
    (64, 512, 128),
    (9, 192, 64),
    (128, 192, -1),
    (40, 96, 32),
    (33, 70, -1),
    (5, 48, 6),
]


@pytest.fixture(params=["C kernel", "without it"])
def kernel(request):
    """Return the compiled kernel, and None for what serves where there is none."""
    return compiled_or_skip() if request.param == "C kernel" else None


def compiled_or_skip() -> native.Kernel:
    found = native.load()
    if isinstance(found, str):
        pytest.skip(found)
    return found


def operands(dtype, bits, rows, n, k, group_size):
    torch.manual_seed(rows * k)
    return (
        torch.randn(rows, 1, k).to(dtype) * 3 + 1,
        torch.randint(-128, 128, (n, k * bits // 8), dtype=torch.int8),
        (torch.rand(n, 1 if group_size < 0 else k // group_size) * 0.01 + 0.001).half(),
        torch.randn(n).to(dtype),
        torch.randn(rows, 1, n).to(dtype),
    )


def relative(out, exact):
    return float((out.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fused_linear_with_groupwise_quantized_weight(kernel, dtype, bits, shape):
    for rows in (1, 2, 3, 5, 8, 17, 40):
        x, w, scale, bias, residual = operands(dtype, bits, rows, *shape)
        settings = {"num_bits": bits, "group_size": shape[2], "beta": 0.5}
        out = cpu.fused_linear_with_groupwise_quantized_weight(
            kernel, x, w, scale, b=bias, _add_to_output=residual, **settings
        )
        exact = reference.fused_linear_with_groupwise_quantized_weight(
            x.double(), w, scale.double(), b=bias.double(), _add_to_output=residual.double(), **settings
        )
        assert out.dtype == dtype and out.shape == exact.shape
        assert relative(out, exact) < ERRORS[dtype], rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(64, 512), (7, 33), (130, 1000), (3, 5)], ids=str)
def test_fused_matmul_bias(dtype, shape):
    kernel = compiled_or_skip()
    for rows in (1, 2, 3, 7, 8, 9):
        x, w = torch.randn(rows, 1, shape[1]).to(dtype), torch.randn(shape).to(dtype)
        bias, residual = torch.randn(shape[0]).to(dtype), torch.randn(rows, 1, shape[0]).to(dtype)
        out = cpu.fused_matmul_bias(kernel, x, w, bias, residual, 0.5)
        exact = reference.fused_matmul_bias(x.double(), w.double(), bias.double(), residual.double(), 0.5)
        assert out.dtype == dtype and out.shape == exact.shape
        assert relative(out, exact) < ERRORS[dtype], rows


def test_strided_inputs_and_weights(kernel):
    x, w, scale, _, _ = operands(torch.float32, 8, 3, 64, 256, -1)
    exact = reference.fused_linear_with_groupwise_quantized_weight(x.double(), w, scale.double())
    strided_x = torch.stack((x, x), dim=-1)[..., 0]
    strided_w = w.T.contiguous().T
    assert not strided_x.is_contiguous() and not strided_w.is_contiguous()
    for arguments in ((strided_x, w, scale), (x, strided_w, scale), (x[:0], w, scale)):
        out = cpu.fused_linear_with_groupwise_quantized_weight(kernel, *arguments)
        assert out.shape == (len(arguments[0]), 1, 64)
        if len(out):
            assert relative(out, exact) < ERRORS[torch.float32]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_spoils_itself_alone(bits, bad):
    kernel = compiled_or_skip()
    x, w, scale, _, _ = operands(torch.float32, bits, 3, 6, 512, -1)
    x[1, 0, 100] = bad
    out = cpu.fused_linear_with_groupwise_quantized_weight(kernel, x, w, scale, num_bits=bits)
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()
    x[1] = 0
    assert not cpu.fused_linear_with_groupwise_quantized_weight(kernel, x, w, scale, num_bits=bits)[1].any()


@pytest.mark.parametrize("bits", [4, 8])
def test_an_outlier_costs_its_own_block_alone(bits):
    """A number that is 10,000 times the others takes precision from the 256 columns around it only."""
    kernel = compiled_or_skip()
    x, w, scale, _, _ = operands(torch.float32, bits, 1, 16, 1024, -1)
    x[0, 0, 5] = 3e4
    exact = reference.fused_linear_with_groupwise_quantized_weight(x.double(), w, scale.double(), num_bits=bits)
    out = native.integer_product(kernel, x[0], w, scale, bits, 1024)
    assert float((out.double() - exact[0]).abs().max()) < 1e-4 * float(exact.abs().max())
    rest = x.clone()
    rest[0, 0, :256] = 0
    exact = reference.fused_linear_with_groupwise_quantized_weight(rest.double(), w, scale.double(), num_bits=bits)
    assert relative(native.integer_product(kernel, rest[0], w, scale, bits, 1024), exact[0]) < ERRORS[torch.float32]


def test_a_packed_weight_follows_its_weight():
    """The library's copy is made anew after the weight changed in place or got another storage."""
    x, w, scale, _, _ = operands(torch.bfloat16, 4, 1, 64, 256, -1)
    if not library.serves(x[0], w, 4, 256):
        pytest.skip("this torch has no int4 kernel for the CPU")
    other = torch.randint(-128, 128, w.shape, dtype=torch.int8)
    change = [lambda: None, lambda: w.random_(-128, 128), lambda: setattr(w, "data", w.flip(0).contiguous())]
    # This one counts no version.
    change.append(lambda: w.data.copy_(other))
    for act in change:
        act()
        exact = reference.fused_linear_with_groupwise_quantized_weight(
            x.double(), w, scale.double(), num_bits=4, group_size=-1
        )
        assert relative(library.product(x[0], w, scale, 4, 256), exact[0]) < ERRORS[torch.bfloat16]


def test_blocks_use_what_the_cpu_multiplies_fast(monkeypatch):
    """bfloat16 products of exact integers, as on CPUs that have such instructions, whatever this one has."""
    kernel = native.load()
    kernel = None if isinstance(kernel, str) else kernel
    monkeypatch.setattr(blocks, "has_bfloat16_products", lambda: True)
    for bits in (4, 8):
        for group_size in (-1, 64):
            x, w, scale, _, _ = operands(torch.bfloat16, bits, 40, 130, 256, group_size)
            settings = {"num_bits": bits, "group_size": group_size}
            exact = reference.fused_linear_with_groupwise_quantized_weight(x.double(), w, scale.double(), **settings)
            out = cpu.fused_linear_with_groupwise_quantized_weight(kernel, x, w, scale, **settings)
            assert relative(out, exact) < 6e-3


def in_a_process(code: str, **environment: str) -> str:
    """Run code in a Python of its own, which may crash, and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    return done.stdout


EVERY_SIZE = """
import torch
from faster_chatglm_6b.ops import cpu, reference
from faster_chatglm_6b.ops.cpu import native

found = native.load()
for kernel in (None,) if isinstance(found, str) else (found, None):
    for dtype, most in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        for columns in range(1, 301):
            x = torch.randn(9, columns).to(dtype)
            for bits in (8, 4) if columns % 2 == 0 else (8,):
                w = torch.randint(-128, 128, (64, columns * bits // 8), dtype=torch.int8)
                scale = torch.rand(64).half() + 0.1
                exact = reference.fused_linear_with_groupwise_quantized_weight(
                    x.double(), w, scale.double(), num_bits=bits
                )
                for rows in range(1, 10):
                    out = cpu.fused_linear_with_groupwise_quantized_weight(kernel, x[:rows], w, scale, num_bits=bits)
                    error = float((out.double() - exact[:rows]).abs().max() / exact.abs().max())
                    assert error < most, (kernel, dtype, columns, bits, rows, error)
print("right:", "without the kernel" if isinstance(found, str) else "with and without the kernel")
"""


def test_no_size_crashes():
    expected = "without the kernel" if isinstance(native.load(), str) else "with and without the kernel"
    assert in_a_process(EVERY_SIZE) == f"right: {expected}\n"


CHOICE = """
import torch
import faster_chatglm_6b
from faster_chatglm_6b import ops

for dtype in (torch.float32, torch.bfloat16):
    table = ops.operators_for(torch.device("cpu"), dtype, 64, False)
    x, w = torch.randn(1, 256).to(dtype), torch.randint(-128, 128, (64, 128), dtype=torch.int8)
    scale = torch.rand(64).to(dtype)
    out = table.fused_linear_with_groupwise_quantized_weight(x, w, scale, num_bits=4)
    exact = ops.reference.fused_linear_with_groupwise_quantized_weight(x.double(), w, scale.double(), num_bits=4)
    assert float((out.double() - exact).norm() / exact.norm()) < (1e-6 if dtype == torch.float32 else 6e-3)
print(faster_chatglm_6b.status())
"""


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"ATEN_CPU_CAPABILITY": "default"}, "the C kernel needs AVX2, and torch uses"),
        ({"PATH": "", "CC": ""}, "the C kernel needs a C compiler and none is on the PATH; install gcc"),
        ({"CC": "false"}, "the C kernel could not be made: "),
        ({"FASTER_CHATGLM_6B_KERNELS": "off"}, "FASTER_CHATGLM_6B_KERNELS=off"),
    ],
    ids=str,
)
def test_without_the_kernel_the_report_says_why_and_products_are_right(tmp_path, environment, reason):
    if sys.platform != "linux":
        pytest.skip("the C kernel is for Linux")
    said = in_a_process(CHOICE, XDG_CACHE_HOME=str(tmp_path), **environment)
    lines = [line for line in said.splitlines() if "fused_linear_with_groupwise_quantized_weight" in line]
    assert len(lines) == 2 and all(reason in line and "C kernel (" not in line for line in lines)


def test_masked_avx512_leaves_the_avx2_kernel(tmp_path):
    compiled_or_skip()
    said = in_a_process(CHOICE, XDG_CACHE_HOME=str(tmp_path), ATEN_CPU_CAPABILITY="avx2")
    assert said.count("C kernel (AVX2, compiled by ") == 10
    # The second process loads what the first one compiled.
    assert [path.suffix for path in (tmp_path / "faster_chatglm_6b").iterdir()] == [".so"]


def test_a_cache_that_others_may_write_to_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = native.cache_folder()
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    with pytest.raises(PermissionError, match="others may write to .* name your own folder in XDG_CACHE_HOME"):
        native.cache_folder()


def test_a_kernel_that_is_wrong_does_not_serve():
    kernel = compiled_or_skip()

    class Wrong:
        def __getattr__(self, name):
            return lambda *arguments: 0

    assert "differs from the definition" in native._trial(kernel._replace(library=Wrong()))
    assert native._trial(kernel) is None


DEFAULTS = """
import torch
from faster_chatglm_6b.ops import cpu
from faster_chatglm_6b.ops.cpu import native

x, w, scale = torch.randn(40, 256), torch.randint(-128, 128, (64, 128), dtype=torch.int8), torch.rand(64).half()
floats = torch.randn(64, 256)

def products():
    kernel = native.load()
    found = [cpu.fused_linear_with_groupwise_quantized_weight(kernel, x[:n], w, scale, num_bits=4) for n in (1, 40)]
    return [*found, cpu.fused_matmul_bias(kernel, x[:1], floats, None)]

def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

torch.set_default_dtype(torch.float16)
first = products()
assert all(out.dtype == torch.float32 for out in first)
for dtype in (torch.float64, torch.float32):
    torch.set_default_dtype(dtype)
    assert same(products(), first), dtype
with torch.device("meta"):
    assert same(products(), first)
print("right")
"""


def test_the_defaults_of_torch_change_nothing():
    """The kernel writes float32 into memory that the caller makes; any other size would damage the process."""
    compiled_or_skip()
    assert in_a_process(DEFAULTS) == "right\n"


@pytest.mark.parametrize("settings", [{"num_bits": 4}, {"num_bits": 2}, {}], ids=str)
def test_sizes_that_do_not_fit_are_refused_as_by_the_definition(kernel, settings):
    x, w, scale = torch.randn(40, 100), torch.randint(-128, 128, (64, 100), dtype=torch.int8), torch.rand(64, 2)
    # The definition reads the groups from the scales.
    exact = reference.fused_linear_with_groupwise_quantized_weight(x, w, scale, group_size=48)
    assert torch.equal(kernel_operator(kernel)(x, w, scale, group_size=48), exact)
    for function in (reference.fused_linear_with_groupwise_quantized_weight, kernel_operator(kernel)):
        with pytest.raises((RuntimeError, ValueError)):
            function(x, w, scale, **settings)


def kernel_operator(kernel):
    return lambda *arguments, **settings: cpu.fused_linear_with_groupwise_quantized_weight(
        kernel, *arguments, **settings
    )


def test_a_float_weight_of_another_width_is_refused():
    with pytest.raises(RuntimeError):
        cpu.fused_matmul_bias(compiled_or_skip(), torch.randn(2, 64), torch.randn(8, 32), None)


def test_a_traced_product_is_recorded():
    kernel, x, w = compiled_or_skip(), torch.randn(2, 64), torch.randn(8, 64)
    traced = torch.jit.trace(lambda x: cpu.fused_matmul_bias(kernel, x, w, None), x)
    other = torch.randn(2, 64)
    torch.testing.assert_close(traced(other), other @ w.T)


COMPILED_FIRST = """
import torch
import faster_chatglm_6b
from faster_chatglm_6b import ops

def call(x):
    table = ops.operators_for(torch.device("cpu"), torch.float32, 64, False)
    return table.fused_matmul_bias(x, torch.ones(8, 64), None)

x = torch.randn(2, 64)
with torch.no_grad():
    torch.testing.assert_close(torch.compile(call, backend="eager")(x), call(x))
print(faster_chatglm_6b.status())
"""


def test_a_model_that_is_compiled_first_keeps_the_kernel_for_later_calls():
    compiled_or_skip()
    said = in_a_process(COMPILED_FIRST)
    assert "C kernel (" in said and "is wrong on this machine" not in said


def test_a_damaged_file_in_the_cache_is_compiled_again(tmp_path):
    compiled_or_skip()
    for _ in range(2):
        said = in_a_process(CHOICE, XDG_CACHE_HOME=str(tmp_path))
        assert said.count("C kernel (") == 10
        (file,) = (tmp_path / "faster_chatglm_6b").iterdir()
        file.write_bytes(b"nothing")


def test_a_user_without_a_home_gets_the_reason(monkeypatch):
    compiled_or_skip()

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(native.Path, "home", homeless)
    assert native.load.__wrapped__() == "the C kernel could not be made: Could not determine home directory."
