"""The kernels in Triton's interpreter, on a CPU, against float64 and transformers' logits processors."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed, so there are no kernels to interpret")

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
from interpreted_cases import HALF, SINGLE, name_of, run_and_print, run_in_a_process  # noqa: E402

# (check, dtype, arguments). The interpreter has no bfloat16 products and needs seconds for a sort: small shapes only.
CASES = [
    ("fast_gelu", HALF, [(3, 701)]),
    ("fast_gelu", SINGLE, [(1, 1)]),
    ("fused_fast_gelu_mul", "bfloat16", [(5, 77)]),
    ("skip_layer_norm", HALF, [3, 100, True]),
    ("skip_layer_norm", SINGLE, [1, 128, False]),
    ("skip_layer_norm", "bfloat16", [5, 4096, True]),
    ("fused_apply_rotary_emb", HALF, [2, 3, 2, 32, True]),
    ("fused_apply_rotary_emb", SINGLE, [2, 3, 2, 24, False]),
    ("rotary_concat_past_key_value", HALF, [3, 5, 2, 24, True]),
    ("rotary_concat_past_key_value", SINGLE, [2, 7, 9, 32, False, 3]),
    ("rotary_concat_past_key_value", SINGLE, [1, 1, 2, 16, True]),
    ("prompt_attention", HALF, [3, 70, 2, 24]),
    ("prompt_attention", SINGLE, [3, 131, 1, 32, 6]),
    ("prompt_attention", SINGLE, [5, 33, 2, 8]),
    ("prompt_attention", HALF, [1, 1, 2, 128, 2]),
    ("attention", HALF, [2, 2, 32, 130, 3]),
    ("attention", SINGLE, [1, 2, 24, 5, 4]),
    ("decode_attention", HALF, [5, 2, 32, 130, 3]),
    ("decode_attention", SINGLE, [3, 2, 32, 0, 2]),
    ("decode_attention", SINGLE, [1, 2, 24, 70, 1, False]),
    ("decode_attention", SINGLE, [1, 1, 128, 200, None]),
    ("draft_attention", HALF, [4, 4, 2, 32, 130, 3]),
    ("draft_attention", SINGLE, [2, 8, 2, 24, 70, 2, False]),
    ("draft_attention", SINGLE, [1, 8, 1, 8, 0, 1]),
    ("draft_attention", SINGLE, [4, 8, 1, 16, 90, 4, True, 3]),
    ("draft_attention", HALF, [1, 8, 1, 128, 200, None]),
    ("draft_attention", HALF, [4, 4, 2, 32, 130, 3, True, 9, 64]),
    ("draft_attention", SINGLE, [5, 8, 1, 24, 62, 2, True, 8, 32, True]),
    ("draft_attention", HALF, [2, 8, 1, 16, 60, 1, True, 3, 16, True]),
    ("propose", None, [4, 20, 3, False]),
    ("propose", None, [8, 1500, 2, True]),
    ("propose", None, [8, 30, 2, True]),
    ("accept", None, [4]),
    ("accept", None, [8]),
    ("back_off", None, []),
    ("fused_matmul_bias", HALF, [1, 37, 100, "residual"]),
    ("fused_matmul_bias", SINGLE, [3, 37, 100, "gelu"]),
    ("fused_matmul_bias", SINGLE, [4, 37, 100, "plain", False]),
    ("fused_matmul_bias", HALF, [5, 37, 100, "residual"]),
    ("fused_matmul_bias", HALF, [20, 70, 144, "gelu"]),
    ("fused_matmul_bias", HALF, [65, 37, 100, "residual"]),
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
    ("thresholds", HALF, [2500, "normal", 0.95, None, 0.7]),
    ("thresholds", SINGLE, [2500, "banned", 1.3, 1000, 0.9]),
    ("thresholds", "bfloat16", [2500, "few values", 1.0, 300, None]),
    ("thresholds", SINGLE, [700, "banned", 0.5, 699, None]),
    ("thresholds", HALF, [700, "equal", 1.0, None, 0.3, 8]),
    ("thresholds", SINGLE, [700, "far", 0.9, 40, 0.99999, 8]),
    ("thresholds", "bfloat16", [700, "few values", 1.0, 100, 0.8, 8]),
    ("repeatable", None, ["full", 60]),
    ("same_draws", None, ["top_k", 4, 300]),
    ("same_draws", None, ["full", 4, 300]),
    *(("rows_of_their_own", None, [sampler, 3, 60]) for sampler in ("greedy", "top_k", "full")),
]


@pytest.fixture(scope="module")
def results() -> dict[str, str | None]:
    return run_in_a_process(__file__)


@pytest.mark.parametrize("name", [name_of(case) for case in CASES])
def test_interpreted(name: str, results: dict[str, str | None]) -> None:
    assert results[name] is None, results[name]


if __name__ == "__main__":
    import operator_checks
    import sampling_checks
    import speculation_checks

    from faster_chatglm_6b.ops.triton import configs

    run_and_print(CASES, operator_checks, sampling_checks, speculation_checks, configs)
