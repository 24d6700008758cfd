"""Kernels on pages in Triton's interpreter, on a CPU, against float64."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed, so there are no kernels to interpret")

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
from interpreted_cases import HALF, SINGLE, name_of, run_and_print, run_in_a_process  # noqa: E402

CASES = [
    ("paged_decode_attention", HALF, [6, 2, 32, 64, 3, 2]),
    ("paged_decode_attention", SINGLE, [3, 1, 24, 16, 5, 1]),
    ("paged_decode_attention", HALF, [2, 2, 128, 64, 2, None]),
    ("paged_decode_attention", HALF, [6, 2, 32, 32, 4, 2, False]),
    ("packed_rotary_concat", HALF, [[5, 1, 20], 2, 24, True, 16]),
    ("packed_rotary_concat", SINGLE, [[17], 3, 32, False, 64, 64]),
    ("packed_prompt_attention", HALF, [[70, 1, 20, 33], 2, 24, 64]),
    ("packed_prompt_attention", SINGLE, [[131, 16], 1, 32, 16, 32, 5]),
    ("packed_prompt_attention", HALF, [[3, 65], 2, 128, 64, 128, 100]),
]


@pytest.fixture(scope="module")
def results() -> dict[str, str | None]:
    return run_in_a_process(__file__)


@pytest.mark.parametrize("name", [name_of(case) for case in CASES])
def test_interpreted(name: str, results: dict[str, str | None]) -> None:
    assert results[name] is None, results[name]


if __name__ == "__main__":
    import page_checks

    run_and_print(CASES, page_checks)
