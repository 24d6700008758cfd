"""The products with integer weights in Triton's interpreter, on a CPU, against float64.

In the interpreter a plain emulation stands for the inline PTX; everything around it is the real kernel.
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
# (check, dtype, arguments).
CASES = [
    ("quantized", HALF, [8, 1, 37, 64, -1, "residual"]),
    ("quantized", HALF, [4, 1, 37, 128, -1, "gelu"]),
    ("quantized", HALF, [4, 3, 16, 256, 128, "residual"]),
    ("quantized", HALF, [8, 8, 20, 192, 64, "plain"]),
    ("quantized", "bfloat16", [4, 2, 17, 128, -1, "gelu"]),
    # Shapes that the tensor-core kernel does not take.
    ("quantized", HALF, [8, 2, 13, 100, -1, "gelu"]),
    ("quantized", HALF, [4, 1, 13, 90, 18, "residual"]),
    ("quantized", SINGLE, [4, 3, 13, 128, -1, "plain"]),
    ("quantized", SINGLE, [8, 1, 13, 99, 33, "residual"]),
    ("quantized", HALF, [8, 70, 13, 100, -1, "residual"]),
    ("quantized", SINGLE, [4, 9, 13, 100, 10, "gelu"]),
    ("quantized_config", HALF, [4, 9, 40, 384, -1, "Quantized(2, 2, 1)"]),
    ("quantized_config", HALF, [8, 16, 16, 320, -1, "Quantized(1, 2, 2)"]),
    ("quantized_config", HALF, [4, 12, 16, 640, 128, "Quantized(1, 2, 1)"]),
    ("quantized_config", HALF, [8, 25, 48, 128, -1, "Quantized(4, 1, 2)"]),
    # One round and several, uneven rows and columns, two tiles of rows.
    ("quantized_config", HALF, [4, 2, 300, 1152, -1, "Stream(1, 2, 2, 3, 1)"]),
    ("quantized_config", HALF, [8, 3, 48, 256, -1, "Stream(1, 4, 1, 2, 1)"]),
    ("quantized_config", HALF, [8, 5, 37, 512, 128, "Stream(2, 2, 2, 2, 1)"]),
    ("quantized_config", HALF, [4, 8, 40, 512, -1, "Stream(2, 1, 2, 4, 2)"]),
    ("quantized_config", HALF, [4, 1, 300, 1152, -1, "Row(2, 2, 3, 1)"]),
    ("quantized_config", HALF, [8, 1, 48, 256, -1, "Row(4, 1, 2, 1)"]),
    ("quantized_config", HALF, [8, 1, 37, 2048, 128, "Row(2, 4, 2, 1)"]),
    ("quantized_config", HALF, [4, 1, 20, 4096, -1, "Row(2, 8, 1, 1)"]),
    ("quantized_config", HALF, [4, 1, 40, 512, 128, "Row(1, 2, 4, 2)"]),
    ("quantized_gemv", SINGLE, [8, 2, 7, 700, 7]),
    ("quantized_gemv", SINGLE, [4, 1, 7, 1500, -1]),
    ("large_values", None, [4, 256]),
    ("large_values", None, [8, 128]),
    ("dequantize", HALF, [4, 7, 90, 18]),
    ("dequantize", HALF, [8, 7, 99, -1]),
    ("dequantize", HALF, [8, 50, 128, 32]),
    ("layer_norm_quantized", HALF, [4, 2, 17, 128]),
]
NAMES = [f"{check}-{dtype}-{arguments}" for check, dtype, arguments in CASES]


def _configuration(text: str) -> object:
    """The ``Quantized``, ``Stream`` or ``Row`` that ``text`` spells."""
    import quantized_checks

    name, numbers = text.rstrip(")").split("(")
    return getattr(quantized_checks, name)(*json.loads(f"[{numbers}]"))


def _run_cases() -> None:
    """Run every case and print a JSON object: name to None or the traceback."""
    root = Path(__file__).parents[2]
    sys.path[:0] = [str(root), str(Path(__file__).parent)]
    import quantized_checks

    results = {}
    for name, (check, dtype, arguments) in zip(NAMES, CASES, strict=True):
        torch.manual_seed(0)
        start = time.perf_counter()
        values = [_configuration(argument) if "(" in str(argument) else argument for argument in arguments]
        try:
            function = getattr(quantized_checks, f"check_{check}")
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
