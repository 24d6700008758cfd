"""The kernels of the loop's steps on a CPU: the checks of Triton's kernels, and the same random numbers."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed, and the checks are those of its kernels")

sys.path[:0] = [str(Path(__file__).parent)]
import operator_checks  # noqa: E402
import page_checks  # noqa: E402
import sampling_checks  # noqa: E402
import speculation_checks  # noqa: E402

from faster_chatglm_6b.ops.cpu import between, steps  # noqa: E402
from faster_chatglm_6b.ops.cpu.steps import kernel  # noqa: E402

MODULES = (operator_checks, page_checks, sampling_checks, speculation_checks)
HALF, SINGLE, BFLOAT = torch.float16, torch.float32, torch.bfloat16
CASES = [
    ("fused_matmul_bias", HALF, 1, 37, 100, "residual"),
    ("fused_matmul_bias", SINGLE, 3, 37, 100, "gelu"),
    ("fused_matmul_bias", SINGLE, 20, 37, 100, "residual", False),
    ("layer_norm_matmul", HALF, 2, 37, 100),
    ("skip_layer_norm", HALF, 3, 100, True),
    ("skip_layer_norm", SINGLE, 1, 128, False),
    ("rotary_concat_past_key_value", HALF, 3, 5, 2, 24, True),
    ("rotary_concat_past_key_value", SINGLE, 2, 7, 9, 32, False, 3),
    ("rotary_concat_past_key_value", BFLOAT, 1, 1, 2, 16, True),
    ("prompt_attention", HALF, 3, 70, 2, 24),
    ("prompt_attention", SINGLE, 3, 131, 1, 32, 6),
    ("prompt_attention", SINGLE, 5, 33, 2, 8),
    ("prompt_attention", BFLOAT, 1, 1, 2, 128, 2),
    ("attention", HALF, 2, 2, 32, 130, 3),
    ("decode_attention", BFLOAT, 5, 2, 128, 130, 3),
    ("decode_attention", SINGLE, 3, 2, 32, 0, 2),
    ("decode_attention", SINGLE, 1, 2, 12, 70, 1, False),
    ("paged_decode_attention", HALF, 7, 2, 24, 16, 5, None),
    ("paged_decode_attention", SINGLE, 3, 1, 72, 32, 3, None, False),
    ("packed_rotary_concat", SINGLE, [5, 1, 17], 2, 24, True, 16),
    ("packed_rotary_concat", HALF, [40, 3], 1, 32, False, 16, 20),
    ("packed_prompt_attention", SINGLE, [5, 1, 40], 2, 24, 16),
    ("packed_prompt_attention", HALF, [33, 18, 2, 1], 1, 32, 16, 32, 5),
    ("draft_attention", HALF, 4, 4, 2, 32, 130, 3),
    ("draft_attention", SINGLE, 4, 8, 1, 16, 90, 4, True, 3),
    ("draft_attention", SINGLE, 5, 8, 1, 24, 62, 2, True, 8, 32, True),
    ("propose", 4, 20, 3, False),
    ("propose", 8, 300, 2, True),
    ("accept", 8),
    ("back_off",),
    ("embedding", HALF, 3, 50, 100),
    ("greedy", HALF, 3, 2500),
    ("invalid_rule", HALF, 140),
    ("processors", HALF, 3, 704),
    ("ties", "top_k", 32),
    ("ties", "full", 32),
    ("distribution", "top_k", HALF, 150, 0.95, 50, 0.7, 40, 10),
    ("distribution", "full", HALF, 500, 0.95, None, 0.7, 40, 10),
    ("distribution", "full", SINGLE, 2500, 1.3, 100, 0.9, 40, 10),
    ("repeatable", "full", 60),
    *(("rows_of_their_own", sampler, 3, 60) for sampler in ("greedy", "top_k", "full")),
]


class Scratch(steps.Workspace):
    """Has what the checks spoil and look at; the kernels here have no scratch memory."""

    def __init__(self, *sizes):
        super().__init__(*sizes[:2])
        self.counters = torch.zeros(1)
        for name in ("partial", "candidates", "maxima", "chunk_sums", "histogram", "thresholds"):
            setattr(self, name, torch.zeros(1))


def names_of(case):
    return "-".join(map(str, case))


@pytest.mark.parametrize("case", CASES, ids=names_of)
def test_as_triton(case, monkeypatch):
    check(case, True, monkeypatch)


# What has a C kernel.
@pytest.mark.parametrize("case", CASES[: CASES.index(("propose", 4, 20, 3, False))] + CASES[-4:], ids=names_of)
def test_in_torch_alone(case, monkeypatch):
    check(case, False, monkeypatch)


def check(case, compiled, monkeypatch):
    if compiled and isinstance(between.load(), str):
        pytest.skip(between.load())
    assert not compiled or kernel.kernel() is not None, "the C functions of the steps fail their trial"
    if not compiled:
        for module in [module for name, module in sys.modules.items() if name.startswith(f"{steps.__name__}.")]:
            for name in ("kernel", "_kernel"):
                if hasattr(module, name) and module is not kernel:
                    monkeypatch.setattr(module, name, lambda: None)
    table = SimpleNamespace(**{**vars(steps), "Workspace": Scratch})
    for module in MODULES:
        monkeypatch.setattr(module, "kernels", table)
    torch.manual_seed(0)
    name, *arguments = case
    next(getattr(module, f"check_{name}") for module in MODULES if hasattr(module, f"check_{name}"))("cpu", *arguments)


def test_the_trial_is_the_same_every_time():
    """Threads take the rows: a trial whose rows shared a place failed now and then, and all products became slow."""
    if isinstance(between.load(), str):
        pytest.skip(between.load())
    assert all(kernel._is_right(between.load()) for _ in range(200))
