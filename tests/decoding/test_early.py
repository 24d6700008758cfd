"""Prompts that start before their request is read; stand-ins for the kernels compute with the model's own forward."""

import copy
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed, so there is no captured loop")

sys.path.insert(0, str(Path(__file__).parent))
import early_checks  # noqa: E402


@pytest.mark.parametrize("check", early_checks.EVERYWHERE, ids=lambda check: check.__name__)
def test_early_prompts(tiny_model, check):
    model = copy.deepcopy(tiny_model)
    with early_checks.stand_ins():
        check(model)
