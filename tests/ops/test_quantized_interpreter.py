"""The products with integer weights in Triton's interpreter, on a CPU, against float64.

In the interpreter a plain emulation takes the place of the inline PTX; everything around it is the real kernel.
"""

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed, so there are no kernels to interpret")

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
from interpreted_cases import HALF, SINGLE, name_of, run_and_print, run_in_a_process  # noqa: E402

# (check, dtype, arguments).
CASES = [
    ("fused_linear_with_groupwise_quantized_weight", HALF, [8, 1, 37, 64, -1, "residual"]),
    ("fused_linear_with_groupwise_quantized_weight", HALF, [4, 1, 37, 128, -1, "gelu"]),
    ("fused_linear_with_groupwise_quantized_weight", HALF, [4, 3, 16, 256, 128, "residual"]),
    ("fused_linear_with_groupwise_quantized_weight", HALF, [8, 8, 20, 192, 64, "plain"]),
    ("fused_linear_with_groupwise_quantized_weight", "bfloat16", [4, 2, 17, 128, -1, "gelu"]),
    # Shapes that the tensor-core kernel does not take.
    ("fused_linear_with_groupwise_quantized_weight", HALF, [8, 2, 13, 100, -1, "gelu"]),
    ("fused_linear_with_groupwise_quantized_weight", HALF, [4, 1, 13, 90, 18, "residual"]),
    ("fused_linear_with_groupwise_quantized_weight", SINGLE, [4, 3, 13, 128, -1, "plain"]),
    ("fused_linear_with_groupwise_quantized_weight", SINGLE, [8, 1, 13, 99, 33, "residual"]),
    ("fused_linear_with_groupwise_quantized_weight", HALF, [8, 70, 13, 100, -1, "residual"]),
    ("fused_linear_with_groupwise_quantized_weight", SINGLE, [4, 9, 13, 100, 10, "gelu"]),
    ("quantized_config", HALF, [4, 9, 40, 384, -1, "Quantized(2, 2, 1)"]),
    ("quantized_config", HALF, [8, 16, 16, 320, -1, "Quantized(1, 2, 2)"]),
    ("quantized_config", HALF, [4, 12, 16, 640, 128, "Quantized(1, 2, 1)"]),
    ("quantized_config", HALF, [8, 25, 48, 128, -1, "Quantized(4, 1, 2)"]),
    # Few rows, which this kernel takes if their own one fails its trial.
    ("quantized_config", HALF, [4, 2, 40, 512, -1, "Quantized(1, 4, 1)"]),
    ("quantized_config", HALF, [8, 8, 37, 512, 128, "Quantized(1, 4, 1)"]),
    # One part and several, uneven rows and columns, several tiles of a program, groups.
    ("quantized_parts", HALF, [4, 2, 40, 1152, -1, "FewRows(2, 2, 1, 1)"]),
    ("quantized_parts", HALF, [8, 3, 48, 256, -1, "FewRows(4, 1, 1, 1)"]),
    ("quantized_parts", HALF, [8, 5, 37, 512, 128, "FewRows(2, 2, 2, 1)", "gelu"]),
    ("quantized_parts", HALF, [4, 8, 40, 512, -1, "FewRows(1, 2, 2, 2)", "gelu"]),
    ("quantized_parts", HALF, [4, 7, 40, 384, 128, "FewRows(1, 4, 3, 1)"]),
    ("fused_linear_with_groupwise_quantized_weight", "bfloat16", [8, 8, 40, 256, 128, "residual"]),
    ("quantized_config", HALF, [4, 1, 40, 1152, -1, "Row(2, 4, 1, 1)"]),
    ("quantized_config", HALF, [8, 1, 48, 256, -1, "Row(4, 2, 2, 1)"]),
    ("quantized_config", HALF, [8, 1, 37, 2048, 128, "Row(2, 2, 2, 1)"]),
    ("quantized_config", HALF, [4, 1, 20, 4096, -1, "Row(2, 2, 2, 1)"]),
    ("quantized_config", HALF, [4, 1, 40, 512, 128, "Row(1, 4, 3, 2)"]),
    # Uneven rows of both and uneven columns, splits, blocks of x rows, groups of a block and of several.
    ("quantized_parts", HALF, [8, 9, 40, 320, -1, "Tiles(16, 16, 128, 4, 3, 2)"]),
    ("quantized_parts", HALF, [4, 17, 70, 640, -1, "Tiles(32, 64, 128, 4, 3, 3)", "gelu"]),
    ("quantized_parts", HALF, [8, 37, 33, 256, 64, "Tiles(16, 32, 128, 4, 3, 2)"]),
    ("quantized_parts", HALF, [4, 65, 48, 768, 384, "Tiles(32, 16, 128, 4, 3)"]),
    ("quantized_parts", HALF, [4, 129, 40, 384, 96, "Tiles(256, 64, 64, 4, 3, 2)"]),
    ("integers_of_tiles", HALF, [8]),
    ("integers_of_tiles", HALF, [4]),
    ("integers_of_tiles", "bfloat16", [8]),
    ("fused_linear_with_groupwise_quantized_weight", HALF, [8, 9, 37, 128, 64, "gelu"]),
    ("fused_linear_with_groupwise_quantized_weight", "bfloat16", [4, 33, 40, 256, -1, "residual"]),
    ("fused_linear_with_groupwise_quantized_weight", HALF, [4, 257, 20, 128, -1, "residual"]),
    ("quantized_gemv", SINGLE, [8, 2, 7, 700, 7]),
    ("quantized_gemv", SINGLE, [4, 1, 7, 1500, -1]),
    ("large_values", None, [4, 256]),
    ("large_values", None, [8, 128]),
    ("dequantize", HALF, [4, 7, 90, 18]),
    ("dequantize", HALF, [8, 7, 99, -1]),
    ("dequantize", HALF, [8, 50, 128, 32]),
    ("layer_norm_quantized", HALF, [4, 2, 17, 128]),
    ("layer_norm_quantized", HALF, [4, 1, 17, 384]),
    ("layer_norm_quantized", HALF, [8, 1, 40, 256]),
    ("normalised_row", HALF, [4, 40, 1152, -1, "Row(2, 4, 1, 1)", 10.0]),
    ("normalised_row", HALF, [8, 37, 1024, 128, "Row(2, 2, 2, 1)"]),
    ("normalised_row", "bfloat16", [8, 40, 512, -1, "Row(1, 2, 2, 2)"]),
]


@pytest.fixture(scope="module")
def results() -> dict[str, str | None]:
    return run_in_a_process(__file__)


@pytest.mark.parametrize("name", [name_of(case) for case in CASES])
def test_interpreted(name: str, results: dict[str, str | None]) -> None:
    assert results[name] is None, results[name]


if __name__ == "__main__":
    import quantized_checks

    run_and_print(CASES, quantized_checks)
