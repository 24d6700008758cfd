"""The decode loop on a CPU with its own kernels: the checks of the interpreter and the GPU, in this process."""

import copy
import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "ops")]
import draft_checks  # noqa: E402
import draft_life_checks  # noqa: E402
import fault_checks  # noqa: E402
import lifecycle_checks  # noqa: E402
import loop_checks  # noqa: E402
import prompt_checks  # noqa: E402
import release_checks  # noqa: E402
import row_checks  # noqa: E402

from faster_chatglm_6b.ops.steps import step_kernels  # noqa: E402

MODULES = (
    loop_checks,
    release_checks,
    prompt_checks,
    lifecycle_checks,
    fault_checks,
    row_checks,
    draft_checks,
    draft_life_checks,
)
CHECKS = {check.__name__: check for module in MODULES for check in module.EVERYWHERE}
# No session has rows to spare here.
del CHECKS["out_of_memory_for_rows_to_spare"]


@pytest.fixture(autouse=True)
def drafts(monkeypatch):
    """Let drafts be made as on a GPU; without that, only who asks for them in every step gets them."""
    monkeypatch.setattr(step_kernels(torch.device("cpu")), "DRAFTS_PAY", True)


@pytest.fixture(scope="module")
def model(tiny_model):
    return copy.deepcopy(tiny_model)


@pytest.mark.parametrize("name", CHECKS)
def test_on_a_cpu(name, model):
    CHECKS[name](model)


def test_auto_drafts_nothing(model, monkeypatch):
    monkeypatch.undo()
    ids = loop_checks.prompt(model, 5)
    with draft_checks.turns() as count, loop_checks.expect(captured=2):
        one = model.generate(ids, do_sample=False, max_new_tokens=8, speculate="auto")
        assert count["several"] == 0
        assert model.generate(ids, do_sample=False, max_new_tokens=8, speculate=3).tolist() == one.tolist()
    assert count["several"] > 0


@pytest.mark.parametrize("bits", [8, 4])
def test_integers(bits, tiny_model):
    quantized = copy.deepcopy(tiny_model).quantize(bits)
    for check in (loop_checks.greedy, loop_checks.left_padded_batch, loop_checks.prompt_that_goes_on_behind_sop):
        check(quantized)


@pytest.mark.parametrize("projection", [0, 1])
def test_a_prefix(projection, load_tuned):
    tuned = load_tuned(projection)
    loop_checks.greedy(tuned)
    loop_checks.left_padded_batch(tuned)
