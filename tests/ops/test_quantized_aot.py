"""The kernels of integer weights compile for every supported GPU, within its limits and in the assumed layout."""

import importlib
import re

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed, so there are no kernels to compile")

import ahead_of_time  # noqa: E402
from ahead_of_time import Launch  # noqa: E402
from launches import HIDDEN, INNER, WEIGHTS, meta  # noqa: E402

from faster_chatglm_6b.ops import triton as kernels  # noqa: E402
from faster_chatglm_6b.ops.triton.quantized.configs import (  # noqa: E402
    FewRows,
    Row,
    Tiles,
    few_rows_config,
    fit_few_rows,
    fit_tiles,
    quantized_config,
    row_config,
    rows_for,
    tiles_config,
)
from faster_chatglm_6b.ops.triton.quantized.dequantize import dequantize  # noqa: E402
from faster_chatglm_6b.ops.triton.quantized.few_rows.rows import (  # noqa: E402
    launch_quantized_few_rows,
    quantized_few_rows_kernel,
)
from faster_chatglm_6b.ops.triton.quantized.gemv import launch_quantized_gemv  # noqa: E402
from faster_chatglm_6b.ops.triton.quantized.matmul import launch_quantized_matmul, tiles_of  # noqa: E402
from faster_chatglm_6b.ops.triton.quantized.one_row.norm import NormArguments  # noqa: E402
from faster_chatglm_6b.ops.triton.quantized.one_row.row import launch_quantized_row, quantized_row_kernel, words_kept  # noqa: E402
from faster_chatglm_6b.ops.triton.quantized.tiles import launch_quantized_tiles  # noqa: E402
from faster_chatglm_6b.ops.triton.quantized.trial import find_flaw  # noqa: E402

CAPABILITIES = (80, 86, 89, 90)
HALF, BFLOAT = torch.float16, torch.bfloat16


def normalised_product(capability: int, bits: int, n: int, config: Row) -> Launch:
    """Return the launch of a product with LayerNorm in it."""

    def call() -> None:
        norm = NormArguments(meta(HALF, HIDDEN), meta(HALF, HIDDEN), 1e-5, meta(HALF, 1, HIDDEN))
        launch_quantized_row(
            meta(HALF, 1, HIDDEN), meta(torch.int8, n, HIDDEN * bits // 8), meta(HALF, n), bits, -1, meta(HALF, n),
            None, 1.0, n == INNER, meta(HALF, 1, n), config, norm,
        )  # fmt: skip

    (launch,) = ahead_of_time.record(capability, call)
    return launch


def product(capability: int, dtype: torch.dtype, bits: int, rows: int, n: int, k: int, group_size: int) -> list:
    """Return the launch of one product with a weight [n, k]."""
    device, scratch = torch.device("meta"), ()
    workspace = kernels.Workspace("meta", 1)

    def call() -> None:
        nonlocal scratch
        if rows == 1:
            launch, config = launch_quantized_row, row_config(rows_for(device), bits, n, k)
        elif rows <= 8:
            launch, config = launch_quantized_few_rows, few_rows_config(device, bits, n, k, group_size, workspace)
            scratch = workspace.partial, workspace.counters
        else:
            launch, config = launch_quantized_matmul, quantized_config(bits, tiles_of(rows), k)
        scale = meta(HALF, n) if group_size < 0 else meta(HALF, n, k // group_size)
        out = meta(dtype, rows, n)
        launch(
            meta(dtype, rows, k), meta(torch.int8, n, k * bits // 8), scale, bits, group_size, meta(dtype, n),
            out if n == HIDDEN else None, 7.5, n == INNER, out, config, *scratch,
        )  # fmt: skip

    return ahead_of_time.record(capability, call)


def product_of_many_rows(
    capability: int, dtype: torch.dtype, bits: int, rows: int, n: int, k: int, group_size: int
) -> Launch:
    """Return the launch of one product with more rows than ``few_rows`` takes."""
    workspace = kernels.Workspace("meta", 1)

    def call() -> None:
        scale = meta(HALF, n) if group_size < 0 else meta(HALF, n, k // group_size)
        out = meta(dtype, rows, n)
        launch_quantized_tiles(
            meta(dtype, rows, k), meta(torch.int8, n, k * bits // 8), scale, bits, group_size, meta(dtype, n),
            out if n == HIDDEN else None, 7.5, n == INNER, out,
            tiles_config(torch.device("meta"), bits, rows, n, k, group_size, workspace),
            workspace.partial, workspace.counters,
        )  # fmt: skip

    (launch,) = ahead_of_time.record(capability, call)
    return launch


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("bits", [8, 4])
def test_products_compile_within_the_limits(bits, capability):
    found = []
    for n, k in WEIGHTS:
        found += product(capability, HALF, bits, 1, n, k, -1)
    for rows in (1, 8, 16, 32, 64):
        found += product(capability, HALF, bits, rows, 3 * HIDDEN, HIDDEN, 128)
        found += product(capability, BFLOAT, bits, rows, HIDDEN, INNER, -1)
    for launch in dict.fromkeys(found):
        resources = ahead_of_time.compile_launch(launch, capability)
        assert resources.shared <= ahead_of_time.SHARED_MEMORY[capability], f"{launch}: {resources}"
        if launch.kernel in (quantized_row_kernel, quantized_few_rows_kernel):
            # Shared memory that PTX declares is limited to 48 KiB.
            assert resources.shared <= 48 << 10, f"{launch}: {resources}"
        # Some of the 64-row kernels spill up to four registers.
        assert resources.stack <= 16, f"{launch}: {resources}"
        assert ("launch_pdl", True) in launch.options or capability < 90, f"{launch} is not launched early"


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_for_other_shapes_compile(capability):
    def call() -> None:
        for dtype in (HALF, torch.float32):
            for bits in (4, 8):
                w, scale, bias = meta(torch.int8, 700, 90 * bits // 8), meta(HALF, 700, 5), meta(dtype, 700)
                launch_quantized_gemv(meta(dtype, 3, 90), w, scale, bits, bias, None, 1.0, True, meta(dtype, 3, 700))
                dequantize(w, scale, bits, dtype)

    found = ahead_of_time.record(capability, call)
    assert len(found) == 8
    for launch in found:
        assert ahead_of_time.compile_launch(launch, capability).stack == 0, launch


@pytest.mark.parametrize("rows", [1, 8, 16])
@pytest.mark.parametrize("dtype", [HALF, BFLOAT])
@pytest.mark.parametrize("bits, group_size", [(8, -1), (4, -1), (4, 128)])
def test_layout_is_what_the_tensor_core_instructions_assume(bits, group_size, dtype, rows):
    (launch,) = product(90, dtype, bits, rows, 3 * HIDDEN, HIDDEN, group_size)
    ir = ahead_of_time.compiled(launch, 90).asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\..*)$", ir, re.M))
    products = [line for line in ir.splitlines() if "mma.sync" in line]
    assert products
    per_thread = 4 if rows == 16 else 1
    for line in products:
        for name in re.findall(r"tensor<\d+x\w+, (#\w+)>", line):
            assert f"blocked<{{sizePerThread = [{per_thread}], threadsPerWarp = [32]," in layouts[name], layouts[name]


@pytest.mark.parametrize(
    "rows, left_out, kernels_tried, names",
    [
        (1, (), ["row"], ["quantized_row_kernel"]),
        (1, ("row",), ["row"], ["quantized_gemv_kernel"]),
        (8, (), ["few rows"], ["quantized_few_rows_kernel"]),
        (8, ("few rows",), ["few rows", "matmul"], ["quantized_matmul_kernel"]),
        (8, ("few rows", "matmul"), ["few rows", "matmul"], ["quantized_gemv_kernel"]),
        (64, (), ["pipelined"], ["quantized_pipelined_kernel"]),
        (64, ("pipelined",), ["pipelined", "tiles"], ["quantized_tiles_kernel"]),
        (64, ("pipelined", "tiles"), ["pipelined", "tiles", "matmul"], ["quantized_matmul_kernel"]),
    ],
)
def test_the_next_best_kernel_takes_the_place_of_one_that_fails_its_trial(
    rows, left_out, kernels_tried, names, monkeypatch
):
    module = importlib.import_module(kernels.fused_linear_with_groupwise_quantized_weight.__module__)
    tried = []

    def trial(name: str, *rest: object) -> bool:
        tried.append(name)
        return name not in left_out

    monkeypatch.setattr(module, "holds", trial)
    arguments = meta(HALF, rows, HIDDEN), meta(torch.int8, HIDDEN, HIDDEN // 2), meta(HALF, HIDDEN), None, 4
    launches = ahead_of_time.record(90, lambda: kernels.fused_linear_with_groupwise_quantized_weight(*arguments))
    assert [launch.kernel.__name__ for launch in launches] == names
    assert tried == kernels_tried


def multiply(x, weight, scale, bias, residual, out) -> None:
    integers = torch.stack((weight >> 4, (weight << 4) >> 4), -1).flatten(1)
    out.copy_((x.double() @ integers.double().T * scale[:, None].T).to(out.dtype))


def multiply_exchanged(x, weight, scale, bias, residual, out) -> None:
    """Multiply as a layout would that exchanges two neighbouring columns somewhere."""
    exchanged = x.clone()
    exchanged[:, 64:66] = x[:, 64:66].flip(1)
    exchanged[:, 70:78] = x[:, 70:78].flip(1)
    multiply(exchanged, weight, scale, bias, residual, out)


def forget_a_row(x, weight, scale, bias, residual, out) -> None:
    multiply(x, weight, scale, bias, residual, out)
    out[:, -1] = float("nan")


@pytest.mark.parametrize(
    "launch, flaw", [(multiply, None), (multiply_exchanged, "off by"), (forget_a_row, "off by nan")]
)
def test_a_trial_tells_a_wrong_product(launch, flaw):
    weight = torch.randint(-128, 128, (700, 512), dtype=torch.int8)
    x, scale, bias = torch.full((5, 1024), float("nan"), dtype=HALF), torch.zeros(700, dtype=HALF), torch.ones(700)
    found = find_flaw(launch, x, weight, scale, 4, bias, None, False, False)
    assert found is None if flaw is None else flaw in found, found


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_weight_is_on_its_way_before_the_wait_and_nothing_else(bits, rows):
    for n, k in WEIGHTS:
        (launch,) = product(90, HALF, bits, rows, n, k, -1)
        kernel = ahead_of_time.compiled(launch, 90)
        ir, ptx = kernel.asm["ttgir"], kernel.asm["ptx"]
        wait, loop = ahead_of_time.place_of_wait(ir), ir.index("scf.for")
        assert wait < loop and "cp.async" in ir[:wait], "no copy of the weight precedes the wait"
        # Triton itself loads only the blocks of scale and bias, and sums of parts; PTX reads x and the residual.
        loads = re.findall(r"%(\w+?)(?:_\d+)? = tt\.load", ir)
        before = re.findall(r"%(\w+?)(?:_\d+)? = tt\.load", ir[:wait])
        # Where programs share the columns of a row, the last of them reads these at the end.
        assert set(before) == (set() if rows == 8 and k == INNER else {"row_scale", "row_bias"}), set(before)
        assert set(loads) - {"row_scale", "row_bias"} <= ({"total"} if rows == 8 else set()), set(loads)
        for text, word in ((ir, "ld.global"), (ptx, "ld.global.v4")):
            reads = [found.start() for found in re.finditer(re.escape(word), text)]
            assert reads and min(reads) > ahead_of_time.place_of_wait(text), "x or the residual is read before the wait"


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("k", [128, 384, 4096, 5120, 13696, 16384, 40960])
@pytest.mark.parametrize("config", [FewRows(8, 4, 1, 2), FewRows(16, 2, 1, 1), FewRows(2, 3, 5, 1)])
def test_of_few_rows_every_part_has_columns_and_x_fits_into_registers(bits, k, config):
    workspace = kernels.Workspace("meta", 1)
    fitted = fit_few_rows(config, bits, 4096, k, workspace)
    chunks = k * bits // 512
    part = -(-chunks // fitted.splits)
    steps = -(-part // fitted.warps)
    assert (fitted.splits - 1) * part < chunks and fitted.splits * part >= chunks
    assert steps * 64 // bits <= 64 and steps % fitted.depth == 0 and fitted.depth <= max(config.depth, 1)
    assert fitted.splits == 1 or fitted.splits * 4096 * 8 <= workspace.partial.numel()
    assert fit_few_rows(config, bits, workspace.partial.numel(), 1 << 20, workspace) is None


@pytest.mark.parametrize("bits", [8, 4])
def test_of_one_row_only_the_product_after_attention_holds_the_next_kernel_back(bits):
    for n, k in WEIGHTS:
        (launch,) = product(90, HALF, bits, 1, n, k, -1)
        ahead_of_time.check_start_of_the_next(launch, holds_back=(n, k) == (HIDDEN, HIDDEN))


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("bits, config", [(8, Row(4, 2, 3, 6)), (8, Row(8, 4, 1, 4)), (4, Row(4, 4, 2, 3))])
def test_of_a_row_that_is_normalised_only_x_is_read_after_the_wait(bits, config, capability):
    launch = normalised_product(capability, bits, 3 * HIDDEN, config)
    resources = ahead_of_time.compile_launch(launch, capability)
    assert resources.stack == 0 and resources.shared <= 48 << 10, resources
    if capability < 90:
        return
    ir = ahead_of_time.compiled(launch, capability).asm["ttgir"]
    wait = ahead_of_time.place_of_wait(ir)
    before, after = ir[:wait], ir[wait:]
    # gamma and beta are read before the wait, x after it.
    reads = words_kept(bits, HIDDEN, config.warps) // 4
    assert [part.count("ld.global.v4") for part in (before, after)] == [2 * reads, reads]
    derived = {"%x"}
    for line in before.splitlines():
        names = re.findall(r"%\w+", line)
        if "=" in line and derived & set(names[1:]):
            assert "ld.global" not in line and "tt.load" not in line, line
            derived.add(names[0])


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("bits", [8, 4])
def test_products_of_many_rows_compile_within_the_limits(bits, capability):
    for dtype, rows, n, k, group_size in (
        (HALF, 16, 3 * HIDDEN, HIDDEN, -1),
        (BFLOAT, 64, HIDDEN, INNER, 128),
        (HALF, 256, INNER, HIDDEN, -1),
        (HALF, 256, HIDDEN, HIDDEN, 128),
    ):
        launch = product_of_many_rows(capability, dtype, bits, rows, n, k, group_size)
        resources = ahead_of_time.compile_launch(launch, capability)
        assert resources.shared <= ahead_of_time.SHARED_MEMORY[capability], f"{launch}: {resources}"
        assert resources.stack == 0, f"{launch}: {resources}"
        assert ("launch_pdl", True) in launch.options or capability < 90, f"{launch} is not launched early"


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("bits, dtype, group_size", [(8, HALF, -1), (8, BFLOAT, 128), (4, BFLOAT, -1), (4, HALF, 128)])
def test_of_many_rows_the_integers_become_halves_between_shared_memory_and_the_product(
    bits, dtype, group_size, capability
):
    launch = product_of_many_rows(capability, dtype, bits, 64, 3 * HIDDEN, HIDDEN, group_size)
    kernel = ahead_of_time.compiled(launch, capability)
    ir, ptx = kernel.asm["ttgir"], kernel.asm["ptx"]
    loop = ir[ir.index("scf.for") :]
    loop = loop[: loop.index("scf.yield")]
    copies = set(re.findall(r"async_copy_global_to_local %(\w+?)_pointers(?:_\d+)?,", ir))
    assert copies == {"w", "x"}, f"not both weight and x are copied ahead: {copies}"
    assert not re.search("local_store|local_alloc|tt.load %w", loop), "the weight is not copied, or goes back"
    # Where lanes exchange what they hold, the layouts' conversion takes shared memory or shuffles.
    inner = ptx[ptx.index("$L__BB0_1:") : ptx.index("bra", ptx.index("$L__BB0_1:"))]
    assert not re.search(r"st\.shared|shfl", inner), "the weight changes lanes in registers"
    if capability == 90:
        dots = re.findall(r"ttng\.warp_group_dot %.*", loop)
        assert dots and all("dot_op<{opIdx = 0" in dot.split(" * ")[0] for dot in dots), dots
        assert re.search(r"wgmma\.mma_async\S* \{[^}]*\}, \{", ptx), "the instruction takes no weight from registers"
        after = inner[inner.rindex("wgmma.mma_async") :]
        assert "wgmma.wait_group.sync.aligned 0" in after, "the next weights go into registers that are still read"
    else:
        assert "ldmatrix" in inner and "mma.sync" in inner


@pytest.mark.parametrize("bits, group_size", [(8, -1), (4, 128)])
def test_of_many_rows_x_and_the_residual_are_read_after_the_wait(bits, group_size):
    launch = product_of_many_rows(90, HALF, bits, 64, HIDDEN, INNER, group_size)
    kernel = ahead_of_time.compiled(launch, 90)
    ir, ptx = kernel.asm["ttgir"], kernel.asm["ptx"]
    wait = ahead_of_time.place_of_wait(ir)
    assert "async_copy" not in ir[:wait] and wait < ir.index("scf.for")
    loads = re.findall(r"%(\w+?)(?:_\d+)? = tt\.load", ir[:wait])
    assert set(loads) == (set() if group_size < 0 else {"next_scale"}), loads
    before, after = ptx[: ahead_of_time.place_of_wait(ptx)], ptx[ahead_of_time.place_of_wait(ptx) :]
    assert "prefetch.L2" in before and "cp.async." not in before.replace("cp.async.bulk.prefetch.L2", "")
    assert "cp.async" in after
    ahead_of_time.check_start_of_the_next(launch, holds_back=False)


@pytest.mark.parametrize(
    "bits, group_size, rows, name",
    [
        (8, -1, 9, "quantized_tiles_kernel"),
        (8, -1, 256, "quantized_pipelined_kernel"),
        (4, 128, 8, "quantized_few_rows_kernel"),
        (4, 128, 9, "quantized_tiles_kernel"),
        (4, 32, 256, "quantized_tiles_kernel"),
        (4, 32, 8, "quantized_gemv_kernel"),
    ],
)
def test_rows_decide_the_kernel(bits, group_size, rows, name):
    scale = meta(HALF, HIDDEN) if group_size < 0 else meta(HALF, HIDDEN, HIDDEN // group_size)
    arguments = meta(HALF, rows, HIDDEN), meta(torch.int8, HIDDEN, HIDDEN * bits // 8), scale, None, bits, group_size
    launches = ahead_of_time.record(90, lambda: kernels.fused_linear_with_groupwise_quantized_weight(*arguments))
    assert [launch.kernel.__name__ for launch in launches] == [name]


@pytest.mark.parametrize("rows", [16, 100, 256])
def test_splits_fit_into_the_workspace(rows):
    workspace = kernels.Workspace("meta", 1)
    for n, k in WEIGHTS:
        for splits in (1, 7, 64):
            config = fit_tiles(Tiles(128, 64, 64, 4, 3, splits), rows, n, k, -1, workspace)
            blocks = -(-rows // config.block_m)
            needed = config.splits * blocks * n * config.block_m
            assert 1 <= config.splits <= splits
            assert config.splits == 1 or needed <= workspace.partial.numel()
            assert config.splits == 1 or blocks * -(-n // config.block_n) <= workspace.counters.numel()


@pytest.mark.parametrize("bits, group_size", [(8, -1), (4, -1), (8, 96), (4, 128)])
def test_every_split_has_columns(bits, group_size):
    """Check sizes that no table lists: the last part may not begin behind the row."""
    workspace = kernels.Workspace("meta", 1)
    for k in range(384, 6144, 384):
        for rows in (9, 40, 256):
            for config in (
                tiles_config(torch.device("meta"), bits, rows, 384, k, group_size, workspace),
                fit_tiles(Tiles(64, 64, 128, 4, 3, 8), rows, 384, k, group_size, workspace),
            ):
                part = -(-k // (config.splits * config.block_k)) * config.block_k
                assert (config.splits - 1) * part < k, (k, config)
