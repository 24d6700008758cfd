"""The pipelined product compiles for Hopper within its limits, and its instructions wait only where they must."""

import re

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed, so there are no kernels to compile")

import ahead_of_time  # noqa: E402
from launches import HIDDEN, INNER, WEIGHTS, meta  # noqa: E402

from examples.measuring.tune_many_rows import candidates  # noqa: E402
from faster_chatglm_6b.ops import triton as kernels  # noqa: E402
from faster_chatglm_6b.ops.triton.quantized.pipelined.tables import fit_pipelined, pipelined_config  # noqa: E402

HALF, BFLOAT = torch.float16, torch.bfloat16


@pytest.mark.parametrize(
    "bits, dtype, rows, n, k", [(4, HALF, 256, INNER, HIDDEN), (8, BFLOAT, 64, HIDDEN, INNER), (4, HALF, 30, 100, 384)]
)
def test_the_pipelined_product_keeps_the_tensor_cores_busy(bits, dtype, rows, n, k):
    def call() -> None:
        arguments = meta(dtype, rows, k), meta(torch.int8, n, k * bits // 8), meta(HALF, n), meta(dtype, n), bits
        kernels.fused_linear_with_groupwise_quantized_weight(*arguments)

    (launch,) = ahead_of_time.record(90, call)
    constants = launch.named_constants()
    stages, warpgroups = constants["STAGES"], constants["WARPGROUPS"]
    resources = ahead_of_time.compile_launch(launch, 90)
    assert resources.shared <= ahead_of_time.SHARED_MEMORY[90] and resources.stack == 0, resources
    kernel = ahead_of_time.compiled(launch, 90)
    ptx, machine = kernel.asm["ptx"], ahead_of_time.machine_code(kernel)
    # The compiler would put a wait after each instruction if registers were short.
    assert machine.count("HGMMA") == warpgroups * constants["BLOCK_K"] // 16
    assert machine.count("WARPGROUP.DEPBAR") == warpgroups
    for loop in ptx.split("wgmma.fence")[1:]:
        wait, unpacking = loop.index("wgmma.wait_group.sync.aligned 0"), re.search(r"ld\.shared\.b(8|16)\b", loop)
        assert unpacking is None or wait < unpacking.start(), "the next weights go into registers that are still read"
    # Only the weight's blocks are asked for before the wait.
    copies = ptx[ptx.index("cp.async.bulk.tensor") :]
    assert copies[: ahead_of_time.place_of_wait(copies)].count("cp.async.bulk.tensor") == min(
        stages, k // constants["BLOCK_K"]
    )


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [9, 16, 17, 64, 100, 256])
def test_shapes_fit_into_the_workspace_and_the_ring(bits, rows):
    workspace = kernels.Workspace("meta", 1)
    for n, k in (*WEIGHTS, (100, 384), (4096, 1024)):
        config = pipelined_config(bits, rows, n, k, workspace)
        if config is None:
            assert rows <= 16
            continue
        blocks = -(-n // config.weight_rows) * -(-rows // config.block_m)
        assert config.stages % config.turns == 0 and config.warpgroups % config.turns == 0
        assert config.splits == 1 or config.splits * rows * n <= workspace.partial.numel()
        assert config.splits == 1 or blocks * config.weight_rows // 64 <= workspace.counters.numel()
        # A part without columns would only add zeros.
        assert (config.splits - 1) * -(-k // (config.splits * config.block_k)) * config.block_k < k
        most = fit_pipelined(config, rows, workspace.partial.numel(), workspace)
        assert most.splits == 1


@pytest.mark.parametrize("bits", [8, 4])
def test_the_tuner_tries_shapes_that_fit(bits):
    for n, k in WEIGHTS[:4]:
        shapes = [shape for rows in (16, 64, 256) for shape in candidates(bits, rows, n, k)]
        assert len(set(shapes)) >= 10
        # A ring with fewer stages than turns would read beyond itself.
        assert all(shape.stages >= 2 * shape.turns and shape.stages % shape.turns == 0 for shape in shapes)
