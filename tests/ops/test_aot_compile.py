"""Every kernel and tuned configuration compiles for every supported GPU, fits its shared memory and spills nothing."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed, so there are no kernels to compile")

import ahead_of_time  # noqa: E402
import launches  # noqa: E402

from faster_chatglm_6b.ops import triton as kernels  # noqa: E402
from faster_chatglm_6b.ops.triton import configs  # noqa: E402

CAPABILITIES = (80, 86, 89, 90)
# Bytes that kernels on pages may spill: their addresses take two registers more than there are. They were measured so.
MOST_STACK_OF_PAGES = 8
GROUPS = {
    "operators fp16": lambda family: launches.operator_launches(torch.float16),
    "operators fp32": lambda family: launches.operator_launches(torch.float32),
    "gemv fp16": lambda family: launches.gemv_launches(family, torch.float16),
    "gemv bf16": lambda family: launches.gemv_launches(family, torch.bfloat16),
    "gemv fp32": lambda family: launches.gemv_launches(family, torch.float32),
    "tensor cores fp16": lambda family: launches.dot_launches(family, torch.float16),
    "tensor cores bf16": lambda family: launches.dot_launches(family, torch.bfloat16),
    "speculation fp16": lambda family: launches.speculation_launches(torch.float16),
    "speculation fp32": lambda family: launches.speculation_launches(torch.float32),
    "sampling fp16": lambda family: launches.sampling_launches(torch.float16, capacity=64),
    # Once is enough: the larger capacity takes the most shared memory, and a sort takes seconds to compile.
    "sampling fp32": lambda family: launches.sampling_launches(torch.float32, capacity=128),
}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("group", GROUPS)
def test_compiles_within_the_limits(group, capability):
    family = configs.FAMILIES[divmod(capability, 10)]
    found = [launch for call in GROUPS[group](family) for launch in ahead_of_time.record(capability, call)]
    assert found
    for launch in dict.fromkeys(found):
        resources = ahead_of_time.compile_launch(launch, capability)
        assert resources.shared <= ahead_of_time.SHARED_MEMORY[capability], f"{launch}: {resources}"
        is_paged = launch.named_constants().get("PAGE", 0) > 0
        assert resources.stack <= (MOST_STACK_OF_PAGES if is_paged else 0), f"{launch}: {resources}"
        assert ("launch_pdl", True) in launch.options or capability < 90, f"{launch} is not launched early"


@pytest.mark.parametrize("batch, keys, holds_back", [(1, 256, True), (2, 256, False), (1, 2048, False)])
def test_attention_between_the_products_of_one_row_holds_the_next_kernel_back(batch, keys, holds_back):
    (launch,) = ahead_of_time.record(90, launches.decode_attention_launch(torch.float16, batch, 2, keys, keys <= 256))
    ahead_of_time.check_start_of_the_next(launch, holds_back)


def test_grids_of_the_most_and_longest_prompts():
    batch, rows, dtype = 256, 2048, torch.float16
    ids, vector = launches.meta(torch.int64, batch * rows), launches.meta(dtype, launches.HIDDEN)
    hidden, inner = (launches.meta(dtype, batch * rows, size) for size in (launches.HIDDEN, launches.INNER))

    def prompt() -> None:
        launches.prompt_launches(dtype, batch, rows)
        kernels.embedding(ids, launches.meta(dtype, launches.VOCAB, launches.HIDDEN), out=hidden)
        kernels.skip_layer_norm(hidden, vector, vector, skip=hidden, alpha=7.5, out=hidden)
        kernels.fast_gelu(inner, out=inner)

    assert len(ahead_of_time.record(90, prompt)) == 5
