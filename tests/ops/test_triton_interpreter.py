"""The kernels in Triton's interpreter, on a CPU, against float64 and transformers' logits processors.

The interpreter is chosen by an environment variable when the kernels are imported, so the cases run in one process of
their own, which this file starts as a program.
"""

import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed, so there are no kernels to interpret")

HALF, SINGLE = "float16", "float32"
# (check, dtype, arguments). The interpreter has no bfloat16 products and needs seconds for a sort: small shapes only.
CASES = [
    ("fast_gelu", HALF, [(3, 701)]),
    ("fast_gelu", SINGLE, [(1, 1)]),
    ("fused_fast_gelu_mul", "bfloat16", [(5, 77)]),
    ("skip_layer_norm", HALF, [3, 100, True]),
    ("skip_layer_norm", SINGLE, [1, 128, False]),
    ("skip_layer_norm", "bfloat16", [5, 4096, True]),
    ("rotary", HALF, [2, 3, 2, 32, True]),
    ("rotary", SINGLE, [2, 3, 2, 24, False]),
    ("concat", HALF, [2, 3, 2, 24]),
    ("concat", SINGLE, [1, 17, 2, 32]),
    ("attention", HALF, [2, 2, 32, 130, 3]),
    ("attention", SINGLE, [1, 2, 24, 5, 4]),
    ("decode_attention", HALF, [5, 2, 32, 130, 3]),
    ("decode_attention", SINGLE, [3, 2, 32, 0, 2]),
    ("decode_attention", SINGLE, [1, 2, 24, 70, 1, False]),
    ("decode_attention", SINGLE, [1, 1, 128, 200, None]),
    ("matmul", HALF, [1, 37, 100, "residual"]),
    ("matmul", SINGLE, [3, 37, 100, "gelu"]),
    ("matmul", SINGLE, [4, 37, 100, "plain", False]),
    ("matmul", HALF, [5, 37, 100, "residual"]),
    ("matmul", HALF, [20, 70, 144, "gelu"]),
    ("matmul", HALF, [65, 37, 100, "residual"]),
    ("gemv_config", SINGLE, [3, 37, 100, "Gemv(2, 64, 1)"]),
    ("gemv_config", HALF, [1, 300, 100, "Gemv(2, 128, 1, 1)"]),
    ("dot_config", HALF, [5, 70, 200, "Dot(32, 32, 4, 3, 3)"]),
    ("layer_norm_matmul", HALF, [2, 37, 100]),
    ("layer_norm_matmul", HALF, [1, 300, 100, "Gemv(2, 128, 1, 1)"]),
    ("embedding", HALF, [3, 50, 100]),
    ("greedy", HALF, [3, 2500]),
    ("greedy", SINGLE, [1, 704]),
    ("invalid_rule", HALF, [140]),
    ("processors", HALF, [3, 704]),
    ("ties", None, ["top_k", 2]),
    ("ties", None, ["full", 2]),
    ("distribution", None, ["top_k", HALF, 150, 0.95, 50, 0.7, 4, 1]),
    ("distribution", None, ["full", HALF, 500, 0.95, None, 0.7, 5, 1]),
    ("distribution", None, ["full", SINGLE, 2500, 1.3, 100, 0.9, 2, 1]),
    ("repeatable", None, ["full", 60]),
]
NAMES = [f"{check}-{dtype}-{arguments}" for check, dtype, arguments in CASES]


def _run_cases() -> None:
    """Run every case and print a JSON object: name to None or the traceback."""
    root = Path(__file__).parents[2]
    sys.path[:0] = [str(root), str(Path(__file__).parent)]
    import operator_checks
    import sampling_checks

    from faster_chatglm_6b.ops.triton.configs import Dot, Gemv

    results = {}
    for name, (check, dtype, arguments) in zip(NAMES, CASES, strict=True):
        torch.manual_seed(0)
        start = time.perf_counter()
        function = getattr(operator_checks, f"check_{check}", None) or getattr(sampling_checks, f"check_{check}")
        values = []
        for argument in arguments:
            if isinstance(argument, str) and "(" in argument:
                kind, numbers = argument.rstrip(")").split("(")
                argument = {"Gemv": Gemv, "Dot": Dot}[kind](*json.loads(f"[{numbers}]"))
            elif argument in (HALF, SINGLE):
                argument = getattr(torch, argument)
            values.append(argument)
        try:
            function("cpu", *([] if dtype is None else [getattr(torch, dtype)]), *values)
            results[name] = None
        except Exception:
            results[name] = traceback.format_exc()
        print(f"{time.perf_counter() - start:6.2f} s  {name}", file=sys.stderr)
    print(json.dumps(results))


@pytest.fixture(scope="module")
def results() -> dict[str, str | None]:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", NAMES)
def test_interpreted(name: str, results: dict[str, str | None]) -> None:
    assert results[name] is None, results[name]


if __name__ == "__main__":
    _run_cases()
